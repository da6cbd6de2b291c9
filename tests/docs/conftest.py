"""What the walks share."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from presupposed import make_presupposed, reader_environment
from walking import Walk
from warm import warm_programs


@pytest.fixture(scope="session")
def readers_programs(shared_folder: Path) -> Iterator[Path]:
    """A folder with the program `eupe`, for PATH: it begins with its libraries imported, in a reader's environment."""
    walk = Walk(shared_folder, reader_environment(shared_folder / "presupposed"))
    with warm_programs(walk.all_environment()) as programs:
        yield programs


RAY = """
import sys
import tempfile

import ray

with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # a socket's path has 107 bytes at most
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
    ray.shutdown()
"""


@pytest.fixture(scope="package")
def running_ray(
    readers_programs: Path, shared_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """A Ray that commands join, which else start one each: the variables by which they find it."""
    script = tmp_path_factory.mktemp("ray") / "ray_for_pages.py"
    script.write_text(RAY)
    open_to_all = {"RAY_AUTH_MODE": "disabled"}  # else the token lies in a home, and each reader has another
    environment = {**reader_environment(shared_folder / "presupposed"), **open_to_all}
    walk = Walk(shared_folder, environment, programs=readers_programs)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    words = [str(readers_programs / "python"), str(script)]
    with subprocess.Popen(words, env=walk.all_environment(), **pipes) as process:  # type: ignore[call-overload]
        yield {"RAY_ADDRESS": process.stdout.readline().strip(), **open_to_all}
        process.stdin.close()


@pytest.fixture(scope="package")
def presupposed(shared_folder: Path, assets: Path, readers_programs: Path, running_ray: dict[str, str]) -> Path:
    """What pages presuppose, all of it, made by one of the processes. Not to be changed."""
    folder = shared_folder / "presupposed"
    whole = shared_folder / "presupposed.whole"
    with FileLock(shared_folder / "presupposed.lock"):
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_presupposed(folder, assets, readers_programs, running_ray)
            whole.touch()
    return folder
