"""Texts and JSON from outside, whose every fault is an OSError or a ValueError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """What a file of UTF-8 holds.

    Raises: OSError; ValueError if it is no JSON, no UTF-8, or nested too deeply to be read.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """Raises: ValueError if it is no JSON, or nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
