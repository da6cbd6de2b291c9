"""Parts from pictures to committed features: plain Python, no Ray.

A pool of threads decodes and renders ahead of the teachers, at most two batches; the features of a part stay in memory
until they are written.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from eupe.cores import num_cores
from eupe.corpus.photometric import Photometric
from eupe.corpus.views import ViewSpec
from eupe.extract.count import counter
from eupe.extract.forward import Forward, Halves, Pending
from eupe.extract.isolate import find_killers
from eupe.extract.load import LoadedSample, Loader
from eupe.extract.plan import PartTask, Sample, Stretch, installed_versions
from eupe.place import Place, Where
from eupe.store.layout import DENSE, SUMMARY, StoreSpec, feature_path
from eupe.store.reader import NOT_FINITE
from eupe.store.writer import Part, Row, StoreWriter
from eupe.teachers.teacher import Teacher


class Computer:
    """A teacher and the pictures to read: a part's content, without a store to write to."""

    def __init__(
        self,
        teacher: Teacher,
        spec: StoreSpec,
        *,
        corpus_root: Place,
        views: ViewSpec,
        batch_size: int,
        cores: int | None = None,
    ) -> None:
        """
        Args:
            cores: to decode and compute on; all that this process may use where not given.
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
        """How many make two batches."""
        return max(2, 2 * self._batch_size // self.spec.num_views)

    def compute(self, task: PartTask) -> Part:
        """Everything of a part but the writing; a pure function of the spec, the corpus and the part's number."""
        making = PartInMaking(self, task)
        for sample in self.load_ahead(task.samples):
            making.add(sample)
        return making.finish()

    def load_ahead(self, samples: Sequence[Sample]) -> Iterator[LoadedSample]:
        """Rendered samples in order, decoded by a pool that runs two batches ahead at most."""
        loader = Loader(self.root, self.views, [self.spec], ahead=self.samples_ahead, cores=self.cores)
        return loader.load(samples)


class PartInMaking:
    """A part that takes samples one by one, in order, and hands them to the teacher batch by batch.

    A batch is fetched when the next ones have been begun, so that the device always has work.
    """

    def __init__(self, computer: Computer, task: PartTask) -> None:
        self.index = task.index
        self.buffers = PartBuffers(computer.spec, task)
        self.views_done = 0
        self._forward = computer.forward
        self._size = computer.forward.batch_size
        self._batch: list[RenderedView] = []
        self._pending: deque[tuple[list[RenderedView], Pending]] = deque()

    def add(self, sample: LoadedSample) -> None:
        """The next sample of the part."""
        views = self.buffers.take(sample)
        if not views:
            self.views_done += len(sample.flips)
        for view in views:
            self._batch.append(view)
            if len(self._batch) == self._size:
                self._begin()

    def flush(self) -> None:
        """Begin the last batch, once all samples have been added: another part may have the teacher then."""
        if self._batch:
            self._begin()

    def finish(self) -> Part:
        """Once all samples have been added."""
        self.flush()
        self._fetch(but=0)
        return self.buffers.part()

    def _begin(self) -> None:
        self._pending.append((self._batch, self._forward.begin([view.pixels for view in self._batch])))
        self._batch = []
        self._fetch(but=self._forward.batches_at_once)

    def _fetch(self, *, but: int) -> None:
        """The oldest batches; all but so many."""
        while len(self._pending) > but:
            views, pending = self._pending.popleft()
            for halves in pending.wait():
                self.buffers.put(views[halves.start : halves.start + len(halves.tokens)], halves)
            self.views_done += len(views)


class Progress:
    """Views and failed samples of what is under way: counted by the worker, read by who shows it."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, int], tuple[int, int]] = {}
        self._lock = threading.Lock()

    def note(self, store: int, making: PartInMaking) -> None:
        with self._lock:
            self._counts[store, making.index] = making.views_done, making.buffers.num_failed

    def forget(self, stretch: Stretch) -> None:
        with self._lock:
            for store, task in stretch.tasks:
                self._counts.pop((store, task.index), None)

    @property
    def counts(self) -> tuple[int, int]:
        """Views, and samples without features."""
        with self._lock:
            return sum(views for views, _ in self._counts.values()), sum(failed for _, failed in self._counts.values())


class Worker:
    """Computers that share the pictures, and the stores to write to.

    Two stretches may run at once from two threads: while the parts of one are compressed and written, the next has the
    teachers, and its first pictures are decoded before its turn comes.
    """

    def __init__(self, computers: Sequence[Computer], stores: Sequence[Where]) -> None:
        """
        Args:
            stores: one for each computer.
        """
        self.progress = Progress()
        self._computers = computers
        self._writers = [
            StoreWriter(store, threads=computer.cores, count=counter(computer.device))
            for computer, store in zip(computers, stores, strict=True)
        ]
        self._sizes = sorted({size for computer in computers for size in computer.spec.sizes})
        first = computers[0]
        ahead = max(computer.samples_ahead for computer in computers)
        specs = [computer.spec for computer in computers]
        self._loader = Loader(first.root, first.views, specs, ahead=ahead, cores=first.cores)
        self._turn, self._searching = threading.Lock(), threading.Lock()
        self._commits = ThreadPoolExecutor(len(computers))
        self._committing: list[Future[None] | None] = [None] * len(computers)
        self._commit_turns = [threading.Lock() for _ in computers]

    def run(self, stretch: Stretch, *, killers: Mapping[str, str] | None = None, careful: bool = False) -> int:
        """Compute and commit the parts of a stretch.

        Args:
            killers: key to reason, of pictures that must not be decoded here.
            careful: a process died of this stretch: look for the pictures that killed it first, and hold one picture
                in memory at a time.
        Returns: how many samples have no features in a store.
        Raises: StorageError if a part cannot be written; StuckError.
        """
        known = dict(killers or {})
        placed = stretch.samples
        samples = [sample for _, sample in placed]
        if careful:
            first = self._computers[0]
            others = [sample for sample in samples if sample.key not in known]
            with self._searching:
                known |= find_killers(others, first.root, first.views, self._sizes)
        loaded = self._loader.load(samples, killers=known, one_by_one=careful)
        try:
            with self._turn:
                commits, ended = self._compute(stretch, zip(placed, loaded, strict=True))
            commits += [self._commit(store, making) for store, making in ended.items()]
            for commit, _ in commits:
                commit.result()
            return sum(num_failed for _, num_failed in commits)
        finally:
            self.progress.forget(stretch)

    def _compute(
        self, stretch: Stretch, samples: Iterable[tuple[tuple[int, Sample], LoadedSample]]
    ) -> tuple[list[tuple[Future[None], int]], dict[int, PartInMaking]]:
        """Commits that have begun; and of each store the last part, whose last batches the teacher still has."""
        commits = []
        making: dict[int, PartInMaking] = {}
        ended: dict[int, PartInMaking] = {}
        for (place, _), sample in samples:
            for store, task in stretch.tasks:
                if not task.start <= place < task.stop:
                    continue
                if place == task.start:
                    making[store] = PartInMaking(self._computers[store], task)
                making[store].add(sample)
                self.progress.note(store, making[store])
                if place + 1 == task.stop:
                    if store in ended:
                        commits.append(self._commit(store, ended.pop(store)))
                    ended[store] = making.pop(store)
                    ended[store].flush()
        return commits, ended

    def _commit(self, store: int, making: PartInMaking) -> tuple[Future[None], int]:
        """Begun once the store's part before is written, so that only one waits; and how many samples failed."""
        part = making.finish()
        self.progress.note(store, making)
        with self._commit_turns[store]:
            if (before := self._committing[store]) is not None:
                before.exception()
            commit = self._commits.submit(self._writers[store].commit, part)
            self._committing[store] = commit
        return commit, making.buffers.num_failed


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
        for size, grid in zip(spec.sizes, spec.grids, strict=True):
            shapes = {
                SUMMARY: (n, k, spec.teacher["summary_dim"]),
                DENSE: (n, k, grid, grid, spec.teacher["dense_dim"]),
            }
            for kind in spec.tokens:
                self._features[feature_path(size, kind)] = np.full(shapes[kind], np.nan, np.float16)

    def take(self, sample: LoadedSample) -> list[RenderedView]:
        """Note the next sample's row and view parameters; its views, for the teacher."""
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

    def put(self, batch: Sequence[RenderedView], halves: Halves) -> None:
        """A batch's tokens."""
        self._num_clipped += int(halves.num_clipped)
        self._num_nonfinite += int(halves.num_nonfinite)
        rows, views = [v.sample for v in batch], [v.view for v in batch]
        self._features[halves.path][rows, views] = halves.tokens.numpy()

    def part(self) -> Part:
        """The finished part; a sample with a non-finite feature fails as a whole."""
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
