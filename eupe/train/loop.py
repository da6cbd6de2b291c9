"""The training run; read it from top to bottom."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eupe.common.compute import pick_device
from eupe.common.files import write_file
from eupe.common.holding import Holder
from eupe.common.locks import LOCK
from eupe.common.option import options_of
from eupe.common.reading import read_json
from eupe.common.signals import stop_signals
from eupe.common.storage import StoragePath
from eupe.errors import ConfigError, EupeError, IncompleteError, RunError, StorageError
from eupe.train.advice import advice
from eupe.train.checkpoint import steps_kept
from eupe.train.config import TrainConfig
from eupe.train.dense_maps import SHOWN_VIEWS, dense_maps, draw_maps
from eupe.train.log import METRICS_FILE, Rates, RunLog, TrainStatus, require_wandb
from eupe.train.option_files import OPTIONS_FILE, write_options
from eupe.train.parallel import World
from eupe.train.run_spec import CONFIG_FILE, REPORT_FILE, RunSpec, holdout_by, method_of, resolve, target_names
from eupe.train.sampling import Views
from eupe.train.stream import Meter, open_corpora, stream, training_requests
from eupe.train.targets import Batch, Request, TargetSet
from eupe.train.trainer import Trainer
from eupe.train.validate import Gains, fit_gains, held_out_cosines

INIT_FILE = "init.json"
VALIDATION_VIEWS = 512
GAIN_VIEWS = 256
JUDGED_AT_ONCE = 32

Validation = dict[str, dict[str, dict[str, float]]]
"""Values by target, kind of token and measure (see `eupe.train.validate.Cosines`)."""


@dataclass(frozen=True)
class Judged:
    """The results of a validation."""

    cosines: Validation
    gains: Gains
    """Factors with which predictions were scaled before they were compared with raw features."""


@dataclass(frozen=True)
class TrainReport:
    """The outcome of a run."""

    run: str
    cached: bool
    """Whether the run was finished already."""
    steps: int
    pictures: int
    """Number of pictures that all of `--targets` have."""
    left_out: dict[str, int]
    """Per store, the number of its pictures that were not used: they failed in it, or another store lacks them."""
    seconds: float
    images_per_s: float
    data_wait: float
    """`seconds`, `images_per_s` and `data_wait` count from the start or the last resume."""
    validation: Validation


def train(config: TrainConfig, *, on_status: Callable[[TrainStatus], None] = lambda status: None) -> TrainReport:
    """Distil stores into a student.

    Raises: an EupeError for anything that the user can fix; TrainingError before an update with a non-finite loss.
    """
    return train_together([config], on_status=lambda _, status: on_status(status))[0]


def train_together(
    configs: Sequence[TrainConfig],
    *,
    on_status: Callable[[int, TrainStatus], None] = lambda i, status: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[TrainReport]:
    """Distil stores into several students that share one stream; each becomes what it would have become alone.

    Args:
        on_status: called with a student's index among the configs, and its status.
        on_note: called before the first step with what the user may not have intended; see `eupe.train.advice`.
    Raises: as `train`; ConfigError if the students need different streams.
    """
    _require_one_stream(configs)
    with Holder("train") as holder:
        return _trained(configs, holder, on_status, on_note)


def _trained(
    configs: Sequence[TrainConfig],
    holder: Holder,
    on_status: Callable[[int, TrainStatus], None],
    on_note: Callable[[str], None],
) -> list[TrainReport]:
    """Return the reports of all runs: stored ones of finished runs, new ones of the others; see `train_together`."""
    if any(config.wandb is not None for config in configs):
        require_wandb()
    corpora = open_corpora(configs[0])
    specs = [resolve(config, corpora) for config in configs]
    if len({holdout_by(method_of(spec)) for spec in specs}) > 1:
        raise RunError(
            "these runs were started by different versions of eupe, which hold out different pictures; resume them one "
            "by one"
        )
    for corpus in corpora:
        corpus.require_pictures(*specs[0].config["size"])
    reports = [_recognise(config, spec) for config, spec in zip(configs, specs, strict=True)]
    unfinished = [i for i, report in enumerate(reports) if report is None]
    if unfinished:
        for corpus in corpora:
            # before anything is written, so that a mistake leaves no run behind
            corpus.check_views()
        for i in unfinished:
            holder.hold(StoragePath.of(configs[i].out))
            # again, now under the lock: another process may have begun or finished the run meanwhile
            if _recognise(configs[i], specs[i]) is not None:
                raise RunError(
                    f"{configs[i].out} was finished just now by another `eupe train`; run the same command again"
                )
            _begin(configs[i], specs[i])
        for note in dict.fromkeys(note for i in unfinished for note in advice(configs[i], specs[i], corpora)):
            on_note(note)
        made = _train_unfinished(
            [configs[i] for i in unfinished],
            [specs[i] for i in unfinished],
            corpora,
            lambda i, status: on_status(unfinished[i], status),
        )
        for i, report in zip(unfinished, made, strict=True):
            reports[i] = report
    return [report for report in reports if report is not None]


def _train_unfinished(
    configs: list[TrainConfig],
    specs: list[RunSpec],
    corpora: list[TargetSet],
    on_status: Callable[[int, TrainStatus], None],
) -> list[TrainReport]:
    if configs[0].num_workers > 1:
        from eupe.train.distributed import train_on_ray

        return train_on_ray(configs, specs, on_status)
    with stop_signals(signal.SIGINT, signal.SIGTERM) as stop_asked:
        return train_as_worker(configs, specs, corpora, World(), pick_device(), on_status, stop_asked)


def train_as_worker(
    configs: Sequence[TrainConfig],
    specs: Sequence[RunSpec],
    corpora: Sequence[TargetSet],
    world: World,
    device: torch.device,
    on_status: Callable[[int, TrainStatus], None],
    stop_asked: Callable[[], bool],
) -> list[TrainReport]:
    """Train in one worker: all steps that are left, then validation and export.

    Raises: as `train`.
    """
    trainers = [
        Trainer(config, spec, corpora[0], world=world, device=device)
        for config, spec in zip(configs, specs, strict=True)
    ]
    first_step = _common_step([config.out for config in configs])
    if not world.agree(f"{first_step} {[spec.to_json() for spec in specs]}"):
        raise RunError(
            f"workers see different contents in {configs[0].out}; --out must be a folder that all workers share"
        )
    try:
        with ExitStack() as stack:
            logs = [
                stack.enter_context(RunLog(each.config, each.spec, first_step))
                for each in trainers
                if world.is_main_process
            ]
            loop = TrainLoop(trainers, corpora, logs, device)
            for trainer in trainers:
                trainer.resume(first_step)
            seconds, rates = loop.run(first_step, on_status, stop_asked).totals()
            found = loop.validate(specs[0].total_steps)
        return [loop.finish(trainer, seconds, rates, each) for trainer, each in zip(trainers, found, strict=True)]
    except EupeError:
        raise
    except OSError as error:
        raise StorageError(
            f"run {configs[0].out} stopped: {error}; resume it with --resume once there is space on disk and all its "
            "inputs can be read"
        ) from error


class TrainLoop:
    """The steps of one worker: students that share a stream, each with its trainer."""

    def __init__(
        self, trainers: Sequence[Trainer], corpora: Sequence[TargetSet], logs: Sequence[RunLog], device: torch.device
    ) -> None:
        """Choose the views to validate, and load those that pictures show.

        Args:
            logs: one for each trainer; none outside the main process.
        """
        self.trainers = trainers
        self.corpora = corpora
        self.logs = logs
        self.device = device
        spec, targets = trainers[0].spec, corpora[0]
        held_out = targets.views_of(targets.held_out)
        self._judged = evenly_spaced(held_out, VALIDATION_VIEWS)
        self._shown = list(stream([targets], judged(spec, evenly_spaced(held_out, SHOWN_VIEWS)), device))

    def run(
        self, first_step: int, on_status: Callable[[int, TrainStatus], None], stop_asked: Callable[[], bool]
    ) -> Meter:
        """Run every step from the first one on.

        Raises: TrainingError before an update that is not finite; IncompleteError, with a checkpoint, if asked to stop;
            StorageError, CorpusError, PartCorruptError.
        """
        config, spec, world = self.trainers[0].config, self.trainers[0].spec, self.trainers[0].world
        requests = training_requests(
            spec, self.corpora, world, first_step=first_step, num_microbatches=config.accumulate
        )
        meter = Meter(world.size)
        batches = meter.waiting(stream(self.corpora, requests, self.device))
        for step in range(first_step, spec.total_steps):
            for microbatch in range(config.accumulate):
                batch = next(batches)
                # all students learn from the batch while it is loaded, so it is read and decoded once
                for trainer in self.trainers:
                    trainer.forward_backward(batch, microbatch=microbatch)
            progress = [trainer.optimizer_step(step) for trainer in self.trainers]
            done, last = step + 1, step + 1 == spec.total_steps
            if done % config.log_every == 0 or last:
                rates = meter.rates()
                for i, log in enumerate(self.logs):
                    status = progress[i].status(done, spec.total_steps, rates)
                    log.step(status)
                    on_status(i, status)
            # the last step is validated in `train_as_worker`, for the report
            if done % config.validate_every == 0 and not last:
                self.validate(done)
            # only one worker may hear of the request, but all must stop after the same step
            stopping = world.any(stop_asked(), self.device) and not last
            if done % config.checkpoint_every == 0 or last or stopping:
                for trainer in self.trainers:
                    trainer.save(done)
            if stopping:
                raise IncompleteError(f"stopped after step {done} of {spec.total_steps}; resume with --resume")
        return meter

    def validate(self, step: int) -> list[Judged]:
        """Validate on held-out views of the first corpus, at the first sizes.

        Every worker does the same, because a student may be sharded over them; the main process logs it.
        """
        found = []
        for i, trainer in enumerate(self.trainers):
            # the averages are in place for validation only; training continues with the weights
            with trainer.averaged():
                found.append(self._judge(trainer))
                maps = dense_maps(trainer.distiller, self._shown, target_names(trainer.spec.targets), self.device)
            for log in self.logs[i : i + 1]:
                log.validation(step, found[-1].cosines)
                if maps:
                    log.picture(step, draw_maps(self._shown, maps))
        return found

    def finish(self, trainer: Trainer, seconds: float, rates: Rates, found: Judged) -> TrainReport:
        """Write the student, and then the report, which marks the run as finished."""
        trainer.export(trainer.spec.total_steps, found.gains)
        report = TrainReport(
            run=str(trainer.config.out),
            cached=False,
            steps=trainer.spec.total_steps,
            pictures=self.corpora[0].num_joined,
            left_out=self.corpora[0].left_out,
            seconds=seconds,
            images_per_s=rates.images_per_s,
            data_wait=rates.data_wait,
            validation=found.cosines,
        )
        if self.logs:
            if trainer.initialised is not None:
                _write_json(trainer.config.out / INIT_FILE, asdict(trainer.initialised))
            # last, because it marks the run as finished
            _write_json(trainer.config.out / REPORT_FILE, asdict(report))
        return report

    def _judge(self, trainer: Trainer) -> Judged:
        spec, targets, distiller = trainer.spec, self.corpora[0], trainer.distiller

        def batches(views: Views) -> Iterator[Batch]:
            return stream([targets], judged(spec, views), self.device)

        gains = fit_gains(distiller, batches(training_sample(targets)), self.device)
        totals = held_out_cosines(distiller, batches(self._judged), self.device, gains)
        cosines = {
            name: {kind: cosines.means() for kind, cosines in kinds.items()}
            for name, kinds in zip(target_names(spec.targets), totals, strict=True)
        }
        return Judged(cosines, gains)


def judged(spec: RunSpec, views: Views) -> Iterator[Request]:
    """Yield requests for all of the views, in order, at the first sizes; small enough for any GPU that trains."""
    sizes = tuple(sizes[0] for sizes in spec.target_sizes)
    for start in range(0, len(views), JUDGED_AT_ONCE):
        yield Request(views=views[start : start + JUDGED_AT_ONCE], size=spec.size, target_sizes=sizes)


def training_sample(targets: TargetSet) -> Views:
    """Return the training views from which gains are fitted."""
    return evenly_spaced(targets.views_of(~targets.held_out), GAIN_VIEWS)


def evenly_spaced(views: Views, limit: int) -> Views:
    """Return at most `limit` of the views, evenly spaced."""
    return views if len(views) <= limit else views[np.linspace(0, len(views) - 1, limit).astype(np.int64)]


def _common_step(runs: Sequence[Path]) -> int:
    """Return the newest step of which all runs have a checkpoint; 0 if none has any.

    Raises: RunError if some have checkpoints, but none of a common step.
    """
    kept = [set(steps_kept(run)) for run in runs]
    # a kill between the saves of two students leaves their newest checkpoints at different steps
    common = set.intersection(*kept)
    if not common and any(kept):
        raise RunError(
            f"{', '.join(map(str, runs))} have no checkpoint of the same step; resume them one by one, or give other "
            "runs"
        )
    return max(common, default=0)


def _require_one_stream(configs: Sequence[TrainConfig]) -> None:
    """Raise ConfigError if the configs need different streams, or could not be resumed together."""
    if len({config.out.absolute() for config in configs}) < len(configs):
        raise ConfigError("give each student its own --out")
    if len(configs) > 1 and configs[0].keep == 1:
        raise ConfigError("with --keep 1 the students may have no checkpoint of the same step; give 2 or more")
    for other in configs[1:]:
        for name, option in options_of(TrainConfig).items():
            ours, theirs = getattr(configs[0], name), getattr(other, name)
            if ours != theirs and not option.may_differ:
                raise ConfigError(f"students that share a stream cannot differ in {name}: {ours} and {theirs}")


def _recognise(config: TrainConfig, spec: RunSpec) -> TrainReport | None:
    """Return the report of a finished run; None for a run that is to be trained.

    Raises: RunError if the directory holds another run, or an unfinished one and `--resume` was not given.
    """
    run = config.out
    if not (run / CONFIG_FILE).exists():
        if config.resume:
            raise RunError(f"--resume: there is no run in {run}; leave --resume out to start one")
        if run.exists() and (not run.is_dir() or any(path.name != LOCK for path in run.iterdir())):
            raise RunError(f"{run} already exists and is not a training run; give another --out")
        return None
    try:
        kept = RunSpec.from_json(read_json(run / CONFIG_FILE))
        report = None
        if (run / REPORT_FILE).exists():
            report = TrainReport(**{**read_json(run / REPORT_FILE), "cached": True})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{run} holds a {CONFIG_FILE} or {REPORT_FILE} that is not from a training run; give another --out"
        ) from error
    if report is None and not (run / METRICS_FILE).exists() and not steps_kept(run):
        return None  # an earlier attempt failed before its first step; start over
    if different := kept.differences(spec):
        raise RunError(
            f"{run} holds another run ({'; '.join(different)}); give another --out, or the options of that run"
        )
    if report is not None:
        return report
    if not config.resume:
        raise RunError(f"{run} holds this run, unfinished; resume it with --resume, or give another --out")
    return None


def _begin(config: TrainConfig, spec: RunSpec) -> None:
    """Create the run's directory, and write its spec and options there.

    Raises: StorageError.
    """
    run = config.out
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_options(config, spec, run / OPTIONS_FILE)
        _write_json(run / CONFIG_FILE, spec.to_json())
    except OSError as error:
        raise StorageError(f"run {run} cannot be written: {error}") from error


def _write_json(path: Path, plain: dict[str, Any]) -> None:
    write_file(path, json.dumps(plain, indent=2) + "\n")
