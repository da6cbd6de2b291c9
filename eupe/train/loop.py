"""The training run: read it from top to bottom."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eupe.device import compute_dtype, pick_device
from eupe.encoder import build_encoder, save_encoder
from eupe.errors import EupeError, IncompleteError, RunError, StorageError, TrainingError
from eupe.stopping import stop_signals
from eupe.train.checkpoint import Trainables, load_checkpoint, save_checkpoint, save_tensors
from eupe.train.config import CONFIG_FILE, RunCard, TrainConfig, resolve
from eupe.train.heads import TargetHeads
from eupe.train.log import Meter, RunLog, TrainStatus
from eupe.train.normalise import STANDARD, normalisers
from eupe.train.schedule import learning_rate
from eupe.train.targets import Batch, TargetSet, Views, batch_at, open_targets, stream
from eupe.train.validate import Distiller, fit_gains, held_out_cosines

REPORT_FILE = "report.json"
HEADS_FILE = "heads.safetensors"
VALIDATION_VIEWS = 512
GAIN_VIEWS = 256


@dataclass(frozen=True)
class TrainReport:
    """How a run ended."""

    run: str
    cached: bool
    """It was finished already."""
    steps: int
    seconds: float
    images_per_s: float
    data_wait: float
    """These three since the run was started, or last resumed."""
    validation: dict[str, dict[str, dict[str, float]]]
    """Target, kind of token, measure (see `eupe.train.validate.Cosines`)."""


@dataclass(frozen=True)
class Session:
    """A run while it is trained."""

    config: TrainConfig
    card: RunCard
    targets: TargetSet
    distiller: Distiller
    optimizer: torch.optim.Optimizer
    device: torch.device

    @property
    def trainables(self) -> Trainables:
        """What a checkpoint holds."""
        return Trainables(self.distiller.encoder, self.distiller.heads, self.optimizer)

    def batches(self, chosen: Iterator[Views]) -> Iterator[Batch]:
        """The views asked for, at the student's size, loaded ahead."""
        return stream(self.targets, chosen, size=self.card.config["size"], device=self.device)


def train(config: TrainConfig, *, on_status: Callable[[TrainStatus], None] = lambda status: None) -> TrainReport:
    """Distil stores into a student.

    Raises: an EupeError for whatever the user can mend; TrainingError before an update with a non-finite loss.
    """
    targets = open_targets(config.targets, corpus=config.corpus, holdout=config.holdout)
    size = config.size or targets.stores[0].spec.sizes[0]
    targets.require_pictures(size)
    card = resolve(config, targets, size=size)
    if (report := _recognise(config, card)) is not None:
        return report
    targets.check_views()
    _begin(config.out, card)
    device = pick_device()
    distiller, optimizer = build(card, targets, device)
    session = Session(config, card, targets, distiller, optimizer, device)
    first_step = load_checkpoint(config.out, session.trainables)
    try:
        with RunLog(config.out, first_step) as log:
            rates = _run_steps(session, first_step, log, on_status).totals()
            validation = _validate(session)
            log.validation(card.total_steps, validation)
        _export(config.out, session.trainables, card.total_steps)
        report = TrainReport(str(config.out), False, card.total_steps, *rates, validation)
        _write_json(config.out / REPORT_FILE, asdict(report))
    except EupeError:
        raise
    except OSError as error:
        raise StorageError(f"run {config.out} cannot be written: {error}; free some space and --resume") from error
    return report


def build(card: RunCard, targets: TargetSet, device: torch.device) -> tuple[Distiller, torch.optim.Optimizer]:
    """Student, heads and optimiser as at step 0; seeds torch's generators with the run's seed."""
    torch.manual_seed(card.config["seed"])
    encoder = build_encoder(card.config["student"], size=card.config["size"])
    widths = (encoder.card.summary_dim, encoder.card.dense_dim)
    heads = nn.ModuleList(
        TargetHeads(widths, (target["summary_dim"], target["dense_dim"]), card.config["head_width"])
        for target in card.targets
    )
    norms = [normalisers(store, store.spec.sizes[0], device, STANDARD) for store in targets.stores]
    distiller = Distiller(encoder, heads, norms, dtype=compute_dtype(card.config["dtype"], device)).to(device)
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": card.config["weight_decay"]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return distiller, torch.optim.AdamW(groups, lr=card.config["lr"])


def _run_steps(session: Session, first_step: int, log: RunLog, on_status: Callable[[TrainStatus], None]) -> Meter:
    config, card, optimizer = session.config, session.card, session.optimizer
    views = session.targets.views_of(~session.targets.held_out)
    steps = range(first_step, card.total_steps)
    wanted = (batch_at(views, step, batch_size=config.batch_size, seed=config.seed) for step in steps)
    warmup_steps = round(config.warmup * card.total_steps)
    meter = Meter(config.batch_size)
    session.distiller.train()
    with stop_signals(signal.SIGINT, signal.SIGTERM) as stop_asked:
        for step, batch in zip(steps, meter.waiting(session.batches(wanted)), strict=True):
            rate = learning_rate(step, peak=config.lr, warmup_steps=warmup_steps, total_steps=card.total_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses = session.distiller(batch.to(session.device))
            loss = torch.stack([value for kinds in losses for value in kinds.values()]).sum()
            _require_finite(loss, step, batch)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            done = step + 1
            last = done == card.total_steps
            if done % config.log_every == 0 or last:
                status = meter.status(done, card.total_steps, loss.item())
                log.step(status, learning_rate=rate, losses=_named(losses, card))
                on_status(status)
            if done % config.validate_every == 0 and not last:
                log.validation(done, _validate(session))
            stopping = stop_asked() and not last
            if done % config.checkpoint_every == 0 or last or stopping:
                save_checkpoint(config.out, session.trainables, step=done)
            if stopping:
                raise IncompleteError(f"stopped after step {done} of {card.total_steps}; go on with --resume")
    return meter


def _require_finite(loss: Tensor, step: int, batch: Batch) -> None:
    if not torch.isfinite(loss):
        raise TrainingError(
            f"the loss of step {step} is {loss.item()}, so nothing was updated; its pictures are "
            f"{', '.join(sorted(set(batch.keys))[:5])}, ...; a lower --lr or --dtype fp32 may help, with another --out"
        )


def target_names(card: RunCard) -> list[str]:
    """One name per target: its teacher's, numbered where two are the same."""
    names = [Path(target["teacher"]).name for target in card.targets]
    return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]


def _named(losses: list[dict[str, Tensor]], card: RunCard) -> dict[str, float]:
    return {
        f"{name}/{kind}": value.item()
        for name, kinds in zip(target_names(card), losses, strict=True)
        for kind, value in kinds.items()
    }


def _validate(session: Session) -> dict[str, dict[str, dict[str, float]]]:
    """Target, kind of token, measure: on held-out views."""
    targets, distiller, device = session.targets, session.distiller, session.device

    def batches(views: Views) -> Iterator[Batch]:
        return session.batches(in_order(views, session.config.batch_size))

    gains = fit_gains(distiller, batches(training_sample(targets)), device)
    held_out = spread(targets.views_of(targets.held_out), VALIDATION_VIEWS)
    totals = held_out_cosines(distiller, batches(held_out), device, gains)
    return {
        name: {kind: cosines.means() for kind, cosines in kinds.items()}
        for name, kinds in zip(target_names(session.card), totals, strict=True)
    }


def training_sample(targets: TargetSet) -> Views:
    """The training views from which gains are fitted."""
    return spread(targets.views_of(~targets.held_out), GAIN_VIEWS)


def spread(views: Views, limit: int) -> Views:
    """At most `limit` of the views, evenly chosen."""
    return views if len(views) <= limit else views[np.linspace(0, len(views) - 1, limit).astype(np.int64)]


def in_order(views: Views, batch_size: int) -> Iterator[Views]:
    """All of the views as they come, the last batch smaller."""
    return (views[i : i + batch_size] for i in range(0, len(views), batch_size))


def _recognise(config: TrainConfig, card: RunCard) -> TrainReport | None:
    """The report of a finished run; None for one to be trained.

    Raises: RunError if the directory holds another run, or an unfinished one and `--resume` was not given.
    """
    path = config.out / CONFIG_FILE
    if not path.exists():
        if config.resume:
            raise RunError(f"--resume: there is no run in {config.out}; leave --resume out to start it")
        if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
            raise RunError(f"{config.out} holds something that is no training run; give another --out")
        return None
    if different := _card_differences(json.loads(path.read_text()), card.to_json()):
        raise RunError(
            f"{config.out} holds another run ({'; '.join(different)}); "
            "give another --out, or the options it was made with"
        )
    if (config.out / REPORT_FILE).exists():
        return TrainReport(**{**json.loads((config.out / REPORT_FILE).read_text()), "cached": True})
    if not config.resume:
        raise RunError(f"{config.out} holds this run unfinished; go on with --resume, or give another --out")
    return None


def _begin(run: Path, card: RunCard) -> None:
    """Make the run's directory and leave its card there.

    Raises: StorageError.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        _write_json(run / CONFIG_FILE, card.to_json())
    except OSError as error:
        raise StorageError(f"run {run} cannot be written: {error}") from error


def _card_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One phrase for each thing that makes two runs different; a target's place is not such a thing."""
    phrases = [
        f"{name}: was {old['config'].get(name)}, now {new['config'].get(name)}"
        for name in sorted({*old["config"], *new["config"]})
        if old["config"].get(name) != new["config"].get(name)
    ]
    if old["total_steps"] != new["total_steps"]:
        phrases.append(f"steps: was {old['total_steps']}, now {new['total_steps']}")
    prints = [[target["fingerprint"] for target in card["targets"]] for card in (old, new)]
    if prints[0] != prints[1]:
        places = [", ".join(target["path"] for target in card["targets"]) for card in (old, new)]
        phrases.append(f"targets: was {places[0]}, now {places[1]}, or stores made anew")
    return phrases


def _export(run: Path, state: Trainables, step: int) -> None:
    """The student on its own, and its heads beside it."""
    save_encoder(state.encoder, run)
    save_tensors(dict(state.heads.state_dict()), run / HEADS_FILE, step=step)


def _write_json(path: Path, plain: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(plain, indent=2) + "\n")
    temporary.replace(path)
