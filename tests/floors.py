"""Prints the oldest releases that pyproject.toml allows, as pip takes them: `make test-floors` installs and tries them.

Not PyTorch and torchvision, which are gigabytes.

    python tests/floors.py          what can be installed with all that it needs
    python tests/floors.py torch    what needs PyTorch, and is to be installed without
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

AS_INSTALLED = ("torch", "torchvision")
NEED_TORCH = ("timm", "open_clip_torch")


def floors() -> dict[str, str]:
    """Return the least version of each package that is asked for, by its name."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    pairs = (asked.partition(">=")[::2] for asked in project["dependencies"])
    return {name: version for name, version in pairs if name not in AS_INSTALLED}


if __name__ == "__main__":
    without = sys.argv[1:] == ["torch"]
    print(*(f"{name}=={version}" for name, version in floors().items() if (name in NEED_TORCH) == without))
