"""The table of teachers: name to spec. Rows of one family share a helper; the tests cover a new row automatically.

Widths, patch, prefix, size, mean and std are checked row by row against the libraries' own definitions. If libraries
disagree on the same weights, the note says which one is followed; `tests/teachers/test_disagreements.py` shows it.
Resizing presets are not part of a teacher: all teachers of a corpus get the same views.
"""

from __future__ import annotations

import dataclasses

from eupe.teachers.spec import TeacherSpec

Triple = tuple[float, float, float]

IMAGENET: dict[str, Triple] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPENAI: dict[str, Triple] = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF: dict[str, Triple] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SATELLITE: dict[str, Triple] = {"mean": (0.43, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}

APACHE = "Apache-2.0"
DINOV3_LICENCE = "DINOv3-License"
FAIR_LICENCE = "FAIR-Noncommercial-Research-License"
NVIDIA_LICENCE = "NVIDIA-Open-Model-License"
APPLE_LICENCE = "Apple-ASCL"


_DINOV2 = (
    "follows transformers, whose repository the weights are from; off 518 px (37x37) it resamples the position table "
    "bicubic, timm antialiases, too: one and the same at 518 px, dense cosines down to 0.987 between them at 224 px"
)
_DINOV2_REGISTERS = (
    "follows transformers, whose repository the weights are from; off 518 px (37x37) it resamples the position table "
    "bicubic and antialiased, as timm does, and unlike DINOv2 without registers"
)


def _dinov2(name: str, repository: str, width: int, registers: int = 0) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="hf",
        model=f"facebook/{repository}",
        patch=14,
        dense_dim=width,
        summary_dim=width,
        prefix_tokens=1 + registers,
        summary="cls",
        dense="normed",
        native_size=224,
        **IMAGENET,
        licence=APACHE,
        note=_DINOV2_REGISTERS if registers else _DINOV2,
    )


def _dinov3(name: str, model: str, width: int, pixels: dict[str, Triple], licence: str = DINOV3_LICENCE) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="timm",
        model=model,
        patch=16,
        dense_dim=width,
        summary_dim=width,
        prefix_tokens=5,
        summary="cls",
        dense="normed",
        native_size=256,
        **pixels,
        licence=licence,
        note="summary is the class token, as in transformers; timm's own forward would give the mean of the patches; "
        "follows timm, whose RoPE angles are float32 in any arithmetic, transformers' have the dtype of the pixels; "
        "the view decides how pictures are resized: timm's preset is bicubic, transformers' a bilinear squash",
    )


def _convnext(name: str, model: str, width: int, licence: str, note: str, native_size: int = 224) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="timm",
        model=model,
        patch=32,
        dense_dim=width,
        summary_dim=width,
        prefix_tokens=0,
        summary="pooled",
        dense="normed",
        native_size=native_size,
        **IMAGENET,
        licence=licence,
        note=note,
    )


def _and_projected(row: TeacherSpec, width: int) -> tuple[TeacherSpec, TeacherSpec]:
    """Return the row, and NAME-proj, whose summary is projected to the text space."""
    projected_name = f"{row.name}-proj"
    ahead = f"the summary is ahead of the projection to the text space ({width} wide), {projected_name} has it behind"
    behind = (
        "the summary is behind the projection to the text space, as zero-shot needs it, not yet of unit length "
        "(open_clip's encode_image, timm's own forward)"
    )
    return (
        dataclasses.replace(row, note=f"{ahead}; {row.note}"),
        dataclasses.replace(
            row, name=projected_name, summary="projected", summary_dim=width, note=f"{behind}; {row.note}"
        ),
    )


_PE_VIEWS = (
    "the view decides how pictures are resized: timm's preset is a bicubic centre crop, open_clip's a bilinear squash"
)


def _pe_core(
    name: str, model: str, width: int, patch: int, size: int, prefix: int, projected: int
) -> tuple[TeacherSpec, TeacherSpec]:
    row = TeacherSpec(
        name=name,
        backend="timm",
        model=f"vit_pe_core_{model}.fb",
        patch=patch,
        dense_dim=width,
        summary_dim=width,
        prefix_tokens=prefix,
        summary="attention_pool",
        dense="normed",
        native_size=size,
        **HALF,
        licence=APACHE,
        note="it pools all tokens by attention, the class token among them where there is one; " + _PE_VIEWS,
    )
    return _and_projected(row, projected)


def _pe_raw(name: str, model: str, width: int, patch: int, size: int, prefix: int) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="timm",
        model=f"vit_pe_{model}",
        patch=patch,
        dense_dim=width,
        summary_dim=width,
        prefix_tokens=prefix,
        summary="mean",
        dense="raw",
        native_size=size,
        **HALF,
        licence=APACHE,
        note="tokens are the bare residual stream (no final norm, large range: look at the clip counts); the model was "
        "trained without a summary, so the mean of the patch tokens stands in, un-normed, as in timm's own forward; "
        "--tokens dense leaves it out; " + _PE_VIEWS,
    )


def _clip(
    name: str,
    model: str,
    width: int,
    patch: int,
    size: int,
    licence: str,
    pixels: dict[str, Triple] = OPENAI,
    *,
    projected: int,
) -> tuple[TeacherSpec, TeacherSpec]:
    row = TeacherSpec(
        name=name,
        backend="open_clip",
        model=model,
        patch=patch,
        dense_dim=width,
        summary_dim=width,
        prefix_tokens=1,
        summary="cls",
        dense="normed",
        native_size=size,
        **pixels,
        licence=licence,
        note="class and patch tokens after ln_post, as in open_clip and timm; "
        "transformers' last_hidden_state has no post_layernorm on the patch tokens, and off the native size its "
        f"position table is not antialiased; the activation is {'QuickGELU' if 'quickgelu' in model else 'GELU'}, as "
        "in training: open_clip's and timm's names with the other one are refused for such weights",
    )
    return _and_projected(row, projected)


def _siglip_gelu(model: str) -> str:
    with_tanh = ("giantopt", "so400m_patch16", "large_patch16_siglip_512")
    return "the tanh" if model.startswith(with_tanh) else "the exact"


def _siglip(name: str, model: str, width: int, patch: int, size: int) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="timm",
        model=f"vit_{model}",
        patch=patch,
        dense_dim=width,
        summary_dim=width,
        prefix_tokens=0,
        summary="attention_pool",
        dense="normed",
        native_size=size,
        **HALF,
        licence=APACHE,
        note="no class token: the summary is the attention pool, which is also the image embedding, as nothing is "
        f"projected; follows timm, with {_siglip_gelu(model)} GELU, transformers' default is the tanh one for all; off "
        "the native size timm antialiases the position table, transformers does not; the view decides how pictures are "
        "resized: timm's preset is a centre crop of 90%, open_clip's and transformers' squash",
    )


def _radio(name: str, model: str, width: int, class_tokens: int, prefix: int, corners: bool = False) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="timm",
        model=f"naflexvit_{model}.c_radio",
        patch=16,
        dense_dim=width,
        summary_dim=width * class_tokens,
        prefix_tokens=prefix,
        summary="cls_concat",
        dense="raw",
        native_size=512,
        **OPENAI,
        licence=NVIDIA_LICENCE,
        note=f"summary is {class_tokens} class tokens side by side, one per teacher that the authors' summary_idxs "
        "name; tokens have no final norm; follows timm, which leaves out the conditioner that normalises the pixels "
        "inside the authors' and transformers' models (hf: teachers get pixels in [0, 1]): they are normalised once, "
        f"here; off 2048 px the position table is bilinear, corners {'' if corners else 'not '}aligned, as timm has it "
        "for each checkpoint; transformers never aligns them",
    )


def _sam(name: str, model: str) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="timm",
        model=model,
        patch=16,
        dense_dim=256,
        summary_dim=0,
        prefix_tokens=0,
        summary="none",
        dense="raw",
        native_size=1024,
        **IMAGENET,
        licence=APACHE,
        note="dense is the neck's output, which ends in its own norm; there is no summary, stores leave it out; "
        "follows timm, which resamples the position table off 1024 px, where windows are padded and features degrade, "
        "transformers refuses other sizes; the view decides how pictures are resized: transformers' preset shrinks "
        "the longest side and pads",
    )


def _efficientnet(name: str, model: str, pixels: dict[str, Triple]) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="timm",
        model=model,
        patch=32,
        dense_dim=320,
        summary_dim=1280,
        prefix_tokens=0,
        summary="pooled",
        dense="last_stage",
        native_size=224,
        **pixels,
        licence=APACHE,
        note="dense is the map before the head convolution, summary the pooled vector behind it; the map that timm's "
        "and transformers' feature forward ends in lies behind the convolution",
    )


_HEAD_NORM = (
    "dense is the last map under the final norm, summary its mean under that norm, as in transformers; timm's "
    "forward_features ends ahead of the norm, which timm keeps behind the pooling"
)
_CLASSIFIER = (
    "a classifier's features; dense is the last map under the norm that timm keeps behind the pooling; timm's "
    "forward_features and transformers' last_hidden_state end ahead of it"
)

_ROWS = (
    _dinov2("dinov2-s", "dinov2-small", 384),
    _dinov2("dinov2-b", "dinov2-base", 768),
    _dinov2("dinov2-l", "dinov2-large", 1024),
    _dinov2("dinov2-g", "dinov2-giant", 1536),
    _dinov2("dinov2-reg-s", "dinov2-with-registers-small", 384, registers=4),
    _dinov2("dinov2-reg-b", "dinov2-with-registers-base", 768, registers=4),
    _dinov2("dinov2-reg-l", "dinov2-with-registers-large", 1024, registers=4),
    _dinov2("dinov2-reg-g", "dinov2-with-registers-giant", 1536, registers=4),
    _dinov3("dinov3-s", "vit_small_patch16_dinov3.lvd1689m", 384, IMAGENET),
    _dinov3("dinov3-s+", "vit_small_plus_patch16_dinov3.lvd1689m", 384, IMAGENET),
    _dinov3("dinov3-b", "vit_base_patch16_dinov3.lvd1689m", 768, IMAGENET),
    _dinov3("dinov3-l", "vit_large_patch16_dinov3.lvd1689m", 1024, IMAGENET),
    _dinov3("dinov3-h+", "vit_huge_plus_patch16_dinov3.lvd1689m", 1280, IMAGENET),
    _dinov3("dinov3-7b", "vit_7b_patch16_dinov3.lvd1689m", 4096, IMAGENET),
    _dinov3("dinov3-sat-l", "vit_large_patch16_dinov3.sat493m", 1024, SATELLITE),
    _dinov3("dinov3-sat-7b", "vit_7b_patch16_dinov3.sat493m", 4096, SATELLITE),
    _convnext("dinov3-convnext-t", "convnext_tiny.dinov3_lvd1689m", 768, DINOV3_LICENCE, _HEAD_NORM),
    _convnext("dinov3-convnext-s", "convnext_small.dinov3_lvd1689m", 768, DINOV3_LICENCE, _HEAD_NORM),
    _convnext("dinov3-convnext-b", "convnext_base.dinov3_lvd1689m", 1024, DINOV3_LICENCE, _HEAD_NORM),
    _convnext("dinov3-convnext-l", "convnext_large.dinov3_lvd1689m", 1536, DINOV3_LICENCE, _HEAD_NORM),
    _dinov3("eupe-t", "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", 192, IMAGENET, FAIR_LICENCE),
    _dinov3("eupe-s", "vit_small_patch16_dinov3_qkvb.eupe_lvd1689m", 384, IMAGENET, FAIR_LICENCE),
    _dinov3("eupe-b", "vit_base_patch16_dinov3_qkvb.eupe_lvd1689m", 768, IMAGENET, FAIR_LICENCE),
    _convnext("eupe-convnext-t", "convnext_tiny.eupe_lvd1689m", 768, FAIR_LICENCE, _HEAD_NORM, native_size=256),
    _convnext("eupe-convnext-s", "convnext_small.eupe_lvd1689m", 768, FAIR_LICENCE, _HEAD_NORM, native_size=256),
    _convnext("eupe-convnext-b", "convnext_base.eupe_lvd1689m", 1024, FAIR_LICENCE, _HEAD_NORM, native_size=256),
    *_pe_core("pe-core-t", "tiny_patch16_384", 192, 16, 384, prefix=1, projected=512),
    *_pe_core("pe-core-s", "small_patch16_384", 384, 16, 384, prefix=1, projected=512),
    *_pe_core("pe-core-b", "base_patch16_224", 768, 16, 224, prefix=1, projected=1024),
    *_pe_core("pe-core-l", "large_patch14_336", 1024, 14, 336, prefix=1, projected=1024),
    *_pe_core("pe-core-g", "gigantic_patch14_448", 1536, 14, 448, prefix=0, projected=1280),
    _pe_raw("pe-lang-l", "lang_large_patch14_448.fb", 1024, 14, 448, prefix=1),
    _pe_raw("pe-lang-g", "lang_gigantic_patch14_448.fb", 1536, 14, 448, prefix=0),
    _pe_raw("pe-lang-l-tiling", "lang_large_patch14_448.fb_tiling", 1024, 14, 448, prefix=1),
    _pe_raw("pe-lang-g-tiling", "lang_gigantic_patch14_448.fb_tiling", 1536, 14, 448, prefix=0),
    _pe_raw("pe-spatial-t", "spatial_tiny_patch16_512.fb", 192, 16, 512, prefix=1),
    _pe_raw("pe-spatial-s", "spatial_small_patch16_512.fb", 384, 16, 512, prefix=1),
    _pe_raw("pe-spatial-b", "spatial_base_patch16_512.fb", 768, 16, 512, prefix=1),
    _pe_raw("pe-spatial-l", "spatial_large_patch14_448.fb", 1024, 14, 448, prefix=1),
    _pe_raw("pe-spatial-g", "spatial_gigantic_patch14_448.fb", 1536, 14, 448, prefix=0),
    *_clip("clip-b32", "ViT-B-32-quickgelu@openai", 768, 32, 224, "MIT", projected=512),
    *_clip("clip-b16", "ViT-B-16-quickgelu@openai", 768, 16, 224, "MIT", projected=512),
    *_clip("clip-l14", "ViT-L-14-quickgelu@openai", 1024, 14, 224, "MIT", projected=768),
    *_clip("clip-l14-336", "ViT-L-14-336-quickgelu@openai", 1024, 14, 336, "MIT", projected=768),
    *_clip("clip-laion-b16", "ViT-B-16@laion2b_s34b_b88k", 768, 16, 224, "MIT", projected=512),
    *_clip("clip-laion-l14", "ViT-L-14@laion2b_s32b_b82k", 1024, 14, 224, "MIT", HALF, projected=768),
    *_clip("clip-laion-h14", "ViT-H-14@laion2b_s32b_b79k", 1280, 14, 224, "MIT", projected=1024),
    *_clip("clip-dfn-l14", "ViT-L-14-quickgelu@dfn2b", 1024, 14, 224, APPLE_LICENCE, projected=768),
    *_clip("clip-dfn-h14", "ViT-H-14-quickgelu@dfn5b", 1280, 14, 224, APPLE_LICENCE, projected=1024),
    *_clip("clip-dfn-h14-378", "ViT-H-14-378-quickgelu@dfn5b", 1280, 14, 378, APPLE_LICENCE, projected=1024),
    _siglip("siglip-b-224", "base_patch16_siglip_224.webli", 768, 16, 224),
    _siglip("siglip-b-256", "base_patch16_siglip_256.webli", 768, 16, 256),
    _siglip("siglip-b-384", "base_patch16_siglip_384.webli", 768, 16, 384),
    _siglip("siglip-b-512", "base_patch16_siglip_512.webli", 768, 16, 512),
    _siglip("siglip-l-256", "large_patch16_siglip_256.webli", 1024, 16, 256),
    _siglip("siglip-l-384", "large_patch16_siglip_384.webli", 1024, 16, 384),
    _siglip("siglip-so400m-224", "so400m_patch14_siglip_224.webli", 1152, 14, 224),
    _siglip("siglip-so400m-378", "so400m_patch14_siglip_378.webli", 1152, 14, 378),
    _siglip("siglip2-b-224", "base_patch16_siglip_224.v2_webli", 768, 16, 224),
    _siglip("siglip2-b-256", "base_patch16_siglip_256.v2_webli", 768, 16, 256),
    _siglip("siglip2-b-384", "base_patch16_siglip_384.v2_webli", 768, 16, 384),
    _siglip("siglip2-b-512", "base_patch16_siglip_512.v2_webli", 768, 16, 512),
    _siglip("siglip2-l-256", "large_patch16_siglip_256.v2_webli", 1024, 16, 256),
    _siglip("siglip2-l-384", "large_patch16_siglip_384.v2_webli", 1024, 16, 384),
    _siglip("siglip2-l-512", "large_patch16_siglip_512.v2_webli", 1024, 16, 512),
    _siglip("siglip2-so400m-224", "so400m_patch14_siglip_224.v2_webli", 1152, 14, 224),
    _siglip("siglip2-so400m-256", "so400m_patch16_siglip_256.v2_webli", 1152, 16, 256),
    _siglip("siglip2-so400m-384", "so400m_patch16_siglip_384.v2_webli", 1152, 16, 384),
    _siglip("siglip2-so400m-512", "so400m_patch16_siglip_512.v2_webli", 1152, 16, 512),
    _siglip("siglip2-g-256", "giantopt_patch16_siglip_256.v2_webli", 1536, 16, 256),
    _siglip("siglip2-g-384", "giantopt_patch16_siglip_384.v2_webli", 1536, 16, 384),
    _radio("radio-v3-b", "base_patch16_radio_v3", 768, class_tokens=3, prefix=8, corners=True),
    _radio("radio-v3-l", "large_patch16_radio_v3", 1024, class_tokens=3, prefix=8),
    _radio("radio-v3-h", "huge_patch16_radio_v3", 1280, class_tokens=3, prefix=8, corners=True),
    _radio("radio-v3-g", "giant_patch16_radio_v3", 1536, class_tokens=3, prefix=8),
    _radio("radio-v4-so400m", "so400m_patch16_radio_v4", 1152, class_tokens=2, prefix=10),
    _radio("radio-v4-h", "huge_patch16_radio_v4", 1280, class_tokens=2, prefix=10),
    _sam("sam-b", "samvit_base_patch16.sa1b"),
    _sam("sam-l", "samvit_large_patch16.sa1b"),
    _sam("sam-h", "samvit_huge_patch16.sa1b"),
    _convnext("convnext-t", "convnext_tiny.in12k_ft_in1k", 768, APACHE, _CLASSIFIER),
    _convnext("convnext-s", "convnext_small.in12k_ft_in1k", 768, APACHE, _CLASSIFIER),
    _convnext("convnext-b", "convnext_base.fb_in22k_ft_in1k", 1024, APACHE, _CLASSIFIER),
    _convnext("convnext-l", "convnext_large.fb_in22k_ft_in1k", 1536, APACHE, _CLASSIFIER),
    _efficientnet("efficientnet-b0", "efficientnet_b0.ra_in1k", IMAGENET),
    _efficientnet("efficientnet-lite0", "tf_efficientnet_lite0.in1k", HALF),
)

REGISTRY: dict[str, TeacherSpec] = {row.name: row for row in _ROWS}

ALIASES: dict[str, str] = {
    "dinov2": "dinov2-s",
    "dinov2-reg": "dinov2-reg-s",
    "dinov3": "dinov3-h+",
    "pe-core": "pe-core-g",
    "pe-lang": "pe-lang-g",
    "pe-spatial": "pe-spatial-g",
    "clip": "clip-l14",
    "siglip": "siglip-so400m-378",
    "siglip2": "siglip2-so400m-384",
    "radio": "radio-v4-h",
    "sam": "sam-b",
}
