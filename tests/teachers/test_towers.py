"""Rows whose weights transformers can run, too: its processor and its model, with the same tensors renamed.

Neither mean and std nor the order of patches nor the norms come from the row: the picture goes in as pixels of 8 bits.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from teacher_checks import CPU, assert_same_tokens, clip_in_hugging_face_names, load_state, views
from timm.models.qwen3_vit import checkpoint_filter_fn_classifier
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionConfig, Qwen3VLVisionModel
from transformers.models.tipsv2.modeling_tipsv2 import Tipsv2VisionConfig, Tipsv2VisionModel

from eupe.errors import TeacherError
from eupe.teachers.own_forward import NARROW_WIDTH, fill_at_random, narrow, open_clip_preparation
from eupe.teachers.registry import REGISTRY
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import load_teacher

State = dict[str, Tensor]
DIMENSIONS: dict[str, Any] = {"hidden_size": NARROW_WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
BLOCK = {r"encoder\.layers?\.": "blocks.", r"layer_?norm_?(1|before)\b|rms_norm1": "norm1"} | {
    r"layer_?norm_?(2|after)\b|rms_norm2": "norm2",
    r"(self_attn|attention)\.(out_proj|o_proj|projection_layer)": "attn.proj",
    r"layer_scale([12])\.lambda1|lambda_([12])": r"ls\1\2.gamma",
    r"^(post_)?layernorm|^rms_norm\.": "norm.",
}
"""Names of transformers, as patterns, to names of timm, for all of the families."""


def in_timm_names(state: State, swaps: dict[str, str]) -> State:
    """Rename tensors, and join each block's query, key and value."""
    out: State = {}
    for name, tensor in state.items():
        if re.search(r"\.k_proj\.|\.v_proj\.", name):
            continue
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = re.sub(r"(self_attn|attention)\.q_proj", "attn.qkv", name)
        for old, new in (swaps | BLOCK).items():
            name = re.sub(old, new, name).replace("norm..", "norm.")
        out[name] = tensor
    return out


def unfolded(tokens_ND: Tensor, batch: int, grid: int) -> Tensor:
    """Row by row, from 2x2 blocks one after the other."""
    blocks = tokens_ND.reshape(batch, grid // 2, grid // 2, 2, 2, -1)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(batch, grid * grid, -1)


def tipsv2() -> tuple[Any, State, Callable[[Any], Any]]:
    model = Tipsv2VisionModel(Tipsv2VisionConfig(**DIMENSIONS)).eval()
    fill_at_random(model)
    swaps = {r"embeddings\.patch_embeddings\.projection": "patch_embed.proj", r"embeddings\.cls_token": "cls_token"}
    state = in_timm_names(dict(model.state_dict()), {**swaps, r"embeddings\.register_tokens": "reg_token"})
    positions = state.pop("embeddings.position_embeddings")
    del state["embeddings.mask_token"]
    state |= {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}

    def run(pictures: Any) -> tuple[Tensor, Tensor]:
        output = model(**transformers.Tipsv2ImageProcessor()(pictures, return_tensors="pt"))
        return output.last_hidden_state[:, 2:], output.pooler_output

    return model, state, run


def aimv2() -> tuple[Any, State, Callable[[Any], Any]]:
    config = transformers.Aimv2VisionConfig(**DIMENSIONS, intermediate_size=int(2.75 * NARROW_WIDTH), use_head=False)
    model = transformers.Aimv2VisionModel(config).eval()
    fill_at_random(model)
    swaps = {r"embeddings\.patch_embed": "patch_embed.proj", r"embeddings\.rms_norm": "patch_embed.norm"}
    swaps |= {r"ffn\.gate_proj": "mlp.fc1_g", r"ffn\.up_proj": "mlp.fc1_x", r"ffn\.down_proj": "mlp.fc2"}
    state = in_timm_names(dict(model.state_dict()), swaps)
    state["pos_embed"] = state.pop("embeddings.position_embedding.weight")[None]

    def run(pictures: Any) -> tuple[Tensor, Tensor]:
        processor = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False)
        dense = model(**processor(pictures, return_tensors="pt")).last_hidden_state
        return dense, dense.mean(1)

    return model, state, run


def internvit() -> tuple[Any, State, Callable[[Any], Any]]:
    config = transformers.InternVLVisionConfig(**DIMENSIONS, intermediate_size=4 * NARROW_WIDTH, attention_bias=True)
    model = transformers.InternVLVisionModel(config).eval()
    fill_at_random(model)
    swaps = {r"embeddings\.patch_embeddings\.projection": "patch_embed.proj", r"embeddings\.cls_token": "cls_token"}
    state = in_timm_names(dict(model.state_dict()), {**swaps, r"embeddings\.position_embeddings": "pos_embed"})

    def run(pictures: Any) -> tuple[Tensor, Tensor]:
        processor = transformers.GotOcr2ImageProcessor(
            do_resize=False,
            image_mean=transformers.image_utils.IMAGENET_DEFAULT_MEAN,
            image_std=transformers.image_utils.IMAGENET_DEFAULT_STD,
        )
        tokens = model(processor(pictures, return_tensors="pt")["pixel_values"]).last_hidden_state
        return tokens[:, 1:], tokens[:, 0]

    return model, state, run


def siglip2_naflex() -> tuple[Any, State, Callable[[Any], Any]]:
    config = transformers.Siglip2VisionConfig(**DIMENSIONS, intermediate_size=4 * NARROW_WIDTH)
    model = transformers.Siglip2VisionModel(config).eval()
    fill_at_random(model)
    swaps = {r"embeddings\.patch_embedding": "embeds.proj", r"head\.attention\.out_proj": "attn_pool.proj"}
    swaps |= {r"head\.probe": "attn_pool.latent", r"head\.layernorm": "attn_pool.norm", r"^head\.mlp": "attn_pool.mlp"}
    state = in_timm_names(dict(model.state_dict()), swaps)
    state["embeds.pos_embed"] = state.pop("embeddings.position_embedding.weight").reshape(1, 16, 16, -1)
    for part in ("weight", "bias"):
        query, key, value = state.pop(f"head.attention.in_proj_{part}").chunk(3)
        state |= {f"attn_pool.q.{part}": query, f"attn_pool.kv.{part}": torch.cat([key, value])}

    def run(pictures: Any) -> tuple[Tensor, Tensor]:
        processor = transformers.Siglip2ImageProcessor(max_num_patches=(pictures.shape[-1] // 16) ** 2)
        output = model(**processor(list(pictures), return_tensors="pt"))
        return output.last_hidden_state, output.pooler_output

    return model, state, run


def qwen3_vl() -> tuple[Any, State, Callable[[Any], Any]]:
    sizes = {"hidden_size": NARROW_WIDTH, "depth": 2, "num_heads": 4, "intermediate_size": 4 * NARROW_WIDTH}
    model = Qwen3VLVisionModel(Qwen3VLVisionConfig(**sizes, out_hidden_size=8, deepstack_visual_indexes=[])).eval()
    fill_at_random(model)
    named = {f"model.visual.{name}": tensor for name, tensor in model.state_dict().items()}
    state = checkpoint_filter_fn_classifier(named, timm.create_model("qwen3_vit_306m", num_classes=0))
    state = {name: tensor.float() for name, tensor in state.items()}  # it adds up the two frames in float64

    def run(pictures: Any) -> tuple[Tensor, Tensor]:
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        processor = transformers.Qwen2VLImageProcessor(patch_size=16, do_resize=False, **half)
        inputs = processor(list(pictures), return_tensors="pt")
        tokens = model(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).last_hidden_state
        dense = unfolded(tokens, len(pictures), pictures.shape[-1] // 16)
        return dense, dense.mean(1)

    return model, state, run


TOWERS: dict[str, tuple[Callable[[], tuple[Any, State, Callable[[Any], Any]]], int]] = {
    "tipsv2-b": (tipsv2, 448),
    "aimv2-l-224": (aimv2, 224),
    "internvit-300m": (internvit, 448),
    "siglip2-naflex-b": (siglip2_naflex, 256),
    "qwen3-vl-4b": (qwen3_vl, 128),
}


@pytest.mark.usefixtures("narrow_vits")
@pytest.mark.parametrize("name", TOWERS)
def test_the_same_in_transformers(name: str, tmp_path: Path) -> None:
    make, size = TOWERS[name]
    _, state, run = make()
    spec = narrow(REGISTRY[name])
    teacher = load_state(spec, state, tmp_path, sizes=(size,))
    pictures = views(size)
    with torch.no_grad():
        dense, summary = run(pictures.permute(0, 3, 1, 2))
    assert_same_tokens(teacher(pictures), dense, summary)


@pytest.mark.parametrize("way", ["directory", "weights"])
def test_sam3_is_the_image_encoder_of_a_whole_video_model(way: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    windows = {"image_size": 112, "pretrain_image_size": 56, "window_size": 4, "global_attn_indexes": [1]}
    config = transformers.Sam3VisionConfig(
        backbone_config=transformers.Sam3ViTConfig(**sizes, **windows), fpn_hidden_size=16
    )
    own = transformers.Sam3VisionModel(config).eval()
    fill_at_random(own)
    whole = transformers.Sam3VideoConfig(detector_config=transformers.Sam3Config(vision_config=config))
    whole.save_pretrained(tmp_path)
    processor = transformers.Sam3ImageProcessor(do_resize=False)
    processor.save_pretrained(tmp_path)
    state = {f"detector_model.vision_encoder.{name}": tensor for name, tensor in own.state_dict().items()}
    state |= {"detector_model.detr_encoder.x": torch.ones(1), "tracker_model.x": torch.ones(1)}
    save_file(state, tmp_path / "model.safetensors")
    spec, pictures = resolve_teacher(f"hf:{tmp_path}"), views(112)
    assert (spec.summary, spec.dense, spec.native_size) == ("none", "raw", 112)
    weights = tmp_path if way == "weights" else None
    teacher = load_teacher(spec, weights=weights, device=CPU, dtype=torch.float32, sizes=(112,))
    with torch.no_grad():
        inputs = processor(pictures.permute(0, 3, 1, 2), return_tensors="pt")
        dense = own(inputs["pixel_values"]).last_hidden_state
    assert_same_tokens(teacher(pictures), dense, None)
    with pytest.raises(TeacherError, match="use --size 112"):
        load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(56,))


@pytest.mark.usefixtures("narrow_vits")
def test_eva02_clip_is_the_tower_and_the_image_embedding_of_open_clip(tmp_path: Path) -> None:
    row = narrow(REGISTRY["eva02-clip-b16-proj"])
    own = open_clip.create_model("EVA02-B-16", load_weights=False).eval()
    fill_at_random(own.visual)
    state, pictures = dict(own.visual.trunk.state_dict()), views(224)
    pixels = open_clip_preparation(open_clip.get_pretrained_cfg("EVA02-B-16", "merged2b_s8b_b131k"))(pictures.numpy())
    with torch.no_grad():
        embedding, normed = own.encode_image(pixels), own.visual.trunk.forward_features(pixels)
    assert_same_tokens(load_state(row, state, tmp_path, sizes=(224,))(pictures), normed[:, 1:], embedding)
    plain = load_state(narrow(REGISTRY["eva02-clip-b16"]), state, tmp_path, sizes=(224,))
    assert_same_tokens(plain(pictures), normed[:, 1:], normed[:, 0])


@pytest.mark.usefixtures("narrow_vits")
def test_metaclip2_is_the_class_token_and_the_normed_patches_of_transformers(tmp_path: Path) -> None:
    row = narrow(REGISTRY["metaclip2-h14"])
    own = open_clip.create_model(row.model.split("@")[0], load_weights=False).eval()
    fill_at_random(own.visual)
    state = {f"visual.{name}": tensor for name, tensor in own.visual.state_dict().items()}
    config = transformers.MetaClip2VisionConfig(**DIMENSIONS, intermediate_size=4 * NARROW_WIDTH, patch_size=14)
    other = transformers.MetaClip2VisionModel(config).eval()
    other.load_state_dict(clip_in_hugging_face_names(state), strict=True)
    pictures = views(224)
    processor = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False)
    with torch.no_grad():
        output = other(**processor(pictures.permute(0, 3, 1, 2), return_tensors="pt"))
        dense = other.post_layernorm(output.last_hidden_state[:, 1:])
    assert_same_tokens(load_state(row, state, tmp_path, sizes=(224,))(pictures), dense, output.pooler_output)


@pytest.mark.parametrize(("arch", "kind"), [("qwen3_vit_88m.qwen3_5_0_8b", "raw"), ("vit_tiny_patch16_224", "normed")])
def test_a_norm_that_follows_the_pooling_norms_no_tokens(arch: str, kind: str) -> None:
    assert resolve_teacher(f"timm:{arch}").dense == kind
