"""Teachers from the Hugging Face library, by model type."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eupe.common.compute import Tokens
from eupe.common.kinds import LOCAL_DIR, DenseKind, LayerShape, SummaryKind
from eupe.errors import ConfigError, TeacherError
from eupe.models.checkpoints import (
    ADAPTER_FILE,
    describe_misfits,
    read_checkpoint,
    require_no_adapter,
    require_readable,
)
from eupe.models.hub import at_revision, brief, hub_or_offline, quiet_transformers
from eupe.models.meta import built_on_meta
from eupe.teachers.preprocess import NESTED_FILE, UNIT, of_processor, processor_settings, timm_folder
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.weights import hub_errors

Triple = tuple[float, float, float]

IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

UNUSED_WEIGHTS = re.compile(
    r"text_model\.|text_projection|visual_projection|logit_scale|logit_bias|classifier\.|head\.(weight|bias)|pooler\."
    r"|.*position_ids$|.*mask_token$"
)
"""Tensors in checkpoints that the encoder does not use: text towers, projections, classifiers, poolers, mask tokens."""
UNNEEDED_WEIGHTS = re.compile(r".*mask_token$")
"""Weights of the library's encoder that a forward pass without masks never uses, so a checkpoint may lack them."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The differences between the library's model types."""

    model_class: str
    summary: SummaryKind
    dense: DenseKind
    normalisation: tuple[Triple, Triple]
    """Mean and std for a repository without an image processor."""
    prefix: Callable[[Any], int] = lambda config: 1
    patch: Callable[[Any], int] = lambda config: _side(config, "patch_size")
    width: Callable[[Any], int] = lambda config: int(config.hidden_size)
    size: Callable[[Any], int] = lambda config: _side(config, "image_size")
    final_norm: str = ""
    """Name of the norm that a layer's tokens go through; empty if the library's hidden states are no layers' maps."""
    inside: str = ""
    """Names of the tensors' place in the checkpoints of larger models, as a pattern; nothing else of these is used."""
    takes_other_sizes: bool = True
    """False if the model's positions are laid out for its own size, and nothing would say that they do not fit."""
    inputs: Callable[[Any, Tensor], dict[str, Tensor]] = lambda config, pixels_BCHW: {"pixel_values": pixels_BCHW}
    build: dict[str, Any] = field(default_factory=dict)
    """Extra arguments of the model's constructor."""
    run: dict[str, Any] = field(default_factory=dict)
    """Extra arguments of the forward pass."""
    note: str = ""
    """Differences from other libraries, or from this library's own outputs, on the same weights."""


_INTERPOLATE = {"interpolate_pos_encoding": True}


def _frames(config: Any, pixels_BCHW: Tensor) -> dict[str, Tensor]:
    """Return each picture as the shortest video that the model takes: one tubelet of equal frames."""
    return {"pixel_values_videos": pixels_BCHW.unsqueeze(1).repeat(1, config.tubelet_size, 1, 1, 1)}


FAMILIES: dict[str, Family] = {
    "dinov2": Family(
        model_class="Dinov2Model",
        summary="cls",
        dense="normed",
        normalisation=IMAGENET,
        final_norm="layernorm",
        note="off its own grid the position table is resampled without antialiasing, unlike timm's",
    ),
    "dinov2_with_registers": Family(
        model_class="Dinov2WithRegistersModel",
        summary="cls",
        dense="normed",
        normalisation=IMAGENET,
        final_norm="layernorm",
        prefix=lambda config: 1 + int(config.num_register_tokens),
    ),
    "dinov3_vit": Family(
        model_class="DINOv3ViTModel",
        summary="cls",
        dense="normed",
        normalisation=IMAGENET,
        final_norm="norm",
        prefix=lambda config: 1 + int(config.num_register_tokens),
    ),
    "dinov3_convnext": Family(
        model_class="DINOv3ConvNextModel",
        summary="pooled",
        dense="normed",
        normalisation=IMAGENET,
        patch=lambda config: 32,
        width=lambda config: int(config.hidden_sizes[-1]),
    ),
    "clip_vision_model": Family(
        model_class="CLIPVisionModel",
        summary="cls",
        dense="normed",
        normalisation=OPENAI,
        final_norm="post_layernorm",
        run=_INTERPOLATE,
        note="patch tokens pass post_layernorm, as in open_clip and timm; the library's last_hidden_state has not",
    ),
    "siglip_vision_model": Family(
        model_class="SiglipVisionModel",
        summary="attention_pool",
        dense="normed",
        normalisation=HALF,
        final_norm="post_layernorm",
        prefix=lambda config: 0,
        run=_INTERPOLATE,
    ),
    "radio": Family(
        model_class="RadioModel",
        summary="cls_concat",
        dense="raw",
        normalisation=UNIT,
        prefix=lambda config: int(config.num_summary_tokens),
        note="the model normalises inside: pixels in [0, 1] go in, whatever the repository's preprocessor says",
    ),
    "metaclip_2_vision_model": Family(
        model_class="MetaClip2VisionModel",
        summary="cls",
        dense="normed",
        normalisation=OPENAI,
        final_norm="post_layernorm",
        run=_INTERPOLATE,
        note="patch tokens pass post_layernorm, as in open_clip and timm; the library's last_hidden_state has not",
    ),
    "vjepa2": Family(
        model_class="VJEPA2Model",
        summary="mean",
        dense="normed",
        normalisation=IMAGENET,
        prefix=lambda config: 0,
        size=lambda config: _side(config, "crop_size"),
        takes_other_sizes=False,
        inputs=_frames,
        run={"skip_predictor": True},
        note="a picture is a video of one tubelet, whose frames are equal; the summary is the tokens' mean",
    ),
    "sam3_vit_model": Family(
        model_class="Sam3ViTModel",
        summary="none",
        dense="raw",
        normalisation=HALF,
        prefix=lambda config: 0,
        inside=r"(detector_model\.)?(vision_encoder\.)?backbone\.",
        takes_other_sizes=False,
        note="the tokens of SAM 3's encoder ahead of its neck",
    ),
    "vit": Family(
        model_class="ViTModel",
        summary="cls",
        dense="normed",
        normalisation=HALF,
        final_norm="layernorm",
        build={"add_pooling_layer": False},
        run=_INTERPOLATE,
    ),
}


def describe(name: str) -> TeacherSpec:
    """Return the spec of `hf:REPO[@REVISION]` or `hf:DIR`, from its config.json and image processor settings.

    Raises: TeacherError if the configuration cannot be loaded, or its model type is not supported.
    """
    model = name.removeprefix("hf:")
    if timm_folder(Path(model)):  # a TimmWrapperModel
        from eupe.teachers import timm_adapter  # only now: timm takes seconds to import

        return dataclasses.replace(timm_adapter.describe(f"timm:{LOCAL_DIR}{model}"), name=name)
    _require_no_adapter(model)
    config = _vision_config(model)
    family = FAMILIES[config.model_type]
    (mean, std), said = (UNIT, "") if config.model_type == "radio" else _normalisation(model, family)
    width, patch = family.width(config), family.patch(config)
    return TeacherSpec(
        name=name,
        backend="hf",
        model=model,
        patch=patch,
        dense_dim=width,
        summary_dim=_summary_dim(config, width),
        prefix_tokens=family.prefix(config),
        summary=family.summary,
        dense=family.dense,
        native_size=_native_size(model, config, patch),
        mean=mean,
        std=std,
        licence="unknown",
        note="; ".join(filter(None, (family.note, said, "licence: see the repository"))),
    )


def load(spec: TeacherSpec, *, weights: Path | None, key: str | None, sizes: tuple[int, ...]) -> Any:
    """Load the library's vision encoder with every weight from one source.

    A weights file needs its config.json beside it, or in the repository or directory that the spec names.

    Raises: TeacherError if the configuration describes another model than the spec, or a weight is missing, has
        another shape or is unexpected.
    """
    if weights is None:
        _require_no_adapter(spec.model)
        if spec.place.is_dir():
            require_readable(spec.place)
    source = _config_source(spec, weights)
    config = _vision_config(source, weights)
    _check_fits(spec, config, source)
    family = FAMILIES[config.model_type]
    _check_sizes(spec, config, sizes)
    model_class = _library_class(family.model_class)
    options = {
        "config": config,
        "dtype": torch.float32,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # mismatches then appear in the report, which is checked
        **family.build,
    }
    if family.inside:
        options["key_mapping"] = {f"^{family.inside}": ""}
    with quiet_transformers():
        if weights is None:
            with hub_errors(spec):
                name, revision = at_revision(spec.model)
                model, report = model_class.from_pretrained(name, revision=revision, **options)
        else:
            with built_on_meta():
                shapes = model_class(config, **family.build).state_dict()
            state = read_checkpoint(weights, key=key, fitting=shapes, whole=True)
            model, report = _from_state_dict(model_class, state, weights, options)
    _check_report(report, source=str(weights or spec.model), others_may_be=bool(family.inside))
    return model


def require_config(spec: TeacherSpec, weights: Path) -> None:
    """Raise TeacherError unless a configuration is beside the weights or where the spec says."""
    if (source := _config_source(spec, weights)) == spec.model:
        _vision_config(source, weights)


def build(spec: TeacherSpec, *, sizes: tuple[int, ...]) -> Any:
    """Build the library's vision encoder with random weights.

    A registry row takes its dimensions from timm's model of the same weights, so no configuration is fetched.

    Raises: TeacherError if the configuration of an `hf:` name cannot be loaded.
    """
    if not spec.name.startswith("hf:"):
        from eupe.teachers.own_forward import own_model

        return own_model(spec).module
    config = _vision_config(spec.model)
    family = FAMILIES[config.model_type]
    _check_sizes(spec, config, sizes)
    return _library_class(family.model_class)(config, **family.build)


def tokens(model: Any, spec: TeacherSpec, pixels_BCHW: Tensor, layers: Sequence[int] = ()) -> Tokens:
    """Return the tokens of normalised pixels.

    CLIP's dense tokens go through `post_layernorm`, which the library applies to the class token only. They then equal
    those of open_clip and timm.
    """
    family = FAMILIES[model.config.model_type]
    run = {**family.run, "output_hidden_states": True} if layers else family.run
    output = model(**family.inputs(model.config, pixels_BCHW), **run)
    grid = (pixels_BCHW.shape[-2] // spec.patch, pixels_BCHW.shape[-1] // spec.patch)
    # the first hidden state is the embedding, so layer 1 is the one after it
    states = {number: getattr(model, family.final_norm)(output.hidden_states[number]) for number in layers}
    maps = {number: state[:, spec.prefix_tokens :].unflatten(1, grid) for number, state in states.items()}
    if model.config.model_type == "radio":
        return Tokens(summary=output.summary, dense=output.features.unflatten(1, grid))
    hidden = output.last_hidden_state
    if model.config.model_type in ("clip_vision_model", "metaclip_2_vision_model"):
        hidden = model.post_layernorm(hidden)
    dense = hidden[:, spec.prefix_tokens :]
    if spec.summary == "none":
        return Tokens(summary=None, dense=dense.unflatten(1, grid))
    pooled = {"attention_pool": lambda: output.pooler_output, "mean": lambda: dense.mean(1)}
    summary = pooled.get(spec.summary, lambda: hidden[:, 0])()
    return Tokens(summary=summary, dense=dense.unflatten(1, grid), layers=maps)


def layers(spec: TeacherSpec, *, weights: Path | None = None) -> list[LayerShape]:
    """Return the shapes of the maps of a model's layers, from its configuration.

    That of a registry row is known without fetching it, see `build`.

    Raises: ConfigError for a model whose hidden states are not those of a plain ViT.
    """
    if weights is None and not spec.name.startswith("hf:"):
        with built_on_meta():
            config = build(spec, sizes=(spec.native_size,)).config
    else:
        config = _vision_config(_config_source(spec, weights), weights)
    if not FAMILIES[config.model_type].final_norm:
        raise ConfigError(f"a {config.model_type} gives its last map only")
    return [LayerShape(spec.dense_dim, spec.patch)] * int(config.num_hidden_layers)


def _vision_config(source: str, weights: Path | None = None) -> Any:
    """Return the configuration of the vision tower of a repository or directory.

    Args:
        weights: a weights file without a config.json beside it, named in the error message.
    Raises: TeacherError if the configuration cannot be loaded, or its model type, NaFlex grid or number of channels is
        not supported.
    """
    from transformers import AutoConfig

    try:
        with quiet_transformers(), hub_or_offline(source):
            name, revision = at_revision(source)
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:
        lone = f"{weights} has no config.json next to it, and " if weights is not None else ""
        raise TeacherError(
            f"{lone}the configuration of {source} cannot be fetched from the hub ({brief(error)}); "
            f"give a directory that holds config.json and model.safetensors, as --weights DIR or hf:DIR"
        ) from error
    if config.model_type.startswith("siglip2"):
        raise TeacherError(
            f"{source} is a NaFlex SigLIP2, whose grid varies with the picture; "
            f"use a fixed-resolution one (for example siglip2-b-256)"
        )
    parts = (
        ("detector_config", "vision_config", "backbone_config") if "sam3" in config.model_type else ("vision_config",)
    )
    for part in parts:
        config = getattr(config, part, config)
    if config.model_type not in FAMILIES:
        raise TeacherError(
            f"{source} has model type {config.model_type!r}; supported are {', '.join(sorted(FAMILIES))}"
        )
    if (channels := getattr(config, "num_channels", 3)) != 3:
        raise TeacherError(f"{source} takes pictures with {channels} channels, but eupe's views have 3 (RGB)")
    return config


def _require_no_adapter(source: str) -> None:
    """Raise TeacherError as `require_no_adapter` does, also for a repository on the hub."""
    from transformers.utils import cached_file

    name, revision = at_revision(source)
    with hub_or_offline(source):
        file = cached_file(
            name,
            ADAPTER_FILE,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    if file is not None:
        require_no_adapter(Path(file).parent)


def _library_class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _config_source(spec: TeacherSpec, weights: Path | None) -> str:
    """Return where the configuration is: beside the weights if it is there, otherwise where the spec says."""
    if weights is not None:
        directory = weights if weights.is_dir() else weights.parent
        if (directory / "config.json").exists():
            return str(directory)
    return spec.model


def _check_fits(spec: TeacherSpec, config: Any, source: str) -> None:
    """Raise TeacherError if the configuration contradicts the spec."""
    family = FAMILIES[config.model_type]
    width = family.width(config)
    have = {
        "patch": family.patch(config),
        "dense_dim": width,
        "summary_dim": _summary_dim(config, width),
        "prefix_tokens": family.prefix(config),
        "summary": family.summary,
        "dense": family.dense,
    }
    wrong = [
        f"{name} {value} instead of {getattr(spec, name)}"
        for name, value in have.items()
        if value != getattr(spec, name)
    ]
    if wrong:
        raise TeacherError(f"{source} holds a different model than {spec.name}: {', '.join(wrong)}")


def _check_sizes(spec: TeacherSpec, config: Any, sizes: tuple[int, ...]) -> None:
    """Raise TeacherError for a size other than the model's own, if it takes no other."""
    family = FAMILIES[config.model_type]
    own = family.size(config)
    if not family.takes_other_sizes and any(size != own for size in sizes):
        raise TeacherError(
            f"{spec.name} cannot take inputs of {', '.join(map(str, sizes))} px, because its positions are laid out "
            f"for {own} px; use --size {own}"
        )


def _from_state_dict(
    model_class: Any, state: dict[str, Tensor], weights: Path, options: dict[str, Any]
) -> tuple[Any, Any]:
    """Load tensors that are already in memory through the library's own loader, which also renames old names."""
    try:
        model, report = model_class.from_pretrained(None, state_dict=state, **options)
    except (RuntimeError, ValueError) as error:
        raise TeacherError(f"the weights in {weights} do not fit the model ({brief(error)})") from error
    return model, report


def _check_report(report: Any, *, source: str, others_may_be: bool) -> None:
    """Raise TeacherError if the library filled in, resized or ignored a weight that matters.

    Args:
        others_may_be: whether the encoder is a part of a larger model, whose other weights do not matter.
    """
    misfits = {
        "missing": sorted(name for name in report["missing_keys"] if not UNNEEDED_WEIGHTS.fullmatch(name)),
        "unexpected": sorted(
            name for name in report["unexpected_keys"] if not (others_may_be or UNUSED_WEIGHTS.match(name))
        ),
        "wrong shape": [f"{name} {tuple(have)} for {tuple(want)}" for name, have, want in report["mismatched_keys"]],
        "unreadable": list(report["error_msgs"]),
    }
    if any(misfits.values()):
        raise TeacherError(f"the weights in {source} do not fit the model: {describe_misfits(misfits)}")


def _summary_dim(config: Any, width: int) -> int:
    if FAMILIES[config.model_type].summary == "none":
        return 0
    return width * len(config.summary_idxs) if config.model_type == "radio" else width


def _normalisation(model: str, family: Family) -> tuple[tuple[Triple, Triple], str]:
    """Return mean and std, and a note if they come from the file that older versions of eupe did not read."""
    found = of_processor(model)
    if found is None:
        return family.normalisation, ""
    return (found.mean, found.std), f"mean and std are those of {NESTED_FILE}" if found.file == NESTED_FILE else ""


def _native_size(model: str, config: Any, patch: int) -> int:
    """Return the side that the repository's preprocessor produces if the patch divides it, else the model's own.

    It is the model's own, too, if it takes no other size.
    """
    if not FAMILIES[config.model_type].takes_other_sizes:
        return FAMILIES[config.model_type].size(config)
    settings, _ = processor_settings(model)
    size = (settings or {}).get("crop_size") or (settings or {}).get("size") or {}
    side = size.get("height") if isinstance(size, dict) else size[0] if isinstance(size, list) else size
    if isinstance(side, int) and side > 0 and side % patch == 0:
        return side
    return max(FAMILIES[config.model_type].size(config) // patch, 1) * patch


def _side(config: Any, name: str) -> int:
    """Return one side of a configuration value that is a number, or two equal ones.

    Raises: TeacherError if it is anything else.
    """
    value = getattr(config, name)
    sides = {*value} if isinstance(value, list | tuple) else {value}
    (side,) = sides if len(sides) == 1 else (None,)
    if not isinstance(side, int) or side < 1:
        raise TeacherError(f"the configuration has {name} {value!r}; expected a number, or two equal ones")
    return side
