"""Students as the Transformers library's own models: their configurations, and timm's tensors under its names.

Shapes: D width, H hidden width of an MLP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

DINOV3_VIT = re.compile(r"vit_\w+_patch\d+_dinov3(_qkvb)?")
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "SiLU": "silu"}
"""The library's names of activation classes."""


@dataclass(frozen=True)
class Native:
    """A student in the form of one of the library's models."""

    model: str
    """Class of the model."""
    config: str
    """Class of the configuration."""
    options: dict[str, Any]
    """Arguments of the configuration."""
    state: dict[str, Tensor]
    prefix: int
    """Number of tokens in `last_hidden_state` before the dense ones."""


def native(arch: str, model: Any, size: int) -> Native | None:
    """Return the library's model that computes the same as a timm model; None if the library has none.

    Args:
        arch: timm's name of the architecture, without a tag.
        size: side of the input in pixels, for the configuration.
    """
    if DINOV3_VIT.fullmatch(arch):
        return _dinov3_vit(model, size)
    if type(model) is ConvNeXt and _is_dinov3_convnext(model):
        return _dinov3_convnext(model, size)
    return None


def _dinov3_vit(model: Any, size: int) -> Native:
    block = model.blocks[0]
    has_bias, is_gated = block.attn.q_bias is not None, hasattr(block.mlp, "fc1_g")
    options = {
        "image_size": size,
        "patch_size": model.patch_embed.patch_size[0],
        "hidden_size": model.embed_dim,
        "intermediate_size": block.mlp.fc2.in_features,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "num_register_tokens": model.reg_token.shape[1],
        "hidden_act": ACTIVATIONS[type(block.mlp.act).__name__],
        "use_gated_mlp": is_gated,
        "query_bias": has_bias,
        "key_bias": False,
        "value_bias": has_bias,
        "layer_norm_eps": model.norm.eps,
        "rope_theta": model.rope.temperature,
        # the library's default rescales positions at random in training; students are trained without that
        "pos_embed_rescale": None,
    }
    state = model.state_dict()
    renamed = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.register_tokens": state["reg_token"],
        "embeddings.mask_token": torch.zeros(1, 1, model.embed_dim),  # students have none; it is for masked training
        **_module("embeddings.patch_embeddings", state, "patch_embed.proj"),
        **_module("norm", state, "norm"),
    }
    up = "fc1_x" if is_gated else "fc1"
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}", f"model.layer.{i}"
        weights = dict(zip("qkv", state[f"{ours}.attn.qkv.weight"].chunk(3), strict=True))
        renamed |= {f"{theirs}.attention.{x}_proj.weight": weight for x, weight in weights.items()}
        if has_bias:
            renamed |= {f"{theirs}.attention.{x}_proj.bias": state[f"{ours}.attn.{x}_bias"] for x in "qv"}
        renamed |= {f"{theirs}.layer_scale{n}.lambda1": state[f"{ours}.gamma_{n}"] for n in (1, 2)}
        for there, here in {
            "norm1": "norm1",
            "norm2": "norm2",
            "attention.o_proj": "attn.proj",
            "mlp.up_proj": f"mlp.{up}",
            "mlp.down_proj": "mlp.fc2",
            **({"mlp.gate_proj": "mlp.fc1_g"} if is_gated else {}),
        }.items():
            renamed |= _module(f"{theirs}.{there}", state, f"{ours}.{here}")
    prefix = 1 + options["num_register_tokens"]
    return Native("DINOv3ViTModel", "DINOv3ViTConfig", options, renamed, prefix)


def _is_dinov3_convnext(model: Any) -> bool:
    """Return whether the model has exactly the parts of the paper's ConvNeXt; timm has many variants."""
    first, *later = [stage.downsample for stage in model.stages]
    left_out = [model.norm_pre, getattr(model.head, "pre_logits", None), first]
    if not all(isinstance(module, nn.Identity) for module in left_out):
        return False
    if len(model.stem) != 2 or not all(isinstance(downsampling, nn.Sequential) for downsampling in later):
        return False
    blocks = [block for stage in model.stages for block in stage.blocks]
    norms = [model.stem[1], model.head.norm, *(block.norm for block in blocks), *(norm for norm, _ in later)]
    return (
        _is_conv(model.stem[0], 4, 4)
        and all(_is_conv(conv, 2, 2) for _, conv in later)
        and all(_is_conv(block.conv_dw, 7, 1) and block.gamma is not None for block in blocks)
        and all(isinstance(block.shortcut, nn.Identity) and _is_plain_mlp(block.mlp) for block in blocks)
        and all(isinstance(norm, nn.LayerNorm) and norm.bias is not None for norm in norms)
        and len({norm.eps for norm in norms}) == 1
        and len({type(block.mlp.act) for block in blocks}) == 1
    )


def _is_conv(module: object, kernel: int, stride: int) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.dilation) == ((kernel,) * 2, (stride,) * 2, (1, 1))
        and module.bias is not None
    )


def _is_plain_mlp(mlp: Any) -> bool:
    """Return whether the MLP has two layers, a hidden width of four times its input, and a known activation."""
    wide, narrow = mlp.fc1.weight.shape[:2]
    return {name.split(".")[0] for name in mlp.state_dict()} == {"fc1", "fc2"} and (
        wide == 4 * narrow and mlp.fc1.bias is not None and type(mlp.act).__name__ in ACTIVATIONS
    )


def _dinov3_convnext(model: Any, size: int) -> Native:
    options = {
        "image_size": size,
        "hidden_sizes": [stage.blocks[0].conv_dw.out_channels for stage in model.stages],
        "depths": [len(stage.blocks) for stage in model.stages],
        "hidden_act": ACTIVATIONS[type(model.stages[0].blocks[0].mlp.act).__name__],
        "layer_norm_eps": model.head.norm.eps,
    }
    state = model.state_dict()
    renamed = _module("layer_norm", state, "head.norm")
    for part in (0, 1):
        renamed |= _module(f"model.stages.0.downsample_layers.{part}", state, f"stem.{part}")
        for i in range(1, len(model.stages)):
            theirs, ours = f"model.stages.{i}.downsample_layers.{part}", f"stages.{i}.downsample.{part}"
            renamed |= _module(theirs, state, ours)
    for i, stage in enumerate(model.stages):
        for j in range(len(stage.blocks)):
            ours, theirs = f"stages.{i}.blocks.{j}", f"model.stages.{i}.layers.{j}"
            renamed[f"{theirs}.gamma"] = state[f"{ours}.gamma"]
            renamed |= _module(f"{theirs}.depthwise_conv", state, f"{ours}.conv_dw")
            renamed |= _module(f"{theirs}.layer_norm", state, f"{ours}.norm")
            for there, here in (("pointwise_conv1", "mlp.fc1"), ("pointwise_conv2", "mlp.fc2")):
                layer = _module(f"{theirs}.{there}", state, f"{ours}.{here}")
                # timm's layers may be 1 x 1 convolutions; the library's are linear
                renamed |= {name: value.flatten(1) if value.ndim == 4 else value for name, value in layer.items()}
    return Native("DINOv3ConvNextModel", "DINOv3ConvNextConfig", options, renamed, prefix=1)


def _module(theirs: str, state: Mapping[str, Tensor], ours: str) -> dict[str, Tensor]:
    """Return the weight and bias of one module under another name."""
    return {f"{theirs}.{part}": state[f"{ours}.{part}"] for part in ("weight", "bias")}
