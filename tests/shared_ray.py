"""A Ray that commands of several tests join: to start one takes longer than most of them need it for."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

SCRIPT = """
import sys
import tempfile

import ray

with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # a socket's path has 107 bytes at most
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()
"""


@contextmanager
def running_ray(python: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Run a Ray of two CPUs, whose workers are started by a Python with an environment; its address."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(SCRIPT)
        script.flush()
        with subprocess.Popen([python, script.name], env={**environment}, **pipes) as process:
            yield process.stdout.readline().strip()
            process.stdin.close()
