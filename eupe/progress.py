"""The progress bar of every long verb: rate, time left, failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} {self._unit}/s")


class Bar:
    """One task at a time; naming another stage begins a new one."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stages: dict[str, int] = {}

    def update(self, stage: str, done: int, total: int, *, failed: int = 0, note: str = "") -> None:
        if stage not in self._stages:
            for earlier in self._stages.values():
                self._progress.stop_task(earlier)  # type: ignore[arg-type]
            self._stages[stage] = self._progress.add_task(stage, total=total, note="")
        words = [note] if note else []
        if failed:
            words.append(f"[red]{failed} failed[/]")
        self._progress.update(self._stages[stage], completed=done, total=total, note="  ".join(words))  # type: ignore[arg-type]


@contextmanager
def bar(console: Console, unit: str, *, show: bool) -> Iterator[Bar]:
    """A bar on a terminal; a plain line per stage where there is none; nothing with `show` off."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not show) as progress:
        yield Bar(progress)
