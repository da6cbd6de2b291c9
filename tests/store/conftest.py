"""Small stores for all tests that only read them, and copies for those that break them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from store_cases import CODED, Case, make_case, make_spec, write_store


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


@pytest.fixture(scope="session")
def coded() -> Case:
    """The same in precisions that lose something: summaries of 3 mantissa bits, dense maps of int8."""
    return make_case(make_spec(precision=CODED), failed={5})


@pytest.fixture(scope="session")
def coded_store(coded: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`coded`, finished. Not to be changed."""
    path = tmp_path_factory.mktemp("stores") / "coded.zarr"
    write_store(coded, path)
    return path
