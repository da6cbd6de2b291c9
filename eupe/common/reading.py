"""Parsing of JSON and YAML from outside, and dataclasses as plain JSON.

Every fault in what comes from outside raises an OSError or a ValueError.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

MOST_VALUES = 100_000
"""Upper bound on the values of a YAML file; each counts as often as aliases repeat it."""


def read_json(path: Path) -> Any:
    """Read a JSON file in UTF-8.

    Raises: OSError; ValueError if it is not JSON, not UTF-8, or nested too deeply.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, given as text or as UTF-8.

    Raises: ValueError if it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def to_plain(instance: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as plain JSON, with tuples as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(instance).items()}


def from_plain(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that `to_plain` turned into JSON, with lists as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}


def parse_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Parse YAML.

    Raises: ValueError if it is not YAML, nested too deeply, or has more than `MOST_VALUES` values with its aliases.
    """
    try:
        value = yaml.load(text, Loader=loader)
        if _num_values(value, {}) > MOST_VALUES:
            raise ValueError(f"its aliases expand to more than {MOST_VALUES} values")
        return value
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply, or contains itself") from error


def _num_values(value: Any, known: dict[int, int]) -> int:
    """Count the values in a value, aliases included.

    Args:
        known: counts so far, by identity of the object.
    Raises: RecursionError for an object that holds itself.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:  # counted once each: nested aliases make the number of visits exponential
        inner: Iterable[Any] = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_num_values(each, known) for each in inner)
    return known[id(value)]
