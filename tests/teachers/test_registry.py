"""Every row of the registry against what its library says of the model, without weights or memory."""

import json
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm
import torch
from timm.layers import RmsNorm, SwiGLUPacked
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    RadioConfig,
    Sam3ImageProcessor,
    Sam3ViTConfig,
    VJEPA2Config,
)
from transformers.models.vjepa2.video_processing_vjepa2 import VJEPA2VideoProcessor

from eupe.models.meta import built_on_meta
from eupe.teachers import hf_adapter, open_clip_adapter, timm_adapter
from eupe.teachers.registry import ALIASES, REGISTRY
from eupe.teachers.spec import TeacherSpec, is_permissive

LICENCE = ("--licence", "permissive")
ROWS = {
    backend: [row for row in REGISTRY.values() if row.backend == backend] for backend in ("timm", "open_clip", "hf")
}

TIMM_TWINS = {
    "facebook/dinov2-small": "vit_small_patch14_dinov2.lvd142m",
    "facebook/dinov2-base": "vit_base_patch14_dinov2.lvd142m",
    "facebook/dinov2-large": "vit_large_patch14_dinov2.lvd142m",
    "facebook/dinov2-giant": "vit_giant_patch14_dinov2.lvd142m",
    "facebook/dinov2-with-registers-small": "vit_small_patch14_reg4_dinov2.lvd142m",
    "facebook/dinov2-with-registers-base": "vit_base_patch14_reg4_dinov2.lvd142m",
    "facebook/dinov2-with-registers-large": "vit_large_patch14_reg4_dinov2.lvd142m",
    "facebook/dinov2-with-registers-giant": "vit_giant_patch14_reg4_dinov2.lvd142m",
}
"""timm's version of the models that Hugging Face loads: the oracle for their widths."""


SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
GIANT = {"patch_size": 14, "depth": 24, "num_heads": 24, "embed_dim": 1536, "mlp_ratio": 2.66667 * 2}
AT_224 = {"img_size": 224, "init_values": 1e-5, "num_classes": 0}
CARDS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf-hub:MahmoodLab/UNI2-h": (
        "vit_giant_patch14_224",
        {**AT_224, **GIANT, **SWIGLU, "no_embed_class": True, "reg_tokens": 8},
    ),
    "hf-hub:paige-ai/Virchow2": (
        "vit_huge_patch14_224",
        {**AT_224, **SWIGLU, "reg_tokens": 4, "mlp_ratio": 5.3375, "global_pool": ""},
    ),
    "hf-hub:bioptimus/H-optimus-0": ("vit_giant_patch14_reg4_dinov2", AT_224),
    "hf-hub:bioptimus/H-optimus-1": ("vit_giant_patch14_reg4_dinov2", AT_224),
}
"""What the model cards and config.json files on the hub say, in timm's own words."""


def by_name(rows: list[TeacherSpec]) -> Any:
    return pytest.mark.parametrize("spec", rows, ids=[row.name for row in rows])


def timm_on_meta(name: str, **options: Any) -> Any:
    with built_on_meta():
        return timm.create_model(name, **options).eval()


def meta_tokens(adapter: Any, model: nn.Module, spec: TeacherSpec) -> tuple[Any, Any]:
    """Shapes of summary and dense that the adapter gives at native size, of few blocks as of many."""
    if hasattr(model, "blocks") and hasattr(model.blocks[0], "attn"):
        model.blocks = model.blocks[:2]
    with torch.no_grad():
        tokens = adapter.tokens(model, spec, torch.zeros(2, 3, spec.native_size, spec.native_size, device="meta"))
    return None if tokens.summary is None else tuple(tokens.summary.shape), tuple(tokens.dense.shape)


def promised(spec: TeacherSpec) -> tuple[Any, Any]:
    grid = spec.native_size // spec.patch
    return (2, spec.summary_dim) if spec.summary_dim else None, (2, grid, grid, spec.dense_dim)


@by_name([row for row in ROWS["timm"] if row.hub_repository])
def test_rows_of_the_hub(spec: TeacherSpec) -> None:
    """What the authors' model cards give to timm, which has no table of theirs; test_timm_hub.py loads from a hub."""
    arch, options = CARDS[spec.model]
    model = timm_on_meta(arch, **options)
    assert (spec.dense_dim, spec.prefix_tokens) == (model.num_features, model.num_prefix_tokens)
    assert (spec.patch, spec.native_size) == (model.patch_embed.patch_size[0], model.patch_embed.img_size[0])
    with built_on_meta():
        ours = timm_adapter.build(spec, sizes=(spec.native_size,))
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (ours, model)]
    assert shapes[0] == shapes[1] and [*map(type, ours.modules())] == [*map(type, model.modules())]
    assert meta_tokens(timm_adapter, model, spec) == promised(spec)


@by_name([row for row in ROWS["timm"] if not row.hub_repository])
def test_timm_rows(spec: TeacherSpec) -> None:
    model = timm_on_meta(spec.model, **({} if spec.summary == "projected" else {"num_classes": 0}))
    config = model.pretrained_cfg
    assert spec.model in timm.list_pretrained()
    assert (spec.mean, spec.std) == (tuple(config["mean"]), tuple(config["std"]))
    assert config["input_size"] == (3, spec.native_size, spec.native_size)
    assert spec.licence.lower() == config["license"]
    assert spec.patch == model.feature_info[-1]["reduction"]
    assert spec.prefix_tokens == getattr(model, "num_prefix_tokens", 0)
    assert meta_tokens(timm_adapter, model, spec) == promised(spec)
    assert_kinds(spec, model)


def assert_kinds(spec: TeacherSpec, model: Any) -> None:
    """The kinds are what the architecture has: a final norm, an attention pool, a trained class token."""
    if spec.prefix_tokens or spec.model.startswith(("vit_", "aimv2_")):
        assert (spec.dense == "normed") == isinstance(model.norm, nn.LayerNorm | RmsNorm)
    if spec.model.startswith("convnext"):
        assert spec.dense == "normed" and type(model.head.norm).__name__.startswith("LayerNorm")
    pools = getattr(model, "attn_pool", None) is not None
    assert (spec.summary == "attention_pool") == (pools and isinstance(model.head, nn.Identity))
    assert (spec.summary == "projected") == isinstance(getattr(model, "head", None), nn.Linear)
    assert (spec.summary == "none") == (spec.summary_dim == 0)
    if spec.summary in ("cls", "cls_concat"):
        assert spec.prefix_tokens * spec.dense_dim >= spec.summary_dim


@by_name(ROWS["open_clip"])
def test_open_clip_rows(spec: TeacherSpec) -> None:
    arch, tag = spec.model.split("@")
    settings = open_clip.get_pretrained_cfg(arch, tag)
    with built_on_meta():
        visual = open_clip.create_model(arch, load_weights=False, device="meta").visual
    assert (spec.mean, spec.std) == (tuple(settings["mean"]), tuple(settings["std"]))
    assert visual.image_size == (spec.native_size, spec.native_size)
    assert visual.patch_size == visual.conv1.kernel_size == (spec.patch, spec.patch)
    assert visual.ln_post.normalized_shape == (spec.dense_dim,) and not visual.final_ln_after_pool
    gelu = type(visual.transformer.resblocks[0].mlp.gelu).__name__
    assert gelu == ("QuickGELU" if settings.get("quick_gelu") else "GELU")
    visual.proj, visual.output_tokens = visual.proj if spec.summary == "projected" else None, True
    assert meta_tokens(open_clip_adapter, visual, spec) == promised(spec)


@by_name([row for row in ROWS["hf"] if "vjepa2" in row.model])
def test_vjepa2_rows(spec: TeacherSpec) -> None:
    """The library's defaults are those of the large model."""
    config = VJEPA2Config()
    assert (spec.patch, spec.prefix_tokens) == (config.patch_size, 0)
    assert (spec.mean, spec.std) == (tuple(VJEPA2VideoProcessor.image_mean), tuple(VJEPA2VideoProcessor.image_std))
    with built_on_meta():
        model = hf_adapter.build(spec, sizes=(spec.native_size,)).eval()
    assert model.config.crop_size == spec.native_size and spec.model.endswith(f"-{spec.native_size}")
    if spec.name == "vjepa2-l":
        assert model.config.to_dict() == config.to_dict()
    model.encoder.layer = model.encoder.layer[:2]
    assert meta_tokens(hf_adapter, model, spec) == promised(spec)


def test_sam3_is_the_library_s_default() -> None:
    row, config, processor = REGISTRY["sam3"], Sam3ViTConfig(), Sam3ImageProcessor
    assert (row.patch, row.dense_dim, row.native_size) == (config.patch_size, config.hidden_size, config.image_size)
    assert (row.mean, row.std) == (tuple(processor.image_mean), tuple(processor.image_std))
    with built_on_meta():
        model = hf_adapter.build(row, sizes=(row.native_size,)).eval()
    model.layers = model.layers[:1]
    assert meta_tokens(hf_adapter, model, row) == promised(row)


@by_name([row for row in ROWS["hf"] if row.model in TIMM_TWINS])
def test_hf_rows(spec: TeacherSpec) -> None:
    twin = timm_on_meta(TIMM_TWINS[spec.model])
    assert spec.dense_dim == twin.num_features
    assert spec.patch == twin.patch_embed.patch_size[0]
    assert spec.prefix_tokens == twin.num_prefix_tokens
    assert spec.licence.lower() == twin.pretrained_cfg["license"]
    assert (spec.mean, spec.std) == (tuple(twin.pretrained_cfg["mean"]), tuple(twin.pretrained_cfg["std"]))
    assert (spec.dense == "normed") == isinstance(twin.norm, nn.LayerNorm)
    with built_on_meta():
        model = hugging_face_model(spec, twin).eval()
    assert meta_tokens(hf_adapter, model, spec) == promised(spec)


def hugging_face_model(spec: TeacherSpec, twin: Any) -> nn.Module:
    """The library's class for the repository, of the twin's dimensions."""
    dimensions = {
        "hidden_size": twin.num_features,
        "num_hidden_layers": len(twin.blocks),
        "num_attention_heads": twin.blocks[0].attn.num_heads,
        "image_size": 518,
        "patch_size": 14,
        "use_swiglu_ffn": "giant" in spec.model,
    }
    if "registers" in spec.model:
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**dimensions, num_register_tokens=4))
    return Dinov2Model(Dinov2Config(**dimensions))


def test_radio_rows_have_the_summary_of_the_authors_configuration() -> None:
    config = RadioConfig()
    row = REGISTRY["radio-v4-h"]
    assert (row.dense_dim, row.prefix_tokens) == (config.hidden_size, config.num_summary_tokens)
    assert row.summary_dim == len(config.summary_idxs) * config.hidden_size
    assert config.summary_idxs == list(range(len(config.summary_idxs))), "the row takes leading class tokens"
    assert (row.mean, row.std) == (tuple(config.norm_mean), tuple(config.norm_std))


def test_rows_name_themselves_and_aliases_lead_to_rows() -> None:
    assert all(name == row.name for name, row in REGISTRY.items())
    assert set(ALIASES.values()) <= set(REGISTRY) and not set(ALIASES) & set(REGISTRY)
    assert ALIASES["dinov2"] == "dinov2-s"


def test_the_list_by_licence(run_eupe: Callable[..., Any]) -> None:
    every, few = (json.loads(run_eupe("teachers", *words, "--json").out)["teachers"] for words in ([], LICENCE))
    assert [row["name"] for row in every] == list(REGISTRY)
    assert {row["licence"] for row in few} == {"Apache-2.0", "MIT"}
    closed = {row["name"] for row in every} - {row["name"] for row in few}
    assert {"dinov3-s", "eupe-t", "radio-v4-h", "clip-dfn-l14", "metaclip2-h14", "aimv2-l-448", "uni2-h"} <= closed
    assert not {"dinov2-s", "pe-core-g", "clip-b16", "tipsv2-b", "h-optimus-0", "vjepa2-l"} & closed
    shown = run_eupe("teachers", *LICENCE).out
    assert "dinov2-s" in shown and "dinov3" not in shown
    for words, said in (
        (["--licence", "free"], "--licence free is unknown; give permissive"),
        ([*LICENCE, "dinov2"], "are for the list; leave them out"),
    ):
        outcome = run_eupe("teachers", *words)
        assert outcome.code == 2 and said in " ".join(outcome.err.split())


@pytest.mark.parametrize("licence", ["unknown", "unknown: no run is here", "other", "", "CC-BY-NC-4.0", "own"])
def test_what_is_not_known_is_not_permissive(licence: str) -> None:
    assert not is_permissive(licence) and is_permissive("mit") and is_permissive("BSD-3-Clause")


def test_every_row_says_what_a_user_must_know() -> None:
    assert all(row.note and row.licence for row in REGISTRY.values())
    assert all(row.native_size % row.patch == 0 for row in REGISTRY.values())
