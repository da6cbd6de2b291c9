"""Choice of the device and of the dtype to compute in."""

from __future__ import annotations

import torch

from eupe.errors import ConfigError

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


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))
