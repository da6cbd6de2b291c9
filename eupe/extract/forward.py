"""The forward pass: as many views at once as fit into memory, without the device waiting for the host."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eupe.device import is_out_of_memory
from eupe.errors import TeacherError
from eupe.store.layout import DENSE, SUMMARY, StoreSpec, feature_path
from eupe.store.precision import FP16_MAX
from eupe.teachers.teacher import Teacher

FIRST_BATCH, LARGEST_BATCH = 8, 512
WORTHWHILE = 1.05
"""Speedup in views per second from which a larger batch is taken."""
TRIALS = 3
"""Trials of each batch size; the first one is slower."""
TRIAL_SECONDS = 0.5
"""Expected time beyond which a batch is not tried: the fixed cost of a batch is already small beside it."""


@dataclass(frozen=True)
class Fp16Tokens:
    """The float16 tokens of one array for some views of a batch; the copy from the device may still be in progress."""

    path: str
    start: int
    """Index of the first of these views in the batch."""
    tokens: Tensor
    num_clipped: Tensor
    num_nonfinite: Tensor


class Pending(Protocol):
    """A batch in progress on the device."""

    def wait(self) -> list[Fp16Tokens]:
        """Return the tokens once they are in the host's memory."""


@dataclass(frozen=True)
class OnGpu:
    """A batch on the GPU; `done` comes after its last copy to the host."""

    fp16_tokens: list[Fp16Tokens]
    done: torch.cuda.Event

    def wait(self) -> list[Fp16Tokens]:
        self.done.synchronize()
        return self.fp16_tokens


@dataclass(frozen=True)
class OnCpu:
    """A batch on one of the CPU's cores."""

    future: Future[list[Fp16Tokens]]

    def wait(self) -> list[Fp16Tokens]:
        return self.future.result()


class Forward:
    """The forward pass of a teacher for a store: its tokens at all sizes, as float16, before they are coded."""

    def __init__(self, teacher: Teacher, spec: StoreSpec, *, batch_size: int, cores: int) -> None:
        """Set up the forward pass; on a CPU, start a thread for each core.

        Args:
            cores: number of batches that run side by side on a CPU. It is passed in, because
                `torch.get_num_threads` in one thread may return what was last set in another.
        """
        self.teacher = teacher
        self._spec = spec
        self.batch_size = batch_size
        """Size of the next batch; halved when the device runs out of memory."""
        self._on_gpu = teacher.device.type == "cuda"
        self.batches_at_once = 1 if self._on_gpu else cores
        """Number of batches to start before waiting for one, so that the device always has work."""
        self._cores = None if self._on_gpu else single_threads(self.batches_at_once)

    def begin(self, views: Sequence[dict[int, NDArray[np.uint8]]]) -> Pending:
        """Start the forward pass of some views without waiting for its result.

        Args:
            views: for each view, size to pixels [size, size, 3].
        Raises: TeacherError, here or in `wait`, if not even a single view fits into memory.
        """
        if self._cores is not None:
            return OnCpu(self._cores.submit(self._tokens, views))
        fp16_tokens = self._tokens(views)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.teacher.device))  # the stream that the copies are queued on
        return OnGpu(fp16_tokens, done)

    def _tokens(self, views: Sequence[dict[int, NDArray[np.uint8]]]) -> list[Fp16Tokens]:
        fp16_tokens: list[Fp16Tokens] = []
        for size, grid in zip(self._spec.sizes, self._spec.grids, strict=True):
            pixels = torch.from_numpy(np.stack([view[size] for view in views]))
            # only a copy from pinned memory to the GPU runs without the host waiting
            fp16_tokens += self._pieces(pixels.pin_memory() if self._on_gpu else pixels, size, grid)
        return fp16_tokens

    def _pieces(self, pixels: Tensor, size: int, grid: int) -> list[Fp16Tokens]:
        """Return the tokens of pixels [B, S, S, 3], in pieces that fit into memory."""
        fp16_tokens: list[Fp16Tokens] = []
        start = 0
        while start < len(pixels):
            piece = pixels[start : start + self.batch_size]
            try:
                fp16_tokens += self._fp16_tokens(piece, start, size, grid)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(piece) == 1:
                    raise TeacherError(
                        f"{self.teacher.spec.name} runs out of memory on {self.teacher.device} with a single view of "
                        f"{size} px; give a smaller --size, or use a device with more memory"
                    ) from error
            else:
                start += len(piece)
                continue
            # outside `except`: there the error's traceback still holds the tensors of the failed pass
            self.batch_size = -(-len(piece) // 2)
            if self._on_gpu:
                torch.cuda.empty_cache()
        return fp16_tokens

    def _fp16_tokens(self, pixels: Tensor, start: int, size: int, grid: int) -> list[Fp16Tokens]:
        tokens = self.teacher(pixels)
        fp16_tokens = []
        for kind in self._spec.tokens:
            values = tokens.summary if kind == SUMMARY else pool_cells(tokens.dense, grid)
            assert values is not None
            fp16_tokens.append(Fp16Tokens(feature_path(size, kind), start, *map(_to_host, _to_fp16(values))))
        return fp16_tokens


def single_threads(count: int) -> ThreadPoolExecutor:
    """Return a pool of threads in which torch uses one core each.

    On a CPU, whole batches run side by side. If each batch were split over all cores, the cores would wait for each
    other after every operation, and for whatever else a core is doing, such as decoding.

    Only torch's own setting reaches MKL. Without it, MKL would use the process's number of threads, and on some
    processors round differently.
    """
    before = torch.get_num_threads()
    all_there = threading.Barrier(count + 1)

    def settle() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # from here on the setting is this thread's own, whatever another thread sets
        all_there.wait()  # so that no thread settles twice in place of another

    pool = ThreadPoolExecutor(count)
    for _ in range(count):
        pool.submit(settle)
    all_there.wait()
    torch.set_num_threads(before)  # threads that start later take what was set last
    return pool


def pool_cells(dense_BhwD: Tensor, grid: int) -> Tensor:
    """Return the map [B, h, w, D] averaged to `grid` x `grid` cells, float32; unchanged if it has that grid."""
    if dense_BhwD.shape[1] == grid:
        return dense_BhwD
    pooled = torch.nn.functional.adaptive_avg_pool2d(dense_BhwD.float().movedim(-1, 1), grid)
    return pooled.movedim(1, -1)


def _to_fp16(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens as float16, and the numbers of clipped and of non-finite values.

    Values beyond float16's range are clipped; values that are not finite become NaN.
    """
    finite = values.isfinite()
    clipped = values.clamp(-FP16_MAX, FP16_MAX)
    tokens = torch.where(finite, clipped, torch.nan).to(torch.float16)
    return tokens, ((clipped != values) & finite).sum(), (~finite).sum()


def _to_host(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)  # pinned, or the copy would block
    return host.copy_(values, non_blocking=True)


def fastest_batch(teacher: Teacher, sizes: Sequence[int]) -> int:
    """Find the batch size beyond which the device gains little speed, runs out of memory, or takes too long.

    The size is a power of two. The search takes a few seconds, or as long as three passes of a single view.
    """
    if teacher.device.type == "cuda":
        return _fastest_batch(teacher, sizes)
    # on one core, as batches run on a CPU
    with single_threads(1) as core:
        return core.submit(_fastest_batch, teacher, sizes).result()


def _fastest_batch(teacher: Teacher, sizes: Sequence[int]) -> int:
    best, best_rate, batch = FIRST_BATCH, 0.0, FIRST_BATCH
    try:
        view_s = min(_seconds(teacher, sizes, 1) for _ in range(TRIALS))
        while batch <= LARGEST_BATCH and batch * view_s <= TRIAL_SECONDS:
            view_s = min(_seconds(teacher, sizes, batch) for _ in range(TRIALS)) / batch
            if 1 / view_s < best_rate * WORTHWHILE:
                break
            best, best_rate, batch = batch, 1 / view_s, 2 * batch
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return best


def _seconds(teacher: Teacher, sizes: Sequence[int], batch: int) -> float:
    began = time.perf_counter()
    for size in sizes:
        teacher(torch.zeros((batch, size, size, 3), dtype=torch.uint8)).dense.sum().item()  # waits for the GPU
    return time.perf_counter() - began


def cosine_to_fp32(teacher: Teacher, pixels: Tensor) -> dict[str, float]:
    """Measure how near a teacher's tokens are to its own in float32, view by view over pixels [B, S, S, 3].

    Returns: kind of token to its lowest cosine; empty if there are no views, or no memory for one in float32.
    """
    exactly = replace(teacher, dtype=torch.float32)
    least: dict[str, float] = {}
    try:
        for view in pixels[:, None]:
            exact, fast = exactly(view), teacher(view)
            pairs = {SUMMARY: (exact.summary, fast.summary), DENSE: (exact.dense, fast.dense)}
            for kind, (a, b) in pairs.items():
                if a is not None and b is not None:
                    # NaN, as after an overflow, must not pass for agreement
                    cosines = torch.nn.functional.cosine_similarity(a, b, dim=-1).nan_to_num(nan=-1.0)
                    least[kind] = min(least.get(kind, 1.0), cosines.min().item())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {}
    return least
