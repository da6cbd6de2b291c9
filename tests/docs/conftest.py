"""What the walks share."""

from __future__ import annotations

import shutil
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


@pytest.fixture(scope="session")
def presupposed(shared_folder: Path, assets: Path, readers_programs: Path) -> Path:
    """What pages presuppose, all of it, made by one of the processes. Not to be changed."""
    folder = shared_folder / "presupposed"
    whole = shared_folder / "presupposed.whole"
    with FileLock(shared_folder / "presupposed.lock"):
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make_presupposed(folder, assets, readers_programs)
            whole.touch()
    return folder
