"""A model hub's cache on this machine, in the hub's own layout: what the libraries would have fetched.

DINOv2-S has its real weights, since they are at hand. All others are random, and those in `NARROW` small as well: what
the pages do with them is the same, and two cores are enough for it. A program, to be run in the environment in which
they are narrow: `python hub.py HOME FOLDER_OF_DINOV2_SMALL`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from making import hub_snapshot, save_siglip_tokenizer
from safetensors.torch import save_file
from torch import nn

NARROW = ("dinov2-b", "clip-b16", "clip-b16-proj", "siglip2-b-256")


def fill_hub(home: Path, dinov2_small: Path) -> None:
    """A folder for HF_HOME with every model that the pages fetch.

    Args:
        dinov2_small: the folder of its real weights.
    """
    shutil.copytree(dinov2_small, hub_snapshot(home / "hub", "facebook/dinov2-small"), dirs_exist_ok=True)
    for repository, write in MODELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            write(hub_snapshot(home / "hub", repository))


def _dinov2_base(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, patch_size=14, image_size=518)
    Dinov2Model(config).save_pretrained(folder)


def _clip(folder: Path) -> None:
    import open_clip

    model = open_clip.create_model("ViT-B-16-quickgelu", load_weights=False, pretrained_text=False)
    _save(model, folder / "open_clip_model.safetensors")


def _siglip2(folder: Path) -> None:
    import open_clip

    model = open_clip.create_model("ViT-B-16-SigLIP2-256", load_weights=False, pretrained_text=False)
    _save(model, folder / "open_clip_model.safetensors")
    save_siglip_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "siglip"}')


def _of_timm(arch: str) -> Callable[[Path], None]:
    return lambda folder: _save(timm.create_model(arch), folder / "model.safetensors")


def _save(model: nn.Module, path: Path) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, path)


MODELS: dict[str, Callable[[Path], None]] = {
    "facebook/dinov2-base": _dinov2_base,
    "timm/vit_base_patch16_clip_224.openai": _clip,
    "timm/vit_base_patch16_siglip_256.v2_webli": _of_timm("vit_base_patch16_siglip_256"),
    "timm/ViT-B-16-SigLIP2-256": _siglip2,
    "timm/test_vit.r160_in1k": _of_timm("test_vit"),
}


if __name__ == "__main__":
    fill_hub(*map(Path, sys.argv[1:]))
