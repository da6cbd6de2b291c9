"""The student: a model with its spec, built, saved and loaded. A picture in, a summary vector and dense tokens out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from eupe.common.compute import Tokens
from eupe.common.files import replacing, share, write_file
from eupe.common.kinds import STUDENT_FILE, WEIGHTS_FILE
from eupe.errors import ConfigError, RunError, StorageError, TeacherError
from eupe.models.checkpoints import load_state_dict_strictly
from eupe.models.encoder_spec import EncoderSpec, load_encoder_spec
from eupe.models.meta import built_on_meta
from eupe.models.timm_models import brief, create_timm, dense_kind, remembered, summary_kind, timm_spec, timm_tokens


class Encoder(nn.Module):
    """A timm model with its spec: normalised pixels in, Tokens out."""

    def __init__(self, spec: EncoderSpec, model: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.model = model

    def forward(self, pixels_BCHW: Tensor) -> Tokens:
        """Return the tokens of normalised float pixels, in the dtype that the model computes in."""
        return timm_tokens(self.model, pixels_BCHW, summary=self.spec.summary, dense=self.spec.dense)


def build_encoder(arch: str, *, size: int) -> Encoder:
    """Build a timm architecture with the library's random initialisation, which draws from torch's global generator.

    Inputs of other sizes than `size` work if the architecture can take them and the patch divides them.

    Raises: ConfigError as `timm_spec` does.
    """
    spec = timm_spec(arch, size)
    return Encoder(spec, create_timm(arch, size=size))


def save_encoder(encoder: Encoder, directory: Path, *, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the weights, then the spec, each as a whole or not at all.

    Args:
        weights: tensors to write instead of the encoder's own, by their names in its model.
    Raises: StorageError if they cannot be written.
    """
    weights = encoder.model.state_dict() if weights is None else weights
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / WEIGHTS_FILE) as unfinished:
            safetensors.torch.save_file(weights, unfinished)
            share(unfinished)
        # The spec comes last: a run that has one counts as finished.
        write_file(directory / STUDENT_FILE, json.dumps(encoder.spec.to_json(), indent=2) + "\n")
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
    try:
        with torch.random.fork_rng(devices=[]):
            encoder = build_encoder(spec.arch, size=spec.size)
        if encoder.spec != spec:
            raise ConfigError(f"the installed timm {timm.__version__} builds a different {spec.arch}: {encoder.spec}")
        load_state_dict_strictly(encoder.model, weights, source=str(directory / WEIGHTS_FILE))
    except (ConfigError, TeacherError) as error:
        raise RunError(f"the student in {directory} cannot be rebuilt: {error}") from error
    return encoder


def check_student(arch: str, sizes: Sequence[int], *, views: int) -> None:
    """Try a forward and a backward pass, as in training, at every size on the meta device.

    Args:
        sizes: sides of its inputs; the model is laid out for the first.
        views: number of views that a worker takes at once.
    Raises: ConfigError unless one model can be trained at all sizes with that number of views.
    """
    _try_student(arch, tuple(sizes), min(views, 2))  # only batch norms care, and only whether it is one view or more


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


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model's output for a view depends, in training, on the other views of the batch."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
