"""Coding of features: float16, float16 with fewer mantissa bits, or int8 with a scale for each token.

Shapes: T tokens (any leading axes), D channels, C stored channels.

int8 (symmetric, per token, on channels standardised by calibration): with z = (x - mean) / std, the token's scale is
max|z| / 127 as float16, and q = round(z / scale). The array has D + 2 int8 channels; the last two are the bytes of the
little-endian float16 scale, so that a chunk can be decoded without any other. A scale of NaN marks a token without a
value; the array's fill value, 127, gives exactly that.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs import BitRound
from numpy.typing import NDArray

from eupe.errors import ConfigError

FP16, INT8, BITROUND = "fp16", "int8", "bitround"
FP16_MAX = 65504.0
MANTISSA_BITS = 10
SCALE_CHANNELS = 2
INT8_LIMIT = 127
INT8_BITS = 7
"""Number of bits that int8 keeps of a token's largest channel."""
INT8_FILL = 127
"""Fill value; two bytes of it are a float16 NaN."""
CANDIDATES = (FP16, *(f"{BITROUND}:{bits}" for bits in range(MANTISSA_BITS - 1, 1, -1)), INT8)
"""Precisions that `--fidelity` chooses from."""


@dataclass(frozen=True)
class Calibration:
    """Mean and standard deviation of each channel, float32 [D], over a sample of the corpus; int8 is coded by them."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    """Standard deviation; 1 for a channel that never changed."""

    @classmethod
    def of(cls, tokens: NDArray[Any]) -> Calibration:
        """Compute the calibration from tokens [..., D], all finite."""
        flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
        std = flat.std(axis=0)
        return cls(flat.mean(axis=0).astype(np.float32), np.where(std > 0, std, 1.0).astype(np.float32))

    def to_json(self) -> dict[str, str]:
        return {"mean": _encode(self.mean), "std": _encode(self.std)}

    @classmethod
    def from_json(cls, plain: Mapping[str, str]) -> Calibration:
        return cls(_decode(plain["mean"]), _decode(plain["std"]))


def is_calibration(plain: object, dim: int) -> bool:
    """Return whether a JSON value calibrates `dim` channels: finite numbers, deviations above zero."""
    try:
        calibration = Calibration.from_json(plain)  # type: ignore[arg-type]
    except (TypeError, KeyError, ValueError, AttributeError):
        return False
    mean, std = calibration.mean, calibration.std
    return bool(mean.shape == std.shape == (dim,) and np.isfinite([mean, std]).all() and (std > 0).all())


def parse_precision(text: str, kinds: tuple[str, ...]) -> dict[str, str]:
    """Parse `int8`, for all kinds of token, or `dense=int8,summary=fp16`; a kind that is not named is fp16.

    Raises: ConfigError for an unknown precision or kind.
    """
    pairs = [word.partition("=") for word in text.split(",")]
    if len(pairs) == 1 and not pairs[0][1]:
        return dict.fromkeys(kinds, require_known(text))
    chosen = {kind: require_known(precision) for kind, _, precision in pairs}
    if unknown := sorted(set(chosen) - {"summary", "dense"}):
        raise ConfigError(f"--precision {text!r} names {unknown[0]!r}; it takes dense=... and summary=...")
    return {kind: chosen.get(kind, FP16) for kind in kinds}


def require_known(precision: str) -> str:
    """Return the precision itself.

    Raises: ConfigError if it is unknown.
    """
    match = re.fullmatch(rf"{BITROUND}:(\d+)", precision)
    if precision in (FP16, INT8) or (match and 1 <= int(match[1]) < MANTISSA_BITS):
        return precision
    raise ConfigError(
        f"precision {precision!r} is unknown; give fp16, bitround:B with B mantissa bits (1 to 9), or int8"
    )


def require_convertible(stored: Mapping[str, str], wanted: Mapping[str, str], *, where: str) -> None:
    """Raise ConfigError if tokens of a store would be stored as more than what is left of them.

    Args:
        stored: kind of token to its precision in the store.
        wanted: the same as requested.
        where: the store, for the error message.
    """
    for kind, precision in wanted.items():
        if not _keeps_no_more(stored[kind], precision):
            most = INT8 if stored[kind] == INT8 else f"bitround:B with B up to {_mantissa_bits(stored[kind])}"
            raise ConfigError(
                f"{where} has {kind} tokens in {stored[kind]}, and {precision} would claim more than is left of them; "
                f"give --precision {kind}={most}, or make the other store with `eupe extract --precision {precision}`"
            )


def _keeps_no_more(stored: str, wanted: str) -> bool:
    if wanted == stored or stored == FP16:
        return True
    if stored == INT8 or wanted == FP16:
        return False
    return _mantissa_bits(stored) >= (INT8_BITS if wanted == INT8 else _mantissa_bits(wanted))


def _mantissa_bits(precision: str) -> int:
    """Return the B of `bitround:B`."""
    return int(precision.partition(":")[2])


def stored_channels(precision: str, dim: int) -> int:
    """Return C, the number of channels that D channels take in the array."""
    return dim + SCALE_CHANNELS if precision == INT8 else dim


def encode(tokens: NDArray[Any], precision: str, calibration: Calibration | None) -> NDArray[Any]:
    """Code float16 tokens [..., D] as they are stored: float16 [..., D], or int8 [..., D + 2]. NaN tokens stay NaN.

    Tokens that are coded as int8 already are returned as they are.
    """
    if precision == FP16 or tokens.dtype == np.int8:
        return tokens
    if precision == INT8:
        assert calibration is not None
        return _encode_int8(tokens, calibration)
    bits = _mantissa_bits(precision)
    rounded = BitRound(bits).decode(BitRound(bits).encode(tokens.copy())).view(np.float16).reshape(tokens.shape)
    # rounding up may carry into the exponent: the largest values would become infinite, and NaN another value
    largest = np.float16((2 - 2.0**-bits) * 2.0**15)
    return np.where(np.isnan(tokens), tokens, np.clip(rounded, -largest, largest))


def _encode_int8(tokens: NDArray[np.float16], calibration: Calibration) -> NDArray[np.int8]:
    z = (tokens.astype(np.float32) - calibration.mean) / calibration.std
    largest = np.abs(z).max(axis=-1, keepdims=True)
    scale = np.where(largest > 0, largest / INT8_LIMIT, 1)
    # a scale of zero would divide by zero, and an infinite one decode to NaN
    scale = np.clip(scale, np.finfo(np.float16).tiny, FP16_MAX).astype("<f2")
    missing = np.isnan(largest)
    with np.errstate(invalid="ignore"):
        z /= scale.astype(np.float32)
    q = np.clip(np.rint(np.where(missing, INT8_FILL, z)), -INT8_LIMIT, INT8_LIMIT).astype(np.int8)
    scale_bytes = np.where(missing, np.int8(INT8_FILL), scale.astype("<f2").view(np.int8))
    return np.concatenate([q, scale_bytes], axis=-1)


def decode(stored: NDArray[Any], precision: str, calibration: Calibration | None) -> NDArray[Any]:
    """Decode stored values to tokens: float16 [..., D], or float32 [..., D] from int8."""
    if precision != INT8:
        return stored
    assert calibration is not None
    # FORMAT.md fixes the order of these operations, so that every reader gets the same bits
    scale = np.ascontiguousarray(stored[..., -SCALE_CHANNELS:]).view("<f2").astype(np.float32)
    tokens = stored[..., :-SCALE_CHANNELS] * scale
    tokens *= calibration.std
    tokens += calibration.mean
    return tokens


@dataclass(frozen=True)
class Tokens:
    """Features of B views as they are stored: cheap to move, and decoded where they are used."""

    stored: NDArray[Any]
    """float16 [B, ..., D], or int8 [B, ..., D + 2]; in memory dense maps lie channel by channel."""
    precision: str
    calibration: Calibration | None
    """Calibration of int8 values; None for other precisions."""

    def decode(self) -> NDArray[Any]:
        """Return the teacher's values: float16 [B, ..., D], or float32 if stored as int8; NaN for a failed sample."""
        return decode(self.stored, self.precision, self.calibration)


@dataclass(frozen=True)
class Fidelity:
    """Fidelity of a precision, measured on a calibration sample."""

    mean: float
    """Mean of the cosines between each token as the teacher gave it and as it is read back, both standardised."""
    p5: float
    """5th percentile of these cosines: 95% of the tokens are at least as near."""
    share: float
    """Compressed bytes as a share of raw float16."""


def cosines(tokens: NDArray[np.float16], precision: str, calibration: Calibration) -> NDArray[np.float64]:
    """Return the cosine of each token [T, D] with itself stored and read, both standardised: float64 [T].

    They are standardised by the calibration because the loss sees them so: a channel with a large mean would hide what
    the others lose.
    """
    back = decode(encode(tokens, precision, calibration), precision, calibration)
    a, b = ((x.astype(np.float64) - calibration.mean) / calibration.std for x in (tokens, back))
    norm_a, norm_b = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    norms = norm_a * norm_b
    dots = np.einsum("...d,...d->...", a, b) / np.where(norms == 0, 1.0, norms)
    # a token equal to the mean has no direction: 1 if it comes back so, 0 if only one of the two is zero
    return np.where((norm_a == 0) & (norm_b == 0), 1.0, dots)


def _encode(values: NDArray[np.float32]) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")


def _decode(text: str) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
