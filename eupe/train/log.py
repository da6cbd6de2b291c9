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

from eupe.train.batch import Batch

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Rates:
    """How fast a run goes."""

    images_per_s: float
    """Of all workers."""
    data_wait: float
    """Share of the time that was spent waiting for data."""


@dataclass(frozen=True)
class TrainStatus(Rates):
    """Where a run stands; rates are those since the last report."""

    step: int
    total_steps: int
    loss: float
    losses: dict[str, float]
    """Per target and kind of token, `dinov2-s/dense`, not weighted."""
    learning_rate: float
    gradient_norm: float | None
    """Before it was clipped; None where it is not."""

    def words(self) -> str:
        """For a line of progress: the loss, each target's, the rates."""
        sums: dict[str, float] = {}
        for name, value in self.losses.items():
            target = name.rpartition("/")[0]
            sums[target] = sums.get(target, 0.0) + value
        each = [f"{target} {value:.3f}" for target, value in sums.items()] if len(sums) > 1 else []
        rates = f"{self.images_per_s:.0f} img/s", f"data-wait {self.data_wait:.1%}"
        return "  ".join((f"loss {self.loss:.3f}", *each, *rates))


class Meter:
    """Time spent on steps, and the share of it spent waiting for data."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._began = self._last = time.monotonic()
        self._waited = self._waited_before = 0.0
        self._images = self._images_before = 0

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; how long each is waited for is counted."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - asked
            if batch is None:
                return
            self._images += len(batch.keys) * self._world_size
            yield batch

    def rates(self) -> Rates:
        """Since the last call, at the end of a step."""
        now = time.monotonic()
        elapsed = now - self._last
        rates = Rates((self._images - self._images_before) / elapsed, (self._waited - self._waited_before) / elapsed)
        self._last, self._waited_before, self._images_before = now, self._waited, self._images
        return rates

    def totals(self) -> tuple[float, Rates]:
        """Seconds, and rates, since the start."""
        seconds = time.monotonic() - self._began
        return seconds, Rates(self._images / seconds, self._waited / seconds)


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

    def step(self, status: TrainStatus) -> None:
        """Note where the run stands."""
        values = {name: value for name, value in vars(status).items() if name != "total_steps" and value is not None}
        self._line(values)
        for name, value in {**values.pop("losses"), **values}.items():
            if name != "step":
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
