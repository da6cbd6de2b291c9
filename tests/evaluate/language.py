"""Image-text models that open_clip builds small, under the names of teachers in the registry, with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from making import save_siglip_tokenizer
from safetensors.torch import save_file

from eupe.evaluate import subject as subjects
from eupe.teachers.own_forward import NARROW_VIT, fill_at_random, narrow
from eupe.teachers.registry import REGISTRY

CLIP, PE, SIGLIP = "clip-b32-proj", "pe-core-t-proj", "siglip-b-224"
ARCHS = {CLIP: "ViT-B-32-quickgelu", PE: "PE-Core-T-16-384", SIGLIP: "ViT-B-16-SigLIP"}
SMALL_TEXT = {"width": 32, "heads": 2, "layers": 2}
SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16},
    "text_cfg": {**SMALL_TEXT, "context_length": 12, "vocab_size": 49408},
}
CLIP_SIZE = 32


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Make these teachers' models small, and computed in float32 on any machine, while `patch` lasts."""
    create_timm = timm.create_model

    def create_small(name: str, *words: Any, **options: Any) -> Any:
        small = name.startswith(("vit_pe_core_tiny", "vit_base_patch16_siglip_224"))
        return create_timm(name, *words, **{**options, **NARROW_VIT} if small else options)

    patch.setattr(timm, "create_model", create_small)
    configs = {name: open_clip.get_model_config(arch) for name, arch in ARCHS.items()}
    for name in (PE, SIGLIP):
        configs[name]["text_cfg"] |= SMALL_TEXT
    configs[SIGLIP]["embed_dim"] = NARROW_VIT["embed_dim"]
    for name, config in (configs | {CLIP: SMALL_CLIP}).items():
        patch.setitem(open_clip.factory._MODEL_CONFIGS, ARCHS[name], config)
    small_clip = replace(REGISTRY[CLIP], patch=16, dense_dim=64, summary_dim=24, native_size=CLIP_SIZE)
    for row in (narrow(REGISTRY[PE]), narrow(REGISTRY[SIGLIP]), small_clip):
        patch.setitem(REGISTRY, row.name, row)
    patch.setattr(subjects, "compute_dtype", lambda word, device: torch.float32)


def whole_model(name: str, folder: Path, seed: int = 0) -> tuple[Any, Path]:
    """open_clip's own model of a teacher, and the file of its weights."""
    folder.mkdir(exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        model = open_clip.create_model(ARCHS[name], load_weights=False, pretrained_text=False)
    fill_at_random(model, seed)
    with torch.no_grad():
        model.logit_scale.fill_(4.0)
        if model.logit_bias is not None:
            model.logit_bias.fill_(-3.0)
    path = folder / "open_clip_model.safetensors"
    save_file({key: value.contiguous().clone() for key, value in model.state_dict().items()}, path)
    if name == SIGLIP:
        save_siglip_tokenizer(folder)
    return model.eval().requires_grad_(False), path
