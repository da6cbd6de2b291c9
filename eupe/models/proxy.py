"""The proxy of the paper and smaller ViTs of its kind, as timm architectures: `vit_giant_patch16_eupe` and so on.

The paper (EUPE, arXiv 2603.22387) specifies a ViT-G of 1.9B parameters, patches of 16 pixels, one class token,
4 register tokens and rotary positions. The rest is this project's choice:

- Width, depth, heads and MLP are those of the Perception Encoder, the paper's largest teacher: pre-norm blocks with
  biases and without LayerScale, a norm before the blocks and one after. A proxy may start from that trunk, block by
  block.
- There is no position table and no attention pool; the class token after the last norm is the summary.
- Rotary angles are DINOv3's: coordinates from -1 to 1 over a picture of any size, periods from 1 to 100. They rotate
  the same channel pairs as the Perception Encoder, along the same axes, but by other angles.
- Inputs are 256 pixels, with ImageNet's mean and standard deviation, as for DINOv3 and the paper's students.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva

_CFG = {
    "num_classes": 0,
    "input_size": (3, 256, 256),
    "fixed_input_size": True,
    "pool_size": None,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
FAMILY = ("vit_giant_patch16_eupe", "vit_large_patch16_eupe", "vit_base_patch16_eupe", "vit_small_patch16_eupe")
default_cfgs = generate_default_cfgs(dict.fromkeys(FAMILY, _CFG))


_SHARED: dict[str, Any] = {
    "patch_size": 16,
    "global_pool": "token",
    "class_token": True,
    "num_reg_tokens": 4,
    "attn_type": "rope",
    "use_abs_pos_emb": False,
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_grid_indexing": "xy",
    "use_pre_transformer_norm": True,
    "dynamic_img_size": True,
}
_SHAPES: dict[str, dict[str, Any]] = {
    "vit_giant_patch16_eupe": {"embed_dim": 1536, "depth": 50, "num_heads": 16, "mlp_ratio": 8960 / 1536},
    "vit_large_patch16_eupe": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0},
    "vit_base_patch16_eupe": {"embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0},
    "vit_small_patch16_eupe": {"embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0},
}


def vit_giant_patch16_eupe(pretrained: bool = False, **options: Any) -> Any:
    """Create the proxy, of 1.85B parameters; blocks as in `vit_pe_core_gigantic_patch14_448`."""
    return _create("vit_giant_patch16_eupe", pretrained, options)


def vit_large_patch16_eupe(pretrained: bool = False, **options: Any) -> Any:
    """Create a ViT of 303M parameters; blocks as in `vit_pe_core_large_patch14_336`."""
    return _create("vit_large_patch16_eupe", pretrained, options)


def vit_base_patch16_eupe(pretrained: bool = False, **options: Any) -> Any:
    """Create a ViT of 86M parameters; blocks as in `vit_pe_core_base_patch16_224`."""
    return _create("vit_base_patch16_eupe", pretrained, options)


def vit_small_patch16_eupe(pretrained: bool = False, **options: Any) -> Any:
    """Create a ViT of 22M parameters; blocks as in `vit_pe_core_small_patch16_384`."""
    return _create("vit_small_patch16_eupe", pretrained, options)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    made = {**_SHARED, **_SHAPES[name], "norm_layer": partial(LayerNorm, eps=1e-5), **options}
    return build_model_with_cfg(Eva, name, pretrained, **made)


def in_stock_timm(arch: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments with which timm, without this package, builds the same architecture.

    The stock architecture is the Perception Encoder with the same blocks. Arguments that are not JSON (its LayerNorm)
    are left out, because they are equal there.
    """
    if arch not in FAMILY:
        return arch, {}
    return "vit_pe_core_base_patch16_224", {**_SHARED, **_SHAPES[arch], "rope_grid_offset": 0.0}


for _architecture in (vit_giant_patch16_eupe, vit_large_patch16_eupe, vit_base_patch16_eupe, vit_small_patch16_eupe):
    register_model(_architecture)
