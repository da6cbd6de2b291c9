"""The student: a model with its spec, built, saved and loaded. A picture in, a summary vector and dense tokens out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from eupe.common.compute import Tokens
from eupe.common.files import replacing, share, write_file
from eupe.common.kinds import STUDENT_FILE, WEIGHTS_FILE, LayerShape
from eupe.errors import ConfigError, RunError, StorageError, TeacherError
from eupe.models.checkpoints import load_state_dict_strictly
from eupe.models.encoder_spec import EncoderSpec, load_encoder_spec
from eupe.models.meta import built_on_meta
from eupe.models.outside import (
    OWN_SIDE,
    build_outside,
    is_outside,
    outside_layers,
    outside_spec,
    outside_tokens,
    require_trust,
)
from eupe.models.timm_models import (
    brief,
    create_timm,
    dense_kind,
    remembered,
    summary_kind,
    timm_layers,
    timm_on_paper,
    timm_spec,
    timm_tokens,
)

ANSWER = "answer"
"""Key in the origin of an encoder from outside timm: numbers of its output for a picture."""
ANSWERS_ALIKE = 1e-2
"""Largest difference of two answers, as a share of the largest number: processors round differently."""


class Encoder(nn.Module):
    """A model with its spec: normalised pixels in, Tokens out."""

    def __init__(self, spec: EncoderSpec, model: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.model = model

    def forward(self, pixels_BCHW: Tensor, layers: Sequence[int] = ()) -> Tokens:
        """Return the tokens of normalised float pixels, in the dtype that the model computes in.

        Args:
            layers: numbers of the layers whose maps are wanted as well; see `encoder_layers`.
        """
        if self.spec.origin is not None:
            return outside_tokens(self.model, pixels_BCHW, self.spec, layers)
        return timm_tokens(self.model, pixels_BCHW, summary=self.spec.summary, dense=self.spec.dense, layers=layers)


def build_encoder(arch: str, *, size: int, known: EncoderSpec | None = None) -> Encoder:
    """Build a student with its library's random initialisation, which draws from torch's global generator.

    Inputs of other sizes than `size` work if the architecture can take them and the patch divides them.

    Args:
        arch: a timm architecture, or the name of a student from outside timm.
        known: spec of an encoder that was built before, so that this one is built alike even if the files are gone
            that its name means.
    Raises: ConfigError as `encoder_spec` does.
    """
    if is_outside(arch):
        model = build_outside(arch, size, known)
        with torch.random.fork_rng(devices=[]):
            return Encoder(outside_spec(arch, model, size, known), model)
    return Encoder(timm_spec(arch, size), create_timm(arch, size=size))


def encoder_spec(arch: str, size: int) -> EncoderSpec:
    """Return the spec of a student for a size; torch's generator is left as it is.

    Raises: ConfigError if there is no such student, or it does not take the size.
    """
    if not is_outside(arch):
        return timm_spec(arch, size)
    with torch.random.fork_rng(devices=[]):
        return build_encoder(arch, size=size).spec


def encoder_layers(arch: str, size: int) -> list[LayerShape]:
    """Return the shapes of the maps that a student's layers give, first to last; layers are numbered from 1.

    Raises: ConfigError if there is no such student, it does not take the size, or it gives no layers.
    """
    if not is_outside(arch):
        return _timm_layers(arch, size)
    with torch.random.fork_rng(devices=[]):
        return outside_layers(arch, build_outside(arch, size), size)


@remembered
def _timm_layers(arch: str, size: int) -> list[LayerShape]:
    with built_on_meta():
        model = create_timm(arch, size=size)
    return timm_layers(model, size)


def save_encoder(encoder: Encoder, directory: Path, *, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the weights, then the spec, each as a whole or not at all.

    The spec of an encoder from outside timm says how it answers, as its code may be another one when it is loaded.

    Args:
        weights: tensors to write instead of the encoder's own, by their names in its model.
    Raises: StorageError if they cannot be written.
    """
    weights = encoder.model.state_dict() if weights is None else weights
    # copies, because a file cannot hold one tensor under two names, as a model may
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / WEIGHTS_FILE) as unfinished:
            safetensors.torch.save_file(weights, unfinished)
            share(unfinished)
        spec = encoder.spec
        if spec.origin is not None:
            answer = _answer(_rebuilt(spec, weights, source=str(directory)))
            spec = replace(spec, origin={**spec.origin, ANSWER: answer})
        # The spec comes last: a run that has one counts as finished.
        write_file(directory / STUDENT_FILE, json.dumps(spec.to_json(), indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"the student cannot be written to {directory}: {error}") from error


def load_encoder(directory: Path) -> Encoder:
    """Load the student of a training run on the CPU, every weight from the file; leave torch's generator as it is.

    Raises: RunError that names the directory if spec or weights are missing, unreadable or do not fit each other.
    """
    spec = load_encoder_spec(directory)
    try:
        weights = safetensors.torch.load_file(directory / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{directory} holds no readable {WEIGHTS_FILE} ({error})") from error
    require_trust(spec.arch, str(directory))
    try:
        encoder = _rebuilt(spec, weights, source=str(directory / WEIGHTS_FILE))
        _check_answer(spec, encoder)
    except (ConfigError, TeacherError) as error:
        raise RunError(f"the student in {directory} cannot be rebuilt: {error}") from error
    return encoder


def _rebuilt(spec: EncoderSpec, weights: Mapping[str, Tensor], *, source: str) -> Encoder:
    """Build an encoder again and fill it; leave torch's generator as it is.

    Raises: ConfigError, TeacherError if the libraries build another one now, or the weights do not fit it.
    """
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(spec.arch, size=spec.size, known=spec)
    if encoder.spec != spec:
        what = f"the installed timm {timm.__version__} builds" if spec.origin is None else "its library builds by now"
        raise ConfigError(f"{what} a different {spec.arch}: {encoder.spec}{_changes(spec, encoder)}")
    load_state_dict_strictly(encoder.model, weights, source=source)
    return encoder


def _answer(encoder: Encoder) -> list[float]:
    """Return the first numbers of an encoder's summary and of its first and last dense token for one random picture."""
    size = encoder.spec.size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    encoder.eval()
    with torch.inference_mode():
        tokens = encoder(pixels)
    assert tokens.summary is not None
    vectors = (tokens.summary[0], tokens.dense[0, 0, 0], tokens.dense[0, -1, -1])
    return [round(number, 6) for vector in vectors for number in vector[:8].tolist()]


def _check_answer(spec: EncoderSpec, encoder: Encoder) -> None:
    """Raise ConfigError if an encoder from outside timm answers otherwise than when it was saved."""
    if spec.origin is None or ANSWER not in spec.origin:
        return
    then, now = torch.tensor(spec.origin[ANSWER]), torch.tensor(_answer(encoder))
    if then.shape != now.shape or (then - now).abs().max() > ANSWERS_ALIKE * then.abs().max():
        raise ConfigError(
            f"{spec.arch} gives other outputs than it gave when it was trained{_changes(spec, encoder)}; install "
            "what it was trained with"
        )


def _changes(spec: EncoderSpec, encoder: Encoder) -> str:
    """Return what changed in the source of an encoder from outside timm, as the end of a sentence."""
    then, now = spec.origin or {}, encoder.spec.origin or {}
    library = now.get("library")
    changed = []
    if then.get("version") != now.get("version"):
        changed.append(f"{library} was {then.get('version')} and is {now.get('version')}")
    if then.get("digest") != now.get("digest"):
        changed.append(f"the source of {library} has changed")
    return f" ({'; '.join(changed)})" if changed else ""


def check_student(arch: str, sizes: Sequence[int], *, views: int) -> None:
    """Try a forward and a backward pass, as in training, at every size; timm's models on the meta device.

    Args:
        sizes: sides of its inputs; the model is laid out for the first.
        views: number of views that a worker takes at once.
    Raises: ConfigError unless one model can be trained at all sizes with that number of views.
    """
    views = min(views, 2)  # only batch norms care, and only whether it is one view or more
    if is_outside(arch):
        _try_outside(arch, sizes, views)
    else:
        _try_student(arch, tuple(sizes), views)


def _try_outside(arch: str, sizes: Sequence[int], views: int) -> None:
    """Try a student on the CPU, because modules of others may not know the meta device."""
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(arch, size=sizes[0]).train()
        for size in sizes:
            try:
                tokens = encoder(torch.randn(views, 3, size, size))
                torch.autograd.backward([tokens.summary.sum(), tokens.dense.sum()])
            except Exception as error:  # models refuse in many ways
                raise ConfigError(_why_not_trained(arch, sizes[0], size, error)) from error
            width, expected = tokens.dense.shape[-1], encoder.spec.dense_dim
            if width != expected:
                raise ConfigError(f"{arch} is {width} wide at {size} px, and {expected} at {sizes[0]}; give one --size")


@remembered
def _try_student(arch: str, sizes: tuple[int, ...], views: int) -> None:
    for size in sizes:
        timm_spec(arch, size)
    with built_on_meta():
        model = create_timm(arch, size=sizes[0]).train()
    kinds: dict[str, Any] = {"summary": summary_kind(model), "dense": dense_kind(model)}
    with torch.device("meta"):
        for size in sizes:
            try:
                tokens = timm_tokens(model, torch.zeros(views, 3, size, size), **kinds)
                assert tokens.summary is not None
                torch.autograd.backward([tokens.summary.sum(), tokens.dense.sum()])
            except Exception as error:  # libraries refuse in many ways
                raise ConfigError(_why_not_trained(arch, sizes[0], size, error)) from error


def _why_not_trained(arch: str, first: int, size: int, error: Exception) -> str:
    if "more than 1 value per channel" in str(error):
        return (
            f"{arch} cannot be trained on one view of {size} px at a time, because its batch norms get one value per "
            "channel; give each worker two views or more: a larger --batch-size, or fewer --num-workers or --accumulate"
        )
    if size != first:
        return f"{arch} built for {first} px does not also take {size} px ({brief(error)}); give one --size"
    return f"{arch} cannot be trained at {size} px ({brief(error)}); give another --student"


def on_paper(arch: str) -> nn.Module:
    """Build a student to look at its layers: timm's at its own size, without weights or memory."""
    if not is_outside(arch):
        model: nn.Module = timm_on_paper(arch)
        return model
    with torch.random.fork_rng(devices=[]):
        return build_outside(arch, OWN_SIDE)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model's output for a view depends, in training, on the other views of the batch."""
    return bool(_batch_norms(model))


def keep_batch_norms(model: nn.Module) -> None:
    """Put a model's batch norms into evaluation mode: they use their running statistics, and leave them as they are."""
    for norm in _batch_norms(model):
        norm.eval()


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
