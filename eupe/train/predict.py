"""A finished run's heads as predictors of the teachers' features; no store and no teacher is opened.

Shapes: B pictures, h w cells of the student's grid, D width of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eupe.common.compute import Tokens
from eupe.errors import RunError, TeacherError
from eupe.models.checkpoints import load_state_dict_strictly, read_tensors
from eupe.models.encoder_spec import load_encoder_spec
from eupe.models.meta import built_on_meta
from eupe.store.layout import KINDS
from eupe.train.layers import LAYERS
from eupe.train.model import AdapterHead
from eupe.train.normalise import Normaliser
from eupe.train.run_spec import HEADS_FILE, NORMS_FILE, REPORT_FILE, finished_run_spec, target_names
from eupe.train.validate import Gains


class KindPredictor(nn.Module):
    """A predictor of one kind of token of one target: `norm.inverse(gain * head(token))`."""

    mean: Tensor
    centre: Tensor
    scale: Tensor
    rotation: Tensor | None
    gain: Tensor

    def __init__(self, widths: tuple[int, int, int], *, rotated: bool) -> None:
        """Build the head, and buffers for its normalisation that are to be loaded.

        Args:
            widths: of the student's token, of the head's hidden layer, of the target's token.
            rotated: whether the target was rotated for the loss.
        """
        super().__init__()
        width = widths[2]
        self.widths = widths
        self.head = AdapterHead(*widths)
        for name in ("mean", "centre", "scale"):
            self.register_buffer(name, torch.zeros(width))
        self.register_buffer("rotation", torch.zeros(width, width) if rotated else None)
        self.register_buffer("gain", torch.zeros(()))

    @property
    def norm(self) -> Normaliser:
        """Return the normalisation of the target in the loss."""
        return Normaliser(mean=self.mean, centre=self.centre, scale=self.scale, rotation=self.rotation)

    def draw_anew(self) -> None:
        """Replace the learned head by one with random weights, which are always the same."""
        # the caller's random numbers stay what they were
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.head = AdapterHead(*self.widths).eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map the student's tokens [..., width] to the teacher's [..., D], float32."""
        return self.norm.inverse(self.gain * self.head(tokens))


class TargetPredictor(nn.Module):
    """The heads of one target, which map the student's tokens to the teacher's."""

    def __init__(
        self, name: str, target: Mapping[str, Any], student: Mapping[str, int], head_width: int, rotated: Sequence[str]
    ) -> None:
        """Build the predictors of a target, without loading them.

        Args:
            name: see `target_names`.
            target: as in `RunSpec.targets`.
            student: the width of each kind of token.
            rotated: the kinds that were rotated for the loss.
        """
        super().__init__()
        self.name = name
        self.teacher: str = target["teacher"]
        self.widths: dict[str, int] = {kind: target[f"{kind}_dim"] for kind in KINDS if target[f"{kind}_dim"]}
        """Widths of the teacher's tokens by kind; kinds that the store does not hold are left out."""
        self.kinds = nn.ModuleDict(
            {
                kind: KindPredictor((student[kind], head_width, width), rotated=kind in rotated)
                for kind, width in self.widths.items()
            }
        )

    def forward(self, tokens: Tokens) -> tuple[Tensor | None, Tensor | None]:
        """Return summary [B, Ds] and dense [B, h, w, D] in the teacher's own space, on the student's grid."""
        said = {kind: predictor(getattr(tokens, kind)) for kind, predictor in self.kinds.items()}
        summary, dense = (said.get(kind) for kind in KINDS)
        return summary, dense


def load_predictors(run: Path) -> list[TargetPredictor]:
    """Load the heads of a finished run, on the CPU, in evaluation mode, in the order of its targets.

    Raises: RunError if the run is not finished, was finished by a version that wrote no norms, or its files do not fit
        each other.
    """
    spec, student = finished_run_spec(run), load_encoder_spec(run)
    heads, norms = _read(run / HEADS_FILE), _read(run / NORMS_FILE)
    widths = dict(zip(KINDS, (student.summary_dim, student.dense_dim), strict=True))
    predictors = []
    for i, (name, target) in enumerate(zip(target_names(spec.targets), spec.targets, strict=True)):
        rotated = [kind for kind in KINDS if f"{i}.{kind}.rotation" in norms]
        with built_on_meta():
            predictor = TargetPredictor(name, target, widths, spec.config["head_width"], rotated)
        state = {f"{kind}.head.{tensor}": value for (kind, tensor), value in _of(heads, i).items()}
        state |= {f"{kind}.{tensor}": value for (kind, tensor), value in _of(norms, i).items()}
        try:
            load_state_dict_strictly(predictor.to_empty(device="cpu").kinds, state, source=str(run))
        except TeacherError as error:
            raise RunError(f"the heads of run {run} cannot be used: {error}") from error
        predictors.append(predictor.eval())
    return predictors


def norm_tensors(norms: Sequence[Mapping[str, Normaliser]], gains: Gains) -> dict[str, Tensor]:
    """Return the tensors that undo the normalisation of the heads' targets.

    They are named `TARGET_NUMBER.KIND.NAME`, where NAME is `mean`, `centre`, `scale`, `rotation` or `gain`.

    Args:
        norms: per target, by kind of token.
        gains: see `fit_gains`.
    """
    tensors: dict[str, Tensor] = {}
    for i, (kinds, factors) in enumerate(zip(norms, gains, strict=True)):
        for kind, norm in ((kind, norm) for kind, norm in kinds.items() if kind in factors):
            found = {**vars(norm), "gain": torch.tensor(factors[kind], dtype=torch.float32)}
            tensors |= {f"{i}.{kind}.{name}": value for name, value in found.items() if value is not None}
    return tensors


def _of(tensors: Mapping[str, Tensor], target: int) -> dict[tuple[str, str], Tensor]:
    """Return the tensors of one target, by kind and name."""
    parts = {name: name.split(".", 2) for name in tensors}
    # heads of layers serve training alone
    return {
        (kind, rest): tensors[name]
        for name, (number, kind, rest) in parts.items()
        if number == str(target) and kind != LAYERS
    }


def _read(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of a run.

    Raises: RunError if it is missing or cannot be read.
    """
    if not path.exists():
        run = path.parent
        raise RunError(
            f"run {run} has no {path.name}, which turns the outputs of its heads into features of its teachers: an "
            f"older eupe finished it; remove {run / REPORT_FILE} and finish it again with `eupe train ... --resume`"
        )
    return read_tensors(path)
