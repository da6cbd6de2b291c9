"""The log of a run: rates, `metrics.jsonl`, pictures, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from eupe.common.files import replacing, write_file
from eupe.errors import ConfigError
from eupe.train.config import TrainConfig
from eupe.train.run_spec import RunSpec

METRICS_FILE = "metrics.jsonl"
PICTURES = "pictures"
WANDB_FILE = "wandb_id"


@dataclass(frozen=True)
class Rates:
    """The speed of a run."""

    images_per_s: float
    """Images per second, over all workers."""
    data_wait: float
    """Share of the time spent waiting for data."""


@dataclass(frozen=True)
class TrainStatus(Rates):
    """The progress of a run at a step; rates are those since the last report."""

    step: int
    total_steps: int
    loss: float
    losses: dict[str, float]
    """Per target and kind of token (`dinov2-s/dense`), not weighted."""
    learning_rate: float
    """Of the heads; that of the encoder may differ."""
    gradient_norm: float
    """Norm before clipping, of what is trained in this step."""

    def words(self) -> str:
        """Return the text of a progress line: the loss, each target's loss, the rates."""
        sums: dict[str, float] = {}
        for name, value in self.losses.items():
            target = name.rpartition("/")[0]
            sums[target] = sums.get(target, 0.0) + value
        each = [f"{target} {value:.3f}" for target, value in sums.items()] if len(sums) > 1 else []
        rates = f"{self.images_per_s:.0f} img/s", f"data-wait {self.data_wait:.1%}"
        return "  ".join((f"loss {self.loss:.3f}", *each, *rates))


class RunLog:
    """The log files of a run: `metrics.jsonl`, `pictures/`, TensorBoard and, if requested, Weights & Biases."""

    def __init__(self, config: TrainConfig, spec: RunSpec, first_step: int) -> None:
        """Open the log of a run that starts or resumes after `first_step` steps; lines of later steps are dropped.

        Raises: ConfigError if Weights & Biases is requested but not available.
        """
        self._run = run = config.out
        self._path = run / METRICS_FILE
        if self._path.exists():
            # a killed run may have logged steps after its last checkpoint; they are repeated and logged again
            kept = [line for line in self._path.read_text().splitlines() if _step_of(line) <= first_step]
            write_file(self._path, "".join(f"{line}\n" for line in kept))
        self._wandb = None if config.wandb is None else _WandbRun(run, config.wandb, spec)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def __enter__(self) -> RunLog:
        self._file = self._path.open("a")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish(failed=kind is not None)

    def step(self, status: TrainStatus) -> None:
        """Log the status of a step."""
        values = {name: value for name, value in vars(status).items() if name != "total_steps"}
        self._line(values)
        scalars = {**values.pop("losses"), **values}
        del scalars["step"]
        self._scalars(status.step, scalars)

    def validation(self, step: int, validation: dict[str, dict[str, dict[str, float]]]) -> None:
        """Log the result of a validation."""
        self._line({"step": step, "validation": validation})
        scalars = {
            f"validation/{target}/{kind}": measures["normalised"]
            for target, kinds in validation.items()
            for kind, measures in kinds.items()
        }
        self._scalars(step, scalars)

    def picture(self, step: int, picture: Image.Image) -> None:
        """Save a picture of the student's predictions for some views at a step."""
        path = self._run / PICTURES / f"{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as unfinished:
            picture.save(unfinished, format="png")
        self._board.add_image(PICTURES, np.asarray(picture), step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.picture(step, picture)

    def _line(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        # a kill then loses no step that has been logged
        self._file.flush()

    def _scalars(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.scalars(step, scalars)


class _WandbRun:
    """A run of Weights & Biases, the same one after `--resume`; its entries for steps that are repeated stay."""

    def __init__(self, run: Path, project: str, spec: RunSpec) -> None:
        """Start or resume the run.

        Raises: ConfigError if Weights & Biases is not installed or refuses.
        """
        self._wandb = require_wandb()
        path = run / WANDB_FILE
        if not path.exists():
            # kept in the run's directory, so that a resumed run continues the same W&B run
            write_file(path, secrets.token_hex(4))
        try:
            self._run = self._wandb.init(
                project=project,
                id=path.read_text(),
                resume="allow",
                reinit="create_new",
                name=run.name,
                dir=run,
                config=spec.to_json(),
                settings=self._wandb.Settings(console="off"),
            )
        except self._wandb.Error as error:
            reason = str(error).rstrip(".")
            raise ConfigError(
                f"cannot log to --wandb {project}: {reason}; set WANDB_MODE=offline to keep the log for `wandb sync`"
            ) from error

    def scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def picture(self, step: int, picture: Image.Image) -> None:
        self._run.log({PICTURES: self._wandb.Image(picture)}, step=step)

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def require_wandb() -> Any:
    """Return the `wandb` package.

    Raises: ConfigError if it is not installed; a mere folder `wandb`, which Python would import, does not count.
    """
    try:
        from wandb import init  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--wandb needs Weights & Biases: pip install wandb ({error})") from error
    import wandb

    return wandb


def _step_of(line: str) -> float:
    """Return the step of a log line; infinity for a line that a full disk or a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return math.inf
