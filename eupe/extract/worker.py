"""One part from pictures to committed features: plain Python, no Ray.

A pool of threads decodes and renders ahead of the teacher, at most two batches; the features of one part stay in memory
until they are written.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eupe.ahead import map_ahead
from eupe.corpus.decode import decode_image
from eupe.corpus.index import read_picture
from eupe.corpus.photometric import Photometric
from eupe.corpus.views import ViewSpec, draw_view, render_view, view_digest
from eupe.errors import CorpusError
from eupe.extract.count import counter
from eupe.extract.plan import PartTask, Sample, installed_versions
from eupe.place import Place
from eupe.store.layout import DENSE, SUMMARY, StoreSpec, feature_path
from eupe.store.precision import FP16_MAX
from eupe.store.writer import Part, Row, StoreWriter
from eupe.teachers.teacher import Teacher

MAX_DECODE_THREADS = 8


@dataclass(frozen=True)
class PartResult:
    """What became of a part that was committed."""

    index: int
    num_samples: int
    num_failed: int


@dataclass
class Progress:
    """Counted by the worker, read by whoever shows it."""

    views: int = 0
    failed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, *, views: int = 0, failed: int = 0) -> None:
        with self.lock:
            self.views += views
            self.failed += failed


@dataclass(frozen=True)
class LoadedSample:
    """All views of one picture, rendered; none of them if it has an error."""

    row: Row
    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]
    digests: NDArray[np.uint64]
    views: dict[int, list[NDArray[np.uint8]]]
    """Size to K views of [size, size, 3]."""
    photometric: NDArray[np.float32]
    """[K, 8]; NaN if it has an error."""


class Computer:
    """A teacher and the pictures to read: a part's content, without a store to write to."""

    def __init__(
        self, teacher: Teacher, spec: StoreSpec, *, corpus_root: Place, views: ViewSpec, batch_size: int
    ) -> None:
        self.progress = Progress()
        self.spec = spec
        self._teacher = teacher
        self._root = corpus_root
        self._views = views
        self._batch_size = batch_size

    @property
    def device(self) -> torch.device:
        return self._teacher.device

    def compute(self, task: PartTask) -> Part:
        """Everything of a part but the writing; a pure function of the spec, the corpus and the part's number."""
        buffers = PartBuffers(self.spec, task)
        samples = self.load_ahead(task.samples)
        for batch in batches(buffers.take(samples, self.progress), self._batch_size):
            self.run_batch(batch, buffers)
            self.progress.add(views=len(batch))
        return buffers.part(self.progress)

    def run_batch(self, batch: list[RenderedView], buffers: PartBuffers) -> None:
        """The teacher's tokens of some views, at every size, into the part."""
        for size, grid in zip(self.spec.sizes, self.spec.grids, strict=True):
            pixels = torch.from_numpy(np.stack([view.pixels[size] for view in batch]))
            if self._teacher.device.type == "cuda":
                pixels = pixels.pin_memory()
            tokens = self._teacher(pixels)
            if SUMMARY in self.spec.tokens:
                assert tokens.summary is not None
                buffers.put(feature_path(size, SUMMARY), batch, tokens.summary)
            if DENSE in self.spec.tokens:
                buffers.put(feature_path(size, DENSE), batch, pool_cells(tokens.dense, grid))

    def load_ahead(self, samples: Iterable[Sample]) -> Iterator[LoadedSample]:
        """Rendered samples in order, decoded by a pool that runs two batches ahead at most."""
        ahead = max(2, 2 * self._batch_size // self.spec.num_views)
        load = partial(load_sample, root=self._root, spec=self._views, sizes=self.spec.sizes)
        with ThreadPoolExecutor(self._root.threads(min(MAX_DECODE_THREADS, os.cpu_count() or 1))) as pool:
            yield from map_ahead(pool, load, samples, ahead=ahead)


class Worker:
    """A computer of parts and the store to write them to.

    Two parts may run at once from two threads: while one is compressed and written, the next has the teacher.
    """

    def __init__(self, computer: Computer, store: str | Path | Place) -> None:
        self._computer = computer
        self._writer = StoreWriter(store, count=counter(computer.device))
        self._teacher_turn = threading.Lock()

    @property
    def progress(self) -> Progress:
        return self._computer.progress

    def run(self, task: PartTask) -> PartResult:
        """Compute and commit one part.

        Raises: StorageError if it cannot be written.
        """
        with self._teacher_turn:
            part = self._computer.compute(task)
        self._writer.commit(part)
        num_failed = sum(row.error is not None for row in part.rows)
        return PartResult(task.index, len(part.rows), num_failed)


def pool_cells(dense_BhwD: torch.Tensor, grid: int) -> torch.Tensor:
    """Mean over the cells that fall into each of `grid` x `grid`, float32; the map itself where it has that grid."""
    if dense_BhwD.shape[1] == grid:
        return dense_BhwD
    pooled = torch.nn.functional.adaptive_avg_pool2d(dense_BhwD.float().movedim(-1, 1), grid)
    return pooled.movedim(1, -1)


def load_sample(sample: Sample, root: Place, spec: ViewSpec, sizes: tuple[int, ...]) -> LoadedSample:
    """Read, check, decode and render one picture; whatever is wrong with it becomes its row's error.

    Raises: StorageError if an object store does not serve it, which is no fault of the picture.
    """
    k = spec.num_views
    boxes = np.zeros((k, 4), np.int32)
    flips = np.zeros(k, np.bool_)
    digests = np.zeros(k, np.uint64)
    photometric = np.full((k, len(Photometric._fields)), np.nan, np.float32)
    try:
        data = read_picture(root, sample.key)
        if sample.sha256 is not None and hashlib.sha256(data).hexdigest() != sample.sha256:
            raise CorpusError("the file has changed since it was indexed")
        image = decode_image(data)
    except CorpusError as error:
        row = Row(sample.key, sample.sha256, sample.label, error=str(error))
        return LoadedSample(row, boxes, flips, digests, {}, photometric)
    views: dict[int, list[NDArray[np.uint8]]] = {size: [] for size in sizes}
    for i in range(k):
        params = draw_view(spec, sample.key, i, image.width, image.height)
        for size in sizes:
            views[size].append(render_view(image, params, size))
        boxes[i], flips[i], photometric[i] = params
        digests[i] = view_digest(views[sizes[0]][i])
    row = Row(sample.key, sample.sha256, sample.label, image.width, image.height)
    return LoadedSample(row, boxes, flips, digests, views, photometric)


@dataclass(frozen=True)
class RenderedView:
    """One view on its way to the teacher, and its place in the part."""

    sample: int
    view: int
    pixels: dict[int, NDArray[np.uint8]]


class PartBuffers:
    """A part's arrays while they fill up."""

    def __init__(self, spec: StoreSpec, task: PartTask) -> None:
        n, k = len(task.samples), spec.num_views
        self._task = task
        self._rows: list[Row] = []
        self._boxes = np.zeros((n, k, 4), np.int32)
        self._flips = np.zeros((n, k), np.bool_)
        self._digests = np.zeros((n, k), np.uint64)
        self._photometric = np.full((n, k, len(Photometric._fields)), np.nan, np.float32)
        self._has_photometric = spec.photometric
        self._features: dict[str, NDArray[np.float16]] = {}
        self._num_clipped = 0
        self._num_nonfinite = 0
        sides = spec.sizes if spec.pixels else ()
        self._pixels = {side: np.zeros((n, k, side, side, 3), np.uint8) for side in sides}
        for size, grid in zip(spec.sizes, spec.grids, strict=True):
            shapes = {
                SUMMARY: (n, k, spec.teacher["summary_dim"]),
                DENSE: (n, k, grid, grid, spec.teacher["dense_dim"]),
            }
            for kind in spec.tokens:
                self._features[feature_path(size, kind)] = np.full(shapes[kind], np.nan, np.float16)

    def take(self, samples: Iterable[LoadedSample], progress: Progress) -> Iterator[RenderedView]:
        """Note every sample's row and view parameters, and hand on its views."""
        for i, sample in enumerate(samples):
            self._rows.append(sample.row)
            self._boxes[i], self._flips[i], self._digests[i] = sample.boxes, sample.flips, sample.digests
            self._photometric[i] = sample.photometric
            if sample.row.error is not None:
                progress.add(views=len(sample.flips), failed=1)
                continue
            for size, pixels in self._pixels.items():
                pixels[i] = sample.views[size]
            for k in range(len(sample.flips)):
                yield RenderedView(i, k, {size: views[k] for size, views in sample.views.items()})

    def put(self, path: str, batch: list[RenderedView], values: torch.Tensor) -> None:
        """Store a batch's float32 tokens as float16, counting what had to be clipped."""
        clipped = values.clamp(-FP16_MAX, FP16_MAX)
        self._num_nonfinite += int((~values.isfinite()).sum())
        self._num_clipped += int(((clipped != values) & values.isfinite()).sum())
        halves = torch.where(values.isfinite(), clipped, torch.nan).to(torch.float16).cpu().numpy()
        rows, views = [v.sample for v in batch], [v.view for v in batch]
        self._features[path][rows, views] = halves

    def part(self, progress: Progress) -> Part:
        """The finished part; a sample with a non-finite feature fails as a whole."""
        rows = [self._judged(i, row, progress) for i, row in enumerate(self._rows)]
        return Part(
            self._task.index,
            rows,
            self._boxes,
            self._flips,
            self._digests,
            self._features,
            self._pixels,
            self._num_clipped,
            self._num_nonfinite,
            installed_versions(),
            self._photometric if self._has_photometric else None,
        )

    def _judged(self, i: int, row: Row, progress: Progress) -> Row:
        bad = [path for path, values in self._features.items() if not np.isfinite(values[i]).all()]
        if row.error is not None or not bad:
            return row
        progress.add(failed=1)
        for values in self._features.values():
            values[i] = np.nan
        for pixels in self._pixels.values():
            pixels[i] = 0
        self._boxes[i], self._flips[i], self._digests[i] = 0, False, 0
        self._photometric[i] = np.nan
        return Row(row.key, row.sha256, row.label, error=f"the teacher gave non-finite values in {', '.join(bad)}")


def batches(views: Iterable[RenderedView], size: int) -> Iterator[list[RenderedView]]:
    """In order, the last one as short as it comes."""
    batch: list[RenderedView] = []
    for view in views:
        batch.append(view)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
