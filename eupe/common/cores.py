"""The CPUs of this machine: their name, and the number available to this process."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path


def num_cores(root: Path = Path("/")) -> int:
    """Return the number of CPUs that this process is bound to, or fewer if a control group has a smaller quota.

    Args:
        root: folder that holds `proc` and `sys`.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *map(math.ceil, _quotas(root))]))


def cpu_name() -> str:
    """Return the model name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def control_groups(root: Path) -> tuple[Path, ...]:
    """Return the folders of this process's control group (version 2) and of its ancestors, innermost first."""
    try:
        own = next(line[3:] for line in (root / "proc/self/cgroup").read_text().splitlines() if line[:3] == "0::")
    except (OSError, StopIteration):
        return ()
    inner = root / "sys/fs/cgroup" / own.lstrip("/")
    return (inner, *inner.parents)


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPUs of each control group that has a quota, as set by `docker run --cpus` or Kubernetes limits."""
    for group in control_groups(root):
        try:
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # not a control group, or no quota ("max")
            continue
