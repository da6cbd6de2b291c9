"""A directory that the Transformers library loads with `AutoModel.from_pretrained(DIR)` and `AutoImageProcessor`.

DINOv3-like ViTs and plain ConvNeXts become models of that library. Every other student is a `TimmWrapperModel`, whose
directory is the one that timm loads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eupe.export import timm_files
from eupe.export.config import ExportConfig
from eupe.export.heads import save_heads, say_again
from eupe.export.hf_names import Native, native
from eupe.export.source import ForwardFunction, Source, Written
from eupe.models.encoder_spec import EncoderSpec
from eupe.models.hub import quiet_transformers

PREPROCESSOR_FILE = "preprocessor_config.json"
WRAPPER = "TimmWrapperModel"
BICUBIC = 3
"""The filter's number in the library, which is also Pillow's."""


def write(source: Source, config: ExportConfig, folder: Path) -> Written:
    """Write configuration, weights, preprocessor and heads.

    Raises: OSError, SafetensorError.
    """
    translated = native_of(source)
    if translated is None:
        timm_files.write(source, config, folder)
        return Written(WRAPPER)
    _save_native(translated, folder)
    plain = preprocessor(source.encoder.spec)
    (folder / PREPROCESSOR_FILE).write_text(json.dumps(plain, indent=2) + "\n")
    save_heads(source.heads, folder)
    return Written(translated.model)


def native_of(source: Source) -> Native | None:
    """Return the student as one of the library's own models; None if the library has no such model."""
    spec = source.encoder.spec
    return native(spec.arch.split(".")[0], source.encoder.model, spec.size)


def reopen(source: Source, folder: Path) -> ForwardFunction:
    """Load the directory as a user would; return a function that runs its model."""
    from transformers import AutoModel

    spec, translated = source.encoder.spec, native_of(source)
    with quiet_transformers():
        model = AutoModel.from_pretrained(str(folder), local_files_only=True).eval()

    @torch.inference_mode()
    def forward(pixels: Tensor) -> dict[str, Tensor]:
        answer = model(pixels)
        tokens = {"summary": answer.pooler_output, "dense": _dense(spec, translated, model, answer, pixels)}
        return tokens | say_again(folder, tokens)

    return forward


def _dense(spec: EncoderSpec, translated: Native | None, model: Any, answer: Any, pixels: Tensor) -> Tensor:
    if translated is None:
        return timm_files.dense_of(spec, model.timm_model, answer.last_hidden_state, pixels)
    grid = (pixels.shape[-2] // spec.patch, pixels.shape[-1] // spec.patch)
    dense: Tensor = answer.last_hidden_state[:, translated.prefix :].unflatten(1, grid)
    return dense


def _save_native(translated: Native, folder: Path) -> None:
    import transformers

    with quiet_transformers():
        config = getattr(transformers, translated.config)(**translated.options)
        with torch.random.fork_rng(devices=[]):  # the model's random weights must not advance the caller's generator
            model = getattr(transformers, translated.model)(config)
        model.load_state_dict(translated.state, strict=True)
        model.save_pretrained(folder)


def preprocessor(spec: EncoderSpec) -> dict[str, Any]:
    """Return the settings of the centre view: resize the shorter side to the input's, crop the centre, normalise."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": spec.size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": spec.size, "width": spec.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
