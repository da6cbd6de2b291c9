"""A training run's student as the next teacher: this is how the proxy teaches."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from eupe.common.compute import Tokens
from eupe.models.checkpoints import load_state_dict_strictly, read_checkpoint
from eupe.models.encoder import Encoder, EncoderCard, build_encoder, load_card, load_encoder
from eupe.teachers.spec import TeacherSpec

OWN_LICENCE = "own"
"""Licence of a student that was trained here, although its teachers have licences, too."""


def describe(directory: str) -> TeacherSpec:
    """Return the spec of the student in a run's directory.

    Raises: RunError if there is no readable card.
    """
    return as_teacher(load_card(Path(directory)), directory)


def as_teacher(card: EncoderCard, directory: str) -> TeacherSpec:
    """Return the spec of a student whose run is, or will be, in a directory."""
    return TeacherSpec(
        name=directory,
        backend="run",
        model=directory,
        patch=card.patch,
        dense_dim=card.dense_dim,
        summary_dim=card.summary_dim,
        prefix_tokens=card.prefix_tokens,
        summary=card.summary,
        dense=card.dense,
        native_size=card.size,
        mean=card.mean,
        std=card.std,
        licence=OWN_LICENCE,
        note=f"trained here: {card.arch}",
    )


def load(spec: TeacherSpec, *, weights: Path | None, key: str | None, sizes: tuple[int, ...]) -> Encoder:
    """Load the run's encoder; `weights`, if given, replace the run's own."""
    encoder = load_encoder(Path(spec.model))
    if weights is not None:
        state = read_checkpoint(weights, key=key, fitting=encoder.model.state_dict())
        load_state_dict_strictly(encoder.model, state, source=str(weights))
    return encoder


def build(spec: TeacherSpec, *, sizes: tuple[int, ...]) -> Encoder:
    """Build the run's encoder with random weights.

    Raises: RunError if the run has no card; ConfigError if the installed timm does not know its architecture.
    """
    card = load_card(Path(spec.model))
    return build_encoder(card.arch, size=card.size)


def tokens(model: nn.Module, spec: TeacherSpec, pixels_BCHW: Tensor) -> Tokens:
    """Return the tokens of normalised pixels."""
    result: Tokens = model(pixels_BCHW)
    return result
