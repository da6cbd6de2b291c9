"""Which device does the work, and in which arithmetic."""

from __future__ import annotations

import torch

from eupe.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device() -> torch.device:
    """The first GPU that this process may use, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_word(word: str, device: torch.device) -> str:
    """Resolve `auto`: bf16 where the hardware multiplies it natively, else fp32.

    Raises: ConfigError for an unknown word, or fp16 on a CPU.
    """
    if word == "auto":
        return "bf16" if _has_fast_bf16(device) else "fp32"
    if word not in DTYPES:
        raise ConfigError(f"--dtype {word} is unknown; give auto, {', '.join(DTYPES)}")
    if word == "fp16" and device.type == "cpu":
        raise ConfigError("--dtype fp16 needs a GPU; on a CPU give auto, fp32 or bf16")
    return word


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))


def autocast(word: str, device: torch.device) -> torch.autocast:
    """Autocast to a resolved dtype word; fp32 turns it off."""
    return torch.autocast(device.type, DTYPES[word], enabled=word != "fp32")
