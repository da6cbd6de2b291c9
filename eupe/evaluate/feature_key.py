"""Keys of an encoder's tokens for some views of pictures: equal keys mean equal bytes.

Whatever may change a token's last bit is in the key: the weights and the modules around them, the pictures' bytes in
their order, the crops, the batch, the versions of the libraries, and the machine, because other processors round sums
differently. A needless difference costs a pass; a missing one would cost a result.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from eupe.common.compute import dtype_name
from eupe.common.cores import cpu_name
from eupe.common.prefetch import map_ahead
from eupe.corpus.views import KERNEL
from eupe.evaluate.encode import BATCH
from eupe.evaluate.judged_pictures import STRIDE, CropFunction, Pictures, centre, whole, windows
from eupe.store.layout import DESCRIPTIVE
from eupe.teachers.teacher import Teacher

REVISION = 1
"""To be raised by a change of eupe after which an encoder gives other tokens for the same pictures."""
CROPS: Mapping[CropFunction, str] = {centre: "center", whole: "squash", windows: f"windows {STRIDE!r}"}
"""The crops whose views can be looked up; a changed rule needs another word."""
LIBRARIES = ("eupe", "torch", "timm", "transformers", "open_clip_torch", "pillow", "pillow_heif", "numpy")
"""The libraries that decode and resize pictures, or hold the code of an encoder."""
PLACES = ("name_or_path", "_name_or_path", "_commit_hash", "transformers_version")
"""Attributes of Hugging Face's models that say where a model is from, which does not decide its tokens."""
READ_AHEAD = 32


def encoder_digest(teacher: Teacher) -> str:
    """Return the sha256 of all that decides a teacher's tokens, except views.

    It must be called before the first pass, in which some modules change their attributes.
    """
    decisive = {
        "revision": REVISION,
        "versions": {name: _version(name) for name in LIBRARIES},
        "card": {name: value for name, value in teacher.spec.to_json().items() if name not in DESCRIPTIVE},
        "modules": _modules(teacher.module),
        "config": _config(teacher.module),
        "dtype": dtype_name(teacher.dtype),
        "machine": _machine(teacher.device),
        "batch": BATCH,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()


def views_key(encoder: str, pictures: Pictures, *, size: int, crop: CropFunction) -> str:
    """Return the key of an encoder's tokens for the views that `crop`, one of `CROPS`, makes of the pictures.

    Args:
        encoder: its `encoder_digest`.
    Raises: CorpusError if a picture cannot be read.
    """
    digest = hashlib.sha256(json.dumps([encoder, CROPS[crop], KERNEL, size, len(pictures)]).encode())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for each in map_ahead(pool, pictures.sha256, range(len(pictures)), ahead=READ_AHEAD):
            digest.update(each.encode())
    return digest.hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # pillow_heif is optional
        return None


def _modules(module: nn.Module) -> dict[str, list[Any]]:
    """Return class, attributes, weights and buffers of every part of a module.

    Attributes say what weights do not: heads, eps, strides. Some buffers, such as tables of rotations, are not in the
    state dict.
    """
    return {
        name: [
            f"{type(part).__module__}.{type(part).__qualname__}",
            {
                key: _plain(value)
                for key, value in {**vars(part), **part._parameters, **part._buffers}.items()
                if key not in PLACES
            },
        ]
        for name, part in module.named_modules()
    }


def _plain(value: Any) -> Any:
    """Return an attribute as JSON; of a function or class its name, of any other object the name of its class."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, torch.Tensor):
        content: Any = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return [str(value.dtype), *value.shape, hashlib.sha256(content).hexdigest()]
    if isinstance(value, torch.dtype | torch.device | Enum):
        return str(value)
    return f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}"


def _config(module: nn.Module) -> dict[str, Any] | None:
    """Return the configuration that Hugging Face's models read in their forward pass; None for all other models."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    plain = {name: value for name, value in config.to_dict().items() if name not in PLACES}
    return {**plain, "attention": getattr(config, "_attn_implementation", None)}


def _machine(device: torch.device) -> dict[str, Any]:
    """Return what the order and rounding of sums depend on."""
    if device.type == "cuda":
        return {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "fp32": torch.get_float32_matmul_precision(),
        }
    instructions = torch.backends.cpu.get_cpu_capability()
    return {"device": cpu_name(), "instructions": instructions, "threads": torch.get_num_threads()}
