"""Tokens of every registry row against the library's own forward pass, written out here by another path.

The rows' architectures are built narrow and shallow, with random weights, so that the giants take part too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import timm
import torch
import transformers
from teacher_checks import CPU, assert_same_tokens, by_hand, clip_in_hugging_face_names, load_state, views
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    MetaClip2VisionConfig,
    MetaClip2VisionModel,
    RadioConfig,
    RadioModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
    VJEPA2Config,
    VJEPA2Model,
)

from eupe.teachers.library_check import random_pair
from eupe.teachers.own_forward import NARROW_WIDTH, fill_at_random, hf_forward, narrow
from eupe.teachers.registry import REGISTRY
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import load_teacher

TIMM_ROWS = [row for row in REGISTRY.values() if row.backend == "timm"]


@pytest.mark.parametrize("row", TIMM_ROWS, ids=[row.name for row in TIMM_ROWS])
def test_timm_rows(row: TeacherSpec) -> None:
    size = 6 * row.patch
    own, teacher = random_pair(row, is_narrow=True, sizes=(size, row.native_size))
    if hasattr(own.module, "set_input_size") and "naflex" not in row.model:
        own.module.set_input_size((size, size))
    with torch.no_grad():
        dense, summary = own.forward(by_hand(views(size), row))
    assert_same_tokens(teacher(views(size)), dense, summary)


@pytest.mark.usefixtures("narrow_vits")
def test_pe_core_summary_becomes_the_text_aligned_embedding_by_one_linear_map(tmp_path: Path) -> None:
    spec = narrow(REGISTRY["pe-core-g"])
    whole = timm.create_model(spec.model.split(".")[0]).eval()
    fill_at_random(whole)
    size = spec.native_size
    summary = load_state(spec, whole.state_dict(), tmp_path, sizes=(size,))(views(size)).summary
    assert summary is not None
    with torch.no_grad():
        embedding = whole(by_hand(views(size), spec))
        torch.testing.assert_close(whole.head(summary), embedding, rtol=1e-3, atol=1e-3)


OPEN_CLIP_ROWS = [row for row in REGISTRY.values() if row.backend == "open_clip"]


@pytest.mark.parametrize("row", OPEN_CLIP_ROWS, ids=[row.name for row in OPEN_CLIP_ROWS])
def test_open_clip_rows(row: TeacherSpec) -> None:
    own, teacher = random_pair(row, is_narrow=True, sizes=(row.native_size,))
    tokens = teacher(views(row.native_size))
    pixels = by_hand(views(row.native_size), row)
    with torch.no_grad():
        projected, _ = own.module.visual(pixels)
        assert tokens.summary is not None
        embedding = tokens.summary if row.summary == "projected" else tokens.summary @ own.module.visual.proj
        torch.testing.assert_close(embedding, projected, rtol=1e-3, atol=1e-3)
        dense, summary = own.forward(pixels)
    assert_same_tokens(tokens, dense, summary)


@pytest.mark.usefixtures("narrow_vits")
def test_open_clip_off_grid_as_if_loaded_for_that_size(tmp_path: Path) -> None:
    spec = narrow(REGISTRY["clip-b16"])
    arch = spec.model.split("@")[0]
    model = open_clip.create_model(arch, load_weights=False).eval()
    fill_at_random(model)
    model.visual.positional_embedding.data.mul_(30)  # so that how it is resampled is not lost among the patches
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    other = open_clip.create_model(arch, pretrained=str(tmp_path / "whole.pt"), force_image_size=160)
    other.eval().visual.output_tokens = True
    tokens = load_state(spec, model.state_dict(), tmp_path, sizes=(160, 224))(views(160))
    with torch.no_grad():
        _, dense = other.visual(by_hand(views(160), spec))
    assert_same_tokens(tokens, dense, tokens.summary)


@pytest.mark.usefixtures("narrow_vits")
def test_clip_is_the_same_in_three_libraries(tmp_path: Path) -> None:
    spec = narrow(REGISTRY["clip-b32"])
    model = open_clip.create_model("ViT-B-32-quickgelu", load_weights=False).eval()
    fill_at_random(model.visual)
    state = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    tokens = load_state(spec, model.state_dict(), tmp_path, sizes=(224,))(views(224))

    timm_spec = resolve_teacher("timm:vit_base_patch32_clip_quickgelu_224.openai")
    timm_tokens = load_state(timm_spec, state, tmp_path, sizes=(224,))(views(224))
    assert_same_tokens(timm_tokens, tokens.dense.flatten(1, 2), tokens.summary)

    config = CLIPVisionConfig(
        hidden_size=NARROW_WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=4 * NARROW_WIDTH
    )
    hugging_face = CLIPVisionModel(config)
    hugging_face.load_state_dict(clip_in_hugging_face_names(state), strict=True)
    hugging_face.save_pretrained(tmp_path / "hf")
    hf_spec = resolve_teacher(f"hf:{tmp_path / 'hf'}")
    hf_tokens = load_teacher(hf_spec, weights=None, device=CPU, dtype=torch.float32, sizes=(224,))(views(224))
    assert_same_tokens(hf_tokens, tokens.dense.flatten(1, 2), tokens.summary)


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY_TOWER = {**TINY, "patch_size": 16, "image_size": 64}


DIMENSIONS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PREDICTOR = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
HUGGING_FACE: dict[str, Callable[[], Any]] = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**TINY, image_size=56)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**TINY, image_size=56, patch_size=14)
    ),
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**TINY, num_register_tokens=4)),
    "dinov3_convnext": lambda: DINOv3ConvNextModel(
        DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    ),
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=TINY_TOWER, text_config={**TINY, "vocab_size": 49408})),
    "siglip": lambda: SiglipModel(SiglipConfig(vision_config=TINY_TOWER, text_config={**TINY, "vocab_size": 49408})),
    "radio": lambda: RadioModel(RadioConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)),
    "vjepa2": lambda: VJEPA2Model(VJEPA2Config(**DIMENSIONS, crop_size=96, **PREDICTOR)),
    "metaclip_2": lambda: MetaClip2VisionModel(MetaClip2VisionConfig(**TINY_TOWER)),
    "vit": lambda: ViTModel(ViTConfig(**TINY, image_size=64)),
}


@pytest.mark.parametrize("model_type", HUGGING_FACE)
@pytest.mark.parametrize("as_file", [False, True], ids=["directory", "file"])
def test_hugging_face_types(model_type: str, as_file: bool, tmp_path: Path) -> None:
    model = HUGGING_FACE[model_type]().eval()
    fill_at_random(model)
    if model_type == "radio":
        model.input_conditioner.load_state_dict(RadioModel(model.config).input_conditioner.state_dict())
    model.save_pretrained(tmp_path)
    spec = resolve_teacher(f"hf:{tmp_path}")
    size = 6 * spec.patch
    weights = tmp_path / "model.safetensors" if as_file else tmp_path
    teacher = load_teacher(spec, weights=weights, device=CPU, dtype=torch.float32, sizes=(size, spec.native_size))
    with torch.no_grad():
        dense, summary = hf_forward(model, by_hand(views(size), spec))
    assert_same_tokens(teacher(views(size)), dense, summary)


@pytest.mark.usefixtures("narrow_vits")
def test_radio_is_the_same_in_two_libraries(tmp_path: Path) -> None:
    """Hugging Face saves RADIO under its authors' names, which timm converts; one normalises inside, one outside."""
    model = RadioModel(RadioConfig(hidden_size=NARROW_WIDTH, num_hidden_layers=2, num_attention_heads=4)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" not in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path)
    without_layer_scale(tmp_path / "model.safetensors")
    hf_spec = resolve_teacher(f"hf:{tmp_path}")
    timm_spec = narrow(REGISTRY["radio-v4-h"])
    loaded = [
        load_teacher(spec, weights=tmp_path / "model.safetensors", device=CPU, dtype=torch.float32, sizes=(96, 512))
        for spec in (hf_spec, timm_spec)
    ]
    for size in (96, 512):
        want, got = (teacher(views(size)) for teacher in loaded)
        assert_same_tokens(got, want.dense.flatten(1, 2), want.summary)


def without_layer_scale(path: Path) -> None:
    """The authors' files have none; the library has them at 1."""
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file({k: v for k, v in state.items() if "layer_scale" not in k}, path)


@pytest.mark.usefixtures("narrow_vits")
def test_several_sizes_from_one_teacher_do_not_disturb_each_other(tmp_path: Path) -> None:
    spec = narrow(REGISTRY["siglip-b-224"])
    model = timm.create_model(spec.model.split(".")[0], num_classes=0)
    fill_at_random(model)
    teacher = load_state(spec, model.state_dict(), tmp_path, sizes=(224, 96))
    first = teacher(views(224)).dense
    teacher(views(96))
    assert torch.equal(teacher(views(224)).dense, first)


def test_transformers_is_not_left_silenced(tmp_path: Path) -> None:
    verbosity = transformers.logging.get_verbosity()
    Dinov2Model(Dinov2Config(**TINY, image_size=56)).save_pretrained(tmp_path)
    spec = resolve_teacher(f"hf:{tmp_path}")
    load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(56,))
    assert transformers.logging.get_verbosity() == verbosity
