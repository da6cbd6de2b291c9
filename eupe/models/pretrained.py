"""The weights that a student's library has for it: fetched once by the library itself, which keeps them on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import is_model, split_model_name_tag
from torch import Tensor, nn

from eupe.errors import ConfigError
from eupe.models.checkpoints import weights_digest
from eupe.models.hub import at_revision, hub_or_offline, named, quiet_transformers
from eupe.models.outside import HF, TORCHVISION, build_outside, hf_class, hf_config, is_outside, torchvision_model
from eupe.models.timm_models import create_timm, timm_config

UNKNOWN = "unknown"


@dataclass(frozen=True)
class LibraryWeights:
    """Weights of a student, by the names of its encoder's tensors."""

    name: str
    """Where they are from, in words."""
    licence: str
    """As their library says it; "unknown" if it does not."""
    state: Mapping[str, Tensor]
    digest: str
    """sha256 of names and values."""


def has_tag(student: str) -> bool:
    """Return whether a student is named with a tag of timm's, NAME.TAG, which stands for its weights."""
    return bool(split_model_name_tag(student)[1]) and is_model(student)


def library_weights(student: str, size: int) -> LibraryWeights:
    """Return the weights that a student's library has for it, resampled to a size as the library does.

    A module of the user's own has the weights with which its function returns it. Torch's generator is left as it is.

    Raises: ConfigError if there are none, or they cannot be fetched.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            name, licence, model = _with_weights(student, size)
    except ConfigError:
        raise
    except Exception as error:  # libraries, and the way to their hubs, fail in many ways
        raise ConfigError(
            f"the pretrained weights of {student} cannot be had at {size} px ({named(error)}); "
            "give them as a file with --init"
        ) from error
    return LibraryWeights(name, licence, model.state_dict(), weights_digest(model))


def pretrained_licence(student: str) -> str:
    """Return the licence of the weights that `library_weights` would give, as far as it is known without the hub."""
    config: Any = None if is_outside(student) else timm_config(student)
    return UNKNOWN if config is None else config.license or UNKNOWN


def _with_weights(student: str, size: int) -> tuple[str, str, nn.Module]:
    if not is_outside(student):
        return _timm(student, size)
    if student.startswith(TORCHVISION):
        return _torchvision(student.removeprefix(TORCHVISION), size)
    if student.startswith(HF):
        return _hf(student)
    return student, UNKNOWN, build_outside(student, size)


def _timm(student: str, size: int) -> tuple[str, str, nn.Module]:
    config: Any = timm_config(student)
    if config is None or not config.has_weights:
        raise ConfigError(f"timm has no pretrained weights for {student}; leave --pretrained out, or give a tag")
    model: nn.Module = create_timm(student, size=size, pretrained=True)
    place = config.hf_hub_id or config.url or config.file
    return f"{student} of timm ({place})", config.license or UNKNOWN, model


def _torchvision(name: str, size: int) -> tuple[str, str, nn.Module]:
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(name).DEFAULT
    return f"{name} of torchvision ({weights.url})", UNKNOWN, torchvision_model(name, size, weights)


def _hf(student: str) -> tuple[str, str, nn.Module]:
    config = hf_config(student)
    place, revision = at_revision(student.removeprefix(HF))
    with quiet_transformers(), hub_or_offline(place):
        model: nn.Module = hf_class(config).from_pretrained(
            place, revision=revision, config=config, dtype=torch.float32, trust_remote_code=False
        )
    return place, hub_licence(place, revision), model


def hub_licence(place: str, revision: str) -> str:
    """Return the licence that the README of a directory or repository says; "unknown" if it says none."""
    from huggingface_hub import ModelCard
    from transformers.utils import cached_file

    with suppress(Exception), hub_or_offline(place):  # there may be no README, or one without a licence
        if file := cached_file(place, "README.md", revision=revision, _raise_exceptions_for_missing_entries=False):
            return ModelCard(Path(file).read_text(encoding="utf-8")).data.get("license") or UNKNOWN
    return UNKNOWN
