"""A teacher's layers are its library's own blocks, normed as the last one is; what has none is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from making import random_weights
from teacher_checks import CPU, by_hand, views
from torch import Tensor

from eupe.errors import TeacherError
from eupe.models.encoder import build_encoder, save_encoder
from eupe.teachers.own_forward import fill_at_random
from eupe.teachers.registry import REGISTRY
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import load_teacher, teacher_layers

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
PLAIN: dict[str, tuple[str, str]] = {
    "Dinov2": ("Dinov2Model", "layernorm"),
    "Dinov2WithRegisters": ("Dinov2WithRegistersModel", "layernorm"),
    "DINOv3ViT": ("DINOv3ViTModel", "norm"),
    "CLIPVision": ("CLIPVisionModel", "post_layernorm"),
    "SiglipVision": ("SiglipVisionModel", "post_layernorm"),
    "MetaClip2Vision": ("MetaClip2VisionModel", "post_layernorm"),
    "ViT": ("ViTModel", "layernorm"),
}
"""Family of transformers to its model and the name of its final norm."""


@torch.inference_mode()
@pytest.mark.parametrize("family", PLAIN)
def test_blocks_of_transformers_are_seen_by_hooks(family: str, tmp_path: Path) -> None:
    name, norm = PLAIN[family]
    model = getattr(transformers, name)(getattr(transformers, f"{family}Config")(**SMALL, image_size=56, patch_size=14))
    fill_at_random(model)
    model.save_pretrained(tmp_path / "m")
    spec = resolve_teacher(f"hf:{tmp_path / 'm'}")
    teacher = load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(56,))
    blocks = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == 3)
    seen: list[Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model.eval()(by_hand(views(56), spec))

    tokens = teacher(views(56), [1, 2, 3])

    final = next(part for path, part in model.named_modules() if path.split(".")[-1] == norm)
    for number, state in enumerate(seen, 1):
        wanted = final(state)[:, spec.prefix_tokens :].unflatten(1, (4, 4))
        torch.testing.assert_close(tokens.layers[number], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens.layers[3], tokens.dense, rtol=1e-4, atol=1e-5)
    assert [(shape.dim, shape.patch) for shape in teacher_layers(spec)] == 3 * [(32, 14)]


@torch.inference_mode()
def test_a_runs_student_gives_its_layers_to_the_next_stage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("mobilenetv4_conv_small", size=64).eval()
    save_encoder(encoder, tmp_path)
    spec = resolve_teacher(str(tmp_path))
    teacher = load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(64,))

    tokens = teacher(views(64), [3, 4])

    wanted = encoder.model.forward_intermediates(by_hand(views(64), spec), intermediates_only=True)
    for number in (3, 4):
        torch.testing.assert_close(tokens.layers[number], wanted[number - 1].permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    assert [shape.patch for shape in teacher_layers(spec)] == [2, 4, 8, 16, 32]


@torch.inference_mode()
def test_timm_and_open_clips_trunks_give_their_layers(tmp_path: Path) -> None:
    weights = random_weights("convnext_atto", tmp_path / "w.safetensors")
    spec = resolve_teacher("timm:convnext_atto")
    teacher = load_teacher(spec, weights=weights, device=CPU, dtype=torch.float32, sizes=(64,))
    tokens = teacher(views(64), [1, 4])
    assert tokens.layers[1].shape == (2, 16, 16, 40) and tokens.layers[4].shape == (2, 2, 2, 320)
    # the last stage lacks the norm that the teacher's own map has
    assert not torch.allclose(tokens.layers[4], tokens.dense)

    assert len(teacher_layers(resolve_teacher("open_clip:ViT-B-16-SigLIP"))) == 12


def test_rows_of_the_registry_need_no_hub_to_know_their_layers() -> None:
    assert len(teacher_layers(REGISTRY["dinov2-s"])) == 12 and len(teacher_layers(REGISTRY["dinov3-s"])) == 12
    with pytest.raises(TeacherError, match="a vjepa2 gives its last map only"):
        teacher_layers(REGISTRY["vjepa2-l"])


def test_a_teacher_without_layers_says_so(tmp_path: Path) -> None:
    transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(hidden_sizes=[8] * 4)).save_pretrained(tmp_path)
    for name in ("open_clip:ViT-B-32@laion2b_s34b_b79k", f"hf:{tmp_path}"):
        with pytest.raises(TeacherError, match=r"--layers does not work for teacher .*last map only"):
            teacher_layers(resolve_teacher(name))
