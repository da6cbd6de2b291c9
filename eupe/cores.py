"""How many processors there are for this process."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def num_cores(root: Path = Path("/")) -> int:
    """Return the CPUs that this process is bound to, or fewer where a control group has a smaller quota.

    Args:
        root: of the file system that tells.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *map(math.ceil, _quotas(root))]))


def control_groups(root: Path) -> tuple[Path, ...]:
    """Return the folders of this process's control group (version 2) and of those around it, innermost first."""
    try:
        own = next(line[3:] for line in (root / "proc/self/cgroup").read_text().splitlines() if line[:3] == "0::")
    except (OSError, StopIteration):
        return ()
    inner = root / "sys/fs/cgroup" / own.lstrip("/")
    return (inner, *inner.parents)


def _quotas(root: Path) -> Iterator[float]:
    """Yield CPUs, of the control groups that have a quota: `docker run --cpus`, limits in Kubernetes."""
    for group in control_groups(root):
        try:
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):  # no group, or "max"
            continue
