"""What is known of an encoder without building it, and how a run's directory keeps it."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from eupe.common.kinds import STUDENT_FILE, DenseKind, SummaryKind
from eupe.common.reading import from_plain, read_json, to_plain
from eupe.errors import ConfigError, RunError


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The data that is needed to build an encoder again, and to know its outputs without building it."""

    arch: str
    """timm architecture, with or without a pretrained tag, or the name of a student from outside timm."""
    size: int
    """Side in pixels of the square input that its position table is laid out for."""
    patch: int
    """Pixels of input per dense cell, along either side."""
    dense_dim: int
    summary_dim: int
    prefix_tokens: int
    """Number of class and register tokens ahead of the patch tokens."""
    summary: SummaryKind
    dense: DenseKind
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per-channel normalisation of RGB in [0, 1]."""
    origin: Mapping[str, Any] | None = field(default=None, compare=False)
    """Library, version and configuration or digest of the source of an encoder from outside timm."""

    def to_json(self) -> dict[str, Any]:
        """Return the spec as plain JSON, with tuples as lists."""
        plain = to_plain(self)
        return {name: value for name, value in plain.items() if name != "origin" or value is not None}

    @classmethod
    def from_json(cls, spec: Any) -> EncoderSpec:
        """Build a spec from the JSON of `to_json`.

        Raises: ConfigError that names the fields that are missing, unknown, or hold an unknown word or a value of the
            wrong kind.
        """
        if not isinstance(spec, Mapping):
            raise ConfigError(f"an encoder spec must be an object, not {type(spec).__name__}")
        names = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(names ^ {*spec, "origin"}):
            raise ConfigError(f"an encoder spec has missing or unknown fields: {', '.join(wrong)}")
        if spec["summary"] not in get_args(SummaryKind) or spec["dense"] not in get_args(DenseKind):
            raise ConfigError(f"an encoder spec has unknown kinds: {spec['summary']!r}, {spec['dense']!r}")
        values = from_plain(spec)
        if wrong := [name for name, value in values.items() if not _is_of_its_kind(name, value)]:
            raise ConfigError(
                f"an encoder spec has invalid fields: {', '.join(f'{name} {spec[name]!r}' for name in wrong)}"
            )
        return cls(**values)


def _is_of_its_kind(name: str, value: Any) -> bool:
    """Return whether a spec's field may have this value; any string passes for a word."""
    if name in ("size", "patch", "dense_dim", "summary_dim", "prefix_tokens"):
        return type(value) is int and value >= (0 if name in ("summary_dim", "prefix_tokens") else 1)
    if name == "origin":
        return value is None or isinstance(value, Mapping)
    if name in ("mean", "std"):
        return isinstance(value, tuple) and len(value) == 3 and all(type(v) in (int, float) for v in value)
    return isinstance(value, str)


def load_encoder_spec(directory: Path) -> EncoderSpec:
    """Read the spec of the student in a run's directory.

    Raises: RunError that names the directory if there is no readable spec.
    """
    try:
        return EncoderSpec.from_json(read_json(directory / STUDENT_FILE))
    except (OSError, ValueError) as error:
        raise RunError(why_no_run(directory, STUDENT_FILE, error)) from error


def why_no_run(directory: Path, file: str, error: Exception) -> str:
    """Return the error message for a directory that is not a training run, because its `file` could not be read."""
    if not os.path.isdir(directory):  # noqa: PTH112 - a Path raises where a name is too long
        what = "there is no such directory"
    elif (directory / "zarr.json").exists():
        what = "it is a store (zarr.json); give the run itself"
    else:
        what = f"it has no {file}" if isinstance(error, FileNotFoundError) else f"no readable {file} ({error})"
    return f"{directory} is not a training run: {what}"


def near(word: str, known: list[str]) -> str:
    """Return the end of a message about an unknown name: "; did you mean a, b?", or nothing."""
    matches = difflib.get_close_matches(word, known, n=3)
    return f"; did you mean {', '.join(matches)}?" if matches else ""
