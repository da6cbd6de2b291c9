"""Where libraries give other tokens for the same weights: the notes name it, and the adapters follow the notes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
from teacher_checks import CPU, assert_same_tokens, by_hand, clip_in_hugging_face_names, load_state, views
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    RadioConfig,
    RadioModel,
)
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTConfig, DINOv3ViTRopePositionEmbedding

from eupe.common.compute import normalise
from eupe.corpus.pictures import decode_image
from eupe.corpus.views import ViewSpec, draw_view, render_view
from eupe.models.meta import built_on_meta
from eupe.teachers.library_check import random_pair
from eupe.teachers.own_forward import NARROW_CONV_WIDTH, NARROW_CONVNEXT, NARROW_WIDTH, fill_at_random, narrow
from eupe.teachers.registry import REGISTRY
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import Teacher, load_teacher

SEEN = 0.9999
"""Cosines below it are a disagreement; above it, `eupe teachers verify` calls tokens the same."""

FAMILIES = {
    r"dinov2-[sblg]": ("follows transformers", "position table", "timm antialiases"),
    r"dinov2-reg-[sblg]": ("follows transformers", "position table", "as timm does"),
    r"(dinov3-(s|s\+|b|l|h\+|7b|sat-l|sat-7b)|eupe-[tsb])": (
        "summary is the class token",
        "timm's own forward would give the mean",
        "RoPE angles are float32",
        "bilinear squash",
    ),
    r"(dinov3|eupe)-convnext-[tsbl]": ("as in transformers", "timm's forward_features ends ahead of the norm"),
    r"convnext-[tsbl]": ("transformers' last_hidden_state end ahead of it",),
    r"pe-core-[tsblg]": ("ahead of the projection", "-proj has it behind", "centre crop", "squash"),
    r"pe-core-[tsblg]-proj": ("behind the projection", "encode_image", "centre crop", "squash"),
    r"pe-(lang|spatial)-[tsblg](-tiling)?": ("no final norm", "mean of the patch tokens", "--tokens dense", "squash"),
    r"(metaclip2|clip)-\S+(?<!-proj)": ("ahead of the projection", "-proj has it behind", "no post_layernorm", "GELU"),
    r"eva02-clip-\S+(?<!-proj)": ("ahead of the projection", "-proj has it behind", "open_clip's tower", "centre crop"),
    r"eva02-clip-\S+-proj": ("behind the projection", "encode_image", "open_clip's tower", "centre crop"),
    r"tipsv2-\S+": ("pixels in [0, 1]", "one register", "timm resamples", "transformers bilinear"),
    r"aimv2-\S+": ("no class token", "mean of the patch tokens", "RMS norm", "--tokens dense"),
    r"internvit-\S+": ("no final norm", "drops the class token", "2x2 patches"),
    r"(uni2-h|virchow2)": ("terms to be accepted", "packed SwiGLUs", "fit with GELU"),
    r"h-optimus-[01]": ("terms to be accepted", "not ImageNet's"),
    r"vjepa2-\S+": ("two equal frames", "motion", "the predictor does not run", "--tokens dense", "px only"),
    r"qwen3-vl-\S+": ("ahead of its merger", "2x2 block", "no final norm", "--tokens dense", "two equal frames"),
    r"(metaclip2|clip)-\S+-proj": ("behind the projection", "encode_image", "no post_layernorm", "GELU"),
    r"siglip2-naflex-\S+": ("NaFlex", "aspect ratio", "attention pool", "16x16", "as in transformers"),
    r"siglip2?-(?!naflex)\S+": ("no class token", "attention pool", "GELU", "antialiases", "centre crop", "squash"),
    r"radio-\S+": ("summary_idxs", "pixels in [0, 1]", "normalised once", "corners"),
    r"sam3": ("ahead of its neck", "there is no summary", "0.5, not ImageNet's", "1008 px only"),
    r"sam-[blh]": ("there is no summary", "transformers refuses other sizes", "pads"),
    r"efficientnet-\S+": ("before the head convolution", "transformers'"),
}
"""Names of the rows, and what their notes must name."""


@pytest.mark.parametrize("name", REGISTRY)
def test_every_note_names_what_libraries_disagree_about(name: str) -> None:
    (words,) = (words for pattern, words in FAMILIES.items() if re.fullmatch(pattern, name))
    assert [word for word in words if word not in REGISTRY[name].note] == []


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Dinov2Config(), "without antialiasing"),
        (CLIPVisionConfig(), "pass post_layernorm"),
        (RadioConfig(), "pixels in [0, 1]"),
        (DINOv3ConvNextConfig(), "see the repository"),
    ],
)
def test_notes_of_hugging_face_directories(config: Any, words: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    note = resolve_teacher(f"hf:{tmp_path}").note
    assert words in note and note.endswith("licence: see the repository") and not note.startswith(";")


def cosines(got: Tensor, want: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(got.double().flatten(0, -2), want.double().flatten(0, -2), dim=-1)


def dinov2_in_timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    swaps = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.register_tokens": "reg_token",
        "embeddings.cls_token": "cls_token",
        "encoder.layer.": "blocks.",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "layernorm": "norm",
    }
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for old, new in swaps.items():
            name = name.replace(old, new)
        if "attention.attention.query" in name:
            parts = [state[f"encoder.layer.{name[7:].replace('query', part)}"] for part in ("query", "key", "value")]
            out[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
        elif not re.search(r"attention\.attention|mask_token", name):
            out[name] = tensor
    if "reg_token" in out:  # timm's table has no place for the class token
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


def photographs(assets: Path, size: int) -> Tensor:
    """A photograph and its mirror image."""
    image = decode_image((assets / "photos" / "cat" / "0-0.png").read_bytes())
    view = np.array(render_view(image, draw_view(ViewSpec(), "cat", 0, image.width, image.height), size))
    return torch.from_numpy(np.stack([view, view[:, ::-1]]))


@pytest.mark.parametrize("size", [224, 518])
def test_trained_dinov2_differs_between_timm_and_transformers_off_its_own_grid(
    size: int, assets: Path, tmp_path: Path
) -> None:
    weights, pair = assets / "weights" / "dinov2-small", photographs(assets, size)
    spec = REGISTRY["dinov2-s"]
    followed = load_teacher(spec, weights=weights, device=CPU, dtype=torch.float32, sizes=(size,))(pair)
    with torch.no_grad():
        own = Dinov2Model.from_pretrained(weights).eval()(by_hand(pair, spec))
    assert_same_tokens(followed, own.last_hidden_state[:, 1:], own.pooler_output)

    state = dinov2_in_timm_names(safetensors.torch.load_file(weights / "model.safetensors"))
    timm_spec = resolve_teacher("timm:vit_small_patch14_dinov2.lvd142m")
    other = load_state(timm_spec, state, tmp_path, sizes=(size,))(pair)
    least = float(cosines(other.dense, followed.dense).min())
    assert least > 0.99999 if size == 518 else 0.97 < least < 0.999


@pytest.mark.usefixtures("narrow_vits")
@pytest.mark.parametrize("registers", [0, 4])
def test_the_position_table_of_dinov2_with_registers_is_resampled_alike(registers: int, tmp_path: Path) -> None:
    width = {"hidden_size": NARROW_WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14}
    model: Any = (
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**width, image_size=518, num_register_tokens=registers))
        if registers
        else Dinov2Model(Dinov2Config(**width, image_size=518))
    )
    fill_at_random(model)
    model.embeddings.position_embeddings.data.mul_(10)  # so that how it is resampled is not lost among the patches
    model.save_pretrained(tmp_path / "hf")
    hf_spec = resolve_teacher(f"hf:{tmp_path / 'hf'}")
    followed = load_teacher(hf_spec, weights=None, device=CPU, dtype=torch.float32, sizes=(224,))(views(224))
    reg = "_reg4" if registers else ""
    spec = narrow(resolve_teacher(f"timm:vit_small_patch14{reg}_dinov2.lvd142m"))
    state = dinov2_in_timm_names(safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors"))
    other = load_state(spec, state, tmp_path, sizes=(224,))(views(224))
    assert (float(cosines(other.dense, followed.dense).min()) > SEEN) == (registers > 0)


def dinov3_narrow(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Teacher]:
    spec = narrow(REGISTRY["dinov3-s"])
    model = timm.create_model(spec.model.split(".")[0], num_classes=0).eval()
    fill_at_random(model)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return model, load_teacher(spec, weights=path, device=CPU, dtype=dtype, sizes=(64,))


@pytest.mark.usefixtures("narrow_vits")
def test_dinov3_summary_is_not_what_timm_s_forward_gives(tmp_path: Path) -> None:
    model, teacher = dinov3_narrow(tmp_path)
    pixels, tokens = by_hand(views(64), teacher.spec), teacher(views(64))
    assert tokens.summary is not None
    with torch.no_grad():
        assert cosines(model(pixels), tokens.summary).max() < 0.99
        assert cosines(model(pixels), tokens.dense.mean(dim=(1, 2))).min() > SEEN
        assert cosines(model.forward_features(pixels)[:, 0], tokens.summary).min() > SEEN


@pytest.mark.usefixtures("narrow_vits")
def test_dinov3_angles_are_float32_where_transformers_rounds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = DINOv3ViTRopePositionEmbedding(DINOv3ViTConfig(hidden_size=64, num_attention_heads=4))
    assert {angle.dtype for angle in rope(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16))} == {torch.bfloat16}
    _, teacher = dinov3_narrow(tmp_path, torch.bfloat16)
    module: Any = teacher.module
    seen, own = [], module.rope.get_embed
    monkeypatch.setattr(module.rope, "get_embed", lambda *args, **kw: seen.append(own(*args, **kw)) or seen[-1])
    teacher(views(64))
    assert [angles.dtype for angles in seen] == [torch.float32]


def convnext_in_timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    swaps = (
        (r"^model\.", ""),
        (r"^stages\.0\.downsample_layers\.", "stem."),
        (r"downsample_layers", "downsample"),
        (r"\.layers\.", ".blocks."),
        (r"depthwise_conv", "conv_dw"),
        (r"pointwise_conv", "mlp.fc"),
        (r"(blocks\.\d+)\.layer_norm", r"\1.norm"),
        (r"^layer_norm", "head.norm"),
    )
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for old, new in swaps:
            name = re.sub(old, new, name)
        out[name] = tensor
    return out


def test_dinov3_convnext_has_the_norm_that_timm_keeps_in_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, **options, **NARROW_CONVNEXT))
    spec = narrow(REGISTRY["dinov3-convnext-t"])
    config = DINOv3ConvNextConfig(hidden_sizes=list(NARROW_CONVNEXT["dims"]), depths=list(NARROW_CONVNEXT["depths"]))
    model = DINOv3ConvNextModel(config).eval()
    fill_at_random(model)
    teacher = load_state(spec, convnext_in_timm_names(model.state_dict()), tmp_path, sizes=(224,))
    module: Any = teacher.module
    pixels, tokens = by_hand(views(224), spec), teacher(views(224))
    with torch.no_grad():
        own = model(pixels)
        features = module.forward_features(pixels).permute(0, 2, 3, 1)
    assert features.shape[-1] == NARROW_CONV_WIDTH
    assert_same_tokens(tokens, own.last_hidden_state[:, 1:], own.pooler_output)
    assert cosines(features, tokens.dense).max() < 0.99


@pytest.mark.usefixtures("narrow_vits")
def test_clip_patch_tokens_are_normed_as_open_clip_has_them_and_transformers_not(tmp_path: Path) -> None:
    own = open_clip.create_model("ViT-B-32-quickgelu", load_weights=False).eval().visual
    fill_at_random(own)
    config = CLIPVisionConfig(
        hidden_size=NARROW_WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=4 * NARROW_WIDTH
    )
    other = CLIPVisionModel(config).eval()
    state = {f"visual.{name}": tensor for name, tensor in own.state_dict().items()}
    other.load_state_dict(clip_in_hugging_face_names(state), strict=True)
    other.save_pretrained(tmp_path / "hf")
    hf_spec = resolve_teacher(f"hf:{tmp_path / 'hf'}")
    teachers = (
        load_state(narrow(REGISTRY["clip-b32"]), state, tmp_path, sizes=(224,)),
        load_teacher(hf_spec, weights=None, device=CPU, dtype=torch.float32, sizes=(224,)),
    )
    own.output_tokens = True
    with torch.no_grad():
        pixels = by_hand(views(224), hf_spec)
        _, dense = own(pixels)
        patches = other(pixels).last_hidden_state[:, 1:]
    assert cosines(patches, dense).max() < 0.99
    for teacher in teachers:
        assert cosines(teacher(views(224)).dense.flatten(1, 2), dense).min() > SEEN


def test_pe_core_projected_is_the_image_embedding_of_open_clip(tmp_path: Path) -> None:
    text = {"context_length": 4, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
    own = open_clip.create_model("PE-Core-T-16-384", load_weights=False, text_cfg=text).eval()
    fill_at_random(own.visual)
    spec = REGISTRY["pe-core-t-proj"]
    trunk = dict(own.visual.trunk.state_dict())
    tokens = load_state(spec, trunk, tmp_path, sizes=(384,))(views(384))
    with torch.no_grad():
        embedding = own.encode_image(by_hand(views(384), spec))
    assert tokens.summary is not None and tokens.summary.shape == (2, 512)
    assert cosines(tokens.summary, embedding).min() > SEEN
    plain = load_state(REGISTRY["pe-core-t"], trunk, tmp_path, sizes=(384,))(views(384))
    assert torch.equal(plain.dense, tokens.dense)


@pytest.mark.parametrize("name", ["pe-lang-l", "pe-spatial-g"])
def test_the_mean_of_pe_lang_and_pe_spatial_is_timm_s_own_forward(name: str) -> None:
    spec = REGISTRY[name]
    size = spec.native_size
    own, teacher = random_pair(spec, is_narrow=True, sizes=(size,))
    tokens = teacher(views(size))
    with torch.no_grad():
        assert tokens.summary is not None
        assert cosines(own.module(by_hand(views(size), spec)), tokens.summary).min() > SEEN


SIGLIPS = [name for name in REGISTRY if name.startswith("siglip") and "naflex" not in name]


@pytest.mark.parametrize("name", SIGLIPS)
def test_notes_name_the_gelu_that_timm_gives_siglip(name: str) -> None:
    with built_on_meta():
        gelu = type(timm.create_model(REGISTRY[name].model).blocks[0].mlp.act).__name__
    assert f"with the {'tanh' if gelu == 'GELUTanh' else 'exact'} GELU" in REGISTRY[name].note


RADIOS = [name for name in REGISTRY if name.startswith("radio")]


@pytest.mark.parametrize("name", RADIOS)
def test_notes_name_how_timm_resamples_the_table_of_radio(name: str) -> None:
    with built_on_meta():
        aligns = timm.create_model(REGISTRY[name].model).embeds.pos_embed_align_corners
    assert ("corners aligned" in REGISTRY[name].note) == aligns


@pytest.mark.usefixtures("narrow_vits")
def test_radio_pixels_are_normalised_once_whichever_library(tmp_path: Path) -> None:
    """The preprocessor's mean and std in the repository are a trap: transformers' model normalises inside."""
    model = RadioModel(RadioConfig(hidden_size=NARROW_WIDTH, num_hidden_layers=2, num_attention_heads=4)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" not in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path)
    row = narrow(REGISTRY["radio-v4-h"])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": row.mean, "image_std": row.std}))
    weights = tmp_path / "model.safetensors"
    state = {k: v for k, v in safetensors.torch.load_file(weights).items() if "layer_scale" not in k}
    safetensors.torch.save_file(state, weights)  # the authors' files have none

    unit = views(96).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        once, twice = model(unit), model(normalise(views(96), row.mean, row.std))
    summary = once.last_hidden_state[:, model.config.summary_idxs].flatten(1)
    assert cosines(twice.features, once.features).max() < 0.99, "normalising twice would go unseen"
    for spec in (resolve_teacher(f"hf:{tmp_path}"), row):
        teacher = load_teacher(spec, weights=weights, device=CPU, dtype=torch.float32, sizes=(96,))
        assert_same_tokens(teacher(views(96)), once.features, summary)
