"""A job's worker without a teacher or pictures; it has its own module because Ray imports it by name."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eupe.common.storage import StoragePath
from eupe.extract.actors import ExtractActor, Whereabouts, this_process
from eupe.extract.load import PartTask, WorkUnit
from eupe.store.layout import StoreSpec
from eupe.store.writer import Part, Row, StoreWriter

SIZE = 64


class NullActor(ExtractActor):
    """A worker without a teacher: every sample's summary is zero."""

    def try_forward(self, i: int, spec: StoreSpec, task: PartTask, *, isolate: bool) -> dict[str, Any]:
        return {"batch_size": 1}

    def prepare(self, targets: Sequence[tuple[int, StoragePath]]) -> Whereabouts:
        self._writer = StoreWriter(targets[0][1], threads=1)
        return Whereabouts(socket.gethostname(), this_process())

    def run(self, unit: WorkUnit, crashing: Mapping[str, str], isolate: bool) -> int:
        ((_, task),) = unit.tasks
        n = len(task.samples)
        rows = [Row(sample.key, sample.sha256, sample.label, SIZE, SIZE) for sample in task.samples]
        (path,) = self._writer.spec.feature_paths
        summary = np.zeros((n, 1, self._writer.spec.teacher["summary_dim"]), np.float16)
        boxes = np.tile(np.array([0, 0, SIZE, SIZE], np.int32), (n, 1, 1))
        flips, digests = np.zeros((n, 1), np.bool_), np.ones((n, 1), np.uint64)
        self._writer.commit(Part(task.index, rows, boxes, flips, digests, {path: summary}))
        return 0
