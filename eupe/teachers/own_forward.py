"""Each library's own model and forward pass, through other code paths than the adapters use.

The adapters are verified against these, so no adapter is imported here. Normalisation, too, comes from the libraries
and not from the registry. Shapes: B batch, N tokens, D their width, Ds width of the summary.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import safetensors.torch
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from eupe.common.kinds import STUDENT_FILE, WEIGHTS_FILE
from eupe.common.reading import read_json
from eupe.errors import TeacherError
from eupe.models.checkpoints import read_checkpoint
from eupe.models.encoder_spec import load_encoder_spec
from eupe.models.hub import at_revision, quiet_open_clip, quiet_transformers
from eupe.models.meta import built_on_meta
from eupe.models.outside import is_outside
from eupe.teachers.preprocess import (
    OPEN_CLIP_FILE,
    is_model,
    open_processor,
    processed,
    processor_settings,
    timm_folder,
)
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.timm_hub import card
from eupe.teachers.weights import hub_errors

Prepare = Callable[[NDArray[np.uint8]], Tensor]
"""Function from square pictures [B, S, S, 3] to the pixels [B, 3, S, S] that a library's model takes."""

NARROW_WIDTH, NARROW_CONV_WIDTH = 64, 48
NARROW_VIT: dict[str, Any] = {"embed_dim": NARROW_WIDTH, "depth": 2, "num_heads": 4}
NARROW_SWIGLU: dict[str, Any] = {**NARROW_VIT, "mlp_ratio": 4}
NARROW_CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, NARROW_CONV_WIDTH)}
NARROW_SAM: dict[str, Any] = {**NARROW_VIT, "num_heads": 1, "global_attn_indexes": (1,)}

NARROW_HF: dict[str, Any] = {"hidden_size": NARROW_WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
HF_DIMENSIONS: dict[str, dict[str, Any]] = {
    "facebook/sam3": {},
    "facebook/vjepa2-vitl-fpc64-256": {},
    "facebook/vjepa2-vith-fpc64-256": {"hidden_size": 1280, "num_hidden_layers": 32},
    **{
        f"facebook/vjepa2-vitg-fpc64-{size}": {
            "hidden_size": 1408,
            "num_hidden_layers": 40,
            "num_attention_heads": 22,
            "mlp_ratio": 48 / 11,
        }
        for size in (256, 384)
    },
}
"""How the configurations of rows differ from those that transformers has by default, but for their input size."""

NORMALISED_LIKE = {
    "dinov2": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_with_registers": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov3_vit": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3_convnext": "convnext_tiny.dinov3_lvd1689m",
    "clip_vision_model": "vit_base_patch32_clip_224.openai",
    "metaclip_2_vision_model": "vit_huge_patch14_clip_224.metaclip2_worldwide",
    "vjepa2": "vit_small_patch14_dinov2.lvd142m",
    "sam3_vit_model": "vit_base_patch16_siglip_224.webli",
    "siglip_vision_model": "vit_base_patch16_siglip_224.webli",
    "vit": "vit_base_patch16_224.augreg_in21k",
}
"""timm's weights for each Hugging Face family; they define mean and std if the model's own files do not."""


@dataclass(frozen=True)
class OwnModel:
    """A model as its library builds it, with the library's own forward pass and preparation of pictures."""

    module: nn.Module
    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """Function from normalised pixels [B, 3, S, S] to dense [B, N, D] and summary [B, Ds] (None if there is none)."""
    prepare: Prepare
    """The library's own preparation of pictures that already have the right size."""


def own_model(spec: TeacherSpec, weights: Path | None = None, key: str | None = None) -> OwnModel:
    """Build the library's own model, in eval mode on the CPU.

    Args:
        weights: path of its weights; None for the library's random initialisation, except that `hf:` names and runs
            bring their own.
        key: key of its tensors in a weights file of several models.
    Raises: TeacherError if the library has no second path to the features.
    """
    build = {"timm": _timm_model, "hf": _hf_model, "open_clip": _open_clip_model, "run": _run_model}[spec.backend]
    own: OwnModel = build(spec, weights, key)
    own.module.eval()
    return own


def fill_at_random(model: nn.Module, seed: int = 0) -> None:
    """Fill every parameter and running statistic at random; zero biases and tiny layer scales would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(around + torch.randn(parameter.shape, generator=generator) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def save_own(model: Any, directory: Path) -> Path:
    """Write the weights as the library's users keep them, and return the path to pass as a teacher's weights."""
    if hasattr(model, "save_pretrained"):
        with quiet_transformers():
            model.save_pretrained(directory)
        return directory
    path = directory / "weights.safetensors"
    # Cloned, because safetensors refuses tensors that share memory.
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, path)
    return path


def narrow(spec: TeacherSpec) -> TeacherSpec:
    """Return the spec of a registry row's model as `built_narrow` builds it."""
    options = _narrow_options(spec)
    width = options.get("embed_dim") or options.get("dims", (spec.dense_dim,))[-1]
    if spec.summary == "none":
        return spec
    if spec.summary == "projected":
        return dataclasses.replace(spec, dense_dim=width)
    return dataclasses.replace(
        spec, dense_dim=width if options else spec.dense_dim, summary_dim=spec.summary_dim // spec.dense_dim * width
    )


@contextmanager
def built_narrow(spec: TeacherSpec) -> Iterator[None]:
    """Patch timm and open_clip so that every caller gets a registry row's architecture narrow and shallow."""
    import open_clip

    create_timm, create_open_clip = timm.create_model, open_clip.create_model

    def timm_narrow(*args: Any, **options: Any) -> Any:
        return create_timm(*args, **{**options, **_narrow_options(spec)})

    def open_clip_narrow(arch: str, **options: Any) -> Any:
        vision = open_clip.get_model_config(arch)["vision_cfg"]
        size = options.get("force_image_size", vision["image_size"])
        small = {**vision, "image_size": size, "layers": 2, "width": NARROW_WIDTH, "head_width": 16}
        text = {"layers": 1, "width": 16, "heads": 2}
        return create_open_clip(arch, vision_cfg=small, text_cfg=text, **options)

    with ExitStack() as stack:
        stack.enter_context(patch.object(timm, "create_model", timm_narrow))
        stack.enter_context(patch.object(open_clip, "create_model", open_clip_narrow))
        stack.enter_context(patch.dict(HF_DIMENSIONS, dict.fromkeys(HF_DIMENSIONS, NARROW_HF)))
        yield


def _narrow_options(spec: TeacherSpec) -> dict[str, Any]:
    if spec.model.startswith("convnext"):
        return NARROW_CONVNEXT
    if spec.model.startswith("samvit"):
        return NARROW_SAM
    if spec.model.endswith("-giant") or spec.hub_repository or "giant_patch14_reg1_tipsv2" in spec.model:
        return NARROW_SWIGLU
    return {} if "efficientnet" in spec.model else NARROW_VIT


def _timm_model(spec: TeacherSpec, weights: Path | None, key: str | None) -> OwnModel:
    if spec.name.startswith("hf:") and weights is None:
        return _with_timm_forward(spec, _wrapped_model(spec.place), spec.place)
    from_hub = spec.hub_repository is not None and spec.name.startswith("timm:") and weights is None
    loading: dict[str, Any] = {"pretrained": True} if spec.is_local_dir or from_hub else {}
    arch, options = card(spec) or (spec.model, {})
    options |= {} if spec.summary == "projected" else {"num_classes": 0}
    if weights is not None:
        with built_on_meta():
            shapes = timm.create_model(arch, **options).state_dict()
        state = read_checkpoint(weights, key=key, fitting=shapes)
        loading = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}
    model = timm.create_model(spec.model if from_hub else arch, **options, **loading)
    return _with_timm_forward(spec, model, weights)


def _wrapped_model(folder: Path) -> Any:
    """Return timm's model from inside transformers' TimmWrapperModel, as transformers loads it."""
    from transformers import AutoModel

    with quiet_transformers():
        return AutoModel.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True).timm_model


def _run_model(spec: TeacherSpec, weights: Path | None, key: str | None) -> OwnModel:
    directory = Path(spec.model)
    encoder = load_encoder_spec(directory)
    if is_outside(encoder.arch):
        raise TeacherError(f"{spec.name} is {encoder.arch}, whose own forward pass is the one that is used")
    model = timm.create_model(encoder.arch, num_classes=0)
    if hasattr(model, "set_input_size"):
        model.set_input_size((encoder.size, encoder.size))
    model.load_state_dict(read_checkpoint(weights or directory / WEIGHTS_FILE, key=key, fitting=model.state_dict()))
    return _with_timm_forward(spec, model, weights)


def _with_timm_forward(spec: TeacherSpec, model: Any, weights: Path | None) -> OwnModel:
    prepare = _prepared_as_files_say(spec, weights) or timm_preparation(timm.data.resolve_model_data_config(model))
    return OwnModel(model, lambda x: timm_forward(spec, model, x), prepare)


def timm_preparation(config: dict[str, Any]) -> Prepare:
    """Return timm's own transform of pictures that already have the right size."""

    def prepare(views: NDArray[np.uint8]) -> Tensor:
        same_size = {"input_size": (3, *views.shape[1:3]), "crop_pct": 1.0, "crop_mode": "center"}
        transform = timm.data.create_transform(**{**config, **same_size})
        return torch.stack([transform(Image.fromarray(view)) for view in views])

    return prepare


def open_clip_preparation(settings: dict[str, Any]) -> Prepare:
    """Return open_clip's own transform of pictures of the right size, with its defaults for missing settings."""
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    def prepare(views: NDArray[np.uint8]) -> Tensor:
        merged = {**merge_preprocess_dict(PreprocessCfg(), settings), "size": views.shape[1:3]}
        transform = image_transform_v2(PreprocessCfg(**merged), is_train=False)
        return torch.stack([transform(Image.fromarray(view)) for view in views])

    return prepare


def hf_preparation(source: str) -> Prepare | None:
    """Return what transformers' own processor of a directory or repository does; None if it has no processor.

    If the processor is a class of the repository's own, which the library does not know, only its mean and std count.
    """
    settings, _ = processor_settings(source)
    if settings is None:
        return None
    try:
        processor = open_processor(source)
    except Exception:
        return timm_preparation({"mean": settings["image_mean"], "std": settings["image_std"]})
    return lambda views: torch.from_numpy(np.array(processed(processor, views)))


def _prepared_as_files_say(spec: TeacherSpec, weights: Path | None) -> Prepare | None:
    """Return the preparation that files beside local weights define, the teacher's own library first; else None."""
    if weights is None:
        return None
    folder = weights if weights.is_dir() else weights.parent
    radio = is_model(folder, "radio") or "_radio_" in spec.model
    found: dict[str, Callable[[], Prepare | None]] = {
        "timm": lambda: _prepared_as_timm_folder(folder),
        "open_clip": lambda: _prepared_as_open_clip_folder(folder),
        "hf": lambda: None if radio else hf_preparation(str(folder)),
        "run": lambda: _prepared_as_run(folder),
    }
    ready = (found[kind]() for kind in sorted(found, key=lambda kind: kind != spec.backend))
    return next((prepare for prepare in ready if prepare is not None), None)


def _prepared_as_timm_folder(folder: Path) -> Prepare | None:
    if not timm_folder(folder):
        return None
    with built_on_meta():
        return timm_preparation(timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}")))


def _prepared_as_open_clip_folder(folder: Path) -> Prepare | None:
    if not (folder / OPEN_CLIP_FILE).is_file():
        return None
    return open_clip_preparation(read_json(folder / OPEN_CLIP_FILE).get("preprocess_cfg") or {})


def _prepared_as_run(folder: Path) -> Prepare | None:
    if not (folder / STUDENT_FILE).is_file():
        return None
    spec = load_encoder_spec(folder)
    return timm_preparation({"mean": spec.mean, "std": spec.std})


def timm_forward(spec: TeacherSpec, model: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return dense [B, N, D] and summary of a timm model, through `forward` and `forward_intermediates`.

    The model's `forward` must return the summary, not class scores.

    Raises: TeacherError if the model has no `forward_intermediates` that returns its prefix tokens.
    """
    pool = _pool(model)
    if spec.summary == "pooled" and spec.dense != "last_stage" and pool is not None:
        return _pooled_map(model, pool, x)
    if spec.dense == "last_stage" and hasattr(model, "conv_stem"):
        return model.blocks(model.bn1(model.conv_stem(x))).flatten(2).mT, model(x)
    if not hasattr(model, "forward_intermediates"):
        raise TeacherError(f"timm's {spec.model} has no second forward path to verify {spec.name} against")
    options = {"return_prefix_tokens": True} if spec.prefix_tokens else {}
    norm = spec.dense != "last_stage"
    try:
        (last,) = model.forward_intermediates(x, indices=1, norm=norm, intermediates_only=True, **options)
    except TypeError as error:
        raise TeacherError(
            f"timm's {spec.model} has no second forward path to verify {spec.name} against: {error}"
        ) from error
    feature_map, prefix = last if spec.prefix_tokens else (last, None)
    dense = feature_map.flatten(2).mT
    match spec.summary:
        case "none":
            return dense, None
        case "mean":
            return dense, dense.mean(1)
        case "pooled" if spec.dense != "last_stage":  # the head pools without a pooling module (MambaOut)
            return _under_head_norm(model, dense), model(x)
        case "attention_pool" | "projected" | "pooled":
            return dense, model(x)
    assert prefix is not None
    if spec.summary == "cls_mean":
        return dense, torch.cat([prefix[:, 0], dense.mean(1)], dim=-1)
    return dense, torch.cat(prefix[:, : spec.summary_dim // spec.dense_dim].unbind(1), dim=-1)


def _pool(model: Any) -> nn.Module | None:
    """Return the module that pools a CNN's map; None for ViTs, which have a string in its place."""
    for pool in (getattr(model, "global_pool", None), getattr(getattr(model, "head", None), "global_pool", None)):
        if isinstance(pool, nn.Module):
            return pool
    return None


def _pooled_map(model: Any, pool: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens that the model's forward pass pools, under the norm that follows pooling, and its output."""
    caught: list[Tensor] = []
    hook = pool.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    try:
        summary = model(x)
    finally:
        hook.remove()
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    tokens = (caught[0] if channels_last else caught[0].permute(0, 2, 3, 1)).flatten(1, 2)
    return _under_head_norm(model, tokens), summary


def _under_head_norm(model: Any, tokens_BND: Tensor) -> Tensor:
    """Apply the head's norm, which follows the pooling, to the tokens before they are pooled."""
    norm = getattr(getattr(model, "head", None), "norm", None)
    if not isinstance(norm, nn.LayerNorm) or norm.normalized_shape != tokens_BND.shape[-1:]:
        return tokens_BND
    return nn.functional.layer_norm(tokens_BND, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _open_clip_model(spec: TeacherSpec, weights: Path | None, key: str | None) -> OwnModel:
    import open_clip

    arch, _, tag = spec.model.partition("@")
    device = torch.get_default_device()
    with quiet_open_clip():
        model = open_clip.create_model(arch, load_weights=False, pretrained_text=False, device=device)
    if weights is not None:
        visual, trunk = model.visual, getattr(model.visual, "trunk", None)
        target = visual if trunk is None else trunk
        state = read_checkpoint(weights, key=key, fitting=target.state_dict())
        target.load_state_dict({name.removeprefix("visual.").removeprefix("trunk."): t for name, t in state.items()})
    tag = tag or next(iter(open_clip.list_pretrained_tags_by_model(arch)), "")
    settings = open_clip.get_pretrained_cfg(arch, tag) if tag else {}
    prepare = _prepared_as_files_say(spec, weights) or open_clip_preparation(settings)
    if hasattr(model.visual, "trunk"):
        model.visual.trunk.reset_classifier(0)
        return OwnModel(model, lambda x: timm_forward(spec, model.visual.trunk.eval(), x), prepare)
    model.visual.output_tokens = True
    if spec.summary == "projected":
        return OwnModel(model, lambda x: open_clip_projected(model, x), prepare)
    return OwnModel(model, lambda x: open_clip_forward(model.visual, x), prepare)


def open_clip_forward(visual: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return dense [B, N, D] as open_clip outputs it, and the class token as it leaves the last norm."""
    normed: list[Tensor] = []
    hook = visual.ln_post.register_forward_hook(lambda module, inputs, output: normed.append(output))
    try:
        _, dense = visual(x)
    finally:
        hook.remove()
    return dense, normed[0][:, 0]


def open_clip_projected(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return dense [B, N, D] as open_clip outputs it, and its image embedding, which is compared with texts."""
    _, dense = model.visual(x)
    model.visual.output_tokens = False
    try:
        return dense, model.encode_image(x)
    finally:
        model.visual.output_tokens = True


def _hf_model(spec: TeacherSpec, weights: Path | None, key: str | None) -> OwnModel:
    import transformers

    if weights is None and not spec.name.startswith("hf:"):
        return _random_hf(spec) if spec.model in HF_DIMENSIONS else _random_dinov2(spec)
    source = str(weights if weights and weights.is_dir() else weights.parent if weights else spec.model)
    if weights is not None and not (Path(source) / "config.json").exists():
        source = spec.model
    with hub_errors(spec), quiet_transformers():
        name, revision = at_revision(source)
        options = {"revision": revision, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(name, **options)
        if weights is None:
            model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32, **options)
        else:
            with built_on_meta():
                shapeless = transformers.AutoModel.from_config(config, trust_remote_code=False)
            state = read_checkpoint(weights, key=key, fitting=shapeless.state_dict(), whole=True)
            model = type(shapeless).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    prepare = _hf_prepare(spec, weights, getattr(config, "vision_config", config).model_type)
    return OwnModel(model, lambda x: hf_forward(model, x), prepare)


def _random_hf(spec: TeacherSpec) -> OwnModel:
    from transformers import AutoModel, Sam3ViTConfig, VJEPA2Config

    options = HF_DIMENSIONS[spec.model]
    is_sam = "sam3" in spec.model
    config = Sam3ViTConfig(**options) if is_sam else VJEPA2Config(crop_size=spec.native_size, **options)
    model = AutoModel.from_config(config)
    return OwnModel(model, lambda x: hf_forward(model, x), _hf_prepare(spec, None, config.model_type))


def _random_dinov2(spec: TeacherSpec) -> OwnModel:
    """Build a DINOv2 row's model with the dimensions of timm's model of the same weights."""
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    size = re.split("-", spec.model)[-1]
    registers = "_reg4" if "registers" in spec.model else ""
    twin_name = f"vit_{size}_patch14{registers}_dinov2.lvd142m"
    with built_on_meta():
        twin = timm.create_model(twin_name)
    dimensions = {
        "hidden_size": twin.num_features,
        "num_hidden_layers": len(twin.blocks),
        "num_attention_heads": twin.blocks[0].attn.num_heads,
        "image_size": twin.pretrained_cfg["input_size"][-1],
        "patch_size": twin.patch_embed.patch_size[0],
        "use_swiglu_ffn": size == "giant",
    }
    model: Any
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**dimensions, num_register_tokens=4))
    else:
        model = Dinov2Model(Dinov2Config(**dimensions))
    return OwnModel(model, lambda x: hf_forward(model, x), timm_preparation(timm.data.resolve_model_data_config(twin)))


def hf_forward(model: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return dense [B, N, D] and summary as the library documents them for each model type.

    CLIP's patch tokens are normed here, as the registry promises; the library norms the class token only.
    """
    detector = getattr(model, "detector_model", model)
    vision = getattr(detector, "vision_encoder", getattr(detector, "vision_model", detector))
    config = vision.config
    if "sam3" in config.model_type:
        return vision(x).last_hidden_state, None
    if config.model_type == "vjepa2":  # which itself repeats a frame that is alone
        dense = vision.get_vision_features(x.unsqueeze(1))
        return dense, dense.mean(1)
    clips = ("clip_vision_model", "metaclip_2_vision_model")
    resizes_itself = config.model_type in (*clips, "siglip_vision_model", "vit")
    output = vision(x, interpolate_pos_encoding=True) if resizes_itself else vision(x)
    hidden = output.last_hidden_state
    match config.model_type:
        case "dinov2" | "dinov3_convnext":
            return hidden[:, 1:], output.pooler_output
        case "dinov2_with_registers" | "dinov3_vit":
            return hidden[:, 1 + config.num_register_tokens :], output.pooler_output
        case "clip_vision_model" | "metaclip_2_vision_model":
            return vision.post_layernorm(hidden[:, 1:]), output.pooler_output
        case "siglip_vision_model":
            return hidden, output.pooler_output
        case "radio":
            classes = torch.cat([hidden[:, i] for i in config.summary_idxs], dim=-1)
            return hidden[:, config.num_summary_tokens :], classes
    return hidden[:, 1:], hidden[:, 0]


def _hf_prepare(spec: TeacherSpec, weights: Path | None, model_type: str) -> Prepare:
    """Return the library's own processor, or timm's transform for the family's weights; RADIO normalises inside."""
    if model_type == "radio":
        return timm_preparation({"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
    if (beside := _prepared_as_files_say(spec, weights)) is not None:
        return beside
    own = hf_preparation(spec.model) if spec.name.startswith("hf:") else None
    like = timm.get_pretrained_cfg(NORMALISED_LIKE[model_type]).to_dict()
    return own or timm_preparation(timm.data.resolve_data_config(pretrained_cfg=like))
