"""benchmarks/rivals.py: what it tries, how long it lets a run take, and that it measures nothing twice.

lightly-train itself is not installed where tests run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import rivals
from benchmarks.rivals import LEARNING_RATES, OURS, SHARED, THEIRS, Bench, Kept, Scores, measure

BUDGET, EXTRACTION = 100.0, 30.0
BEST = {THEIRS: LEARNING_RATES[THEIRS][1], OURS: LEARNING_RATES[OURS][2]}


class Clock(Bench):
    """Trainings that only take time: 10 s and 2 s a step, or 20 s and 7 s an epoch."""

    now = 0.0
    calls = 0

    def extract(self) -> None:
        Clock.now += EXTRACTION

    def train(self, out: Path, steps: int, lr: float, seed: int) -> None:
        Clock.now, Clock.calls = Clock.now + 10 + 2 * steps, Clock.calls + 1

    def distil(self, out: Path, epochs: int, lr: float, seed: int) -> None:
        Clock.now, Clock.calls = Clock.now + 20 + 7 * epochs, Clock.calls + 1

    def judge(self, subjects: Sequence[Path], *, untrained: bool = False) -> Scores:
        """An expert at 1 in each task, random weights at 0, and students half-way at the best of the learning rates."""
        if untrained:
            return {"untrained": dict.fromkeys(rivals.JUDGED, 0.0)}
        good = [f"{tool}-{lr:g}" for tool, lr in BEST.items()] + [f"eupe-one-of-five-{BEST[OURS]:g}"]
        scores = {
            path.name: dict.fromkeys(rivals.JUDGED, 0.5 if path.name.startswith(tuple(good)) else 0.1)
            for path in subjects
        }
        return scores | {"dinov2": dict.fromkeys(rivals.JUDGED, 1.0)}


def lasted(call: Callable[[], None]) -> float:
    began = Clock.now
    call()
    return Clock.now - began


def test_the_best_of_as_many_learning_rates_runs_within_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "seconds", lasted)
    bench = Clock(tmp_path, "python")
    lines = measure(bench, Kept(tmp_path / "kept.json"), BUDGET, [0, 1, 2])
    assert f"best: {BEST | {SHARED: BEST[OURS]}}" in lines[0]
    cells = {row[1]: row[2:] for line in lines if len(row := [cell.strip() for cell in line.split("|")]) > 6}
    took = {way: float(cells[way][0]) for way in (THEIRS, OURS, SHARED)}
    assert BUDGET - 7 < took[THEIRS] <= BUDGET
    assert took[THEIRS] - 2 < took[OURS] <= took[THEIRS]
    assert took[THEIRS] / 2 - 2 < took[SHARED] <= took[THEIRS] / 2
    assert all(cells[way][-2].startswith("50%") for way in took)

    # three learning rates and two more seeds of either, three seeds of the shared, and two short runs of either
    assert Clock.calls == 2 * (3 + 2) + 3 + 2 * 2
    assert measure(bench, Kept(tmp_path / "kept.json"), BUDGET, [0, 1, 2]) == lines
    assert Clock.calls == 17
