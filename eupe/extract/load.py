"""What a worker is given, samples in parts and work units, and their loading: samples are read, decoded and rendered.

This module does not import torch, so that a process that only decodes starts quickly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from eupe.common.prefetch import map_ahead
from eupe.common.storage import StoragePath
from eupe.corpus.pictures import Inside, decode_image, read_picture
from eupe.corpus.views import Photometric, ViewSpec, draw_view, render_view, view_digest
from eupe.errors import CorpusError
from eupe.store.layout import StoreSpec
from eupe.store.writer import Row

MAX_DECODE_THREADS = 8
PICTURE_SECONDS = 300.0
"""Time limit of one picture, reading included; one that takes longer counts as endless."""


@dataclass(frozen=True)
class Sample:
    """One picture of a part."""

    key: str
    sha256: str | None
    label: str | None
    inside: Inside | None = None
    """Location of its bytes in a tar or table; None for a picture that is a file of its own."""


@dataclass(frozen=True)
class PartTask:
    """One part: the unit of work, commit and repair."""

    index: int
    samples: tuple[Sample, ...]
    start: int = 0
    """Row of the first sample in the store's index."""

    @property
    def stop(self) -> int:
        return self.start + len(self.samples)


@dataclass(frozen=True)
class WorkUnit:
    """Consecutive samples and the parts of one or more stores that need them: each picture is decoded once."""

    tasks: tuple[tuple[int, PartTask], ...]
    """Pairs of a store's index in the job and one of its parts, in the order in which the parts begin."""

    @property
    def samples(self) -> tuple[tuple[int, Sample], ...]:
        """Return each sample once, with its row in the index, in order."""
        placed: dict[int, Sample] = {}
        for _, task in self.tasks:
            placed.update(zip(range(task.start, task.stop), task.samples, strict=True))
        return tuple(sorted(placed.items(), key=lambda item: item[0]))


class StuckError(RuntimeError):
    """A picture whose decoder does not end; the process that decodes it must be given up."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


@dataclass(frozen=True)
class LoadedSample:
    """All views of one picture, rendered; none if it has an error."""

    row: Row
    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]
    photometric: NDArray[np.float32]
    """[K, 8]; NaN if the picture has an error."""
    views: Mapping[int, Sequence[NDArray[np.uint8]]] = field(default_factory=dict)
    """Size to K views of [size, size, 3]."""
    digests: Mapping[int, NDArray[np.uint64]] = field(default_factory=dict)
    """Size to the digests of the views, [K]; a store keeps those at its first size."""


def failed_sample(sample: Sample, spec: ViewSpec, error: str) -> LoadedSample:
    """Return a sample without views, with the reason in its row."""
    k = spec.num_views
    row = Row(sample.key, sample.sha256, sample.label, error=error)
    photometric = np.full((k, len(Photometric._fields)), np.nan, np.float32)
    return LoadedSample(row, np.zeros((k, 4), np.int32), np.zeros(k, np.bool_), photometric)


def load_sample(
    sample: Sample, root: StoragePath, spec: ViewSpec, sizes: Iterable[int], digested: Iterable[int] = ()
) -> LoadedSample:
    """Read, check, decode and render one picture; whatever is wrong with it becomes its row's error.

    Args:
        digested: sizes whose views also get a digest.
    Raises: StorageError if the storage does not serve it, which is not the picture's fault.
    """
    try:
        data = read_picture(root, sample.key, sample.inside)
        if sample.sha256 is not None and hashlib.sha256(data).hexdigest() != sample.sha256:
            raise CorpusError("the file has changed since it was indexed")
        image = decode_image(data)
    except CorpusError as error:
        return failed_sample(sample, spec, str(error))
    drawn = [draw_view(spec, sample.key, k, image.width, image.height) for k in range(spec.num_views)]
    views = {size: [render_view(image, params, size) for params in drawn] for size in sizes}
    row = Row(sample.key, sample.sha256, sample.label, image.width, image.height)
    boxes, flips, photometric = (np.array(column) for column in zip(*drawn, strict=True))
    digests = {size: np.array([view_digest(view) for view in views[size]], np.uint64) for size in digested}
    return LoadedSample(row, boxes.astype(np.int32), flips, photometric.astype(np.float32), views, digests)


class Loader:
    """A pool of threads that decodes and renders samples ahead of their use; all parts share it."""

    def __init__(
        self, root: StoragePath, views: ViewSpec, specs: Sequence[StoreSpec], *, ahead: int, cores: int
    ) -> None:
        """Set up the pool for some stores.

        Args:
            specs: specs of the stores that need the samples, all with the same views.
            ahead: number of samples that may be ready before they are used.
            cores: number of cores to decode on.
        """
        self._views = views
        sizes = {size for spec in specs for size in spec.sizes}
        digested = {spec.sizes[0] for spec in specs}
        self._load = partial(load_sample, root=root, spec=views, sizes=sizes, digested=digested)
        self._ahead = ahead
        # `threads` gives more for an object store, where each read waits for the network
        self._pool = ThreadPoolExecutor(root.threads(min(MAX_DECODE_THREADS, cores)))

    def load(
        self, samples: Sequence[Sample], *, crashing: Mapping[str, str] | None = None, one_by_one: bool = False
    ) -> Iterator[LoadedSample]:
        """Start to decode the first samples at once; return an iterator over all of them, in order.

        Args:
            crashing: pictures that must not be decoded here, key to reason.
            one_by_one: hold one picture in memory at a time, for pictures that together are too large.
        Raises (while iterating): StorageError; StuckError.
        """
        load = self._load if not crashing else partial(self._load_others, crashing)
        loaded = map_ahead(self._pool, load, samples, ahead=1 if one_by_one else self._ahead, patience=PICTURE_SECONDS)
        return _watched(samples, loaded)

    def _load_others(self, crashing: Mapping[str, str], sample: Sample) -> LoadedSample:
        """Load a sample, or fail it unread if it is one of the crashing ones."""
        if sample.key in crashing:
            return failed_sample(sample, self._views, crashing[sample.key])
        return self._load(sample)


def _watched(samples: Iterable[Sample], loaded: Iterator[LoadedSample]) -> Iterator[LoadedSample]:
    """Yield the loaded samples; raise StuckError with the key of the one that takes too long."""
    for sample in samples:
        try:
            yield next(loaded)
        except TimeoutError:  # the thread that decodes cannot be stopped, so the whole process must go
            raise StuckError(sample.key) from None
