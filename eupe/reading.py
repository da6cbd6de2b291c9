"""JSON and YAML from outside, whose every fault is an OSError or a ValueError."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

MOST_VALUES = 100_000
"""Of a YAML file, each counted as often as its aliases repeat it."""


def read_json(path: Path) -> Any:
    """What a file of UTF-8 holds.

    Raises: OSError; ValueError if it is no JSON, no UTF-8, or nested too deeply to be read.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """Return what JSON says, in text or in UTF-8.

    Raises: ValueError if it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Return what YAML says.

    Raises: ValueError if it is no YAML, nested too deeply, or multiplied by its aliases beyond `MOST_VALUES` values.
    """
    try:
        value = yaml.load(text, Loader=loader)
        if _num_values(value, {}) > MOST_VALUES:
            raise ValueError(f"its aliases make more than {MOST_VALUES} values of it")
        return value
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply, or holds itself") from error


def _num_values(value: Any, known: dict[int, int]) -> int:
    """Raises: RecursionError for what holds itself.

    Args:
        known: by identity, what has been counted.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inner: Iterable[Any] = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_num_values(each, known) for each in inner)
    return known[id(value)]
