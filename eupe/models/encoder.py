"""Any timm model as an encoder: a picture in, a summary vector and a grid of dense tokens out.

The student is one of these, and so is every teacher that timm provides. Shapes: B batch, C channels, H W pixels,
N tokens, h w cells of the dense grid, D width of a dense token, Ds width of the summary.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor, nn

import eupe.models.proxy  # noqa: F401 - registers its architectures with timm
from eupe.common.compute import Tokens
from eupe.common.files import replacing, share, write_file
from eupe.common.kinds import LOCAL_DIR, STUDENT_FILE, WEIGHTS_FILE, DenseKind, SummaryKind
from eupe.common.reading import from_plain, read_json, to_plain
from eupe.errors import ConfigError, RunError, StorageError, TeacherError
from eupe.models.checkpoints import load_state_dict_strictly
from eupe.models.meta import built_on_meta

Question = TypeVar("Question", bound=Callable[..., Any])


def remembered(answer: Question) -> Question:
    """Cache the answer for each architecture, the first argument; directories are not cached, as they may change."""
    known = cache(answer)

    @wraps(answer)
    def asked(arch: str, *others: Hashable) -> Any:
        return answer(arch, *others) if arch.startswith(LOCAL_DIR) else known(arch, *others)

    return cast(Question, asked)


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """The data that is needed to build an encoder again, and to know its outputs without building it."""

    arch: str
    """timm architecture, with or without a pretrained tag."""
    size: int
    """Side in pixels of the square input that its position table is laid out for."""
    patch: int
    """Pixels of input per dense cell, along either side."""
    dense_dim: int
    summary_dim: int
    prefix_tokens: int
    """Number of class and register tokens ahead of the patch tokens."""
    summary: SummaryKind
    dense: DenseKind
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Per-channel normalisation of RGB in [0, 1]."""

    def to_json(self) -> dict[str, Any]:
        """Return the spec as plain JSON, with tuples as lists."""
        return to_plain(self)

    @classmethod
    def from_json(cls, spec: Any) -> EncoderSpec:
        """Build a spec from the JSON of `to_json`.

        Raises: ConfigError that names the fields that are missing, unknown, or hold an unknown word or a value of the
            wrong kind.
        """
        if not isinstance(spec, Mapping):
            raise ConfigError(f"an encoder spec must be an object, not {type(spec).__name__}")
        names = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(names ^ set(spec)):
            raise ConfigError(f"an encoder spec has missing or unknown fields: {', '.join(wrong)}")
        if spec["summary"] not in get_args(SummaryKind) or spec["dense"] not in get_args(DenseKind):
            raise ConfigError(f"an encoder spec has unknown kinds: {spec['summary']!r}, {spec['dense']!r}")
        values = from_plain(spec)
        if wrong := [name for name, value in values.items() if not _is_of_its_kind(name, value)]:
            raise ConfigError(
                f"an encoder spec has invalid fields: {', '.join(f'{name} {spec[name]!r}' for name in wrong)}"
            )
        return cls(**values)


def _is_of_its_kind(name: str, value: Any) -> bool:
    """Return whether a spec's field may have this value; any string passes for a word."""
    if name in ("size", "patch", "dense_dim", "summary_dim", "prefix_tokens"):
        return type(value) is int and value >= (0 if name in ("summary_dim", "prefix_tokens") else 1)
    if name in ("mean", "std"):
        return isinstance(value, tuple) and len(value) == 3 and all(type(v) in (int, float) for v in value)
    return isinstance(value, str)


def timm_tokens(
    model: Any, pixels_BCHW: Tensor, *, summary: SummaryKind, dense: DenseKind, class_tokens: int = 1
) -> Tokens:
    """Return summary and dense tokens of any timm model, through `forward_features`, never `forward`.

    Args:
        model: a timm model: a ViT (features [B, prefix + N, D]) or a CNN (a map, channels first or last).
        pixels_BCHW: normalised float pixels, on the model's device.
        summary: "attention_pool" and "pooled" use the library's `forward_head(..., pre_logits=True)`; "projected" uses
            `forward_head(...)` of a model that was built with its projection as the classifier.
        dense: "normed" includes ConvNeXt's norm, which timm keeps in the head, behind the pooling.
        class_tokens: number of leading prefix tokens that "cls_concat" concatenates.
    Returns: Tokens in the dtype that the model computes in.
    Raises: ConfigError if the model lacks the requested kind, or its features are neither tokens nor a map.
    """
    features, last_stage = _features(model, pixels_BCHW, dense)
    _check_summary(model, features, summary)
    if features.ndim == 3:
        prefix = model.num_prefix_tokens
        grid = _token_grid(model, pixels_BCHW, features.shape[1] - prefix)
        dense_BhwD = features[:, prefix:].reshape(features.shape[0], *grid, -1)  # tracers make len() a constant
    else:
        dense_BhwD = _map_to_BhwD(model, features if last_stage is None else last_stage, dense)
    return Tokens(summary=_summary(model, features, dense_BhwD, summary, class_tokens), dense=dense_BhwD)


@remembered
def timm_spec(arch: str, size: int | None) -> EncoderSpec:
    """Return the spec of a timm architecture as an encoder, from a build on the meta device: no weights, no memory.

    Args:
        arch: architecture with or without a pretrained tag; the tag (or the default one) decides mean and std.
        size: side of the square input; None for the architecture's own.
    Raises: ConfigError for an unknown architecture (suggests similar names), a size that it does not take (suggests
        sizes that it does), or a model whose features are neither tokens nor a map.
    """
    native = on_paper(arch)
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
        return f"{arch} built for {first} px does not also take {size} px ({_brief(error)}); give one --size"
    return f"{arch} cannot be trained at {size} px ({_brief(error)}); give another --student"


def on_paper(arch: str) -> Any:
    """Build a timm architecture at its own size, without weights or memory."""
    with built_on_meta():
        return create_timm(arch)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model's output for a view depends, in training, on the other views of the batch."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())


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
        raise _SizeError(f"timm's model does not take it ({_brief(error)})") from error
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


def _brief(error: Exception) -> str:
    """Return a library's error, shortened to a part of a line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:100]}{'...' if len(words) > 100 else ''}"


def create_timm(arch: str, *, size: int | None = None, num_classes: int = 0, pretrained: bool = False) -> Any:
    """Create a timm model, by default without classifier, that takes other sizes than its own if its class can.

    Args:
        size: side for which position tables are laid out; None for the architecture's own.
        num_classes: -1 for the number of classes that the pretrained weights have.
    Raises: ConfigError for an unknown architecture or tag, and a directory that timm cannot read.
    """
    config = timm_config(arch)
    options: dict[str, Any] = {} if num_classes < 0 else {"num_classes": num_classes}
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
    if hasattr(model, "num_prefix_tokens"):
        return "normed" if _is_norm(getattr(model, "norm", None)) else "raw"
    if _head_norm(model) is not None or _has_final_norm(model):
        return "normed"
    return "last_stage" if model.num_features > model.feature_info[-1]["num_chs"] else "raw"


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


def load_encoder_spec(directory: Path) -> EncoderSpec:
    """Read the spec of the student in a run's directory.

    Raises: RunError that names the directory if there is no readable spec.
    """
    try:
        return EncoderSpec.from_json(read_json(directory / STUDENT_FILE))
    except (OSError, ValueError) as error:
        raise RunError(why_no_run(directory, STUDENT_FILE, error)) from error


def why_no_run(directory: Path, file: str, error: Exception) -> str:
    """Return the error message for a directory that is not a training run, because its `file` could not be read."""
    if not os.path.isdir(directory):  # noqa: PTH112 - a Path raises where a name is too long
        what = "there is no such directory"
    elif (directory / "zarr.json").exists():
        what = "it is a store (zarr.json); give the run itself"
    else:
        what = f"it has no {file}" if isinstance(error, FileNotFoundError) else f"no readable {file} ({error})"
    return f"{directory} is not a training run: {what}"


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


def near(word: str, known: list[str]) -> str:
    """Return the end of a message about an unknown name: "; did you mean a, b?", or nothing."""
    matches = difflib.get_close_matches(word, known, n=3)
    return f"; did you mean {', '.join(matches)}?" if matches else ""


def _features(model: Any, pixels_BCHW: Tensor, dense: DenseKind) -> tuple[Tensor, Tensor | None]:
    """Return the library's features, and the last stage's map if that is the requested dense kind."""
    last_stage = None
    if dense == "last_stage":
        features, (last_stage,) = model.forward_intermediates(pixels_BCHW, indices=1)
    else:
        features = model.forward_features(pixels_BCHW)
    is_tokens = isinstance(features, Tensor) and features.ndim == 3 and hasattr(model, "num_prefix_tokens")
    is_map = isinstance(features, Tensor) and features.ndim == 4
    if not is_tokens and not is_map:
        raise ConfigError(f"{type(model).__name__} gives neither patch tokens with a known prefix nor a feature map")
    if is_tokens and dense != dense_kind(model):
        raise ConfigError(f"{type(model).__name__} has no {dense!r} dense tokens, only {dense_kind(model)!r}")
    return features, last_stage


def _map_to_BhwD(model: Any, feature_map: Tensor, dense: DenseKind) -> Tensor:
    """Return a CNN's map, channels last, with its head's norm applied if the dense kind is "normed"."""
    head_norm = _head_norm(model)
    if dense == "normed":
        if head_norm is None and not _has_final_norm(model):
            raise ConfigError(f"{type(model).__name__} has no final norm for 'normed' dense tokens")
        feature_map = feature_map if head_norm is None else head_norm(feature_map)
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return feature_map if channels_last else feature_map.permute(0, 2, 3, 1)


def _check_summary(model: Any, features: Tensor, summary: SummaryKind) -> None:
    """Raise ConfigError if the model has no such summary."""
    if summary == "attention_pool" and getattr(model, "attn_pool", None) is None:
        raise ConfigError(f"{type(model).__name__} has no attention pool for its summary")
    if summary == "projected" and isinstance(getattr(model, "head", None), nn.Identity | None):
        raise ConfigError(f"{type(model).__name__} was built without a projection for its summary")
    if summary in ("cls", "cls_concat") and (features.ndim != 3 or not _has_class_token(model)):
        raise ConfigError(f"{type(model).__name__} has no class token for its summary")


def _summary(
    model: Any, features: Tensor, dense_BhwD: Tensor, summary: SummaryKind, class_tokens: int
) -> Tensor | None:
    match summary:
        case "cls":
            return features[:, 0]
        case "cls_concat":
            return features[:, :class_tokens].flatten(1)
        case "attention_pool" | "pooled":
            pooled: Tensor = model.forward_head(features, pre_logits=True)
            return pooled
        case "projected":
            projected: Tensor = model.forward_head(features)
            return projected
        case "mean":
            return dense_BhwD.mean(dim=(1, 2))
        case "none":
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
