"""What the walks share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from presupposed import make_presupposed, reader_environment
from shared_ray import running_ray
from walking import Walk
from warm import warm_programs


@pytest.fixture(scope="session")
def readers_programs(shared_folder: Path) -> Iterator[Path]:
    """A folder with the program `eupe`, for PATH: it begins with its libraries imported, in a reader's environment."""
    walk = Walk(shared_folder, reader_environment(shared_folder / "presupposed"))
    with warm_programs(walk.all_environment()) as programs:
        yield programs


@pytest.fixture(scope="package")
def pages_ray(readers_programs: Path, shared_folder: Path) -> Iterator[dict[str, str]]:
    """A Ray that commands join, which else start one each: the variables by which they find it."""
    open_to_all = {"RAY_AUTH_MODE": "disabled"}  # else the token lies in a home, and each reader has another
    environment = {**reader_environment(shared_folder / "presupposed"), **open_to_all}
    walk = Walk(shared_folder, environment, programs=readers_programs)
    with running_ray(str(readers_programs / "python"), walk.all_environment()) as address:
        yield {"RAY_ADDRESS": address, **open_to_all}


@pytest.fixture(scope="package")
def presupposed(shared_folder: Path, assets: Path, readers_programs: Path, pages_ray: dict[str, str]) -> Path:
    """Return a folder with all files that pages presuppose, made by one of the processes; tests must not change it."""
    folder = shared_folder / "presupposed"
    whole = shared_folder / "presupposed.whole"
    with FileLock(shared_folder / "presupposed.lock"):
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_presupposed(folder, assets, readers_programs, pages_ray)
            whole.touch()
    return folder
