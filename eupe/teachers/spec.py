"""The description of a teacher, known without loading it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eupe.common.kinds import HF_HUB, LOCAL_DIR, DenseKind, SummaryKind
from eupe.common.reading import from_plain, to_plain
from eupe.errors import TeacherError

if TYPE_CHECKING:
    from eupe.models.encoder_spec import EncoderSpec

__all__ = ["Backend", "DenseKind", "SummaryKind", "TeacherSpec", "encoder_fields", "is_permissive"]

PERMISSIVE = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause")
"""Licences, in lower case, that let anyone use, change and sell what they cover."""

Backend = Literal["timm", "hf", "open_clip", "run"]
"""The library that a teacher comes from; `run` is a training run of eupe's."""


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """A row of the registry: plain data, stored in full beside the features that the teacher produced."""

    name: str
    """Registry name, or the name that the user typed (`timm:...`, `hf:...`, `open_clip:...`, a run's directory)."""
    backend: Backend
    model: str
    """timm `arch.tag`, `local-dir:DIR` or `hf-hub:REPOSITORY`, Hugging Face repository or directory, open_clip
    `arch@tag`, or a run's directory."""
    patch: int
    """Pixels of input per dense cell, along either side."""
    dense_dim: int
    summary_dim: int
    """Width of the summary; 0 if there is none."""
    prefix_tokens: int
    """Number of class and register tokens ahead of the patch tokens."""
    summary: SummaryKind
    dense: DenseKind
    native_size: int
    """Side in pixels of the square input at which the model was trained or is meant to be used."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per-channel normalisation of RGB in [0, 1]."""
    licence: str
    note: str = ""
    """Facts to know before choosing it: which library is followed where they disagree, and why."""

    def grid(self, size: int) -> int:
        """Return the number of cells along one side of the dense map for a `size` x `size` input.

        Raises: TeacherError if the patch does not divide the size; it names the nearest sizes that work.
        """
        if size < self.patch or size % self.patch:
            below = max(size // self.patch, 1) * self.patch
            raise TeacherError(
                f"size {size} does not work for teacher {self.name}: its patch is {self.patch} pixels "
                f"and must divide the size; "
                f"use --size {below} or --size {below + self.patch}"
            )
        return size // self.patch

    @property
    def architecture(self) -> str | None:
        """Return the library's name of the architecture, without tag; None if `model` is a place with a configuration.

        Together with the weights it determines what the model computes.
        """
        if self.is_local_dir or self.hub_repository or self.backend not in ("timm", "open_clip"):
            return None
        return re.split(r"[.@]", self.model)[0]

    @property
    def is_local_dir(self) -> bool:
        """Return whether `model` is a directory in timm's layout."""
        return self.model.startswith(LOCAL_DIR)

    @property
    def hub_repository(self) -> str | None:
        """Return the repository, with @REVISION if there is one, of a model in timm's layout on the hub; else None."""
        return self.model.removeprefix(HF_HUB) if self.model.startswith(HF_HUB) else None

    @property
    def place(self) -> Path:
        """Return the path of the model, if `model` is a place."""
        return Path(self.model.removeprefix(LOCAL_DIR))

    def at(self, place: Path) -> TeacherSpec:
        """Return the same model at another place, or at the absolute path of its own."""
        return dataclasses.replace(self, model=f"{LOCAL_DIR if self.is_local_dir else ''}{place}")

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> TeacherSpec:
        """Build a spec from the JSON of `to_json`, ignoring what a store adds to the spec.

        Raises: TeacherError if a field is missing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in plain]:
            raise TeacherError(f"a teacher's spec has no {', '.join(missing)}; give the teacher by its name")
        return cls(**from_plain({name: plain[name] for name in names}))

    def to_json(self) -> dict[str, Any]:
        """Return the spec as plain JSON, with tuples as lists."""
        return to_plain(self)


def is_permissive(licence: str) -> bool:
    """Return whether a licence of weights is Apache-2.0, MIT or BSD; one that is not known is not."""
    return licence.lower() in PERMISSIVE


def encoder_fields(encoder: EncoderSpec) -> dict[str, Any]:
    """Return the fields of a teacher's spec that its encoder decides, but for size, mean and std."""
    names = ("patch", "dense_dim", "summary_dim", "prefix_tokens", "summary", "dense")
    return {name: getattr(encoder, name) for name in names}
