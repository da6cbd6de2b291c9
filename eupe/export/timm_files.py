"""A directory that timm loads: `timm.create_model("local-dir:DIR", pretrained=True, num_classes=0)`.

The tensors have timm's own names, so they can replace any other weights of the architecture. The Transformers library
loads the same directory as a `TimmWrapperModel`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import eupe
from eupe.errors import ConfigError
from eupe.export.config import ExportConfig
from eupe.export.heads import save_heads, say_again
from eupe.export.source import ForwardFunction, Source, Written
from eupe.models.encoder_spec import EncoderSpec
from eupe.models.proxy import in_stock_timm

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
POOLS = {"cls": "token", "mean": "avg", "attention_pool": "map"}
"""timm's names of the summaries that some architectures do not have by default; others are always the default."""


def write(source: Source, config: ExportConfig, folder: Path) -> Written:
    """Write the configuration, the weights and the heads.

    Raises: OSError, SafetensorError.
    """
    plain = hub_config(source.encoder.spec, source.encoder.model, source.classes)
    (folder / CONFIG_FILE).write_text(json.dumps(plain, indent=2) + "\n")
    weights = dict(source.encoder.model.state_dict())
    if source.facts is None:
        save_heads(source.heads, folder)
    else:
        weights |= _classifier(source, plain["pretrained_cfg"]["classifier"])
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return Written(f"timm {plain['architecture']}")


def _classifier(source: Source, place: object) -> dict[str, Tensor]:
    """Return a fine-tuned classifier's head by the name that timm has for the last layer of the architecture.

    Raises: ConfigError if it has no such layer.
    """
    if not isinstance(place, str):
        raise ConfigError(f"timm's {source.encoder.spec.arch} has no single classifier; give --format onnx")
    (head,) = source.heads.values()
    return {f"{place}.{name}": tensor for name, tensor in head.state_dict().items()}


def reopen(source: Source, folder: Path) -> ForwardFunction:
    """Load the directory with timm as a user would; return a function that runs its model."""
    tuned = source.facts is not None
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, **({} if tuned else {"num_classes": 0})).eval()

    @torch.inference_mode()
    def forward(pixels: Tensor) -> dict[str, Tensor]:
        features = model.forward_features(pixels)
        summary = model.forward_head(features, pre_logits=True)
        tokens = {"summary": summary, "dense": dense_of(source.encoder.spec, model, features, pixels)}
        return tokens | ({name: model(pixels) for name in source.heads} if tuned else say_again(folder, tokens))

    return forward


def hub_config(spec: EncoderSpec, model: Any, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Return timm's config.json of the hub, which says how to build the architecture and how to prepare pictures.

    Args:
        model: a timm model of the architecture, laid out for `spec.size`.
        classes: names of what its last layer tells apart; none if it has no such layer.
    """
    arch, own_args = in_stock_timm(spec.arch.split(".")[0])
    default = model.pretrained_cfg
    args = dict(own_args)
    if default["fixed_input_size"]:
        args["img_size"] = spec.size
    pool = POOLS.get(spec.summary)
    if isinstance(getattr(model, "global_pool", None), str) and pool not in (None, model.global_pool):
        args["global_pool"] = pool
    return {
        "architecture": arch,
        "num_classes": len(classes),
        **({"label_names": list(classes)} if classes else {}),
        "num_features": model.num_features,
        **({"global_pool": args["global_pool"]} if "global_pool" in args else {}),
        **({"model_args": args} if args else {}),
        "pretrained_cfg": {
            "tag": f"eupe_{eupe.__version__}",
            "custom_load": False,
            "input_size": [3, spec.size, spec.size],
            "fixed_input_size": default["fixed_input_size"],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": len(classes),
            "pool_size": None,
            "first_conv": default.get("first_conv"),
            "classifier": default.get("classifier"),
            "license": "other",
        },
    }


def dense_of(spec: EncoderSpec, model: Any, features: Tensor, pixels: Tensor) -> Tensor:
    """Return dense tokens [B, h, w, D] from timm's features of pictures, using timm alone; see `dense_lines`."""
    if spec.dense == "last_stage":
        last_stage: Tensor = model.forward_intermediates(pixels, indices=1)[1][0]
        return last_stage.permute(0, 2, 3, 1)
    if features.ndim == 3:
        grid = (pixels.shape[-2] // spec.patch, pixels.shape[-1] // spec.patch)
        return features[:, spec.prefix_tokens :].reshape(len(features), *grid, -1)
    if _head_norms(spec, model):
        features = model.head.norm(features)
    return features if _channels_last(model) else features.permute(0, 2, 3, 1)


def dense_lines(spec: EncoderSpec, model: Any, *, features: str = "features", name: str = "model") -> list[str]:
    """Return lines of code that do the same as `dense_of`, from `pixels`.

    Args:
        features: the variable of the features.
        name: the variable of the model.
    """
    if hasattr(model, "num_prefix_tokens"):
        cells = f"(pixels.shape[-2] // {spec.patch}, pixels.shape[-1] // {spec.patch})"
        return [f"dense = {features}[:, {spec.prefix_tokens}:].unflatten(1, {cells})"]
    if spec.dense == "last_stage":
        return [f"dense = {name}.forward_intermediates(pixels, indices=1)[1][0].permute(0, 2, 3, 1)"]
    source = f"{name}.head.norm({features})" if _head_norms(spec, model) else features
    return [f"dense = {source}" if _channels_last(model) else f"dense = {source}.permute(0, 2, 3, 1)"]


def _head_norms(spec: EncoderSpec, model: Any) -> bool:
    """Return whether a CNN's map needs the norm that timm keeps in the head, after the pooling."""
    norm = getattr(getattr(model, "head", None), "norm", None)
    return spec.dense == "normed" and isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity)


def _channels_last(model: Any) -> bool:
    return getattr(model, "output_fmt", "NCHW") == "NHWC"
