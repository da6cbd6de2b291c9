"""How a run is going: rates, `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from eupe.train.targets import Batch

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class TrainStatus:
    """Where a run stands."""

    step: int
    total_steps: int
    loss: float
    images_per_s: float
    data_wait: float
    """Share of the time since the last report that was spent waiting for data."""


class Meter:
    """Time spent on steps, and the share of it spent waiting for data."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._began = self._last = time.monotonic()
        self._waited = self._waited_before = 0.0
        self._steps = self._steps_before = 0

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; how long each is waited for is counted."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch
            self._steps += 1

    def status(self, step: int, total_steps: int, loss: float) -> TrainStatus:
        """Rates since the last call."""
        now = time.monotonic()
        elapsed = now - self._last
        images = (self._steps + 1 - self._steps_before) * self._batch_size
        status = TrainStatus(step, total_steps, loss, images / elapsed, (self._waited - self._waited_before) / elapsed)
        self._last, self._waited_before, self._steps_before = now, self._waited, self._steps + 1
        return status

    def totals(self) -> tuple[float, float, float]:
        """Seconds, images per second, share of the time spent waiting, since the start."""
        seconds = time.monotonic() - self._began
        return seconds, self._steps * self._batch_size / seconds, self._waited / seconds


class RunLog:
    """`metrics.jsonl` and TensorBoard; lines of steps that will be done again are dropped."""

    def __init__(self, run: Path, first_step: int) -> None:
        self._path = run / METRICS_FILE
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= first_step]
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            temporary.replace(self._path)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def __enter__(self) -> RunLog:
        self._file = self._path.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._board.close()

    def step(self, status: TrainStatus, *, learning_rate: float, losses: dict[str, float]) -> None:
        rates = {
            "images_per_s": status.images_per_s,
            "data_wait": status.data_wait,
            "learning_rate": learning_rate,
        }
        self._line({"step": status.step, "loss": status.loss, "losses": losses, **rates})
        self._board.add_scalar("loss", status.loss, status.step)
        for name, value in {**losses, **rates}.items():
            self._board.add_scalar(name, value, status.step)

    def validation(self, step: int, validation: dict[str, dict[str, dict[str, float]]]) -> None:
        self._line({"step": step, "validation": validation})
        for target, kinds in validation.items():
            for kind, measures in kinds.items():
                self._board.add_scalar(f"validation/{target}/{kind}", measures["normalised"], step)

    def _line(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()


def _step_of(line: str) -> float:
    """The step that a line tells of; beyond all steps for one that a full disk or a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return math.inf
