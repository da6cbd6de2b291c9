"""One fine-tuning: batches of random views with their truth, and the update of encoder and head; read it top to bottom.

Shapes: B views of a batch, S side of a view in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eupe.common.prefetch import map_ahead
from eupe.corpus.views import render_view
from eupe.errors import TrainingError
from eupe.evaluate.dense_probe import BATCHES_AHEAD, drawn
from eupe.finetune.model import FineTuned
from eupe.finetune.tasks import Task
from eupe.models.encoder import keep_batch_norms
from eupe.train.trainer import ENCODER, HEADS, adamw_of, learning_rate

WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""
CLIP = 1.0
"""Largest norm of the gradient."""


@dataclass(frozen=True)
class Schedule:
    """Length and rate of a training."""

    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    freeze_batch_norms: bool
    """Whether the encoder's batch norms keep the statistics that belong to its weights."""


def fine_tune(
    model: FineTuned,
    task: Task,
    places: Sequence[int],
    how: Schedule,
    *,
    on_step: Callable[[int, float], None],
) -> None:
    """Train encoder and head on random views of some training pictures, with AdamW and half a cosine.

    Args:
        places: indices of the pictures among the training pictures.
        on_step: called after every step with its number, from 1, and its loss; it may judge the model.
    Raises: TrainingError before an update that is not finite; CorpusError if a picture or its truth cannot be read.
    """
    device = next(model.parameters()).device
    parts = {ENCODER: model.encoder, HEADS: model.head}
    optimizer = adamw_of(parts, lr=how.lr, weight_decay=how.weight_decay)
    warmup = round(WARMUP * how.steps)
    for step, (views, truth) in enumerate(random_batches(task, places, how, size=model.encoder.spec.size)):
        model.train()  # `on_step` may have judged it
        if how.freeze_batch_norms:
            keep_batch_norms(model.encoder)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=how.lr, warmup_steps=warmup, total_steps=how.steps)
        loss = task.loss(model(views.to(device)), truth.to(device))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if not torch.isfinite(loss + norm):
            raise TrainingError(
                f"the loss of step {step} is {loss.item()}, and the norm of its gradient {norm.item()}, so nothing was "
                "updated; a lower --lr may help"
            )
        optimizer.step()
        on_step(step + 1, loss.item())
    model.eval()


def random_batches(task: Task, places: Sequence[int], how: Schedule, *, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a batch for each step: random views, uint8 [B, S, S, 3], and their truth as the task has it.

    A picture comes again when all others have come; each time it shows another view.
    """

    def load(batch: tuple[int, NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
        step, chosen = batch
        pairs = [load_one(places[j], step * how.batch_size + at) for at, j in enumerate(chosen.tolist())]
        views, truths = zip(*pairs, strict=True)
        return torch.from_numpy(np.stack(views)), torch.from_numpy(np.stack(truths))

    def load_one(i: int, k: int) -> tuple[NDArray[np.uint8], NDArray[np.generic]]:
        image = task.learned.image(i)
        view = task.draw(i, k, *image.size, seed=how.seed)
        return render_view(image, view, size), task.truth(i, view, size)

    order = enumerate(drawn(len(places), how.batch_size, how.steps, seed=how.seed))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from map_ahead(pool, load, order, ahead=BATCHES_AHEAD)
