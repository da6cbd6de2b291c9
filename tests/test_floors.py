"""What pyproject.toml allows at least is what is tried, where that is asked for, and no more than what is installed."""

from __future__ import annotations

import os
from importlib.metadata import version

import pytest
from floors import floors


def numbers(release: str) -> tuple[int, ...]:
    parts = [int(part) for part in release.split(".")[:3] if part.isdigit()]
    return tuple(parts + [0] * (3 - len(parts)))


@pytest.mark.parametrize("name", floors())
def test_an_installed_release_is_one_that_is_allowed(name: str) -> None:
    least = numbers(floors()[name])
    at_the_floor = "floors" in os.environ.get("PYTHONPATH", "")
    assert numbers(version(name)) == least if at_the_floor else numbers(version(name)) >= least
