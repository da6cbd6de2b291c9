"""The progress bar of every long verb (rate, time left, failures), and bytes and seconds in words."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LOG_SECONDS = 30.0
UNITS = {"indexing": "pictures"}
"""Units of stages that count something else than their verb does."""


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} {UNITS.get(task.description, self._unit)}/s" if task.total else "")


class Reporter(Protocol):
    """A receiver of a long verb's progress."""

    def update(
        self, stage: str, done: int, total: int, *, failed: int = 0, note: str = "", lines: Sequence[str] = ()
    ) -> None:
        """Report the progress of a stage.

        Args:
            total: 0 if the stage is not counted.
            lines: text about its parts, such as the machines that share the work.
        """


class Bar:
    """Progress on a terminal: one bar per stage."""

    def __init__(self, progress: Progress, below: Text) -> None:
        self._progress = progress
        self._below = below
        self._stages: dict[str, TaskID] = {}

    def update(
        self, stage: str, done: int, total: int, *, failed: int = 0, note: str = "", lines: Sequence[str] = ()
    ) -> None:
        if stage not in self._stages:
            for earlier in self._stages.values():
                self._progress.stop_task(earlier)
            self._stages[stage] = self._progress.add_task(stage, total=total or None, note="")
        words = [note] if note else []
        if failed:
            words.append(f"[red]{failed} failed[/]")
        self._progress.update(self._stages[stage], completed=done, total=total or None, note="  ".join(words))
        self._below.plain = "\n".join(f"  {line}" for line in lines)


class Lines:
    """Progress in a log: a line when a stage begins or a machine joins or leaves, else at most one per LOG_SECONDS."""

    def __init__(self, console: Console, unit: str) -> None:
        self._console = console
        self._unit = unit
        self._told = ("", 0)
        self._last = 0.0

    def update(
        self, stage: str, done: int, total: int, *, failed: int = 0, note: str = "", lines: Sequence[str] = ()
    ) -> None:
        now = time.monotonic()
        told = stage, len(lines)
        if told == self._told and now - self._last < LOG_SECONDS:
            return
        self._told, self._last = told, now
        count = f": {done}/{total} {UNITS.get(stage, self._unit)}, {failed} failed" if total else ""
        self._console.print(f"{stage}{count}  {note}".rstrip(), soft_wrap=True)
        for line in lines:
            self._console.print(f"  {line}", soft_wrap=True, markup=False)


@contextmanager
def report_progress(console: Console, unit: str, *, quiet: bool) -> Iterator[Reporter]:
    """Yield a bar on a terminal, or a reporter of occasional lines in a log; `quiet` silences only the log."""
    if not console.is_terminal:
        yield Lines(Console(quiet=True) if quiet else console, unit)
        return
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
    progress, below = Progress(*columns, console=console), Text()
    with Live(Group(progress, below), console=console):
        yield Bar(progress, below)


def amount(num_bytes: float) -> str:
    """Return a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.4g} PB"


def duration(seconds: float) -> str:
    """Return a number of seconds in a suitable unit."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.3g} {unit}" if seconds < 1000 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.2g} s"
