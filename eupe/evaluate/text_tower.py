"""Text towers of teachers whose summary is an image embedding: prompts in, unit vectors in the teacher's space out.

All come from open_clip. timm's PE-core and SigLIP teachers are the image towers of models that open_clip has with both
towers, so a table leads to their text towers. Tokenizers, context lengths and activations are as open_clip configures
them.
Shapes: N prompts, D width of the space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eupe.common.compute import pick_device
from eupe.errors import TeacherError
from eupe.models.checkpoints import ALONE, load_state_dict_strictly, read_checkpoint
from eupe.models.hub import brief, hub_or_offline, quiet_open_clip
from eupe.teachers.registry import REGISTRY
from eupe.teachers.spec import TeacherSpec

BATCH = 128
WHOLE_MODEL = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""open_clip's names for a checkpoint of both towers; a repository may also hold a file of the image tower alone."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SCALES = ("logit_scale", "logit_bias")
NO_IMAGE_TOWER: dict[str, Any] = {"layers": 1, "width": 8, "head_width": 8, "patch_size": 16, "image_size": 16}
"""Config of a tiny image tower, built and discarded in place of the real one, which may have a billion weights."""

TIMM_TO_OPEN_CLIP: dict[str, str] = {
    "vit_pe_core_tiny_patch16_384.fb": "PE-Core-T-16-384@meta",
    "vit_pe_core_small_patch16_384.fb": "PE-Core-S-16-384@meta",
    "vit_pe_core_base_patch16_224.fb": "PE-Core-B-16@meta",
    "vit_pe_core_large_patch14_336.fb": "PE-Core-L-14-336@meta",
    "vit_pe_core_gigantic_patch14_448.fb": "PE-Core-bigG-14-448@meta",
    "eva02_base_patch16_clip_224.merged2b": "EVA02-B-16@merged2b_s8b_b131k",
    "eva02_large_patch14_clip_224.merged2b": "EVA02-L-14@merged2b_s4b_b131k",
    "eva02_large_patch14_clip_336.merged2b": "EVA02-L-14-336@merged2b_s6b_b61k",
    "eva02_enormous_patch14_clip_224.laion2b_plus": "EVA02-E-14-plus@laion2b_s9b_b144k",
    "vit_base_patch16_siglip_224.webli": "ViT-B-16-SigLIP@webli",
    "vit_base_patch16_siglip_256.webli": "ViT-B-16-SigLIP-256@webli",
    "vit_base_patch16_siglip_384.webli": "ViT-B-16-SigLIP-384@webli",
    "vit_base_patch16_siglip_512.webli": "ViT-B-16-SigLIP-512@webli",
    "vit_large_patch16_siglip_256.webli": "ViT-L-16-SigLIP-256@webli",
    "vit_large_patch16_siglip_384.webli": "ViT-L-16-SigLIP-384@webli",
    "vit_so400m_patch14_siglip_224.webli": "ViT-SO400M-14-SigLIP@webli",
    "vit_so400m_patch14_siglip_378.webli": "ViT-SO400M-14-SigLIP-378@webli",
    "vit_base_patch16_siglip_224.v2_webli": "ViT-B-16-SigLIP2@webli",
    "vit_base_patch16_siglip_256.v2_webli": "ViT-B-16-SigLIP2-256@webli",
    "vit_base_patch16_siglip_384.v2_webli": "ViT-B-16-SigLIP2-384@webli",
    "vit_base_patch16_siglip_512.v2_webli": "ViT-B-16-SigLIP2-512@webli",
    "vit_large_patch16_siglip_256.v2_webli": "ViT-L-16-SigLIP2-256@webli",
    "vit_large_patch16_siglip_384.v2_webli": "ViT-L-16-SigLIP2-384@webli",
    "vit_large_patch16_siglip_512.v2_webli": "ViT-L-16-SigLIP2-512@webli",
    "vit_so400m_patch14_siglip_224.v2_webli": "ViT-SO400M-14-SigLIP2@webli",
    "vit_so400m_patch16_siglip_256.v2_webli": "ViT-SO400M-16-SigLIP2-256@webli",
    "vit_so400m_patch16_siglip_384.v2_webli": "ViT-SO400M-16-SigLIP2-384@webli",
    "vit_so400m_patch16_siglip_512.v2_webli": "ViT-SO400M-16-SigLIP2-512@webli",
    "vit_giantopt_patch16_siglip_256.v2_webli": "ViT-gopt-16-SigLIP2-256@webli",
    "vit_giantopt_patch16_siglip_384.v2_webli": "ViT-gopt-16-SigLIP2-384@webli",
}
"""Map from timm's name for an image tower's weights to open_clip's `arch@tag` for the whole model."""


@dataclass(frozen=True)
class TextTower:
    """A frozen text tower on its device, in float32, with its trained temperature."""

    teacher: str
    model: Any
    """open_clip's whole model without its image tower."""
    tokenize: Callable[[list[str]], Tensor]
    device: torch.device

    @property
    def logit_scale(self) -> float:
        """Return the factor that cosines are multiplied by."""
        return float(self.model.logit_scale.exp())

    @property
    def logit_bias(self) -> float:
        """Return the bias that is added to scaled cosines: SigLIP's, 0 for other models."""
        return 0.0 if self.model.logit_bias is None else float(self.model.logit_bias)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], on_step: Callable[[int, int], None] = lambda done, of: None) -> Tensor:
        """Embed prompts as unit vectors, float32 [N, D], on the CPU.

        Prompts longer than the context are cut off, as in training.
        """
        rows = []
        for start in range(0, len(prompts), BATCH):
            tokens = self.tokenize(list(prompts[start : start + BATCH]))
            rows.append(self.model.encode_text(tokens.to(self.device), normalize=True).float().cpu())
            on_step(min(start + BATCH, len(prompts)), len(prompts))
        return torch.cat(rows)


def text_model(spec: TeacherSpec) -> str | None:
    """Return open_clip's `arch@tag` of the model whose image embedding, before normalisation, is a teacher's summary.

    Returns: None if the summary is not an image embedding, because it is taken before the projection or its teacher
        was not trained with texts.
    """
    if spec.backend == "timm":
        has_projection = "_pe_core_" in spec.model or spec.model.startswith("eva02_")
        embedding = "projected" if has_projection else "attention_pool"
        return TIMM_TO_OPEN_CLIP.get(spec.model) if spec.summary == embedding else None
    return spec.model if spec.backend == "open_clip" and spec.summary == "projected" else None


def why_no_text(spec: TeacherSpec) -> str:
    """Return why a teacher has no text tower, and which teacher to use instead if there is one."""
    if f"{spec.name}-proj" in REGISTRY:
        return (
            f"the summary of {spec.name} is taken before the projection to the text space, that of {spec.name}-proj "
            "after it"
        )
    if spec.name.startswith(("siglip2-naflex", "tipsv2")):
        return f"open_clip does not have the text tower of {spec.name}"
    return f"{spec.name} has no text space"


def load_tower(spec: TeacherSpec, *, weights: Path | None = None) -> TextTower:
    """Load the text tower of a teacher.

    Args:
        weights: open_clip's checkpoint of both towers (it may also be the teacher's weights file), or a directory that
            holds it, with the tokenizer if the model has its own; None for the hub.
    Raises: TeacherError if the teacher has no text tower, or its weights or tokenizer are not available or do not fit.
    """
    model_name = text_model(spec)
    if model_name is None:
        raise TeacherError(
            f"{why_no_text(spec)}; only clip-*-proj, metaclip2-*-proj, eva02-clip-*-proj, pe-core-*-proj and siglip* "
            "have text towers"
        )
    arch, _, tag = model_name.partition("@")
    tokenize = _tokenizer(spec, arch, weights)
    model = _from_hub(spec, arch, tag) if weights is None else _from_file(arch, weights)
    device = pick_device()
    return TextTower(spec.name, model.eval().requires_grad_(False).to(device), tokenize, device)


def _from_hub(spec: TeacherSpec, arch: str, tag: str) -> Any:
    import open_clip

    try:
        with quiet_open_clip(), hub_or_offline(spec.model):
            model = open_clip.create_model(arch, pretrained=tag, require_pretrained=True)
    except Exception as error:
        raise TeacherError(
            f"the text tower of {spec.name} (open_clip's {arch}@{tag}) cannot be fetched from the hub "
            f"({brief(error)}); give --text-weights PATH"
        ) from error
    return _without_image_tower(model)


def _from_file(arch: str, weights: Path) -> Any:
    import open_clip

    # building draws random weights; fork_rng leaves the caller's random state alone
    with quiet_open_clip(), torch.random.fork_rng(devices=[]):
        whole = open_clip.create_model(arch, load_weights=False, pretrained_text=False, vision_cfg=dict(NO_IMAGE_TOWER))
    model = _without_image_tower(whole)
    state = read_checkpoint(_whole_model_file(weights), fitting=model.state_dict(), whole=True, remedy=ALONE)
    if any(name.startswith("text_model.") for name in state):
        raise TeacherError(
            f"{weights} names its weights as transformers does; give open_clip's checkpoint of the same model"
        )
    load_state_dict_strictly(model, _text_state(model, state), source=str(weights))
    return model


def _text_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors but the image tower's, by the model's names.

    Old checkpoints lack the prefix that models with a separate text tower have.
    """
    import open_clip

    if hasattr(model, "text"):
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("visual.")}
    # checkpoints differ in whether a scale has shape [] or [1]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return {
        name: tensor.reshape(shapes[name]) if name in SCALES and tensor.numel() == 1 and name in shapes else tensor
        for name, tensor in state.items()
    }


def _without_image_tower(model: Any) -> Any:
    del model.visual
    return model


def _whole_model_file(weights: Path) -> Path:
    return next((weights / name for name in WHOLE_MODEL if (weights / name).is_file()), weights)


def _tokenizer(spec: TeacherSpec, arch: str, weights: Path | None) -> Callable[[list[str]], Tensor]:
    """Load a tokenizer: open_clip's own for CLIP and PE-core; SigLIP's from beside the weights, or from the hub.

    Raises: TeacherError if it is not available.
    """
    import open_clip

    text = open_clip.get_model_config(arch)["text_cfg"]
    folder = None if weights is None else weights if weights.is_dir() else weights.parent
    made: Callable[[list[str]], Tensor]
    try:
        if "hf_tokenizer_name" in text and folder and any((folder / name).is_file() for name in TOKENIZER_FILES):
            options = text.get("tokenizer_kwargs", {})
            made = open_clip.tokenizer.HFTokenizer(str(folder), context_length=text["context_length"], **options)
        else:
            with quiet_open_clip(), hub_or_offline(spec.model):
                made = open_clip.get_tokenizer(arch)
    except Exception as error:
        where = text.get("hf_tokenizer_name")
        raise TeacherError(
            f"the tokenizer of {spec.name} ({where}) cannot be loaded ({brief(error)}); give --text-weights DIR "
            f"with {TOKENIZER_FILES[0]} next to the weights"
        ) from error
    return made
