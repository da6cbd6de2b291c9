"""A training run's student as the next teacher: this is how the proxy teaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from eupe.common.compute import Tokens
from eupe.common.kinds import LayerShape
from eupe.models.checkpoints import load_state_dict_strictly, read_checkpoint
from eupe.models.encoder import Encoder, build_encoder, encoder_layers, load_encoder
from eupe.models.encoder_spec import EncoderSpec, load_encoder_spec
from eupe.models.outside import require_trust
from eupe.teachers.spec import TeacherSpec, encoder_fields

OWN_LICENCE = "own"
"""Licence of a student that was trained here, although its teachers have licences, too."""


def describe(directory: str) -> TeacherSpec:
    """Return the spec of the student in a run's directory.

    Raises: RunError if there is no readable `student.json`.
    """
    return as_teacher(load_encoder_spec(Path(directory)), directory)


def as_teacher(spec: EncoderSpec, directory: str) -> TeacherSpec:
    """Return the spec of a student whose run is, or will be, in a directory."""
    return TeacherSpec(
        name=directory,
        backend="run",
        model=directory,
        **encoder_fields(spec),
        native_size=spec.size,
        mean=spec.mean,
        std=spec.std,
        licence=OWN_LICENCE,
        note=f"trained here: {spec.arch}",
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

    Raises: RunError if the run has no `student.json`; ConfigError if the installed timm does not know its architecture.
    """
    encoder = load_encoder_spec(Path(spec.model))
    require_trust(encoder.arch, spec.model)
    return build_encoder(encoder.arch, size=encoder.size, known=encoder)


def tokens(model: nn.Module, spec: TeacherSpec, pixels_BCHW: Tensor, layers: Sequence[int] = ()) -> Tokens:
    """Return the tokens of normalised pixels."""
    result: Tokens = model(pixels_BCHW, layers)
    return result


def layers(spec: TeacherSpec, *, weights: Path | None = None) -> list[LayerShape]:
    """Return the shapes of the maps of the layers of the run's student."""
    encoder = load_encoder_spec(Path(spec.model))
    require_trust(encoder.arch, spec.model)
    return encoder_layers(encoder.arch, encoder.size)
