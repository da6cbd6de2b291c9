"""Worker of a job: makes parts, from pictures to committed features, in plain Python without Ray.

A pool of threads decodes and renders at most two batches ahead of the teachers. A forward pass takes as many views at
once as fit into memory, and the device never waits for the host. The features of a part stay in memory until they are
written.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eupe.common.compute import is_out_of_memory, run_in_batches
from eupe.common.cores import num_cores
from eupe.common.storage import AnyPath, StoragePath
from eupe.corpus.views import Photometric, ViewSpec
from eupe.errors import TeacherError
from eupe.extract.count import counter
from eupe.extract.isolate import find_crashing
from eupe.extract.load import LoadedSample, Loader, PartTask, Sample, WorkUnit
from eupe.store.layout import DENSE, SUMMARY, StoreSpec, feature_path, layer_kind
from eupe.store.precision import FP16_MAX
from eupe.store.reader import NOT_FINITE
from eupe.store.writer import Part, Row, StoreWriter, installed_versions
from eupe.teachers.teacher import Teacher


class PartExtractor:
    """A teacher and its source of pictures: computes the content of parts, and writes nothing."""

    def __init__(
        self,
        teacher: Teacher,
        spec: StoreSpec,
        *,
        corpus_root: StoragePath,
        views: ViewSpec,
        batch_size: int,
        cores: int | None = None,
    ) -> None:
        """Set up the forward pass of a teacher for a store.

        Args:
            cores: number of cores to decode and compute on; by default all that this process may use.
        """
        self.cores = cores or num_cores()
        self.spec = spec
        self.root = corpus_root
        self.views = views
        self.forward = Forward(teacher, spec, batch_size=batch_size, cores=self.cores)
        self._batch_size = batch_size

    @property
    def device(self) -> torch.device:
        return self.forward.teacher.device

    @property
    def samples_ahead(self) -> int:
        """Return the number of samples in two batches."""
        return max(2, 2 * self._batch_size // self.spec.num_views)

    def compute(self, task: PartTask, samples: Iterable[LoadedSample] | None = None) -> Part:
        """Compute a part without writing it: a pure function of the spec, the corpus and the part's number.

        Args:
            samples: the task's samples if they are loaded already, or the first of them.
        """
        builder = PartBuilder(self, task)
        for sample in self.load_ahead(task.samples) if samples is None else samples:
            builder.add(sample)
        return builder.finish()

    def load_ahead(self, samples: Sequence[Sample]) -> Iterator[LoadedSample]:
        """Yield rendered samples in order, decoded by a pool at most two batches ahead."""
        loader = Loader(self.root, self.views, [self.spec], ahead=self.samples_ahead, cores=self.cores)
        return loader.load(samples)


class PartBuilder:
    """A part under construction: takes samples one by one, in order, and passes them to the teacher in batches.

    The result of a batch is fetched only after the next batches have started, so that the device always has work.
    """

    def __init__(self, extractor: PartExtractor, task: PartTask) -> None:
        self.index = task.index
        self.buffers = PartBuffers(extractor.spec, task)
        self.views_done = 0
        self._forward = extractor.forward
        self._size = extractor.forward.batch_size
        self._batch: list[RenderedView] = []
        self._pending: deque[tuple[list[RenderedView], Pending]] = deque()

    def add(self, sample: LoadedSample) -> None:
        """Add the next sample of the part."""
        views = self.buffers.take(sample)
        if not views:  # a failed sample: no batch will count its views as done
            self.views_done += len(sample.flips)
        for view in views:
            self._batch.append(view)
            if len(self._batch) == self._size:
                self._begin()

    def flush(self) -> None:
        """Start the last batch, after all samples have been added; another part may then use the teacher."""
        if self._batch:
            self._begin()

    def finish(self) -> Part:
        """Return the part, after all samples have been added."""
        self.flush()
        self._fetch(but=0)
        return self.buffers.part()

    def _begin(self) -> None:
        self._pending.append((self._batch, self._forward.begin([view.pixels for view in self._batch])))
        self._batch = []
        self._fetch(but=self._forward.batches_at_once)

    def _fetch(self, *, but: int) -> None:
        """Fetch the oldest batches, and leave only `but` of them pending."""
        while len(self._pending) > but:
            views, pending = self._pending.popleft()
            for fp16_tokens in pending.wait():
                self.buffers.put(views[fp16_tokens.start : fp16_tokens.start + len(fp16_tokens.tokens)], fp16_tokens)
            self.views_done += len(views)


class Progress:
    """Counts of views and failed samples of the work in progress; the worker writes, another thread reads."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, int], tuple[int, int]] = {}
        self._lock = threading.Lock()

    def note(self, store: int, builder: PartBuilder) -> None:
        with self._lock:
            self._counts[store, builder.index] = builder.views_done, builder.buffers.num_failed

    def forget(self, unit: WorkUnit) -> None:
        with self._lock:
            for store, task in unit.tasks:
                self._counts.pop((store, task.index), None)

    @property
    def counts(self) -> tuple[int, int]:
        """Return the number of views done, and of samples without features."""
        with self._lock:
            return sum(views for views, _ in self._counts.values()), sum(failed for _, failed in self._counts.values())


class Worker:
    """Part extractors that share the decoded pictures, and the stores to write to.

    Two work units may run at once, in two threads: while the parts of one are compressed and written, the other uses
    the teachers, and its first pictures are decoded before its turn comes.
    """

    def __init__(self, extractors: Sequence[PartExtractor], stores: Sequence[AnyPath]) -> None:
        """Open the stores for writing.

        Args:
            stores: one for each extractor.
        """
        self.progress = Progress()
        self._extractors = extractors
        self._writers = [
            StoreWriter(store, threads=extractor.cores, count=counter(extractor.device))
            for extractor, store in zip(extractors, stores, strict=True)
        ]
        self._sizes = sorted({size for extractor in extractors for size in extractor.spec.sizes})
        first = extractors[0]
        ahead = max(extractor.samples_ahead for extractor in extractors)
        specs = [extractor.spec for extractor in extractors]
        self._loader = Loader(first.root, first.views, specs, ahead=ahead, cores=first.cores)
        self._turn, self._searching = threading.Lock(), threading.Lock()
        self._commits = ThreadPoolExecutor(len(extractors))
        self._committing: list[Future[None] | None] = [None] * len(extractors)
        self._commit_turns = [threading.Lock() for _ in extractors]

    def run(self, unit: WorkUnit, *, crashing: Mapping[str, str] | None = None, isolate: bool = False) -> int:
        """Compute and commit the parts of a work unit.

        Args:
            crashing: pictures that must not be decoded here, key to reason.
            isolate: a process died of this work unit: first find the pictures that may have killed it, then hold only
                one picture in memory at a time.
        Returns: the number of samples without features, summed over the stores.
        Raises: StorageError if a part cannot be written; StuckError.
        """
        known = dict(crashing or {})
        placed = unit.samples
        samples = [sample for _, sample in placed]
        if isolate:
            first = self._extractors[0]
            others = [sample for sample in samples if sample.key not in known]
            with self._searching:
                known |= find_crashing(others, first.root, first.views, self._sizes)
        loaded = self._loader.load(samples, crashing=known, one_by_one=isolate)  # decodes before the turn comes
        try:
            with self._turn:
                commits, ended = self._compute(unit, zip(placed, loaded, strict=True))
            # after the turn: the next work unit keeps the device busy while the last batches arrive and are written
            commits += [self._commit(store, builder) for store, builder in ended.items()]
            for commit, _ in commits:
                commit.result()
            return sum(num_failed for _, num_failed in commits)
        finally:
            self.progress.forget(unit)

    def _compute(
        self, unit: WorkUnit, samples: Iterable[tuple[tuple[int, Sample], LoadedSample]]
    ) -> tuple[list[tuple[Future[None], int]], dict[int, PartBuilder]]:
        """Return the commits that have started, and each store's last part, whose batches may still run."""
        commits = []
        builder: dict[int, PartBuilder] = {}
        ended: dict[int, PartBuilder] = {}
        for (place, _), sample in samples:
            for store, task in unit.tasks:
                if not task.start <= place < task.stop:
                    continue
                if place == task.start:
                    builder[store] = PartBuilder(self._extractors[store], task)
                builder[store].add(sample)
                self.progress.note(store, builder[store])
                if place + 1 == task.stop:
                    # finish a part only when the next one ends: by then it is computed, and the device has other work
                    if store in ended:
                        commits.append(self._commit(store, ended.pop(store)))
                    ended[store] = builder.pop(store)
                    ended[store].flush()
        return commits, ended

    def _commit(self, store: int, builder: PartBuilder) -> tuple[Future[None], int]:
        """Finish a part and start to write it; return the commit and the number of failed samples.

        The write starts after that of the store's previous part, so that only one finished part waits in memory.
        """
        part = builder.finish()
        self.progress.note(store, builder)
        with self._commit_turns[store]:
            if (before := self._committing[store]) is not None:
                before.exception()  # waits, and leaves an error to the work unit that the part belongs to
            commit = self._commits.submit(self._writers[store].commit, part)
            self._committing[store] = commit
        return commit, builder.buffers.num_failed


@dataclass(frozen=True)
class RenderedView:
    """A rendered view on its way to the teacher, with its position in the part."""

    sample: int
    view: int
    pixels: dict[int, NDArray[np.uint8]]
    """Size to [size, size, 3]."""


class PartBuffers:
    """The arrays of a part while they fill up."""

    def __init__(self, spec: StoreSpec, task: PartTask) -> None:
        n, k = len(task.samples), spec.num_views
        self.num_failed = 0
        self._task = task
        self._first_size = spec.sizes[0]
        self._rows: list[Row] = []
        self._boxes = np.zeros((n, k, 4), np.int32)
        self._flips = np.zeros((n, k), np.bool_)
        self._digests = np.zeros((n, k), np.uint64)
        self._photometric = np.full((n, k, len(Photometric._fields)), np.nan, np.float32)
        self._has_photometric = spec.photometric
        self._features: dict[str, NDArray[np.float16]] = {}
        self._num_clipped = 0
        self._num_nonfinite = 0
        self._sizes = spec.sizes
        self._pixels = {side: np.zeros((n, k, side, side, 3), np.uint8) for side in spec.sizes if spec.pixels}
        for path in spec.feature_paths:
            self._features[path] = np.full((n, k, *spec.shape(path)), np.nan, np.float16)

    def take(self, sample: LoadedSample) -> list[RenderedView]:
        """Record the next sample's row and view parameters; return its views for the teacher."""
        i = len(self._rows)
        self._rows.append(sample.row)
        if sample.row.error is not None:
            self.num_failed += 1
            return []
        self._boxes[i], self._flips[i] = sample.boxes, sample.flips
        self._photometric[i], self._digests[i] = sample.photometric, sample.digests[self._first_size]
        for size, pixels in self._pixels.items():
            pixels[i] = sample.views[size]
        return [
            RenderedView(i, k, {size: sample.views[size][k] for size in self._sizes}) for k in range(len(sample.flips))
        ]

    def put(self, batch: Sequence[RenderedView], fp16_tokens: Fp16Tokens) -> None:
        """Store the tokens of some views."""
        self._num_clipped += int(fp16_tokens.num_clipped)
        self._num_nonfinite += int(fp16_tokens.num_nonfinite)
        rows, views = [v.sample for v in batch], [v.view for v in batch]
        self._features[fp16_tokens.path][rows, views] = fp16_tokens.tokens.numpy()

    def part(self) -> Part:
        """Return the finished part; a sample with any non-finite feature fails as a whole."""
        rows = [self._judged(i, row) for i, row in enumerate(self._rows)]
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

    def _judged(self, i: int, row: Row) -> Row:
        """Return a sample's row; fail the sample and reset its values if any of its features is not finite."""
        bad = [path for path, values in self._features.items() if not np.isfinite(values[i]).all()]
        if row.error is not None or not bad:
            return row
        self.num_failed += 1
        for values in self._features.values():
            values[i] = np.nan
        for pixels in self._pixels.values():
            pixels[i] = 0
        self._boxes[i], self._flips[i], self._digests[i] = 0, False, 0
        self._photometric[i] = np.nan
        return Row(row.key, row.sha256, row.label, error=f"{NOT_FINITE} ({', '.join(bad)})")


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
        self._layers = tuple(map(int, spec.layers))
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
        for size in self._spec.sizes:
            pixels = torch.from_numpy(np.stack([view[size] for view in views]))
            # only a copy from pinned memory to the GPU runs without the host waiting
            fp16_tokens += self._pieces(pixels.pin_memory() if self._on_gpu else pixels, size)
        return fp16_tokens

    def _pieces(self, pixels: Tensor, size: int) -> list[Fp16Tokens]:
        """Return the tokens of pixels [B, S, S, 3], in pieces that fit into memory."""
        try:
            pieces, fitting = run_in_batches(
                lambda start, stop: self._fp16_tokens(pixels[start:stop], start, size),
                len(pixels),
                self.batch_size,
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise TeacherError(
                f"{self.teacher.spec.name} runs out of memory on {self.teacher.device} with a single view of "
                f"{size} px; give a smaller --size, or use a device with more memory"
            ) from error
        self.batch_size = min(self.batch_size, fitting)
        return [fp16_tokens for piece in pieces for fp16_tokens in piece]

    def _fp16_tokens(self, pixels: Tensor, start: int, size: int) -> list[Fp16Tokens]:
        tokens = self.teacher(pixels, self._layers)
        given = {SUMMARY: tokens.summary, DENSE: tokens.dense}
        given |= {layer_kind(number): dense for number, dense in tokens.layers.items()}
        fp16_tokens = []
        for kind in self._spec.kinds:
            path, values = feature_path(size, kind), given[kind]
            assert values is not None
            if kind != SUMMARY:
                values = pool_cells(values, self._spec.shape(path)[0])
            fp16_tokens.append(Fp16Tokens(path, start, *map(_to_host, to_fp16(values))))
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


def to_fp16(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
