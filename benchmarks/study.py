"""The tables of the study: means over seeds, with 95% intervals of means and of paired differences.

eupe run study --set seed=N --json > N.json        for each seed N; then
python -m benchmarks.study SCORES.json [--run N N.json ...]

Scores of finished seeds are added to SCORES.json, and the tables are printed from all seeds that it holds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student_t

from demo.outcome import share_closed

UNTRAINED = "-untrained"
TASKS = {
    "knn": "k-NN",
    "knn-digits": "k-NN, digits",
    "knn-clipart": "k-NN, clip art",
    "linear": "linear",
    "linear-clipart": "linear, clip art",
    "linear-tenth": "linear, 10%",
    "linear-hundredth": "linear, 1%",
    "segment": "mIoU",
    "depth": "RMSE, m",
    "correspond": "PCK",
}
"""Headings of the columns, by the names of the recipe's steps."""
EXPERTS = ("dinov2", "efficientnet-lite0")


@dataclass(frozen=True)
class Question:
    """One table: its rows are compared with the first of them, seed by seed."""

    title: str
    rows: tuple[str, ...]


QUESTIONS = (
    Question("Before training", (*EXPERTS, "untrained", "pixels")),
    Question("One expert and two", ("untrained", "from-dinov2", "from-efficientnet", "direct")),
    Question("From an expert's weights", ("efficientnet-lite0", "proxy-of-dinov2", "proxy")),
    Question("Cached views and fresh ones", ("fresh-views", "views-1", "views-2", "direct", "views-12")),
    Question("The paper's stages", ("direct", "stages-1-2", "stages-1-3", "stages-1-2-3")),
    Question("Precision", ("direct", "int8", "pooled")),
)
BEFORE = {"proxy": "efficientnet-lite0", "proxy-of-dinov2": "efficientnet-lite0"}
"""What a subject was before training; all others began with random weights."""

Scores = dict[int, dict[str, dict[str, float]]]
"""Seed -> task -> subject -> the first measure, negated where less is better."""


def read_scores(run: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the scores of a finished run of the recipe, by task and subject."""
    steps = {Path(step["output"]).name: step["step"] for step in run["steps"] if step["output"]}
    scores: dict[str, dict[str, float]] = {}
    for step in run["steps"]:
        if (task := step["step"].removesuffix(UNTRAINED)) not in TASKS:
            continue
        for result in step["report"]["results"]:
            name, quality = judged(result, steps.get(Path(result["subject"]).name, result["subject"]))
            scores.setdefault(task, {})[name] = quality
    return scores


def judged(result: Mapping[str, Any], subject: str) -> tuple[str, float]:
    """Return a subject's name, or `untrained`, and its first measure, negated where less is better."""
    value = next(iter(result["scores"].values()))
    return "untrained" if result["untrained"] else subject, -value if result["lower_is_better"] else value


def interval(values: Sequence[float]) -> float:
    """Return half the width of the 95% t-interval of a mean; not a number for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def table(question: Question, scores: Scores) -> list[str]:
    """Return the lines of a table: mean, and the paired difference to the first row in brackets.

    A difference whose interval excludes zero is bold.
    """
    found = scores.values()
    tasks = [task for task in TASKS if all(row in by_task.get(task, {}) for by_task in found for row in question.rows)]
    lines = [f"## {question.title}", "", "| | " + " | ".join(TASKS[task] for task in tasks) + " |"]
    lines.append("|---" * (len(tasks) + 1) + "|")
    for row in question.rows:
        cells = [_cell(scores, task, row, question.rows[0]) for task in tasks]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def _cell(scores: Scores, task: str, row: str, first: str) -> str:
    values = [by_task[task][row] for by_task in scores.values()]
    if row == first:
        return f"{abs(fmean(values)):.3f}"
    changes = [by_task[task][row] - by_task[task][first] for by_task in scores.values()]
    change, spread = fmean(changes), interval(changes)
    words = f"{change:+.3f} ± {spread:.3f}"
    return f"{abs(fmean(values)):.3f} ({f'**{words}**' if abs(change) > spread else words})"


def gaps_closed(scores: Scores, subject: str) -> list[float]:
    """Return, seed by seed, the mean share of the gap between a subject before and the better expert that was closed.

    The mean is over tasks in which the subject before was not as good as the better expert; each share is at most 1.
    """
    before = BEFORE.get(subject, "untrained")
    means = []
    for by_task in scores.values():
        shares = [
            share_closed(found[before], found[subject], max(found[expert] for expert in EXPERTS))
            for found in by_task.values()
        ]
        means.append(fmean(share for share in shares if share is not None))
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path)
    parser.add_argument("--run", nargs=2, action="append", default=[], metavar=("SEED", "FILE"))
    given = parser.parse_args()
    kept = json.loads(given.scores.read_text()) if given.scores.exists() else {}
    scores: Scores = {int(seed): by_task for seed, by_task in kept.items()}
    for seed, path in given.run:
        scores[int(seed)] = read_scores(json.loads(Path(path).read_text()))
    given.scores.write_text(json.dumps(scores, indent=1, sort_keys=True) + "\n")
    print(
        f"Seeds: {', '.join(map(str, sorted(scores)))}. In brackets: the difference to the first row, paired by seed."
    )
    for question in QUESTIONS:
        print("\n" + "\n".join(table(question, scores)))
    print("\n## Share of the gap to the better expert that was closed\n")
    for subject in ("direct", "stages-1-2-3", "proxy-of-dinov2", "proxy"):
        closed = gaps_closed(scores, subject)
        print(f"- {subject}: {fmean(closed):.0%} ± {interval(closed):.0%}")


if __name__ == "__main__":
    main()
