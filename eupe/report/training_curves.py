"""The records of a training run, as curves and rows of a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eupe.common.reading import parse_json, read_json
from eupe.errors import RunError
from eupe.report.charts import Point, Series
from eupe.store.layout import DENSE
from eupe.train.log import METRICS_FILE
from eupe.train.run_spec import REPORT_FILE


@dataclass(frozen=True)
class Cosine:
    """A row of the table: how close the finished student is to one kind of token of one target."""

    target: str
    tokens: str
    normalised: float
    raw: float
    mean_raw: float


@dataclass(frozen=True)
class History:
    """A run's curves, empty if it has no log, and its outcome, empty if it is not finished."""

    losses: tuple[Series, ...]
    cosines: tuple[Series, ...]
    outcome: tuple[Cosine, ...]
    facts: str
    """Steps, pictures per second, ... in words."""


def read_history(run: Path) -> History:
    """Read `metrics.jsonl` and `report.json` of a run.

    Raises: RunError if one of them exists but is damaged.
    """
    losses: dict[str, list[Point]] = {}
    cosines: dict[str, list[Point]] = {}
    try:
        for step, curves, name, value in _values(run / METRICS_FILE):
            if math.isfinite(value):  # `Series` takes no others
                {"loss": losses, "cosine": cosines}[curves].setdefault(name, []).append((step, value))
        report = _read_report(run / REPORT_FILE)
        outcome = tuple(
            Cosine(target, kind, *(float(cosine[name]) for name in ("normalised", "raw", "mean_raw")))
            for target, kinds in report.get("validation", {}).items()
            for kind, cosine in kinds.items()
        )
        facts = _facts(report) if report else ""
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise RunError(f"run {run} has a damaged {METRICS_FILE} or {REPORT_FILE}: {error!r}") from error
    return History(_series(losses), _series(cosines), outcome, facts)


def _values(log: Path) -> Iterator[tuple[int, str, str, float]]:
    """Yield step, chart, curve and value of everything to draw, in the order it was written."""
    for line in log.read_text().splitlines() if log.exists() else ():
        entry: dict[str, Any] = parse_json(line)
        step = int(entry["step"])
        if "loss" in entry:
            yield step, "loss", "total", entry["loss"]
            for name, value in entry["losses"].items():
                yield step, "loss", name, value
        for target, kinds in entry.get("validation", {}).items():
            for kind, measures in kinds.items():
                yield step, "cosine", f"{target}/{kind}", measures["normalised"]


def _series(curves: dict[str, list[Point]]) -> tuple[Series, ...]:
    """Return the curves, with a colour for each target, dashes for dense tokens and ink for the total."""
    targets = list(dict.fromkeys(name.rpartition("/")[0] for name in curves if "/" in name))
    return tuple(
        Series(name, points)
        if "/" not in name
        else Series(name, points, targets.index(name.rpartition("/")[0]), dashed=name.endswith(f"/{DENSE}"))
        for name, points in curves.items()
    )


def _read_report(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = read_json(path) if path.exists() else {}
    return report


def _facts(report: dict[str, Any]) -> str:
    steps, rate, wait = report["steps"], report["images_per_s"], report["data_wait"]
    return (
        f"{steps:,} steps in {_duration(report['seconds'])}, {rate:,.0f} pictures/s, "
        f"{wait:.1%} of the time waiting for data"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
