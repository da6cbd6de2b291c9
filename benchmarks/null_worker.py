"""A worker of a job that has neither teacher nor pictures; a module of its own, since Ray imports it by name."""

from __future__ import annotations

import numpy as np

from eupe.extract.job import ExtractActor
from eupe.extract.plan import PartTask
from eupe.extract.worker import PartResult
from eupe.place import Place
from eupe.store.writer import Part, Row, StoreWriter

SIZE = 64


class NullActor(ExtractActor):
    """A worker without a teacher: every sample's summary is zero."""

    def prepare(self, store: Place) -> None:
        self._writer = StoreWriter(store, threads=1)
        self._done = 0

    def run(self, task: PartTask, store: Place) -> PartResult:
        n = len(task.samples)
        rows = [Row(sample.key, sample.sha256, sample.label, SIZE, SIZE) for sample in task.samples]
        (path,) = self._writer.spec.feature_paths
        summary = np.zeros((n, 1, self._writer.spec.teacher["summary_dim"]), np.float16)
        boxes = np.tile(np.array([0, 0, SIZE, SIZE], np.int32), (n, 1, 1))
        flips, digests = np.zeros((n, 1), np.bool_), np.ones((n, 1), np.uint64)
        self._writer.commit(Part(task.index, rows, boxes, flips, digests, {path: summary}))
        self._done += n
        return PartResult(task.index, n, 0)

    def progress(self) -> tuple[int, int]:
        return self._done, 0
