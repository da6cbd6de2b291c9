"""The demo's outcome: one table of all encoders on all tasks, the gaps that distillation closed, and one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from rich.table import Table

from eupe.common.files import write_file
from eupe.pipeline.execute import Result

TASKS = {"knn": "categories, k-NN", "segment": "segmentation, mIoU", "depth": "depth, RMSE in m (less is better)"}
"""Headings of the columns by task."""
EXPERT, PROXY, STUDENT, PIXELS = "expert ", "proxy", "student", "pixels"
BEFORE = " before"
PROXY_BEGINS_AS = "efficientnet-lite0"
"""The expert from whose weights the proxy starts; judged at the same size, its scores are those of the proxy before."""


@dataclass(frozen=True)
class Score:
    """A subject's first measure on a task."""

    task: str
    subject: str
    """`expert NAME`, `proxy`, `proxy before`, `student`, `student before` or `pixels`."""
    value: float
    less_is_better: bool


def read_scores(results: Iterable[Result]) -> list[Score]:
    """Return the scores of the recipe's evaluations; those of the expert that the proxy began as come twice."""
    results = list(results)
    steps = {Path(one.output).name: one.step for one in results if one.output is not None}
    scores = []
    for one in results:
        task = one.verb.removeprefix("eval ")
        if task not in TASKS:
            continue
        for judged in one.report["results"]:
            name = steps.get(Path(judged["subject"]).name, judged["subject"])
            subject = name if name in (PROXY, STUDENT, PIXELS) else EXPERT + name
            value, less = next(iter(judged["scores"].values())), judged["lower_is_better"]
            scores.append(Score(task, subject + BEFORE if judged["untrained"] else subject, value, less))
            if name == PROXY_BEGINS_AS:
                scores.append(Score(task, PROXY + BEFORE, value, less))
    return scores


def gaps_closed(scores: Sequence[Score], subject: str) -> dict[str, float]:
    """Return the share of the gap between a subject before and the better expert that was closed, by task.

    1 means as good as the better expert, or better; less than 0 means worse than before. A task in which the subject
    before was as good as the better expert has no gap, and is left out.
    """
    quality = _quality(scores)
    closed = {}
    for task in _tasks(scores):
        before, best = quality[task, subject + BEFORE], max(_experts(scores, task).values())
        if (share := share_closed(before, quality[task, subject], best)) is not None:
            closed[task] = share
    return closed


def share_closed(before: float, after: float, best: float) -> float | None:
    """Return the share of a gap that was closed, at most 1, where more is better; None if there was no gap."""
    return min(1.0, (after - before) / (best - before)) if best > before else None


def conclude(scores: Sequence[Score]) -> str:
    """Return the sentence that the table supports, whatever it says."""
    best_at: dict[str, list[str]] = {}
    for task in _tasks(scores):
        experts = _experts(scores, task)
        best_at.setdefault(max(experts, key=experts.__getitem__), []).append(_words(task))
    strengths = ", and ".join(f"{name} is better at {' and '.join(tasks)}" for name, tasks in best_at.items())
    changes = f"{_change(scores, PROXY)}, and {_change(scores, STUDENT)}"
    return f"Of the two experts, {strengths}; without a label, {changes}."


def _change(scores: Sequence[Score], subject: str) -> str:
    quality, tasks = _quality(scores), _tasks(scores)
    better = [task for task in tasks if quality[task, subject] > quality[task, subject + BEFORE]]
    worse = [_words(task) for task in tasks if task not in better]
    words = f"the {subject} became better than it was at {len(better)} of {len(tasks)} tasks"
    if worse:
        words += f" (not at {', '.join(worse)})"
    if closed := gaps_closed(scores, subject):
        words += f" and closed {fmean(closed.values()):.0%} of the gap to the better expert"
    return words


def results_table(scores: Sequence[Score]) -> Table:
    """Return the table of subjects and tasks, with the share of each gap that the proxy and the student closed."""
    values = {(score.task, score.subject): score.value for score in scores}
    closed = {subject: gaps_closed(scores, subject) for subject in (PROXY, STUDENT)}
    columns = (TASKS[task] for task in _tasks(scores))
    table = Table("", *columns, title="On pictures that nothing was trained on", box=None)
    for subject in _subjects(scores):
        cells = []
        for task in _tasks(scores):
            share = closed.get(subject, {}).get(task)
            cells.append(f"{values[task, subject]:.3f}" + ("" if share is None else f"  {share:+.0%} of the gap"))
        table.add_row(subject, *cells)
    return table


def write_scores(scores: Sequence[Score], path: Path) -> None:
    """Write the scores as a JSON list."""
    write_file(path, json.dumps([asdict(score) for score in scores], indent=1) + "\n")


def _tasks(scores: Sequence[Score]) -> list[str]:
    return [task for task in TASKS if any(score.task == task for score in scores)]


def _words(task: str) -> str:
    return TASKS[task].partition(",")[0]


def _subjects(scores: Sequence[Score]) -> list[str]:
    experts = dict.fromkeys(score.subject for score in scores if score.subject.startswith(EXPERT))
    return [*experts, PROXY + BEFORE, PROXY, STUDENT + BEFORE, STUDENT, PIXELS]


def _quality(scores: Sequence[Score]) -> Mapping[tuple[str, str], float]:
    """Return numbers of which more is better, by task and subject."""
    return {(score.task, score.subject): -score.value if score.less_is_better else score.value for score in scores}


def _experts(scores: Sequence[Score], task: str) -> dict[str, float]:
    """Return the quality of the experts at a task, by name."""
    quality = _quality(scores)
    return {
        subject.removeprefix(EXPERT): value
        for (of, subject), value in quality.items()
        if of == task and subject.startswith(EXPERT)
    }
