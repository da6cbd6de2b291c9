"""A batch through the teacher: as many views at once as it has memory for, the device never waiting for the host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eupe.device import is_out_of_memory
from eupe.encoder import Tokens
from eupe.errors import TeacherError
from eupe.store.layout import DENSE, SUMMARY, StoreSpec, feature_path
from eupe.store.precision import FP16_MAX
from eupe.teachers.teacher import Teacher

FIRST_BATCH, LARGEST_BATCH = 8, 512
WORTHWHILE = 1.05
"""A larger batch is taken if it makes so many times as many views per second."""
TRIALS = 2


@dataclass(frozen=True)
class Halves:
    """One array's float16 tokens of a batch, perhaps still on their way from the device, and what was amiss."""

    path: str
    tokens: Tensor
    num_clipped: Tensor
    num_nonfinite: Tensor


@dataclass(frozen=True)
class Pending:
    """A batch that the device works on."""

    halves: tuple[Halves, ...]
    done: torch.cuda.Event | None

    def wait(self) -> tuple[Halves, ...]:
        """Once they have arrived in the host's memory."""
        if self.done is not None:
            self.done.synchronize()
        return self.halves


class Forward:
    """A teacher's tokens at all sizes of a store, as it keeps them before they are coded."""

    def __init__(self, teacher: Teacher, spec: StoreSpec, *, batch_size: int) -> None:
        self.teacher = teacher
        self._spec = spec
        self.batch_size = batch_size
        """Of the next batch; halved when the device runs out of memory."""

    def begin(self, views: Sequence[dict[int, NDArray[np.uint8]]]) -> Pending:
        """Start the work on views, given by size; on a GPU without waiting for its end.

        Raises: TeacherError if there is no memory for a single view.
        """
        on_gpu = self.teacher.device.type == "cuda"
        halves = []
        for size, grid in zip(self._spec.sizes, self._spec.grids, strict=True):
            pixels = torch.from_numpy(np.stack([view[size] for view in views]))
            tokens = self._tokens(pixels.pin_memory() if on_gpu else pixels)
            for kind in self._spec.tokens:
                values = tokens.summary if kind == SUMMARY else pool_cells(tokens.dense, grid)
                assert values is not None
                halves.append(_to_host(_halves(feature_path(size, kind), values)))
        done = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if done is not None:
            done.record(torch.cuda.current_stream(self.teacher.device))
        return Pending(tuple(halves), done)

    def _tokens(self, pixels: Tensor) -> Tokens:
        """Of [B, S, S, 3], in pieces that fit into memory."""
        while True:
            try:
                pieces = [self.teacher(piece) for piece in torch.split(pixels, self.batch_size)]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.batch_size == 1:
                    raise TeacherError(
                        f"{self.teacher.spec.name} does not fit a single view of {pixels.shape[1]} px into the memory "
                        f"of {self.teacher.device}; give a smaller --size, or a device with more memory"
                    ) from error
            else:
                break
            self.batch_size = -(-min(self.batch_size, len(pixels)) // 2)
            if self.teacher.device.type == "cuda":
                torch.cuda.empty_cache()
        if len(pieces) == 1:
            return pieces[0]
        summaries = [piece.summary for piece in pieces if piece.summary is not None]
        return Tokens(
            summary=torch.cat(summaries) if summaries else None, dense=torch.cat([piece.dense for piece in pieces])
        )


def pool_cells(dense_BhwD: Tensor, grid: int) -> Tensor:
    """Mean over the cells that fall into each of `grid` x `grid`, float32; the map itself where it has that grid."""
    if dense_BhwD.shape[1] == grid:
        return dense_BhwD
    pooled = torch.nn.functional.adaptive_avg_pool2d(dense_BhwD.float().movedim(-1, 1), grid)
    return pooled.movedim(1, -1)


def _halves(path: str, values: Tensor) -> Halves:
    """float32 tokens as float16, what does not fit clipped, what is not finite NaN."""
    finite = values.isfinite()
    clipped = values.clamp(-FP16_MAX, FP16_MAX)
    tokens = torch.where(finite, clipped, torch.nan).to(torch.float16)
    return Halves(path, tokens, ((clipped != values) & finite).sum(), (~finite).sum())


def _to_host(halves: Halves) -> Halves:
    if halves.tokens.device.type == "cpu":
        return halves

    def pinned(values: Tensor) -> Tensor:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    return Halves(halves.path, *map(pinned, (halves.tokens, halves.num_clipped, halves.num_nonfinite)))


def fastest_batch(teacher: Teacher, sizes: Sequence[int]) -> int:
    """The power of two beyond which this device makes hardly more views per second, or has no memory."""
    best, best_rate, batch = FIRST_BATCH, 0.0, FIRST_BATCH
    while batch <= LARGEST_BATCH:
        try:
            rate = batch / min(_seconds(teacher, sizes, batch) for _ in range(TRIALS + 1))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            break
        if rate < best_rate * WORTHWHILE:
            break
        best, best_rate, batch = batch, rate, 2 * batch
    return best


def _seconds(teacher: Teacher, sizes: Sequence[int], batch: int) -> float:
    began = time.perf_counter()
    for size in sizes:
        teacher(torch.zeros((batch, size, size, 3), dtype=torch.uint8)).dense.sum().item()
    return time.perf_counter() - began


def cosine_to_fp32(teacher: Teacher, pixels: Tensor) -> dict[str, float]:
    """The least cosine of each kind of token to the same teacher's in float32, over some views [B, S, S, 3]."""
    exact = replace(teacher, dtype=torch.float32)(pixels)
    fast = teacher(pixels)
    pairs = {SUMMARY: (exact.summary, fast.summary), DENSE: (exact.dense, fast.dense)}
    return {
        kind: torch.nn.functional.cosine_similarity(a, b, dim=-1).min().item()
        for kind, (a, b) in pairs.items()
        if a is not None and b is not None
    }
