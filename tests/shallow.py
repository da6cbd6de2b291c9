"""ViTs of timm with fewer blocks: a graph is traced and compiled in a fraction of the time."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model

default_cfgs: dict[str, Any] = {}
"""By name; timm looks for them in the module of a model's function."""


def register_shallow(name: str, whole: str, *, depth: int) -> str:
    """Register a ViT of timm with only its first blocks, under a name of its own, and return that name."""

    def build(pretrained: bool = False, **options: Any) -> Any:
        return timm.create_model(whole, pretrained, **{**options, "depth": depth})

    default_cfgs.update(generate_default_cfgs({name: timm.get_pretrained_cfg(whole).to_dict()}))
    build.__name__ = name
    register_model(build)
    return name
