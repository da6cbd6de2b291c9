"""A batch through the teacher: as many views at once as it has memory for, the device never waiting for the host."""

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
"""A larger batch is taken if it makes so many times as many views per second."""
TRIALS = 3
"""Of each batch; the first of them is slower."""
TRIAL_SECONDS = 0.5
"""A batch that takes longer is not tried: what is paid once for each batch is little beside it."""


@dataclass(frozen=True)
class Halves:
    """One array's float16 tokens of some views of a batch, maybe still on their way from the device."""

    path: str
    start: int
    """Place of the first of these views in the batch."""
    tokens: Tensor
    num_clipped: Tensor
    num_nonfinite: Tensor


class Pending(Protocol):
    """A batch that the device works on."""

    def wait(self) -> list[Halves]:
        """Once they have arrived in the host's memory."""


@dataclass(frozen=True)
class OnGpu:
    """Begun; its copies to the host come one after the other."""

    halves: list[Halves]
    done: torch.cuda.Event

    def wait(self) -> list[Halves]:
        self.done.synchronize()
        return self.halves


@dataclass(frozen=True)
class OnCpu:
    """On one of the cores."""

    future: Future[list[Halves]]

    def wait(self) -> list[Halves]:
        return self.future.result()


class Forward:
    """A teacher's tokens at all sizes of a store, as it keeps them before they are coded."""

    def __init__(self, teacher: Teacher, spec: StoreSpec, *, batch_size: int, cores: int) -> None:
        """
        Args:
            cores: how many batches are computed side by side on a CPU. It is said, not asked of torch: what torch
                answers in one thread is what was last set in any other.
        """
        self.teacher = teacher
        self._spec = spec
        self.batch_size = batch_size
        """Of the next batch; halved when the device runs out of memory."""
        self._on_gpu = teacher.device.type == "cuda"
        self.batches_at_once = 1 if self._on_gpu else cores
        """How many are begun before one is waited for, so that the device always has work."""
        self._cores = None if self._on_gpu else single_threads(self.batches_at_once)

    def begin(self, views: Sequence[dict[int, NDArray[np.uint8]]]) -> Pending:
        """Start the work on views, given by size, without waiting for its end.

        Raises: TeacherError, here or when it is waited for, if there is no memory for a single view.
        """
        if self._cores is not None:
            return OnCpu(self._cores.submit(self._tokens, views))
        halves = self._tokens(views)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.teacher.device))
        return OnGpu(halves, done)

    def _tokens(self, views: Sequence[dict[int, NDArray[np.uint8]]]) -> list[Halves]:
        halves: list[Halves] = []
        for size, grid in zip(self._spec.sizes, self._spec.grids, strict=True):
            pixels = torch.from_numpy(np.stack([view[size] for view in views]))
            halves += self._pieces(pixels.pin_memory() if self._on_gpu else pixels, size, grid)
        return halves

    def _pieces(self, pixels: Tensor, size: int, grid: int) -> list[Halves]:
        """Of [B, S, S, 3], piece by piece as they fit into memory."""
        halves: list[Halves] = []
        start = 0
        while start < len(pixels):
            piece = pixels[start : start + self.batch_size]
            try:
                halves += self._halves(piece, start, size, grid)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(piece) == 1:
                    raise TeacherError(
                        f"{self.teacher.spec.name} does not fit a single view of {size} px into the memory of "
                        f"{self.teacher.device}; give a smaller --size, or a device with more memory"
                    ) from error
            else:
                start += len(piece)
                continue
            self.batch_size = -(-len(piece) // 2)
            if self._on_gpu:
                torch.cuda.empty_cache()
        return halves

    def _halves(self, pixels: Tensor, start: int, size: int, grid: int) -> list[Halves]:
        tokens = self.teacher(pixels)
        halves = []
        for kind in self._spec.tokens:
            values = tokens.summary if kind == SUMMARY else pool_cells(tokens.dense, grid)
            assert values is not None
            halves.append(Halves(feature_path(size, kind), start, *map(_to_host, _as_halves(values))))
        return halves


def single_threads(count: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one core each.

    On a CPU whole batches run side by side: where one is split over all cores they wait for each other after every
    operation, and each time for whatever else a core has to do, such as decoding. Only torch's own setting reaches MKL,
    which would else take the process's number of threads, and on some processors round otherwise.
    """
    before = torch.get_num_threads()
    all_there = threading.Barrier(count + 1)

    def settle() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # only now it is this thread's own, whatever another sets
        all_there.wait()

    pool = ThreadPoolExecutor(count)
    for _ in range(count):
        pool.submit(settle)
    all_there.wait()
    torch.set_num_threads(before)  # what was set last is what every thread that starts from now on takes
    return pool


def pool_cells(dense_BhwD: Tensor, grid: int) -> Tensor:
    """Mean over the cells that fall into each of `grid` x `grid`, float32; the map itself where it has that grid."""
    if dense_BhwD.shape[1] == grid:
        return dense_BhwD
    pooled = torch.nn.functional.adaptive_avg_pool2d(dense_BhwD.float().movedim(-1, 1), grid)
    return pooled.movedim(1, -1)


def _as_halves(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 tokens as float16, what does not fit clipped, what is not finite NaN; and how many of each there were."""
    finite = values.isfinite()
    clipped = values.clamp(-FP16_MAX, FP16_MAX)
    tokens = torch.where(finite, clipped, torch.nan).to(torch.float16)
    return tokens, ((clipped != values) & finite).sum(), (~finite).sum()


def _to_host(values: Tensor) -> Tensor:
    if values.device.type == "cpu":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


def fastest_batch(teacher: Teacher, sizes: Sequence[int]) -> int:
    """The power of two beyond which this device makes hardly more views per second, has no memory, or takes long.

    A trial takes a few seconds at most, unless three times a single view takes longer.
    """
    if teacher.device.type == "cuda":
        return _fastest_batch(teacher, sizes)
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
        teacher(torch.zeros((batch, size, size, 3), dtype=torch.uint8)).dense.sum().item()
    return time.perf_counter() - began


def cosine_to_fp32(teacher: Teacher, pixels: Tensor) -> dict[str, float]:
    """The least cosine of each kind of token to the same teacher's in float32, view by view over [B, S, S, 3].

    Returns: nothing, where there are no views, or no memory for one in float32.
    """
    exactly = replace(teacher, dtype=torch.float32)
    least: dict[str, float] = {}
    try:
        for view in pixels[:, None]:
            exact, fast = exactly(view), teacher(view)
            pairs = {SUMMARY: (exact.summary, fast.summary), DENSE: (exact.dense, fast.dense)}
            for kind, (a, b) in pairs.items():
                if a is not None and b is not None:
                    cosines = torch.nn.functional.cosine_similarity(a, b, dim=-1).nan_to_num(nan=-1.0)
                    least[kind] = min(least.get(kind, 1.0), cosines.min().item())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {}
    return least
