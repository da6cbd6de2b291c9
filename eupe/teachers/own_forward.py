"""Each library's own model and forward pass, by other paths than the adapters take: what they are held against.

No adapter is imported here. Normalisation is the libraries' word, too, not the registry's.
Shapes: B batch, N tokens, D their width, Ds width of the summary.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from eupe.encoder import WEIGHTS_FILE, load_card
from eupe.errors import TeacherError
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.weights import hub_errors, quiet_open_clip, quiet_transformers, read_state_dict

Triple = tuple[float, float, float]

NARROW_WIDTH, NARROW_CONV_WIDTH = 64, 48
NARROW_VIT: dict[str, Any] = {"embed_dim": NARROW_WIDTH, "depth": 2, "num_heads": 4}
NARROW_SWIGLU: dict[str, Any] = {**NARROW_VIT, "mlp_ratio": 4}
NARROW_CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, NARROW_CONV_WIDTH)}
NARROW_SAM: dict[str, Any] = {**NARROW_VIT, "num_heads": 1, "global_attn_indexes": (1,)}

NORMALISED_LIKE = {
    "dinov2": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_with_registers": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov3_vit": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3_convnext": "convnext_tiny.dinov3_lvd1689m",
    "clip_vision_model": "vit_base_patch32_clip_224.openai",
    "siglip_vision_model": "vit_base_patch16_siglip_224.webli",
    "vit": "vit_base_patch16_224.augreg_in21k",
}
"""timm's weights of each Hugging Face family: their normalisation where a directory has no preprocessor_config.json."""


@dataclass(frozen=True)
class OwnModel:
    """A model that its library built, and what that library makes of normalised pixels."""

    module: nn.Module
    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """Normalised pixels [B, 3, S, S] to dense [B, N, D] and summary [B, Ds]."""
    mean: Triple
    std: Triple


def own_model(spec: TeacherSpec, weights: Path | None = None) -> OwnModel:
    """The library's own model, in eval mode on the CPU.

    Args:
        weights: where its weights are; None for the library's random initialisation, except that `hf:` names and runs
            bring their own.
    Raises: TeacherError where the library has no second path to the features.
    """
    build = {"timm": _timm_model, "hf": _hf_model, "open_clip": _open_clip_model, "run": _run_model}[spec.backend]
    own: OwnModel = build(spec, weights)
    own.module.eval()
    return own


def fill_at_random(model: nn.Module, seed: int = 0) -> None:
    """Fill every parameter and statistic: initialisations with zero biases and tiny layer scales hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(around + torch.randn(parameter.shape, generator=generator) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def save_own(model: Any, directory: Path) -> Path:
    """Write the weights as the library's users keep them; returns the path to give as a teacher's weights."""
    if hasattr(model, "save_pretrained"):
        with quiet_transformers():
            model.save_pretrained(directory)
        return directory
    path = directory / "weights.safetensors"
    safetensors.torch.save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, path)
    return path


def narrow(spec: TeacherSpec) -> TeacherSpec:
    """The spec of a registry row's model as `built_narrow` makes it."""
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
    """While it lasts, the libraries build a registry row's architecture narrow and shallow, for whoever asks."""
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
        yield


def _narrow_options(spec: TeacherSpec) -> dict[str, Any]:
    if spec.model.startswith("convnext"):
        return NARROW_CONVNEXT
    if spec.model.startswith("samvit"):
        return NARROW_SAM
    if spec.model.endswith("-giant"):
        return NARROW_SWIGLU
    return {} if "efficientnet" in spec.model else NARROW_VIT


def _timm_model(spec: TeacherSpec, weights: Path | None) -> OwnModel:
    loading: dict[str, Any] = {}
    if weights is not None:
        loading = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": read_state_dict(weights)}}
    classifier = {} if spec.summary == "projected" else {"num_classes": 0}
    model = timm.create_model(spec.model, **classifier, **loading)
    return _with_timm_forward(spec, model, timm.get_pretrained_cfg(spec.model))


def _run_model(spec: TeacherSpec, weights: Path | None) -> OwnModel:
    directory = Path(spec.model)
    card = load_card(directory)
    model = timm.create_model(card.arch, num_classes=0)
    if hasattr(model, "set_input_size"):
        model.set_input_size((card.size, card.size))
    model.load_state_dict(read_state_dict(weights or directory / WEIGHTS_FILE))
    return _with_timm_forward(spec, model, timm.get_pretrained_cfg(card.arch))


def _with_timm_forward(spec: TeacherSpec, model: Any, config: Any) -> OwnModel:
    return OwnModel(model, lambda x: timm_forward(spec, model, x), tuple(config.mean), tuple(config.std))


def timm_forward(spec: TeacherSpec, model: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Dense [B, N, D] and summary of a timm model that ends in its summary, by `forward` and `forward_intermediates`.

    Raises: TeacherError if the model has no `forward_intermediates`.
    """
    pool = _pool(model)
    if spec.summary == "pooled" and spec.dense != "last_stage" and pool is not None:
        return _pooled_map(model, pool, x)
    if spec.dense == "last_stage" and hasattr(model, "conv_stem"):
        return model.blocks(model.bn1(model.conv_stem(x))).flatten(2).mT, model(x)
    if not hasattr(model, "forward_intermediates"):
        raise TeacherError(f"timm's {spec.model} has no second path to verify {spec.name} against")
    options = {"return_prefix_tokens": True} if spec.prefix_tokens else {}
    norm = spec.dense != "last_stage"
    try:
        (last,) = model.forward_intermediates(x, indices=1, norm=norm, intermediates_only=True, **options)
    except TypeError as error:
        raise TeacherError(f"timm's {spec.model} has no second path to verify {spec.name} against: {error}") from error
    feature_map, prefix = last if spec.prefix_tokens else (last, None)
    dense = feature_map.flatten(2).mT
    match spec.summary:
        case "none":
            return dense, None
        case "mean":
            return dense, dense.mean(1)
        case "attention_pool" | "projected" | "pooled":
            return dense, model(x)
    assert prefix is not None
    return dense, torch.cat(prefix[:, : spec.summary_dim // spec.dense_dim].unbind(1), dim=-1)


def _pool(model: Any) -> nn.Module | None:
    """The module that pools a CNN's map; ViTs have a word in its place."""
    for pool in (getattr(model, "global_pool", None), getattr(getattr(model, "head", None), "global_pool", None)):
        if isinstance(pool, nn.Module):
            return pool
    return None


def _pooled_map(model: Any, pool: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the model's own forward pools, under the norm that follows the pooling, and what comes out at the end."""
    caught: list[Tensor] = []
    hook = pool.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    try:
        summary = model(x)
    finally:
        hook.remove()
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    tokens = (caught[0] if channels_last else caught[0].permute(0, 2, 3, 1)).flatten(1, 2)
    norm = getattr(getattr(model, "head", None), "norm", None)
    if isinstance(norm, nn.LayerNorm):
        tokens = nn.functional.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return tokens, summary


def _open_clip_model(spec: TeacherSpec, weights: Path | None) -> OwnModel:
    import open_clip

    arch, _, tag = spec.model.partition("@")
    device = torch.get_default_device()
    with quiet_open_clip():
        model = open_clip.create_model(arch, load_weights=False, pretrained_text=False, device=device)
    if weights is not None:
        state = read_state_dict(weights)
        (model if any(name.startswith("visual.") for name in state) else model.visual).load_state_dict(state)
    settings = open_clip.get_pretrained_cfg(arch, tag or open_clip.list_pretrained_tags_by_model(arch)[0])
    mean, std = tuple(settings["mean"]), tuple(settings["std"])
    if hasattr(model.visual, "trunk"):
        model.visual.trunk.reset_classifier(0)
        return OwnModel(model, lambda x: timm_forward(spec, model.visual.trunk.eval(), x), mean, std)
    model.visual.output_tokens = True
    if spec.summary == "projected":
        return OwnModel(model, lambda x: open_clip_projected(model, x), mean, std)
    return OwnModel(model, lambda x: open_clip_forward(model.visual, x), mean, std)


def open_clip_forward(visual: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense [B, N, D] as open_clip puts it out; the summary is the class token as it leaves the last norm."""
    normed: list[Tensor] = []
    hook = visual.ln_post.register_forward_hook(lambda module, inputs, output: normed.append(output))
    try:
        _, dense = visual(x)
    finally:
        hook.remove()
    return dense, normed[0][:, 0]


def open_clip_projected(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense [B, N, D] as open_clip puts it out, and its image embedding, the one that is compared with texts."""
    _, dense = model.visual(x)
    model.visual.output_tokens = False
    try:
        return dense, model.encode_image(x)
    finally:
        model.visual.output_tokens = True


def _hf_model(spec: TeacherSpec, weights: Path | None) -> OwnModel:
    import transformers

    if weights is None and not spec.name.startswith("hf:"):
        return _random_dinov2(spec)
    source = str(weights if weights and weights.is_dir() else weights.parent if weights else spec.model)
    if weights is not None and not (Path(source) / "config.json").exists():
        source = spec.model
    with hub_errors(spec), quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(source)
        if weights is None:
            model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
        else:
            with torch.device("meta"):
                model_class = type(transformers.AutoModel.from_config(config))
            state = read_state_dict(weights)
            model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    mean, std = _hf_normalisation(source, getattr(config, "vision_config", config).model_type)
    return OwnModel(model, lambda x: hf_forward(model, x), mean, std)


def _random_dinov2(spec: TeacherSpec) -> OwnModel:
    """A DINOv2 row's model, its dimensions from timm's model of the same weights."""
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    size = re.split("-", spec.model)[-1]
    registers = "_reg4" if "registers" in spec.model else ""
    twin_name = f"vit_{size}_patch14{registers}_dinov2.lvd142m"
    with torch.device("meta"):
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
    mean, std = tuple(twin.pretrained_cfg["mean"]), tuple(twin.pretrained_cfg["std"])
    return OwnModel(model, lambda x: hf_forward(model, x), mean, std)


def hf_forward(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense [B, N, D] and summary as the library's documentation of each model type has them.

    CLIP's patch tokens are normed here, as the registry promises; the library norms the class token only.
    """
    vision = getattr(model, "vision_model", model)
    config = vision.config
    resizes_itself = config.model_type in ("clip_vision_model", "siglip_vision_model", "vit")
    output = vision(x, interpolate_pos_encoding=True) if resizes_itself else vision(x)
    hidden = output.last_hidden_state
    match config.model_type:
        case "dinov2" | "dinov3_convnext":
            return hidden[:, 1:], output.pooler_output
        case "dinov2_with_registers" | "dinov3_vit":
            return hidden[:, 1 + config.num_register_tokens :], output.pooler_output
        case "clip_vision_model":
            return vision.post_layernorm(hidden[:, 1:]), output.pooler_output
        case "siglip_vision_model":
            return hidden, output.pooler_output
        case "radio":
            classes = torch.cat([hidden[:, i] for i in config.summary_idxs], dim=-1)
            return hidden[:, config.num_summary_tokens :], classes
    return hidden[:, 1:], hidden[:, 0]


def _hf_normalisation(source: str, model_type: str) -> tuple[Triple, Triple]:
    """mean and std of the directory's preprocessor, or of timm's weights of the family; RADIO normalises inside."""
    if model_type == "radio":
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    from transformers.utils import cached_file

    file = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if file is not None:
        settings = json.loads(Path(file).read_text())
        if "image_mean" in settings:
            return tuple(settings["image_mean"]), tuple(settings["image_std"])
    config = timm.get_pretrained_cfg(NORMALISED_LIKE[model_type])
    return tuple(config.mean), tuple(config.std)
