"""All fine-tunings of one command: every share of the labels, every seed, every start; each kept as a whole model."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import eupe
from eupe.common.compute import pick_device
from eupe.common.files import publish, write_file
from eupe.common.holding import Holder
from eupe.common.locks import unfinished
from eupe.common.option import options_of
from eupe.common.reading import read_json
from eupe.common.storage import StoragePath
from eupe.errors import ConfigError, RunError, StorageError
from eupe.evaluate.splits import few_pictures
from eupe.finetune.config import FinetuneConfig
from eupe.finetune.loop import Schedule, fine_tune
from eupe.finetune.model import FineTuned, TaskFacts, save_model
from eupe.finetune.results import Gain, Row, Trial, gains, rows
from eupe.finetune.start import SCRATCH, WEIGHTS, Start, open_starts
from eupe.finetune.tasks import Judged, Task
from eupe.train.run_spec import library_versions

ASKED_FILE = "finetune.json"
REPORT_FILE = "report.json"
JUDGED_FILE = "judged.json"
CURVE_FILE = "curve.jsonl"
LOSSES_KEPT = 100
"""Number of losses of a training that its curve keeps, each a mean of the steps since the one before."""
TIMES_JUDGED = 4
"""Number of times that a model is judged during its training, the end among them."""

OnStep = Callable[[str, int, int, str], None]
"""Function that is told of progress: the training, steps done, all of its steps, and a note."""


@dataclass(frozen=True)
class FinetuneReport:
    """The table of a command, and the models behind it."""

    out: str
    cached: bool
    """Whether all models were there already."""
    task: str
    measure: str
    """The measure of the rows."""
    lower_is_better: bool
    starts: dict[str, str]
    """What each start is, in words."""
    rows: list[Row]
    gains: list[Gain]
    """Of the weights over random ones; empty unless both were trained."""
    trials: list[Trial]
    notes: list[str]


def finetune(
    config: FinetuneConfig, task: Task, *, on_step: OnStep = lambda name, done, total, note: None
) -> FinetuneReport:
    """Fine-tune a student on labels, for every share of them and every seed; what is there already is not done again.

    Args:
        task: what `open_task` returned for this config.
    Raises: ConfigError, CorpusError, RunError, TeacherError for what cannot be used; TrainingError for a loss that is
        not finite; StorageError.
    """
    starts = open_starts(config)
    with Holder("finetune") as holder:
        holder.hold(StoragePath.of(config.out))
        _begin(config, starts, task)
        trials = [
            _trial(config, task, start, share, seed, on_step)
            for share in config.label_share
            for seed in range(config.seeds)
            for start in starts
        ]
        report = FinetuneReport(
            out=str(config.out),
            cached=all(trial.cached for trial in trials),
            task=task.name,
            measure=next(iter(trials[0].scores)),
            lower_is_better=task.lower_is_better,
            starts={start.name: start.words for start in starts},
            rows=rows(trials),
            gains=gains(trials, better=WEIGHTS, worse=SCRATCH, lower_is_better=task.lower_is_better),
            trials=trials,
            notes=list(task.notes),
        )
        _write(config.out / REPORT_FILE, asdict(report))
    return report


def _begin(config: FinetuneConfig, starts: Sequence[Start], task: Task) -> None:
    """Write what decides the models, or compare it with what was written before.

    Raises: ConfigError if the directory holds something else; StorageError.
    """
    asked = {
        "eupe": eupe.__version__,
        "start": starts[0].digest,
        "data": _data_digest(task),
        **{name: value for name, value in _settings(config).items() if name != "data"},
    }
    place = config.out / ASKED_FILE
    if place.exists():
        try:
            known = dict(read_json(place))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"--out {config.out} has an {ASKED_FILE} that cannot be read ({error})") from error
        plain = json.loads(json.dumps(asked))
        if changed := [name for name in {**plain, **known} if plain.get(name) != known.get(name)]:
            told = ", ".join(f"{name} was {known.get(name)} and is {plain.get(name)}" for name in changed)
            raise ConfigError(f"--out {config.out} holds another fine-tuning ({told}); give another --out")
    elif other := [path.name for path in config.out.iterdir() if not path.name.startswith(".")]:
        raise ConfigError(f"--out {config.out} is not empty and not a fine-tuning ({other[0]}); give another --out")
    else:
        _write(place, asked)


def _settings(config: FinetuneConfig) -> dict[str, Any]:
    """Return the options that decide each model, as plain JSON."""
    free = {name for name, option in options_of(FinetuneConfig).items() if option.indifferent}
    return {name: value for name, value in asdict(config).items() if name not in free | {"subject", "from_scratch"}}


def _data_digest(task: Task) -> str:
    """Return the sha256 of all pictures, in order, with their truth."""
    digest = hashlib.sha256()
    for pictures, truths in zip((task.learned, task.judged), task.truths(), strict=True):
        for i, truth in enumerate(truths):
            digest.update(f"{pictures.keys[i]}\0{pictures.sha256(i)}\0{truth}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _trial(config: FinetuneConfig, task: Task, start: Start, share: float, seed: int, on_step: OnStep) -> Trial:
    """Return the fine-tuning of one start, share and seed, which is made if it is not there."""
    name = f"{start.name}-{share:g}-{seed}"
    folder = config.out / name
    if folder.is_dir():
        return _known(folder)
    try:
        with unfinished(folder.absolute(), verb="finetune") as making:
            trial = replace(_made(config, task, start, share, seed, making, partial(on_step, name)), folder=str(folder))
            publish(making, folder.absolute())  # last: a directory that has this name is complete
    except OSError as error:
        raise (
            error if isinstance(error, StorageError) else StorageError(f"{folder} cannot be written: {error}")
        ) from error
    return trial


def _made(
    config: FinetuneConfig,
    task: Task,
    start: Start,
    share: float,
    seed: int,
    folder: Path,
    on_step: Callable[[int, int, str], None],
) -> Trial:
    """Train one model and write it to a folder."""
    places = [i for i, kept in enumerate(few_pictures(task.groups, task.learned.keys, share, seed=seed)) if kept]
    steps = _steps(config, task)
    torch.manual_seed(seed)  # of the head, and of what is random in a forward pass
    encoder = start.make(seed)
    curve: list[dict[str, float]] = []
    head, probe = task.make_head(encoder.spec), None
    model = FineTuned(encoder, head, task.name, pick_device())
    if start.name == WEIGHTS:
        on_step(0, steps, "linear probe")
        model.use_head(task.probe(model.encode, encoder.spec, places, steps=steps, seed=seed))
        probe = task.judge(model.eval().head, model.encode)
        curve.append({"step": 0, **probe.scores})
    begun = time.perf_counter()
    judged = _learn(model, task, places, _schedule(config, start, steps, seed), curve, on_step) if steps else probe
    if judged is None:  # neither a probe nor a step
        judged = task.judge(model.eval().head, model.encode)
        curve.append({"step": 0, **judged.scores})
    seconds = time.perf_counter() - begun
    facts = TaskFacts(
        task=task.name,
        classes=task.classes,
        max_m=task.max_m,
        start=start.words,
        learned_from=start.learned_from,
        settings={**_settings(config), "label_share": share, "seed": seed},
        scores=judged.scores,
        data={"path": config.data, "learned": len(places), "judged": len(task.judged)},
        versions=library_versions(),
    )
    save_model(model, facts, folder)
    write_file(folder / CURVE_FILE, "".join(f"{json.dumps(point)}\n" for point in curve))
    trial = Trial(
        folder=str(folder),
        start=start.name,
        label_share=share,
        seed=seed,
        pictures=len(places),
        steps=steps,
        seconds=seconds,
        images_per_s=steps * config.batch_size / seconds if steps else 0.0,
        scores=judged.scores,
        probe=None if probe is None else probe.scores,
    )
    _write(folder / JUDGED_FILE, {**asdict(judged), "trial": asdict(trial)})
    return trial


def _learn(
    model: FineTuned,
    task: Task,
    places: Sequence[int],
    how: Schedule,
    curve: list[dict[str, float]],
    on_step: Callable[[int, int, str], None],
) -> Judged:
    """Fine-tune a model, add losses and scores to its curve, and return what it scores at the end."""
    losses: list[float] = []
    last: list[Judged] = []
    judge_every, keep_every = max(1, how.steps // TIMES_JUDGED), max(1, how.steps // LOSSES_KEPT)

    def note(done: int, loss: float) -> None:
        losses.append(loss)
        if done % keep_every == 0 or done == how.steps:
            curve.append({"step": done, "loss": sum(losses) / len(losses)})
            on_step(done, how.steps, f"loss {curve[-1]['loss']:.3f}")
            losses.clear()
        if done == how.steps or (done % judge_every == 0 and how.steps - done >= judge_every):
            last[:] = [task.judge(model.eval().head, model.encode)]
            curve.append({"step": done, **last[0].scores})

    fine_tune(model, task, places, how, on_step=note)
    return last[0]


def _steps(config: FinetuneConfig, task: Task) -> int:
    """Return the number of updates, which all shares of the labels have."""
    return 0 if not config.epochs else max(1, round(config.epochs * len(task.learned) / config.batch_size))


def _schedule(config: FinetuneConfig, start: Start, steps: int, seed: int) -> Schedule:
    return Schedule(
        steps=steps,
        batch_size=config.batch_size,
        lr=config.lr,
        weight_decay=config.weight_decay,
        seed=seed,
        freeze_batch_norms=start.name == WEIGHTS,
    )


def _known(folder: Path) -> Trial:
    """Return a fine-tuning that is there.

    Raises: RunError if it is damaged.
    """
    try:
        return Trial(**{**read_judged(folder)["trial"], "folder": str(folder), "cached": True})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder} holds no readable {JUDGED_FILE} ({error}); remove the folder to train again"
        ) from error


def read_judged(folder: Path) -> Mapping[str, Any]:
    """Return what `Judged` and `Trial` held of a fine-tuned model.

    Raises: OSError, ValueError if it cannot be read.
    """
    return dict(read_json(folder / JUDGED_FILE))


def read_curve(folder: Path) -> Iterator[dict[str, float]]:
    """Yield the points of a model's curve: a step, with its loss or its scores."""
    yield from map(json.loads, (folder / CURVE_FILE).read_text().splitlines())


def _write(path: Path, plain: Mapping[str, Any]) -> None:
    try:
        write_file(path, json.dumps(plain, indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error}") from error
