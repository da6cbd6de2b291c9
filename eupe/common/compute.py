"""What every encoder computes on and with, in torch alone: device, dtype and memory; pixels in, tokens out.

Model libraries take seconds to import, so nothing here needs one. Shapes: B batch, C channels, H W pixels, h w cells of
the dense grid, D width of a dense token, Ds width of the summary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from eupe.errors import ConfigError

Result = TypeVar("Result")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device() -> torch.device:
    """Return the first GPU that this process may use, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(word: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a word names; "auto" is bfloat16 if the hardware multiplies it, else float32.

    Raises: ConfigError for fp16 on a CPU, and for an unknown word.
    """
    if word == "fp16" and device.type == "cpu":
        raise ConfigError("--dtype fp16 does not work on a CPU; use bf16, fp32 or auto")
    if word == "auto":
        return torch.bfloat16 if _multiplies_bf16(device) else torch.float32
    if word not in DTYPES:
        raise ConfigError(f"--dtype {word} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[word]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the word for a dtype, the inverse of `compute_dtype`."""
    return next(word for word, known in DTYPES.items() if known == dtype)


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return a context with matrix products in `dtype` and weights in float32; it does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that a device or the machine is out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # not every library raises torch.OutOfMemoryError: these are plain RuntimeErrors
    words = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in words)


def run_in_batches(run: Callable[[int, int], Result], num_items: int, batch_size: int) -> tuple[list[Result], int]:
    """Run over items in batches, halving the batch as often as the device runs out of memory.

    Args:
        run: called with the index of a batch's first item, and the one after its last.
    Returns: the results in order, and the batch size, which is smaller if memory ran out.
    Raises: what `run` raises; that memory is out only if there is none for a single item.
    """
    results: list[Result] = []
    start = 0
    while start < num_items:
        stop = min(start + batch_size, num_items)
        try:
            results.append(run(start, stop))
        except Exception as error:
            if stop - start == 1 or not is_out_of_memory(error):
                raise
        else:
            start = stop
            continue
        # outside `except`: there the error's traceback still holds the tensors of the failed batch
        batch_size = -(-(stop - start) // 2)
        torch.cuda.empty_cache()
    return results, batch_size


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))


@dataclass(frozen=True)
class Tokens:
    """Outputs of an encoder for a batch of pictures."""

    summary: Tensor | None
    """[B, Ds]; None if the encoder has no summary."""
    dense: Tensor
    """[B, h, w, D], row by row from the top left."""
    layers: Mapping[int, Tensor] = field(default_factory=dict)
    """Dense maps [B, h', w', D'] of the earlier layers that were asked for, by the layer's number from 1."""


def fastest_format(model: nn.Module) -> torch.memory_format:
    """Return the memory format in which a model computes fastest: channels last if it consists of convolutions.

    The libraries convolve in that format, and would otherwise convert the input and output of each layer. A single
    convolution is a patch embedding. Models with attention stay as they are: they spend their time elsewhere.
    """
    parts = [*model.modules()]
    # not "atten", which is in Flatten as well
    attends = any("attention" in name or "attn" in name for name in (type(part).__name__.lower() for part in parts))
    convolves = sum(isinstance(part, nn.Conv2d) for part in parts) > 1
    return torch.channels_last if convolves and not attends else torch.contiguous_format


def normalise(
    views_u8_BHWC: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Return uint8 [B, H, W, C] pictures as normalised float32 [B, C, H, W], on the same device."""
    assert views_u8_BHWC.dtype == torch.uint8
    device = views_u8_BHWC.device
    pixels = views_u8_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format) / 255
    mean_C11 = torch.tensor(mean, device=device).view(-1, 1, 1)
    std_C11 = torch.tensor(std, device=device).view(-1, 1, 1)
    return (pixels - mean_C11) / std_C11
