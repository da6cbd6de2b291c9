"""Teachers that timm carries."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eupe.common.compute import Tokens
from eupe.common.kinds import HF_HUB, LOCAL_DIR, LayerShape
from eupe.errors import ConfigError, TeacherError
from eupe.models.checkpoints import load_state_dict_strictly, read_checkpoint
from eupe.models.hub import at_revision, brief
from eupe.models.meta import built_on_meta
from eupe.models.pretrained import UNKNOWN, hub_licence
from eupe.models.timm_models import create_timm, remembered, timm_config, timm_layers, timm_spec, timm_tokens
from eupe.teachers.preprocess import timm_folder
from eupe.teachers.registry import REGISTRY
from eupe.teachers.spec import TeacherSpec, encoder_fields
from eupe.teachers.timm_hub import card, fetch, require_as_on_card
from eupe.teachers.weights import hub_errors, own_weights


def describe(name: str) -> TeacherSpec:
    """Return the spec of `timm:ARCH[.tag]`, or of a place in timm's layout.

    Args:
        name: `timm:local-dir:DIR` for a directory, `timm:hf-hub:OWNER/NAME[@REVISION]` for a repository on the hub.
    Raises: TeacherError for an unknown architecture or tag, one whose features cannot be used, CLIP weights under an
        architecture with the wrong activation, or a repository whose config.json cannot be fetched.
    """
    arch = name.removeprefix("timm:")
    if arch.startswith(HF_HUB):
        return _describe_repository(name, arch.removeprefix(HF_HUB))
    try:
        spec = timm_spec(arch, None)
    except ConfigError as error:
        raise TeacherError(f"teacher {name}: {error}") from error
    config = timm_config(arch)
    _check_activation(arch, config.notes or ())
    return TeacherSpec(
        name=name,
        backend="timm",
        model=arch,
        **encoder_fields(spec),
        native_size=spec.size,
        mean=spec.mean,
        std=spec.std,
        licence=config.license or UNKNOWN,
    )


def load(spec: TeacherSpec, *, weights: Path | None, key: str | None, sizes: tuple[int, ...]) -> Any:
    """Load timm's model without its classifier; a CLIP-like one keeps its projection if the summary is projected."""
    size, folder = _build_size(spec, sizes), None
    if spec.hub_repository:
        folder = _folder(spec, spec.hub_repository, weights)
        weights = weights or folder
    weights = weights or own_weights(spec)
    if weights is None:
        with hub_errors(spec):
            model = create_timm(spec.model, size=size, num_classes=-1, pretrained=True)
        if spec.summary != "projected":
            model.reset_classifier(0)
        return model
    model = _built(spec, size, folder)
    state = _without_classifier(model, read_checkpoint(weights, key=key, fitting=model.state_dict()))
    # timm's conversion renames original authors' tensors, and resamples position tables if the build has another size.
    if size is not None or state.keys() != model.state_dict().keys():
        state = _without_classifier(model, _in_timm_names(model, state))
    load_state_dict_strictly(model, state, source=str(weights))
    return model


def build(spec: TeacherSpec, *, sizes: tuple[int, ...]) -> Any:
    """Build timm's model as `load` returns it, with random weights.

    Raises: TeacherError if no single build takes all of the sizes.
    """
    return _built(spec, _build_size(spec, sizes))


def tokens(model: Any, spec: TeacherSpec, pixels_BCHW: Tensor, layers: Sequence[int] = ()) -> Tokens:
    """Return the tokens of normalised pixels."""
    class_tokens = spec.summary_dim // spec.dense_dim
    return timm_tokens(
        model, pixels_BCHW, summary=spec.summary, dense=spec.dense, class_tokens=class_tokens, layers=layers
    )


def layers(spec: TeacherSpec, *, weights: Path | None = None) -> list[LayerShape]:
    """Return the shapes of the maps of a model's layers."""
    with built_on_meta():
        model = _built(spec, None)
    return timm_layers(model, spec.native_size)


def _build_size(spec: TeacherSpec, sizes: tuple[int, ...]) -> int | None:
    """Return the size to build for; None, for the architecture's own, if that build takes all of `sizes`.

    Raises: TeacherError if no single build takes them all.
    """
    if all(_takes(spec, None, size) for size in sizes):
        return None
    if len(sizes) == 1 and _takes(spec, sizes[0], sizes[0]):
        return sizes[0]
    raise TeacherError(
        f"{spec.name} cannot take inputs of {', '.join(map(str, sizes))} px; "
        f"use its native --size {spec.native_size}, or one size at a time"
    )


def _takes(spec: TeacherSpec, build_size: int | None, size: int) -> bool:
    """Return whether a build takes inputs of `size`; try it on the meta device."""
    if build_size is None and size == spec.native_size:
        return True
    return _tried(spec.model, spec, build_size, size)


@remembered
def _tried(arch: str, spec: TeacherSpec, build_size: int | None, size: int) -> bool:
    with torch.device("meta"), torch.no_grad():
        try:
            with built_on_meta():
                model = _built(spec, build_size).eval()
            tokens(model, spec, torch.zeros(1, 3, size, size))
        except Exception:  # libraries refuse in many ways
            return False
    return True


def _built(spec: TeacherSpec, size: int | None, folder: Path | None = None) -> Any:
    """Build the model without weights.

    Args:
        folder: folder with the config.json of a model on the hub; None if there is only what the model card says.
    """
    arch, options = card(spec) or (spec.model, {})
    if spec.hub_repository and folder is None and not options:
        with hub_errors(spec):
            folder = fetch(spec.hub_repository, weights=False)
    if folder is not None:
        arch = f"{LOCAL_DIR}{folder}"
    return create_timm(arch, size=size, num_classes=-1 if spec.summary == "projected" else 0, **options)


def _describe_repository(name: str, repository: str) -> TeacherSpec:
    """Return the spec of a repository on the hub; that of the table of teachers, if it is there."""
    for row in REGISTRY.values():
        if row.model == f"{HF_HUB}{repository.partition('@')[0]}":
            return dataclasses.replace(row, name=name, model=f"{HF_HUB}{repository}")
    try:
        folder = fetch(repository, weights=False)
    except TeacherError:
        raise
    except Exception as error:  # the hub's client fails in many ways
        raise TeacherError(
            f"the config.json of {repository} cannot be fetched from the hub ({brief(error)}); fetch the repository "
            "where there is a hub, and give timm:local-dir:DIR"
        ) from error
    spec = describe(f"timm:{LOCAL_DIR}{folder}")
    licence = hub_licence(*at_revision(repository)) if spec.licence == UNKNOWN else spec.licence
    return dataclasses.replace(spec, name=name, model=f"{HF_HUB}{repository}", licence=licence)


def _folder(spec: TeacherSpec, repository: str, weights: Path | None) -> Path | None:
    """Return the folder with a repository's config.json: beside the weights, or that of the hub's cache with its own.

    Returns: None if the weights are given without a config.json.
    Raises: TeacherError if the files cannot be fetched, or contradict the model card.
    """
    if weights is None:
        with hub_errors(spec):
            folder = fetch(repository, weights=True)
    else:
        folder = weights if weights.is_dir() else weights.parent
        if not timm_folder(folder):
            return None
    require_as_on_card(spec, folder, pixels=weights is None)
    return folder


def _without_classifier(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state without the tensors of a classifier that the encoder does not have."""
    names = model.pretrained_cfg.get("classifier") or ()
    names = (names,) if isinstance(names, str) else names
    dropped = {f"{name}.{part}" for name in names for part in ("weight", "bias")} - model.state_dict().keys()
    return {name: tensor for name, tensor in state.items() if name not in dropped}


def _in_timm_names(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert an original author's tensors to timm's names and the model's grid by timm's own code, if it can."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        converted: dict[str, Tensor] = state if convert is None else convert(state, model)
    except (KeyError, RuntimeError, ValueError, TypeError, IndexError):
        return state
    return converted


def _check_activation(arch: str, notes: Sequence[str]) -> None:
    """Raise TeacherError if timm notes that the weights need QuickGELU, and the architecture has GELU."""
    if "quickgelu" not in arch and any("QuickGELU" in note for note in notes):
        right = arch.replace("_clip_", "_clip_quickgelu_")
        raise TeacherError(f"the weights {arch} were trained with QuickGELU; use timm:{right}")
