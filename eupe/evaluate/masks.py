"""Segmentation masks: which pixel values or colours stand for which class.

A mask holds class numbers, or values that `--mask-values` maps to class numbers. A mask that can be read in more than
one way is refused, and the error lists the values found: scores of a wrong reading look like any others.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eupe.errors import ConfigError, CorpusError

NOTHING = -1
"""Class number of pixels without a class."""
_UNKNOWN = -2
GREATEST = 2**24 - 1
"""Largest absolute value that options may name."""
SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".npy")
LOSSY = (".jpg", ".jpeg", ".jfif", ".webp")
MANY_COLOURS = 256
"""More colours than this make a picture, not a mask."""
NAMED, LISTED = 8, 32
"""Number of values that a message names, and that its suggested option lists."""


@dataclass(frozen=True)
class MaskCode:
    """The meaning of mask values, as the options give it."""

    values: tuple[int, ...] | None = None
    """Values of class 0, 1, ...; None if values are class numbers."""
    ignored: tuple[int, ...] | None = None
    """Values that stand for no class; None for the layout's default."""
    colours: bool = False
    """True if values are colours, 0xRRGGBB."""

    @property
    def protocol(self) -> dict[str, list[str]]:
        """Return the options that decide scores."""
        given = {"mask_values": self.values, "mask_ignore": self.ignored}
        return {name: self.words(values) for name, values in given.items() if values is not None}

    def words(self, values: Sequence[int]) -> list[str]:
        """Return values as they are written on the command line."""
        return [f"#{value:06x}" if self.colours else str(value) for value in values]


CLASS_NUMBERS = MaskCode()
"""Default meaning of mask values."""


def read_code(values: str | None, ignored: str | None) -> MaskCode:
    """Read `--mask-values` and `--mask-ignore`: comma-separated numbers, or colours like #ff0000.

    Raises: ConfigError if a value is neither, too large or named twice, or if `--mask-values` gives fewer than two.
    """
    given = {"--mask-values": values, "--mask-ignore": ignored}
    words = {name: [word.strip() for word in text.split(",")] for name, text in given.items() if text is not None}
    colours = any(word.startswith("#") for each in words.values() for word in each)
    numbers: dict[str, tuple[int, ...]] = {}
    for name, each in words.items():
        try:
            if colours and not all(word.startswith("#") and len(word) == 7 for word in each):
                raise ValueError
            if any(abs(int(word)) > GREATEST for word in each if not colours):
                raise ValueError
            numbers[name] = tuple(int(word[1:], 16) if colours else int(word) for word in each)
        except ValueError:
            raise ConfigError(
                f"{name} takes whole numbers up to {GREATEST}, or colours like #ff0000, separated by commas, got "
                f"{given[name]}"
            ) from None
    both = [value for each in numbers.values() for value in each]
    if len(set(both)) < len(both):
        raise ConfigError(f"{' and '.join(numbers)} name a value twice; a value is one class, or no class")
    if len(numbers.get("--mask-values", (0, 1))) < 2:
        raise ConfigError(
            f"--mask-values {values} is one class; give at least two values, of classes 0, 1, ... in order"
        )
    return MaskCode(numbers.get("--mask-values"), numbers.get("--mask-ignore"), colours)


@dataclass(frozen=True)
class Classes:
    """The mapping from values in a mask to class numbers, which start at 0."""

    values: tuple[int, ...]
    """Value of class 0, 1, ..."""
    ignored: tuple[int, ...]
    code: MaskCode

    @property
    def count(self) -> int:
        return len(self.values)

    def read(self, path: Path) -> NDArray[np.int32]:
        """Read a mask as class numbers, [H, W], with `NOTHING` for pixels without a class.

        Raises: CorpusError if the mask cannot be read, or holds a value that is neither a class nor ignored.
        """
        found = read_mask(path, colours=self.code.colours)
        low, class_of = self._table
        places = found - low
        # clipping keeps the lookup in bounds; what was clipped counts as unknown
        labels: NDArray[np.int32] = class_of[places.clip(0, len(class_of) - 1)]
        unknown = (labels == _UNKNOWN) | (places < 0) | (places >= len(class_of))
        if unknown.any():
            (word,) = self.code.words([int(found[unknown][0])])
            raise CorpusError(
                f"mask {path} holds class {word}, but there are {self.count} classes ({self.told}); --mask-values and "
                "--mask-ignore give values another meaning"
            )
        return labels

    @cached_property
    def _table(self) -> tuple[int, NDArray[np.int32]]:
        """Return the smallest value, and the class of every value from it on."""
        low, high = min(*self.values, *self.ignored), max(*self.values, *self.ignored)
        class_of = np.full(high - low + 1, _UNKNOWN, dtype=np.int32)
        class_of[np.array(self.values) - low] = np.arange(self.count)
        class_of[np.array(self.ignored, dtype=np.int64) - low] = NOTHING
        return low, class_of

    @property
    def told(self) -> str:
        """Return in words which values are classes, and which stand for none."""
        first, last = self.values[0], self.values[-1]
        is_run = self.values == tuple(range(first, last + 1)) and not self.code.colours
        classes = f"{first} to {last}" if is_run else _some(self.code.words(self.values))
        ignored = _some(self.code.words(self.ignored))
        return f"{classes}, and {ignored} for none" if ignored else classes


def find_classes(
    masks: Sequence[Path], code: MaskCode, *, nothing: int, names: int | None, data: Path, whole: bool = True
) -> Classes:
    """Find the classes in masks from the values that occur.

    Args:
        nothing: the layout's value for no class; class numbers start at 1 if it is 0.
        names: number of class names, if the data set has names.
        whole: whether these are all masks, not a subset; fewer than two classes are refused only then.
    Raises: ConfigError if the values can be read in several ways, or fewer than two classes occur; CorpusError if a
        mask cannot be read, or no mask holds a class.
    """
    found = values_in(masks, colours=code.colours, data=data)
    offset = 1 if nothing == 0 else 0
    # the layout's value for no class means nothing among colours, and may be named as a class by the options
    usual = () if code.colours or nothing in (code.values or ()) else (nothing,)
    ignored = usual if code.ignored is None else code.ignored
    kept = [value for value in found if value not in ignored]
    held = f"the masks of {data} hold {_some(code.words(found)) or 'nothing'}"
    advice = f"say which are classes with --mask-values {_listed(code.words(found))}, and --mask-ignore"
    if code.values is not None:
        if names not in (None, len(code.values)):
            raise ConfigError(
                f"--mask-values gives {len(code.values)} classes, but {data} names {names}; both must be the same"
            )
        classes = Classes(code.values, ignored, code)
    elif code.colours:
        raise ConfigError(f"{held}; give the colours that are classes with --mask-values")
    else:
        if not kept and whole:
            raise CorpusError(
                f"the masks of {data} hold no class at all, only {_some(code.words(found))}, which stands for none; "
                "--mask-values and --mask-ignore give values another meaning"
            )
        count = names or kept[-1] - offset + 1
        if kept:
            _require_clear(kept, count, held, advice, layout=(nothing, names, code, found))
        classes = Classes(tuple(range(offset, offset + count)), ignored, code)
    if whole and len(set(kept) & set(classes.values)) < 2:
        raise ConfigError(
            f"{held}; of these, {_some(code.words(kept)) or 'nothing'} is a class and "
            f"{_some(code.words(ignored)) or 'nothing'} stands for none, so there is nothing to tell apart; "
            f"{advice} for the others"
        )
    return classes


def _require_clear(
    kept: Sequence[int], count: int, held: str, advice: str, *, layout: tuple[int, int | None, MaskCode, Sequence[int]]
) -> None:
    """Raise ConfigError if the values are unlikely to be class numbers."""
    nothing, names, code, found = layout
    if kept[0] < 0:
        raise ConfigError(f"{held}, but class numbers start at 0; {advice} for the others")
    if code.ignored is None and nothing == 255 and nothing in found and kept[-1] > nothing:
        raise ConfigError(f"{held}; 255 may be a class or no class; give the value for no class with --mask-ignore")
    # where most numbers below the largest are missing, values are not numbers: 0 and 1000 are two classes, not 1,001
    is_sparse = 2 * len(kept) < count and (nothing != 0 or kept[-1] > 255)
    if names is None and count > 2 and is_sparse and len(kept) > 1:
        raise ConfigError(
            f"{held}, which would be {count:,} classes if they were class numbers; {advice} for the others"
        )


def values_in(masks: Sequence[Path], *, colours: bool, data: Path) -> tuple[int, ...]:
    """Return the values that occur in masks, sorted.

    Raises: ConfigError if masks hold colours although `colours` is False; CorpusError if a mask cannot be read.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(lambda path: _values_of(path, colours=colours), masks))
    if found := sorted({value for kind, part in parts if kind for value in part}):
        words = MaskCode(colours=True).words(found)
        if len(found) > MANY_COLOURS:
            raise ConfigError(
                f"the masks of {data} hold {len(found):,} colours, too many to be classes; give masks, not pictures"
            )
        raise ConfigError(
            f"the masks of {data} hold {len(found)} colours ({_some(words)}), not class numbers; give those of "
            f"classes 0, 1, ... as --mask-values '{_listed(words)}', and the others as --mask-ignore"
        )
    return tuple(sorted({value for _, part in parts for value in part}))


def _values_of(path: Path, *, colours: bool) -> tuple[bool, list[int]]:
    """Return whether a mask holds colours although numbers were expected, and the values it holds."""
    try:
        return False, _different(read_mask(path, colours=colours))
    except _ColouredError:
        return True, _different(read_mask(path, colours=True))


def _different(values: NDArray[np.int32]) -> list[int]:
    # bincount is linear where np.unique sorts; the bound keeps its table small
    is_narrow = values.size and values.min() >= 0 and values.max() < 2**16
    found = np.flatnonzero(np.bincount(values.ravel())) if is_narrow else np.unique(values)
    return [int(value) for value in found]


class _ColouredError(CorpusError):
    """An error for a mask whose channels differ."""


def read_mask(path: Path, *, colours: bool = False) -> NDArray[np.int32]:
    """Read a mask as numbers, [H, W]: values, palette indices, or 0 and 1 for one bit; or as colours, 0xRRGGBB.

    Raises: CorpusError if a pixel is not one whole number, or not one colour where `colours` is True.
    """
    values = _array(path) if path.suffix.lower() == ".npy" else _picture(path, colours=colours)
    if values.ndim == 3 and values.shape[-1] in (2, 4):
        if (values[..., -1] != 255).any():
            raise CorpusError(f"mask {path} is transparent in places, which is not a class; save it without alpha")
        values = values[..., :-1]
    if values.ndim == 3 and values.shape[-1] == 3 and colours:
        red, green, blue = (values[..., i].astype(np.int32) for i in range(3))
        return red * (1 << 16) + green * (1 << 8) + blue
    # a mask that was saved as grey RGB has three equal channels, and is still a mask
    if values.ndim == 3 and (values != values[..., :1]).any():
        raise _ColouredError(
            f"mask {path} has {values.shape[-1]} channels that differ, so it holds colours; give them as --mask-values"
        )
    values = values[..., 0] if values.ndim == 3 else values
    if values.ndim != 2:
        raise CorpusError(f"mask {path} has shape {values.shape}, not height x width")
    if values.dtype.kind not in "biuf" or (values.dtype.kind == "f" and (values != np.floor(values)).any()):
        raise CorpusError(f"mask {path} holds values of type {values.dtype} that are not whole numbers")
    limits = np.iinfo(np.int32)
    if values.size and (values.min() < limits.min or values.max() > limits.max):
        raise CorpusError(f"mask {path} holds {values.max()}, which is out of range for class numbers")
    return values.astype(np.int32)


def _picture(path: Path, *, colours: bool) -> NDArray[Any]:
    """Decode a mask as it was saved, or as RGB or RGBA for colours.

    Raises: CorpusError if it cannot be decoded, or decoding would change its values.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\xff\xd8":
            raise CorpusError(f"mask {path} is a JPEG, which changes values at edges; save masks as PNG")
        # Pillow would reduce such a PNG (bit depth 16; colour types 2, 4, 6) to 8 bits without an error
        if data[:4] == b"\x89PNG" and len(data) > 25 and data[24] == 16 and data[25] in (2, 4, 6):
            raise CorpusError(
                f"mask {path} has 16 bits in each of several channels; save it with 8 bits, or with one channel"
            )
        with Image.open(io.BytesIO(data), formats=("PNG", "TIFF", "BMP")) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise CorpusError(f"mask {path} has several pictures in one file; save one")
            if not colours or image.mode in ("RGB", "RGBA"):
                return np.asarray(image)
            has_alpha = "transparency" in image.info or image.mode in ("LA", "PA")
            return np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    except CorpusError:
        raise
    except Exception as error:  # a decoder may raise anything on a malformed file
        raise CorpusError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _array(path: Path) -> NDArray[Any]:
    try:
        values = np.load(path, allow_pickle=False)
    except Exception as error:  # as above
        raise CorpusError(f"mask {path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(values, np.ndarray):
        raise CorpusError(f"mask {path} is an archive of arrays (.npz), not one array (.npy)")
    return values


def _listed(words: Sequence[str]) -> str:
    return ",".join(words[:LISTED]) + (",..." if len(words) > LISTED else "")


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:NAMED]) + (f", and {len(words) - NAMED:,} more" if len(words) > NAMED else "")
