"""Tokens of pictures from encoders, and where they are kept until a task is done: in memory, or in a file.

Shapes: V views, h w cells of the dense grid, D width of a dense token, Ds width of a summary.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eupe.common.compute import Tokens, is_out_of_memory, run_in_batches
from eupe.common.cores import control_groups
from eupe.common.prefetch import map_ahead
from eupe.corpus.views import ViewParams, render_view
from eupe.errors import ConfigError, StorageError
from eupe.evaluate.judged_pictures import CropFunction, Pictures, centre, whole
from eupe.store.layout import DENSE, SUMMARY

Encode = Callable[[NDArray[np.uint8]], Tokens]
"""Function from views, uint8 [B, S, S, 3], to their tokens."""

BATCH = 16
MEMORY_SHARE = 0.75
"""Share of the free memory that features may take."""


@dataclass(frozen=True)
class EncodedViews:
    """A subject's tokens for views of some pictures."""

    picture_V: NDArray[np.int64]
    """Picture of each view, as its place among the pictures."""
    params: list[ViewParams]
    size: int
    """Side in pixels of the views that the encoder saw."""
    summary: Tensor | None = None
    """float32 [V, Ds]"""
    dense: Tensor | None = None
    """float16 [V, h, w, D]"""

    def __len__(self) -> int:
        return len(self.params)


def encode_views(
    pictures: Pictures,
    encode: Encode,
    *,
    kinds: Sequence[str],
    size: int,
    crop: CropFunction,
    cells: tuple[int, int],
    scratch: Path | None,
    of: str,
) -> EncodedViews:
    """Encode the views that `crop` makes of every picture, all kinds of token in one pass.

    Args:
        cells: side of the dense grid, and D.
        scratch: see `room_for`.
        of: name of the encoder, for messages.
    Raises: CorpusError if a picture cannot be read; ConfigError if there is no room for the dense tokens, or tokens are
        not finite or too large for fp16; StorageError.
    """
    grid, width = cells
    dense = None
    if DENSE in kinds:
        num_views = len(pictures)
        if crop not in (centre, whole):  # the number of views depends on the picture's sides
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                num_views = sum(pool.map(lambda i: len(crop(*pictures.sides(i))), range(len(pictures))))
        dense = room_for((num_views, grid, grid, width), scratch, of=of)
    places: list[int] = []
    params: list[ViewParams] = []
    summaries: list[Tensor] = []
    waiting: list[NDArray[np.uint8]] = []

    def flush() -> None:
        tokens = encoded(encode, np.stack(waiting), of=of)
        if SUMMARY in kinds:
            assert tokens.summary is not None
            summaries.append(require_finite(tokens.summary.float().cpu(), of))
        if dense is not None:
            part = dense[len(params) - len(waiting) : len(params)]
            part.copy_(tokens.dense)
            require_finite(part, of)  # after the copy, in which values too large for fp16 become infinite
        waiting.clear()

    for i, drawn, views in _rendered(pictures, size, crop):
        for how, view in zip(drawn, views, strict=True):
            places.append(i)
            params.append(how)
            waiting.append(view)
            if len(waiting) == BATCH:
                flush()
    if waiting:
        flush()
    return EncodedViews(np.array(places), params, size, torch.cat(summaries) if summaries else None, dense)


def encoded(encode: Encode, views_u8_VSSC: NDArray[np.uint8], *, of: str) -> Tokens:
    """Encode views, halving the batch as often as the device runs out of memory.

    Raises: ConfigError if a single view does not fit.
    """
    try:
        parts, _ = run_in_batches(
            lambda start, stop: encode(views_u8_VSSC[start:stop]), len(views_u8_VSSC), len(views_u8_VSSC)
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size = views_u8_VSSC.shape[1]
        raise ConfigError(
            f"the device has too little memory for {of} and one view of {size} px; give a smaller --size"
        ) from error
    summaries = [part.summary for part in parts if part.summary is not None]
    return Tokens(torch.cat(summaries) if summaries else None, torch.cat([part.dense for part in parts]))


def require_finite(tokens: Tensor, of: str) -> Tensor:
    """Return the tokens if all of them are finite.

    Raises: ConfigError otherwise.
    """
    if not torch.isfinite(tokens).all():
        raise ConfigError(f"{of} gives tokens that are not finite, or too large for fp16; it cannot be evaluated")
    return tokens


def room_for(shape: tuple[int, ...], scratch: Path | None, *, of: str) -> Tensor:
    """Allocate room for dense tokens, float16, uninitialised.

    Args:
        scratch: folder for a file that holds them, which disappears with the process; None for memory.
    Raises: ConfigError if they do not fit in memory, or `scratch` is not a folder; StorageError if it has no room for
        them, or cannot be written.
    """
    num_bytes = 2 * math.prod(shape)
    what = f"the dense tokens of {shape[0]} views of {of} take {num_bytes / 1e9:.1f} GB"
    if scratch is None:
        free = free_bytes()
        if num_bytes > MEMORY_SHARE * free:
            raise ConfigError(
                f"{what}, more than {MEMORY_SHARE:.0%} of the {free / 1e9:.1f} GB of free memory; give "
                "--scratch a folder with room for them, a smaller --size, or --limit"
            )
        return torch.empty(shape, dtype=torch.float16)
    if not scratch.is_dir():
        raise ConfigError(f"--scratch {scratch} is not a folder")
    try:
        free = shutil.disk_usage(scratch).free
        if num_bytes > free:
            raise StorageError(f"{what}, but --scratch {scratch} has {free / 1e9:.1f} GB; give a folder with more room")
        with tempfile.TemporaryFile(dir=scratch) as file:
            _reserve(file.fileno(), num_bytes)
            # the mapping keeps the file, which has no name, alive after it is closed
            return torch.from_numpy(np.memmap(file, dtype=np.float16, mode="r+", shape=shape))
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{what}, which --scratch {scratch} cannot hold ({error.strerror})") from error


def _reserve(file: int, num_bytes: int) -> None:
    """Reserve room on the disk now: a full disk would kill the process when it writes to the mapping later.

    Raises: OSError if there is not enough.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, num_bytes)
    else:
        os.ftruncate(file, num_bytes)


def free_bytes(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may still take: the machine's, or less if a control group limits it.

    Args:
        root: root of the file system with `proc` and `sys`.
    """
    try:
        words = (root / "proc/meminfo").read_text().split("MemAvailable:")[1].split()
        free = int(words[0]) * 1024
    except (OSError, IndexError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left in each of this process's control groups that has a limit."""
    for group in control_groups(root):
        try:
            limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # cached file pages count as used, but the kernel frees them on demand
            yield int(limit) - int(used) + int(stat["active_file"]) + int(stat["inactive_file"])
        except (OSError, KeyError, ValueError):  # no such group, or its limit is "max"
            continue


def _rendered(
    pictures: Pictures, size: int, crop: CropFunction
) -> Iterator[tuple[int, list[ViewParams], list[NDArray[np.uint8]]]]:
    def render(i: int) -> tuple[int, list[ViewParams], list[NDArray[np.uint8]]]:
        image = pictures.image(i)
        drawn = crop(image.width, image.height)
        return i, drawn, [render_view(image, how, size) for how in drawn]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from map_ahead(pool, render, range(len(pictures)), ahead=2 * BATCH)
