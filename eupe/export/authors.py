"""The names that the authors of DINOv3 and EUPE give the tensors of their ViTs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RENAMED = {
    ".gamma_1": ".ls1.gamma",
    ".gamma_2": ".ls2.gamma",
    "reg_token": "storage_tokens",
    ".mlp.fc1_g.": ".mlp.w1.",
    ".mlp.fc1_x.": ".mlp.w2.",
}


def in_authors_names(model: Any) -> dict[str, Tensor]:
    """Return the state dict of a timm DINOv3 model (`vit_*_patch16_dinov3*`) under the names of its authors' code.

    Queries, keys and values share one bias vector there; its middle third belongs to the keys and is masked. Students
    have no token for masked training, so that token is zero. The rotary periods are float32; the authors' own files
    have bfloat16.
    """
    state = model.state_dict()
    is_gated = any(".mlp.fc1_g." in name for name in state)
    written = {"mask_token": torch.zeros(1, model.embed_dim), "rope_embed.periods": model.rope.periods.clone()}
    for name, value in state.items():
        block, _, part = name.rpartition(".")
        if part == "q_bias":
            none = torch.zeros_like(value)
            written[f"{block}.qkv.bias"] = torch.cat([value, none, state[f"{block}.v_bias"]])
            written[f"{block}.qkv.bias_mask"] = torch.cat([none + 1, none, none + 1])
        elif part != "v_bias":
            written[_renamed(name, is_gated)] = value
    return written


def _renamed(name: str, is_gated: bool) -> str:
    for ours, theirs in {**RENAMED, **({".mlp.fc2.": ".mlp.w3."} if is_gated else {})}.items():
        name = name.replace(ours, theirs)
    return name
