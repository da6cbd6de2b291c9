"""Online distillation, the baseline of `benchmarks.train`: the teacher runs in every step, and no features are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eupe.common.cores import num_cores
from eupe.corpus.views import ViewSpec, draw_view, render_view
from eupe.extract.worker import single_threads
from eupe.teachers.teacher import Teacher
from eupe.train.stream import stream
from eupe.train.targets import Batch, Request, TargetBatch, TargetSet, TargetTokens


class PicturesAlone(TargetSet):
    """The views of a target's store, drawn again from the pictures' keys; its features are not read."""

    @classmethod
    def of(cls, targets: TargetSet, *, holdout: float) -> PicturesAlone:
        return cls(targets.stores, targets.corpus_root, holdout=holdout)

    def load(self, request: Request, *, pool: ThreadPoolExecutor) -> Batch:
        drawn = ViewSpec.from_json(self.stores[0].spec.views)
        keys = tuple(self.keys[i] for i in request.views[:, 0])

        def render(image: Image.Image, key: str, number: int) -> NDArray[np.uint8]:
            return render_view(image, draw_view(drawn, key, number, image.width, image.height), request.size)

        images = pool.map(self.read_image, request.views[:, 0].tolist())
        views = pool.map(render, images, keys, request.views[:, 1].tolist())
        return Batch(request, torch.from_numpy(np.stack(list(views))), (), keys)


class OnlineTeacher:
    """A teacher that computes a batch's targets in float32 on all cores, one piece per core, as extraction does."""

    def __init__(self, teacher: Teacher, size: int, *, batch_size: int) -> None:
        """Set up one thread per core, each with single-threaded torch, unless the teacher is on a GPU.

        Args:
            batch_size: maximum number of views that one core computes at once.
        """
        self._teacher, self._size = teacher, size
        self._threads = num_cores()
        self._piece = batch_size
        self._cores = None if teacher.device.type == "cuda" else single_threads(self._threads)

    def targets(self, pixels: Tensor) -> TargetBatch:
        """Return the targets of views, uint8 [B, S, S, 3]."""
        if self._cores is None:
            tokens = [self._teacher(piece) for piece in pixels.split(self._piece)]
        else:
            piece = min(self._piece, math.ceil(len(pixels) / self._threads))
            tokens = list(self._cores.map(self._teacher, pixels.split(piece)))
        summaries = [each.summary for each in tokens if each.summary is not None]
        summary = TargetTokens(torch.cat(summaries)) if summaries else None
        return TargetBatch(self._size, summary, TargetTokens(torch.cat([each.dense for each in tokens])))


def online_stream(
    pictures: PicturesAlone, teacher: OnlineTeacher, requests: Iterable[Request], device: torch.device
) -> Iterator[Batch]:
    """Yield batches of views decoded ahead, as in the trainer; the teacher computes a batch's targets on demand."""
    with closing(stream([pictures], requests, device)) as batches:  # type: ignore[type-var]
        for batch in batches:
            yield replace(batch, targets=(teacher.targets(batch.pixels),))
