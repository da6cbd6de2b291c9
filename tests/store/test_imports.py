"""A store can be read where no framework is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "torchvision", "timm", "transformers", "open_clip", "ray"}


@pytest.mark.parametrize("module", ["eupe.store", "eupe.store.writer"])
def test_the_store_loads_no_framework(module: str) -> None:
    """The import runs in a fresh interpreter, because this one has loaded everything."""
    command = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.split())
    assert "tensorstore" in loaded
    assert not HEAVY & loaded
