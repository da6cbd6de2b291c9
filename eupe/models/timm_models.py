"""Any timm model as an encoder: a picture in, a summary vector and a grid of dense tokens out.

Most students are timm's, and so is every teacher that timm provides. Shapes: B batch, C channels, H W pixels, N tokens,
h w cells of the dense grid, D width of a dense token, Ds width of the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import timm
import torch
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor, nn

import eupe.models.proxy  # noqa: F401 - registers its architectures with timm
from eupe.common.compute import Tokens
from eupe.common.kinds import LOCAL_DIR, DenseKind, LayerShape, SummaryKind
from eupe.errors import ConfigError
from eupe.models.encoder_spec import EncoderSpec, near
from eupe.models.meta import built_on_meta

WITHOUT_A_MAP = (
    *("CoaT", "CrossVit", "EfficientFormer", "EfficientViM", "Hiera", "Levit", "LevitDistilled", "MlpMixer"),
    *("PoolingVisionTransformer", "Twins", "VOLO"),
)
"""Classes whose features are neither a map nor tokens after a known prefix: their last stage's map is taken."""

Question = TypeVar("Question", bound=Callable[..., Any])


def remembered(answer: Question) -> Question:
    """Cache the answer for each architecture, the first argument; directories are not cached, as they may change."""
    known = cache(answer)

    @wraps(answer)
    def asked(arch: str, *others: Hashable) -> Any:
        return answer(arch, *others) if arch.startswith(LOCAL_DIR) else known(arch, *others)

    return cast(Question, asked)


def timm_tokens(
    model: Any,
    pixels_BCHW: Tensor,
    *,
    summary: SummaryKind,
    dense: DenseKind,
    class_tokens: int = 1,
    layers: Sequence[int] = (),
) -> Tokens:
    """Return summary and dense tokens of any timm model, through `forward_features`, never `forward`.

    Args:
        model: a timm model: a ViT (features [B, prefix + N, D]) or a CNN (a map, channels first or last).
        pixels_BCHW: normalised float pixels, on the model's device.
        summary: "attention_pool" and "pooled" use the library's `forward_head(..., pre_logits=True)`; "projected" uses
            `forward_head(...)` of a model that was built with its projection as the classifier.
        dense: "normed" includes ConvNeXt's norm, which timm keeps in the head, behind the pooling.
        class_tokens: number of leading prefix tokens that "cls_concat" concatenates.
        layers: numbers of the layers whose maps are wanted as well; see `timm_layers`.
    Returns: Tokens in the dtype that the model computes in.
    Raises: ConfigError if the model lacks the requested kind, or its features are neither tokens nor a map.
    """
    features, last_stage, maps = _features(model, pixels_BCHW, dense, layers)
    _check_summary(model, features, summary)
    if last_stage is None and features.ndim == 3:
        prefix = model.num_prefix_tokens
        grid = _token_grid(model, pixels_BCHW, features.shape[1] - prefix)
        dense_BhwD = features[:, prefix:].reshape(features.shape[0], *grid, -1)  # tracers make len() a constant
    else:
        dense_BhwD = _map_to_BhwD(model, features, dense) if last_stage is None else last_stage.permute(0, 2, 3, 1)
    return Tokens(
        summary=_summary(model, features, dense_BhwD, summary, class_tokens),
        dense=dense_BhwD,
        layers={number: maps[number].permute(0, 2, 3, 1) for number in layers},
    )


def timm_layers(model: Any, size: int) -> list[LayerShape]:
    """Return the shapes of the maps that a timm model's layers give, first to last.

    A layer is a block of a ViT, whose tokens go through the model's final norm as those of the last one do, or a stage
    of any other model, as timm's `features_only` gives it.

    Args:
        model: a model that was built for the size on the meta device.
        size: side of the square input in pixels.
    Raises: ConfigError for a model that does not give its layers, or whose layers do not tile the input.
    """
    name = type(model).__name__
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"timm's {name} gives its last map only, no layers")
    with torch.device("meta"), torch.no_grad():
        maps = _intermediates(model.eval(), torch.zeros(1, 3, size, size), indices=None)[1]
    sides = [tuple(each.shape[-2:]) for each in maps]
    if any(h != w or size % h for h, w in sides):
        raise ConfigError(f"the layers of timm's {name} give maps of {sides} cells, which do not tile {size} px")
    return [LayerShape(each.shape[1], size // each.shape[-1]) for each in maps]


@remembered
def timm_spec(arch: str, size: int | None) -> EncoderSpec:
    """Return the spec of a timm architecture as an encoder, from a build on the meta device: no weights, no memory.

    Args:
        arch: architecture with or without a pretrained tag; the tag (or the default one) decides mean and std.
        size: side of the square input; None for the architecture's own.
    Raises: ConfigError for an unknown architecture (suggests similar names), a size that it does not take (suggests
        sizes that it does), or a model whose features are neither tokens nor a map.
    """
    native = timm_on_paper(arch)
    config = native.pretrained_cfg
    own, patch = config["input_size"][-1], _patch(native, arch)
    size = size or own
    try:
        model, tokens = _tried(arch, size, patch)
    except _SizeError as refusal:
        raise ConfigError(
            f"size {size} does not work for {arch}: {refusal}; {_other_sizes(arch, size, own, patch)}"
        ) from refusal
    assert tokens.summary is not None
    return EncoderSpec(
        arch=arch,
        size=size,
        patch=patch,
        dense_dim=tokens.dense.shape[-1],
        summary_dim=tokens.summary.shape[-1],
        prefix_tokens=getattr(model, "num_prefix_tokens", 0),
        summary=summary_kind(model),
        dense=dense_kind(model),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def timm_on_paper(arch: str) -> Any:
    """Build a timm architecture at its own size, without weights or memory."""
    with built_on_meta():
        return create_timm(arch)


def has_rope(model: nn.Module) -> bool:
    """Return whether a model has a rotary position embedding that `rescale_rope` supports."""
    return isinstance(getattr(model, "rope", None), RotaryEmbeddingDinoV3)


def rescale_rope(model: Any, factor: float) -> None:
    """Scale the coordinates of a model's rotary position embedding by a random factor during training.

    Models without such an embedding do not change, and evaluation does not either.

    Args:
        factor: R at least 1; each forward pass draws one factor for both axes, log-uniform from 1/R to R.
    Source: `rope_rescale_coords` of DINOv3's and EUPE's released backbones, as in timm's `RotaryEmbeddingDinoV3`.
    """
    if has_rope(model):
        model.rope.rescale_coords, model.rope.aug_active = factor, True


class _SizeError(Exception):
    """The reason why an architecture does not take a size."""


def _tried(arch: str, size: int, patch: int) -> tuple[Any, Tokens]:
    """Return a model built for a size, and its tokens for one picture, both on the meta device.

    Raises: _SizeError if the model does not take the size; ConfigError if no size would make it usable.
    """
    if size < patch or size % patch:
        raise _SizeError(f"its patch is {patch} pixels and must divide the size")
    try:
        with built_on_meta():
            model = create_timm(arch, size=size).eval()
        with torch.device("meta"), torch.no_grad():
            pixels = torch.zeros(1, 3, size, size)
            tokens = timm_tokens(model, pixels, summary=summary_kind(model), dense=dense_kind(model))
    except ConfigError:
        raise
    except Exception as error:  # libraries refuse in many ways
        raise _SizeError(f"timm's model does not take it ({brief(error)})") from error
    got, want = tuple(tokens.dense.shape[1:3]), size // patch
    if got != (want, want):
        raise _SizeError(f"it gives a {got[0]}x{got[1]} map, not the {want}x{want} that its stride of {patch} implies")
    return model, tokens


def _other_sizes(arch: str, size: int, own: int, patch: int) -> str:
    """Suggest the sizes next to one that does not work, or else the architecture's own; each is tried first.

    Raises: ConfigError for a model that no size would make usable.
    """
    takes_own = _takes(arch, own, patch)
    below = max(size // patch, 1) * patch
    near_ones = [each for each in (below, below + patch) if each != size and _takes(arch, each, patch)]
    if near_ones:
        return f"use {' or '.join(map(str, near_ones))}"
    return (
        f"use its own size, {own}"
        if takes_own
        else "the nearest sizes and its own do not work either; use another architecture"
    )


def _takes(arch: str, size: int, patch: int) -> bool:
    try:
        _tried(arch, size, patch)
    except _SizeError:
        return False
    return True


def brief(error: Exception) -> str:
    """Return a library's error, shortened to a part of a line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:100]}{'...' if len(words) > 100 else ''}"


def create_timm(
    arch: str, *, size: int | None = None, num_classes: int = 0, pretrained: bool = False, **options: Any
) -> Any:
    """Create a timm model, by default without classifier, that takes other sizes than its own if its class can.

    Args:
        size: side for which position tables are laid out; None for the architecture's own.
        num_classes: -1 for the number of classes that the pretrained weights have.
        options: further arguments of the architecture.
    Raises: ConfigError for an unknown architecture or tag, and a directory that timm cannot read.
    """
    config = timm_config(arch)
    if num_classes >= 0:
        options["num_classes"] = num_classes
    if size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = size
    try:
        return timm.create_model(arch, pretrained=pretrained, dynamic_img_size=True, **options)
    except TypeError as error:
        if "dynamic_img_size" not in str(error):  # only some of timm's classes have this argument
            raise
    return timm.create_model(arch, pretrained=pretrained, **options)


def timm_config(arch: str) -> Any:
    """Return timm's configuration of an architecture's weights, or of a directory in its layout; None if it has none.

    Raises: ConfigError for an unknown architecture or tag, and a directory that timm cannot read.
    """
    if arch.startswith(LOCAL_DIR):
        return _config_of_directory(Path(arch.removeprefix(LOCAL_DIR)))
    if not timm.is_model(arch):
        raise ConfigError(f"timm has no architecture {arch!r}{near(arch.split('.')[0], timm.list_models())}")
    try:
        return timm.get_pretrained_cfg(arch)
    except RuntimeError:
        base = arch.split(".")[0]
        raise ConfigError(f"timm has no weights {arch!r}{near(arch, timm.list_pretrained(base + '*'))}") from None


def _config_of_directory(folder: Path) -> Any:
    from timm.models._builder import resolve_pretrained_cfg
    from timm.models._hub import load_model_config_from_path

    if not (folder / "config.json").is_file():
        what = "has no config.json, so it is not in timm's layout" if folder.is_dir() else "does not exist"
        raise ConfigError(f"{folder} {what}; give a folder made by timm's save_for_hf or `eupe export --format timm`")
    try:
        own, arch, _ = load_model_config_from_path(folder)
        config = resolve_pretrained_cfg(arch, own)
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{folder / 'config.json'} cannot be read by timm ({words[:200]})") from error
    if not timm.is_model(arch):
        raise ConfigError(
            f"{folder / 'config.json'}: timm has no architecture {arch!r}{near(arch, timm.list_models())}"
        )
    return config


def summary_kind(model: Any) -> SummaryKind:
    """Return the kind of summary that a timm model was built to give."""
    if getattr(model, "attn_pool", None) is not None:
        return "attention_pool"
    if not hasattr(model, "num_prefix_tokens") or _is_norm(getattr(model, "fc_norm", None)):
        return "pooled"
    return "cls" if _has_class_token(model) else "mean"


def dense_kind(model: Any) -> DenseKind:
    """Return the kind of dense tokens that a timm model can give.

    Features wider than the last stage come from a convolution that serves the classifier (EfficientNet);
    narrower ones come from a neck (SAM), which is the model's actual output.
    """
    if type(model).__name__ in WITHOUT_A_MAP:
        return "last_stage"
    tower = getattr(model, "encoder", model)  # timm wraps a language model's tower; the wrapper's norm follows pooling
    if tower is not model or hasattr(model, "num_prefix_tokens"):
        return "normed" if _is_norm(getattr(tower, "norm", None)) else "raw"
    if _head_norm(model) is not None or _has_final_norm(model):
        return "normed"
    return "last_stage" if model.num_features > model.feature_info[-1]["num_chs"] else "raw"


def _features(
    model: Any, pixels_BCHW: Tensor, dense: DenseKind, layers: Sequence[int]
) -> tuple[Any, Tensor | None, dict[int, Tensor]]:
    """Return the library's features, the last stage's map if that is the requested dense kind, and maps of layers.

    With such a map, the features may be anything that the library's head takes. Maps are [B, D, h, w].
    """
    has_tokens = hasattr(model, "num_prefix_tokens")
    numbers, maps = sorted(set(layers)), {}
    if dense == "last_stage" and not has_tokens:
        last = len(model.feature_info)
        numbers = sorted({*numbers, last})
        indices = [number - 1 for number in numbers] if layers else 1
        features, found = _intermediates(model, pixels_BCHW, indices=indices)
        return features, found[-1], dict(zip(numbers, found, strict=True))
    if layers:
        features, found = _intermediates(model, pixels_BCHW, indices=[number - 1 for number in numbers])
        maps = dict(zip(numbers, found, strict=True))
    else:
        features = model.forward_features(pixels_BCHW)
    is_tokens = isinstance(features, Tensor) and features.ndim == 3 and has_tokens
    is_map = isinstance(features, Tensor) and features.ndim == 4
    if not is_tokens and not is_map:
        raise ConfigError(f"{type(model).__name__} gives neither patch tokens with a known prefix nor a feature map")
    if is_tokens and dense != dense_kind(model):
        raise ConfigError(f"{type(model).__name__} has no {dense!r} dense tokens, only {dense_kind(model)!r}")
    return features, None, maps


def _intermediates(model: Any, pixels_BCHW: Tensor, *, indices: Any) -> tuple[Any, list[Tensor]]:
    """Return a model's features and the maps [B, D, h, w] of its layers by timm's own method.

    Args:
        indices: places of the layers, from 0; a number for that many last ones, None for all.
    """
    normed = hasattr(model, "num_prefix_tokens")  # a ViT's final norm fits all of its blocks
    found: tuple[Any, list[Tensor]] = model.forward_intermediates(pixels_BCHW, indices=indices, norm=normed)
    return found


def _map_to_BhwD(model: Any, feature_map: Tensor, dense: DenseKind) -> Tensor:
    """Return a CNN's map, channels last, with its head's norm applied if the dense kind is "normed"."""
    head_norm = _head_norm(model)
    if dense == "normed":
        if head_norm is None and not _has_final_norm(model):
            raise ConfigError(f"{type(model).__name__} has no final norm for 'normed' dense tokens")
        feature_map = feature_map if head_norm is None else head_norm(feature_map)
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return feature_map if channels_last else feature_map.permute(0, 2, 3, 1)


def _check_summary(model: Any, features: Any, summary: SummaryKind) -> None:
    """Raise ConfigError if the model has no such summary."""
    if summary == "attention_pool" and getattr(model, "attn_pool", None) is None:
        raise ConfigError(f"{type(model).__name__} has no attention pool for its summary")
    if summary == "projected" and isinstance(getattr(model, "head", None), nn.Identity | None):
        raise ConfigError(f"{type(model).__name__} was built without a projection for its summary")
    if summary in ("cls", "cls_concat", "cls_mean") and (features.ndim != 3 or not _has_class_token(model)):
        raise ConfigError(f"{type(model).__name__} has no class token for its summary")


def _summary(model: Any, features: Any, dense_BhwD: Tensor, summary: SummaryKind, class_tokens: int) -> Tensor | None:
    match summary:
        case "cls":
            return features[:, 0]  # type: ignore[no-any-return]
        case "cls_concat":
            return features[:, :class_tokens].flatten(1)  # type: ignore[no-any-return]
        case "cls_mean":
            return torch.cat([features[:, 0], dense_BhwD.mean(dim=(1, 2))], dim=-1)
        case "attention_pool" | "pooled":
            pooled: Tensor = model.forward_head(features, pre_logits=True)
            return pooled
        case "projected":
            projected: Tensor = model.forward_head(features)
            return projected
        case "mean":
            return dense_BhwD.mean(dim=(1, 2))
        case "none" | "own":
            return None


def _token_grid(model: Any, pixels_BCHW: Tensor, num_tokens: int) -> tuple[int, int]:
    patch = model.feature_info[-1]["reduction"]
    grid = (pixels_BCHW.shape[-2] // patch, pixels_BCHW.shape[-1] // patch)
    if grid[0] * grid[1] != num_tokens:
        raise ConfigError(f"{type(model).__name__} gives {num_tokens} tokens, not a grid of {grid[0]}x{grid[1]}")
    return grid


def _has_class_token(model: Any) -> bool:
    """Return whether the first prefix token is a class token, which timm's models tell in one of two ways."""
    if hasattr(model, "has_class_token"):
        return bool(model.has_class_token)
    return getattr(model, "cls_token", None) is not None


def _head_norm(model: Any) -> nn.Module | None:
    """Return the norm that a ConvNeXt-like head applies right after pooling; None if it lies behind a wider layer."""
    norm = getattr(getattr(model, "head", None), "norm", None)
    if not isinstance(norm, nn.Module) or not _is_norm(norm):
        return None
    return norm if {parameter.shape[0] for parameter in norm.parameters()} <= {model.num_features} else None


def _has_final_norm(model: Any) -> bool:
    """Return whether a CNN's features end in a norm (Swin, ConvNeXt with its norm before the pooling)."""
    return _is_norm(getattr(model, "norm", None)) or _is_norm(getattr(model, "norm_pre", None))


def _is_norm(module: object) -> bool:
    return isinstance(module, nn.Module) and not isinstance(module, nn.Identity)


def _patch(model: Any, arch: str) -> int:
    """Return the pixels per dense cell, from the model's own table of stages."""
    if not getattr(model, "feature_info", None):
        raise ConfigError(
            f"{arch} has no table of stages, so it has neither patch tokens nor a feature map to learn from"
        )
    return int(model.feature_info[-1]["reduction"])
