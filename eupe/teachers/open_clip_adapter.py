"""Teachers from open_clip: the vision towers of CLIP-like models, which are its own ViTs or timm trunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from eupe.common.compute import Tokens
from eupe.common.kinds import LayerShape
from eupe.errors import ConfigError, TeacherError
from eupe.models.checkpoints import load_state_dict_strictly, read_checkpoint
from eupe.models.encoder_spec import near
from eupe.models.hub import quiet_open_clip
from eupe.models.meta import built_on_meta
from eupe.models.timm_models import create_timm, timm_layers, timm_spec, timm_tokens
from eupe.teachers.spec import TeacherSpec, encoder_fields
from eupe.teachers.weights import hub_errors


def describe(name: str) -> TeacherSpec:
    """Return the spec of `open_clip:ARCH[@TAG]`, from open_clip's own tables.

    Raises: TeacherError for an unknown architecture or tag, a tower without a grid of tokens, or weights that were
        trained with another activation than the architecture's.
    """
    model = name.removeprefix("open_clip:")
    arch, _, tag = model.partition("@")
    config, settings = _architecture(arch), _settings(arch, tag)
    vision = config["vision_cfg"]
    common: dict[str, Any] = {
        "name": name,
        "backend": "open_clip",
        "model": model,
        "native_size": vision["image_size"],
        "mean": tuple(settings["mean"]),
        "std": tuple(settings["std"]),
        "licence": "unknown",
        "note": "licence: see the weights' page",
    }
    if "timm_model_name" in vision:
        return _describe_trunk(name, vision, common)
    _check_native_tower(name, vision)
    return TeacherSpec(
        patch=vision["patch_size"],
        dense_dim=vision["width"],
        summary_dim=vision["width"],
        prefix_tokens=1,
        summary="cls",
        dense="normed",
        **common,
    )


def load(spec: TeacherSpec, *, weights: Path | None, key: str | None, sizes: tuple[int, ...]) -> Any:
    """Load open_clip's ViT, or the timm trunk of a tower that has one.

    The ViT keeps its projection only if the summary is projected. A weights file may hold the whole model (tensors of
    the vision tower under `visual.`) or the vision tower alone.
    """
    import open_clip

    arch, _, tag = spec.model.partition("@")
    vision = _architecture(arch)["vision_cfg"]
    _settings(arch, tag)
    if weights is None:
        if not open_clip.list_pretrained_tags_by_model(arch):
            raise TeacherError(f"open_clip publishes no weights of {arch}; give your own with --weights PATH")
        with hub_errors(spec), quiet_open_clip():
            visual = open_clip.create_model(arch, pretrained=tag or None, require_pretrained=True).visual
        if "timm_model_name" in vision:
            return _trunk(vision, _visual_state(visual.state_dict()), spec.model)
        return _prepared(visual, spec)
    if "timm_model_name" in vision:
        trunk = create_timm(vision["timm_model_name"], size=vision["image_size"])
        state = read_checkpoint(weights, key=key, fitting=trunk.state_dict())
        return _trunk(vision, _visual_state(state), str(weights))
    visual = _random(arch).visual
    state = read_checkpoint(weights, key=key, fitting=visual.state_dict())
    load_state_dict_strictly(visual, _visual_state(state), source=str(weights))
    return _prepared(visual, spec)


def build(spec: TeacherSpec, *, sizes: tuple[int, ...]) -> Any:
    """Build the vision tower, or its timm trunk, as `load` returns it, with random weights."""
    arch = spec.model.partition("@")[0]
    vision = _architecture(arch)["vision_cfg"]
    if "timm_model_name" in vision:
        return create_timm(vision["timm_model_name"], size=vision["image_size"])
    return _prepared(_random(arch).visual, spec)


def tokens(model: Any, spec: TeacherSpec, pixels_BCHW: Tensor, layers: Sequence[int] = ()) -> Tokens:
    """Return the tokens of normalised pixels.

    All tokens of open_clip's own ViT pass `ln_post`; its summary is projected if the spec says so. Off its own grid
    its position table is resampled, as open_clip does when it loads weights for another size.
    """
    if hasattr(model, "num_features"):
        return timm_tokens(model, pixels_BCHW, summary=spec.summary, dense=spec.dense, layers=layers)
    grid = (pixels_BCHW.shape[-2] // spec.patch, pixels_BCHW.shape[-1] // spec.patch)
    table = _resampled(model.positional_embedding, model.grid_size, grid)
    summary, dense = functional_call(model, {"positional_embedding": table}, (pixels_BCHW,))
    return Tokens(summary=summary, dense=dense.unflatten(1, grid))


def layers(spec: TeacherSpec, *, weights: Path | None = None) -> list[LayerShape]:
    """Return the shapes of the maps of a timm trunk's layers.

    Raises: ConfigError for open_clip's own towers.
    """
    vision = _architecture(spec.model.partition("@")[0])["vision_cfg"]
    if "timm_model_name" not in vision:
        raise ConfigError("open_clip's own towers give their last map only; timm has many of them, as timm:ARCH")
    with built_on_meta():
        model = create_timm(vision["timm_model_name"], size=vision["image_size"])
    return timm_layers(model, vision["image_size"])


def _random(arch: str) -> Any:
    """Return the whole model with random weights."""
    import open_clip

    with quiet_open_clip():
        return open_clip.create_model(arch, load_weights=False, pretrained_text=False)


def _prepared(visual: Any, spec: TeacherSpec) -> Any:
    """Make the ViT return patch tokens beside the summary, and drop its projection unless the summary is projected."""
    if spec.summary != "projected":
        visual.proj = None
    visual.output_tokens = True
    return visual


def _architecture(arch: str) -> dict[str, Any]:
    """Return open_clip's configuration of an architecture.

    Raises: TeacherError with similar names if there is none.
    """
    import open_clip

    config: dict[str, Any] | None = open_clip.get_model_config(arch) if arch in open_clip.list_models() else None
    if config is None:
        raise TeacherError(f"open_clip has no architecture {arch!r}{near(arch, open_clip.list_models())}")
    return config


def _settings(arch: str, tag: str) -> dict[str, Any]:
    """Return the settings of pretrained weights: mean, std, activation.

    Without a tag, they are those of the architecture's first published weights. An architecture without any gets
    open_clip's defaults, with which open_clip itself trains it.

    Raises: TeacherError for an unknown tag, or weights that were trained with the other kind of GELU.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg

    tags = open_clip.list_pretrained_tags_by_model(arch)
    if tag and tag not in tags:
        raise TeacherError(f"open_clip has no weights {tag!r} for {arch}; it has {', '.join(tags) or 'none'}")
    if not tags:
        return asdict(PreprocessCfg())
    settings: dict[str, Any] = open_clip.get_pretrained_cfg(arch, tag or tags[0])
    wants, has = settings.get("quick_gelu", False), _architecture(arch).get("quick_gelu") or False
    if tag and wants != has:
        right = f"{arch}-quickgelu" if wants else arch.removesuffix("-quickgelu")
        raise TeacherError(
            f"the weights {tag} were trained with {'QuickGELU' if wants else 'GELU'}, but {arch} has "
            f"{'QuickGELU' if has else 'GELU'}; use open_clip:{right}@{tag}"
        )
    return settings


def _describe_trunk(name: str, vision: dict[str, Any], common: dict[str, Any]) -> TeacherSpec:
    try:
        spec = timm_spec(vision["timm_model_name"], vision["image_size"])
    except ConfigError as error:
        raise TeacherError(f"teacher {name}: {error}") from error
    return TeacherSpec(
        **encoder_fields(spec),
        **common,
    )


def _check_native_tower(name: str, vision: dict[str, Any]) -> None:
    """Raise TeacherError for ResNets, and for pooling that leaves no normed patch tokens."""
    odd = [key for key in ("attentional_pool", "final_ln_after_pool") if vision.get(key)]
    if isinstance(vision["layers"], list) or odd or vision.get("pool_type", "tok") != "tok":
        raise TeacherError(
            f"the vision tower of {name} does not return both a class token and normalised patch tokens; supported are "
            f"open_clip's ViTs with a class token, and timm trunks"
        )


def _visual_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    visual = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    return visual or state


def _trunk(vision: dict[str, Any], state: dict[str, Tensor], source: str) -> Any:
    """Build the timm trunk and load its weights, without the projection behind it in open_clip's head or timm's."""
    trunk = create_timm(vision["timm_model_name"], size=vision["image_size"])
    own = trunk.state_dict().keys()
    projection = {"head.weight", "head.bias", "head.fc.weight", "head.fc.bias"} - own
    weights = {name.removeprefix("trunk."): t for name, t in state.items() if name.startswith("trunk.")}
    fitting = {name: t for name, t in (weights or state).items() if name not in projection}
    load_state_dict_strictly(trunk, fitting, source=source)
    return trunk


def _resampled(table_ND: Tensor, have: tuple[int, int], want: tuple[int, int]) -> Tensor:
    """Resample a position table, class token first, to another grid: bicubic, antialiased."""
    if have == want:
        return table_ND
    cells_1Dhw = table_ND[1:].T.reshape(1, -1, *have)
    resized_1Dhw = F.interpolate(cells_1Dhw, size=want, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table_ND[:1], resized_1Dhw[0].flatten(1).T])
