"""The start of a student: from a finished run, or from weights with timm's names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from eupe.common.kinds import WEIGHTS_FILE
from eupe.errors import RunError, TeacherError
from eupe.models.checkpoints import (
    ALONE,
    describe_misfits,
    find_misfits,
    load_state_dict_strictly,
    read_checkpoint,
    read_tensors,
)
from eupe.models.encoder import Encoder, build_encoder
from eupe.models.encoder_spec import load_encoder_spec
from eupe.models.pretrained import library_weights
from eupe.train.layers import LAYERS
from eupe.train.run_spec import HEADS_FILE, finished_run_spec, same_teachers

PATCHES = "patch_embed.proj.weight"
POSITIONS = "pos_embed"
LEAST_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class InitReport:
    """The weights that a student started from, and what was left over."""

    source: str
    num_tensors: int
    """Number of tensors that were copied."""
    share: float
    """Copied share of the parameters: of the encoder's, and if the source is a run, of the heads' as well."""
    fresh: tuple[str, ...]
    """Tensors of the encoder (`reg_token`) and whole heads (`heads.0.summary`) that keep their initialisation."""
    unused: tuple[str, ...]
    """Tensors and heads of the source that were not used, by the source's names."""
    licence: str | None = None
    """Licence of a library's weights; None for a run, or a file, which does not say one."""

    def __str__(self) -> str:
        """Return one line, with up to five names of each kind."""
        words = f"{self.num_tensors} tensors ({self.share:.1%} of the parameters) from {self.source}"
        for kind, names in (("fresh", self.fresh), ("unused", self.unused)):
            if names:
                words += f"; {len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        return words


def init_from_run(
    run: Path, encoder: Encoder, heads: nn.ModuleList, *, targets: Sequence[Mapping[str, Any]]
) -> InitReport:
    """Start where a finished run ended, as the paper's third stage does (EUPE, arXiv 2603.22387).

    The student's weights are copied exactly, except that a learned position table is resampled to another input size as
    timm does on loading. A head is copied if the run has one of the same shapes for the same teacher; the n-th target
    of a teacher takes the run's n-th, or the run's last if it has fewer.

    Args:
        encoder: of the architecture that the run trained; its input size may differ.
        heads: a `TargetHeads` for each target.
        targets: the new run's, as in `RunSpec.targets`.
    Raises: RunError if the run is missing, unfinished, damaged or of another architecture; then nothing has changed.
    """
    known = finished_run_spec(run).targets
    _check_same_model(run, encoder)
    student = fitted(read_tensors(run / WEIGHTS_FILE), encoder.model)
    theirs = _heads(read_tensors(run / HEADS_FILE))
    ours = {f"{i}.{kind}": head for i, pair in enumerate(heads) for kind, head in pair.named_children()}
    sources = {
        f"{i}.{kind}": f"{j}.{kind}"
        for i, j in same_teachers(targets, known).items()
        for kind in ("summary", "dense", LAYERS)
    }
    sources = {
        name: source
        for name, source in sources.items()
        if name in ours and source in theirs and not any(find_misfits(ours[name], theirs[source]).values())
    }
    try:
        # all files are read and heads chosen by now, so a refusal here leaves everything unchanged
        load_state_dict_strictly(encoder.model, student, source=str(run / WEIGHTS_FILE))
    except TeacherError as error:
        raise RunError(f"a run at {encoder.spec.size} px cannot start from {run}: {error}") from error
    for name, source in sources.items():
        load_state_dict_strictly(ours[name], theirs[source], source=str(run / HEADS_FILE))
    filled = [encoder.model, *(ours[name] for name in sources)]
    return InitReport(
        source=str(run),
        num_tensors=sum(len(module.state_dict()) for module in filled),
        share=sum(map(_num_parameters, filled)) / sum(map(_num_parameters, (encoder.model, heads))),
        fresh=tuple(f"heads.{name}" for name in ours if name not in sources),
        unused=tuple(f"heads.{name}" for name in sorted(theirs.keys() - set(sources.values()))),
    )


def init_from_weights(path: Path, encoder: Encoder) -> InitReport:
    """Start from the trunk of another model: copy tensors of the same name and shape, leave the others as they are.

    Patch embeddings of another patch size and learned position tables for another grid are resampled as timm does on
    loading.

    Args:
        path: a file with timm's names, as safetensors or as torch.save writes it, whatever wraps the tensors.
    Raises: TeacherError if the file cannot be read, or fills less than half of the parameters; then nothing has
        changed.
    """
    model = encoder.model
    state = fitted(read_checkpoint(path, fitting=model.state_dict(), partly=True, remedy=ALONE), model)
    places = model.state_dict()
    fitting = {name: value for name, value in state.items() if name in places and value.shape == places[name].shape}
    filled = sum(parameter.numel() for name, parameter in model.named_parameters() if name in fitting)
    share = filled / _num_parameters(model)
    if share < LEAST_SHARE:
        raise TeacherError(
            f"the weights in {path} fill {share:.1%} of {encoder.spec.arch}, less than {LEAST_SHARE:.0%}: "
            f"{describe_misfits(find_misfits(model, state))}; give weights of a model of the same widths, with "
            "timm's tensor names"
        )
    model.load_state_dict(fitting, strict=False)
    return InitReport(
        source=str(path),
        num_tensors=len(fitting),
        share=share,
        fresh=tuple(name for name in places if name not in fitting),
        unused=tuple(sorted(state.keys() - fitting.keys())),
    )


def init_from_library(encoder: Encoder) -> InitReport:
    """Start from the weights that the library of an encoder has for it.

    Raises: ConfigError if they cannot be had, or do not fit.
    """
    found = library_weights(encoder.spec.arch, encoder.spec.size)
    load_state_dict_strictly(encoder.model, found.state, source=found.name)
    return InitReport(
        source=found.name, num_tensors=len(found.state), share=1.0, fresh=(), unused=(), licence=found.licence
    )


def laid_out(encoder: Encoder, size: int, *, source: str) -> Encoder:
    """Return an encoder for another input size with the same weights; a position table is resampled as `fitted` does.

    Torch's generator is left as it is.

    Args:
        source: where the weights are from, for messages.
    Raises: ConfigError if the architecture does not take the size; RuntimeError, ValueError, TeacherError if the
        weights do not fit it there.
    """
    with torch.random.fork_rng(devices=[]):
        other = build_encoder(encoder.spec.arch, size=size, known=encoder.spec)
    load_state_dict_strictly(other.model, fitted(encoder.model.state_dict(), other.model), source=source)
    return other


def fitted(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return the tensors with patch embedding and positions resampled if only the patch or the grid differs."""
    resampled, places = dict(state), model.state_dict()
    if PATCHES in state and PATCHES in places:
        patches, wanted = state[PATCHES], places[PATCHES].shape
        if patches.ndim == len(wanted) == 4 and patches.shape[:2] == wanted[:2] and patches.shape != wanted:
            resampled[PATCHES] = resample_patch_embed(patches, list(wanted[2:]))
    if POSITIONS in state and POSITIONS in places and hasattr(model, "num_prefix_tokens"):
        table, wanted = state[POSITIONS], places[POSITIONS].shape
        prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        if table.ndim == len(wanted) == 3 and table.shape[2] == wanted[2] and _is_square(table.shape[1] - prefix):
            resampled[POSITIONS] = resample_abs_pos_embed(table, model.patch_embed.grid_size, num_prefix_tokens=prefix)
    return resampled


def _check_same_model(run: Path, encoder: Encoder) -> None:
    """Raise RunError if the two models differ in anything but their input size."""
    got, expected = (spec.to_json() | {"size": None, "origin": None} for spec in (load_encoder_spec(run), encoder.spec))
    if different := [f"{key}: got {got[key]}, expected {expected[key]}" for key in got if got[key] != expected[key]]:
        raise RunError(
            f"the student of {run} is a different model ({'; '.join(different)}); give its --student, or another run"
        )


def _heads(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group a run's tensors by head: `0.summary.3.weight` becomes `3.weight` of head `0.summary`."""
    heads: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        number, kind, tensor = name.split(".", 2)
        heads.setdefault(f"{number}.{kind}", {})[tensor] = value
    return heads


def _is_square(cells: int) -> bool:
    return cells > 0 and math.isqrt(cells) ** 2 == cells


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
