"""The families of the table of teachers: what the rows of one have in common, and what users must know of it.

If libraries disagree on the same weights, the note says which one is followed; `tests/teachers/test_disagreements.py`
shows it. Resizing presets are not part of a teacher: all teachers of a corpus get the same views.
"""

from __future__ import annotations

import dataclasses

from eupe.teachers.spec import TeacherSpec

Triple = tuple[float, float, float]

IMAGENET: dict[str, Triple] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPENAI: dict[str, Triple] = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF: dict[str, Triple] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
UNIT: dict[str, Triple] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
H_OPTIMUS: dict[str, Triple] = {"mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517)}
SATELLITE: dict[str, Triple] = {"mean": (0.43, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}

APACHE = "Apache-2.0"
DINOV3_LICENCE = "DINOv3-License"
FAIR_LICENCE = "FAIR-Noncommercial-Research-License"
NVIDIA_LICENCE = "NVIDIA-Open-Model-License"
APPLE_LICENCE = "Apple-ASCL"
NONCOMMERCIAL = "CC-BY-NC-4.0"
NO_DERIVATIVES = "CC-BY-NC-ND-4.0"


_DINOV2 = (
    "follows transformers, whose repository the weights are from; off 518 px (37x37) it resamples the position table "
    "bicubic, timm antialiases, too: one and the same at 518 px, dense cosines down to 0.987 between them at 224 px"
)
_DINOV2_REGISTERS = (
    "follows transformers, whose repository the weights are from; off 518 px (37x37) it resamples the position table "
    "bicubic and antialiased, as timm does, and unlike DINOv2 without registers"
)


def dinov2(name: str, repository: str, width: int, registers: int = 0) -> TeacherSpec:
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


def dinov3(name: str, model: str, width: int, pixels: dict[str, Triple], licence: str = DINOV3_LICENCE) -> TeacherSpec:
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


def convnext(name: str, model: str, width: int, licence: str, note: str, native_size: int = 224) -> TeacherSpec:
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


ON_CARD_ONLY = (
    "the card alone says that the layers are packed SwiGLUs with SiLU gates; the weights would fit with GELU in the "
    "gates, too, which is what timm takes for packed SwiGLUs if nothing else is said"
)
H_OPTIMUS_PIXELS = "mean and std are its own, not ImageNet's"
VIRCHOW2_SUMMARY = (
    f"{ON_CARD_ONLY}; the summary is the class token and the mean of the patch tokens, without the registers, side by "
    "side, as on the card"
)
_PE_VIEWS = (
    "the view decides how pictures are resized: timm's preset is a bicubic centre crop, open_clip's a bilinear squash"
)


def pe_core(
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


def pe_raw(name: str, model: str, width: int, patch: int, size: int, prefix: int) -> TeacherSpec:
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


def clip(
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


def siglip(name: str, model: str, width: int, patch: int, size: int) -> TeacherSpec:
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


def siglip_naflex(name: str, model: str, width: int) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="timm",
        model=f"naflexvit_{model}_patch16_siglip.v2_webli",
        patch=16,
        dense_dim=width,
        summary_dim=width,
        prefix_tokens=0,
        summary="attention_pool",
        dense="normed",
        native_size=384,
        **HALF,
        licence=APACHE,
        note="a NaFlex SigLIP2 at a square: it was trained at each picture's own aspect ratio; here the view decides, "
        "and no patch is padding; the summary is the attention pool; the position table is 16x16 (256 px), at other "
        "sizes bilinear and antialiased, in timm as in transformers; the GELU is the tanh one",
    )


def tipsv2(name: str, model: str, width: int) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="timm",
        model=f"vit_{model}_patch14_reg1_tipsv2.webli",
        patch=14,
        dense_dim=width,
        summary_dim=width,
        prefix_tokens=2,
        summary="cls",
        dense="normed",
        native_size=448,
        **UNIT,
        licence=APACHE,
        note="pixels in [0, 1] go in: the model has no mean and std; the prefix is the class token and one register; "
        "the class token is also the image embedding, as nothing is projected; off 448 px timm resamples the position "
        "table bicubic, transformers bilinear",
    )


def aimv2(name: str, model: str, width: int, size: int) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="timm",
        model=f"aimv2_{model}_patch14_{size}.apple_pt",
        patch=14,
        dense_dim=width,
        summary_dim=width,
        prefix_tokens=0,
        summary="mean",
        dense="normed",
        native_size=size,
        **OPENAI,
        licence=APPLE_LICENCE,
        note="no class token: the summary is the mean of the patch tokens under the final RMS norm, as in timm's own "
        "forward; transformers' model returns none, except for the lit weights, which are others; --tokens dense "
        "leaves it out",
    )


def eva02_clip(
    name: str, model: str, width: int, patch: int, size: int, *, projected: int
) -> tuple[TeacherSpec, TeacherSpec]:
    row = TeacherSpec(
        name=name,
        backend="timm",
        model=f"eva02_{model}",
        patch=patch,
        dense_dim=width,
        summary_dim=width,
        prefix_tokens=1,
        summary="cls",
        dense="normed",
        native_size=size,
        **OPENAI,
        licence="MIT",
        note="class and patch tokens pass the final norm; open_clip's tower is the same timm model; "
        "the view decides how pictures are resized: timm's preset at 224 px is a centre crop of 90%, "
        "open_clip's takes all of the shorter side",
    )
    return _and_projected(row, projected)


def internvit(name: str, tag: str, licence: str) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="timm",
        model=f"vit_intern300m_patch14_448.{tag}",
        patch=14,
        dense_dim=1024,
        summary_dim=1024,
        prefix_tokens=1,
        summary="cls",
        dense="raw",
        native_size=448,
        **IMAGENET,
        licence=licence,
        note="tokens have no final norm, in timm as in transformers (large range: look at the clip counts); InternVL "
        "drops the class token, which is the summary here, and folds each 2x2 patches into one token afterwards: the "
        "dense tokens are those before the fold",
    )


def qwen3_vl(name: str, model: str, width: int) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="timm",
        model=f"qwen3_vit_{model}",
        patch=16,
        dense_dim=width,
        summary_dim=width,
        prefix_tokens=0,
        summary="mean",
        dense="raw",
        native_size=768,
        **HALF,
        licence=APACHE,
        note="the tower of Qwen3-VL ahead of its merger, row by row, where transformers has the patches of each 2x2 "
        "block one after the other; tokens have no final norm (large range: look at the clip counts); the model has no "
        "summary, so the mean of the patch tokens stands in (timm's own forward norms that mean; --tokens dense leaves "
        "it out); a picture is two equal frames, whose patch embeddings timm has added up; the position table is 48x48 "
        "(768 px) and bilinear, corners aligned, at other sizes",
    )


def pathology(
    name: str,
    repository: str,
    width: int,
    registers: int,
    pixels: dict[str, Triple],
    licence: str,
    trap: str,
    *,
    with_mean: bool = False,
) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="timm",
        model=f"hf-hub:{repository}",
        patch=14,
        dense_dim=width,
        summary_dim=width * 2 if with_mean else width,
        prefix_tokens=1 + registers,
        summary="cls_mean" if with_mean else "cls",
        dense="normed",
        native_size=224,
        **pixels,
        licence=licence,
        note="for tiles of stained tissue; the repository asks for its terms to be accepted first; architecture and "
        f"arguments are those of its config.json and its model card; {trap}",
    )


def vjepa2(name: str, model: str, width: int, size: int, licence: str = APACHE) -> TeacherSpec:
    return TeacherSpec(
        name=name,
        backend="hf",
        model=f"facebook/vjepa2-{model}-fpc64-{size}",
        patch=16,
        dense_dim=width,
        summary_dim=width,
        prefix_tokens=0,
        summary="mean",
        dense="normed",
        native_size=size,
        **IMAGENET,
        licence=licence,
        note="a model of videos: a picture goes in twice, as the two equal frames of one tubelet, as transformers does "
        "with a frame that is alone, and motion is not in the features; tokens are the encoder's, the predictor does "
        f"not run; no class token, so the mean of the tokens stands in (--tokens dense leaves it out); {size} px only: "
        "at other sizes transformers takes rows and columns of its rotary positions for others and says nothing",
    )


SAM3 = TeacherSpec(
    name="sam3",
    backend="hf",
    model="facebook/sam3",
    patch=14,
    dense_dim=1024,
    summary_dim=0,
    prefix_tokens=0,
    summary="none",
    dense="raw",
    native_size=1008,
    **HALF,
    licence="SAM-License",
    note="dense is what the image encoder gives ahead of its neck, with no final norm (large range: look at the clip "
    "counts), where sam-* give the neck's output; there is no summary, stores leave it out; mean and std are 0.5, not "
    "ImageNet's as of SAM; 1008 px only: the angles of its positions are laid out for them; of the repository, "
    "which is a whole video model, only the encoder is kept",
)


def radio(name: str, model: str, width: int, class_tokens: int, prefix: int, corners: bool = False) -> TeacherSpec:
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


def sam(name: str, model: str) -> TeacherSpec:
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


def efficientnet(name: str, model: str, pixels: dict[str, Triple]) -> TeacherSpec:
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


HEAD_NORM = (
    "dense is the last map under the final norm, summary its mean under that norm, as in transformers; timm's "
    "forward_features ends ahead of the norm, which timm keeps behind the pooling"
)
CLASSIFIER = (
    "a classifier's features; dense is the last map under the norm that timm keeps behind the pooling; timm's "
    "forward_features and transformers' last_hidden_state end ahead of it"
)
