"""One small store for all tests that only read it, and a copy for those that break it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from store_cases import Case, make_case, make_spec, write_store


@pytest.fixture(scope="session")
def case() -> Case:
    """Three parts, the last one partial; two sizes; three views; one sample that failed."""
    return make_case(make_spec(), failed={5})


@pytest.fixture(scope="session")
def whole(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`case`, committed in order and finished. Not to be changed."""
    path = tmp_path_factory.mktemp("stores") / "whole.zarr"
    write_store(case, path)
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` to be damaged."""
    return shutil.copytree(whole, tmp_path / "copy.zarr")
