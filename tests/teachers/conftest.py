"""Fixtures of the teacher tests."""

from collections.abc import Iterator

import pytest

from eupe.teachers.own_forward import built_narrow
from eupe.teachers.registry import REGISTRY


@pytest.fixture
def narrow_vits() -> Iterator[None]:
    """timm and open_clip build their ViTs narrow and shallow."""
    with built_narrow(REGISTRY["clip-b32"]):
        yield
