"""The page of a fine-tuning: its table, curves, confusion matrices, and the pictures that the models get most wrong."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from eupe.common.compute import pick_device
from eupe.corpus.views import render_view
from eupe.evaluate.judged_pictures import whole
from eupe.finetune.job import FinetuneReport, read_curve, read_judged
from eupe.finetune.model import FineTuned, load_model
from eupe.finetune.results import Trial
from eupe.finetune.tasks import Dense, Task
from eupe.report.charts import Series, line_chart
from eupe.report.page import make_place, render_template, write_whole

PAGE_FILE = "report.html"
SHOWN_PX = 160
MOST_CLASSES = 40
"""A confusion matrix of more classes is not shown; its most frequent mistakes are."""
MISTAKES = 15
"""Number of pairs of classes that are listed."""
GOLDEN = 0.618034
"""Turns of the colour circle from one class's colour to the next."""


@dataclass(frozen=True)
class Mistake:
    """A pair of classes that a model confuses."""

    true: str
    said: str
    count: int
    share: float
    """Of all pictures or pixels of the true class."""


@dataclass(frozen=True)
class WrongPicture:
    """A picture that a model gets wrong: as it is, and for dense tasks the truth and the answer."""

    key: str
    words: str
    shown: list[NDArray[np.uint8]]


@dataclass(frozen=True)
class ModelSection:
    """The page's section on one model."""

    title: str
    confusion: list[list[float]]
    """Shares of each true class, by (truth, prediction); empty if there are no classes, or too many."""
    mistakes: list[Mistake]
    wrong: list[WrongPicture]


def write_finetune_page(report: FinetuneReport, task: Task) -> Path:
    """Write the page beside the models, and return its path.

    Args:
        task: what the models were trained for.
    Raises: ConfigError, StorageError if it cannot be written; RunError if a model is damaged; CorpusError.
    """
    place = make_place(Path(report.out) / PAGE_FILE)
    write_whole(place, render_finetune_page(report, task))
    return place


def render_finetune_page(report: FinetuneReport, task: Task) -> str:
    """Return the whole page."""
    first = [trial for trial in report.trials if trial.seed == 0]
    return render_template(
        "finetune.html",
        title=f"Fine-tuned: {Path(report.out).absolute().name}",
        report=report,
        charts=_charts(report),
        sections=[_section(trial, report, task) for trial in sorted(first, key=lambda each: -each.label_share)],
        classes=task.classes,
        unit="pixels" if isinstance(task, Dense) else "pictures",
    )


def _charts(report: FinetuneReport) -> list[tuple[str, Markup]]:
    """Draw, for each share of the labels, the judged measure of each start over the steps, as means over the seeds."""
    drawn = []
    for share in dict.fromkeys(trial.label_share for trial in report.trials):
        series = []
        for colour, start in enumerate(report.starts):
            alike = [t for t in report.trials if (t.label_share, t.start) == (share, start)]
            points = [
                [(p["step"], p[report.measure]) for p in read_curve(Path(t.folder)) if report.measure in p]
                for t in alike
            ]
            means = [(together[0][0], fmean(y for _, y in together)) for together in zip(*points, strict=True)]
            series.append(Series(report.starts[start], means, colour))
        title = f"{share:.4g} of the labels"
        label = f"{report.measure} on the judged pictures over training steps, {title}"
        drawn.append((title, line_chart(series, label=label, x_label="step", y_label=report.measure)))
    return drawn


def _section(trial: Trial, report: FinetuneReport, task: Task) -> ModelSection:
    folder = Path(trial.folder)
    judged = read_judged(folder)
    counts = np.array(judged["confusion"], dtype=np.int64)
    return ModelSection(
        f"{report.starts[trial.start]}, {trial.label_share:.4g} of the labels, seed {trial.seed}",
        shares_of(counts).tolist() if 0 < len(counts) <= MOST_CLASSES else [],
        mistakes(counts, task.classes),
        _wrong(folder, task, judged["worst"]),
    )


def shares_of(counts_CC: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return counts by (truth, prediction) as shares of each true class; 0 for a class that did not occur."""
    shares: NDArray[np.float64] = counts_CC / np.maximum(1, counts_CC.sum(axis=1, keepdims=True))
    return shares


def mistakes(counts_CC: NDArray[np.int64], classes: Sequence[str]) -> list[Mistake]:
    """Return the pairs of classes that were confused most often, by number."""
    if not counts_CC.size:
        return []
    shares = shares_of(counts_CC)
    wrong = counts_CC * (1 - np.eye(len(counts_CC), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    pairs = [divmod(int(place), len(wrong)) for place in order]
    return [Mistake(classes[i], classes[j], int(wrong[i, j]), float(shares[i, j])) for i, j in pairs if wrong[i, j]]


def _wrong(folder: Path, task: Task, worst: Sequence[Mapping[str, Any]]) -> list[WrongPicture]:
    """Return the worst pictures of a model; for dense tasks with their truth and the model's answer in colours."""
    shown = [[_picture(task, each["picture"])] for each in worst]
    if isinstance(task, Dense):
        encoder, head, _ = load_model(folder)
        model = FineTuned(encoder, head, task.name, pick_device()).eval()
        for pictures, each in zip(shown, worst, strict=True):
            maps = task.truth_and_answer(model.head, model.encode, each["picture"])
            pictures += [_small(coloured) for coloured in _coloured(*maps, num_classes=len(task.classes))]
    return [WrongPicture(each["key"], each["words"], pictures) for each, pictures in zip(worst, shown, strict=True)]


def _picture(task: Task, i: int) -> NDArray[np.uint8]:
    image = task.judged.image(i)
    (view,) = whole(*image.size)
    return render_view(image, view, SHOWN_PX)


def _coloured(truth_HW: NDArray[Any], answer_HW: NDArray[Any], *, num_classes: int) -> list[NDArray[np.uint8]]:
    """Return both maps as RGB: a colour a class, or a scale up to the truth's greatest depth; no truth is grey."""
    from matplotlib import colormaps

    if num_classes:
        table = np.array([colorsys.hsv_to_rgb(GOLDEN * i % 1, 0.65, 0.9) for i in range(num_classes)])
        maps = [table[values.astype(np.int64).clip(0)] for values in (truth_HW, answer_HW)]
    else:
        greatest = max(float(truth_HW.max()), 1e-9)
        maps = [colormaps["turbo"](values / greatest)[..., :3] for values in (truth_HW, answer_HW)]
    truth, answer = ((255 * rgb).astype(np.uint8) for rgb in maps)
    truth[truth_HW < 0 if num_classes else truth_HW <= 0] = 128
    return [truth, answer]


def _small(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    rows, columns = (np.arange(SHOWN_PX) * side // SHOWN_PX for side in rgb.shape[:2])
    small: NDArray[np.uint8] = rgb[rows][:, columns]
    return small
