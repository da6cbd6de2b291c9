"""Execution of the steps that are not done yet, one command after the other, each in its own process."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eupe.common.files import write_file
from eupe.common.locks import lock_file
from eupe.common.signals import stop_signals
from eupe.errors import IncompleteError, StepError, StorageError
from eupe.pipeline.planned_steps import REPORTS, PlannedStep, read_report
from eupe.pipeline.starter import RunningStep, Starter

POLL_SECONDS = 0.2
LOCK = ".lock"


@dataclass(frozen=True)
class Result:
    """The outcome of a step."""

    step: str
    verb: str
    cached: bool
    """The step was already done, and nothing was run."""
    seconds: float
    """Duration of the step when it was run; of several starts, only the last counts."""
    output: str | None
    report: dict[str, Any]
    """The JSON that the verb prints with `--json`."""


def run_steps(
    planned: Sequence[PlannedStep], out: Path, *, on_step: Callable[[PlannedStep], None] = lambda step: None
) -> Iterator[Result]:
    """Run the steps in order, except those that are done, and yield the result of each.

    SIGINT, SIGTERM and SIGHUP are passed to the running step as SIGTERM, so that it commits what it has.

    Args:
        on_step: called with each step before it runs.
    Raises: StepError with the exit code of a step that failed; IncompleteError after a stop signal; ConfigError if
        another process works in the directory; StorageError.
    """
    with (
        _alone(out) as lock,
        Starter() as starter,
        stop_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as stop_asked,
    ):
        for one in planned:
            kept = read_report(one.report) if one.state == "done" else None
            if kept is None:
                on_step(one)
                kept = _run(one, starter, lock, stop_asked)
            output = None if one.output is None else str(one.output)
            yield Result(
                one.step.name, one.step.verb.name, one.state == "done", kept["seconds"], output, kept["report"]
            )
            if stop_asked() and one is not planned[-1]:
                raise IncompleteError(f"stopped after step {one.step.name}; run the same command to resume")


def _run(one: PlannedStep, starter: Starter, lock: int, stop_asked: Callable[[], bool]) -> dict[str, Any]:
    """Run one step in a process and return its stored report."""
    one.report.unlink(missing_ok=True)  # the output may change from here on, so an old report no longer describes it
    line = one.line()
    printed = one.report.with_name(f".{one.report.name}.out")
    began = time.monotonic()
    with printed.open("wb") as stdout:
        child = starter.start(one.command(), stdout=stdout.fileno(), lock=lock)
        code = _wait(child, stop_asked)
    seconds = time.monotonic() - began
    if code and stop_asked():
        raise IncompleteError(f"stopped in step {one.step.name}; run the same command to resume")
    if code:
        how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
        error = StepError(f"step {one.step.name} ended {how}; fix the cause, then run the same command to resume there")
        error.exit_code = max(code, 1)
        raise error
    kept = {"command": line, "content": one.content, "seconds": seconds, "report": _read(printed, one.step.name)}
    write_file(one.report, json.dumps(kept, indent=2) + "\n")
    printed.unlink()
    return kept


def _wait(child: RunningStep, stop_asked: Callable[[], bool]) -> int:
    told = False
    while True:
        try:
            if (code := child.wait(POLL_SECONDS)) is not None:
                return code
            if stop_asked() and not told:
                child.terminate()
                told = True
        except KeyboardInterrupt:  # a second signal: the step must not wait, either
            child.terminate()


def _read(printed: Path, step: str) -> Any:
    """Return the report that a step printed.

    Raises: StepError if it is not JSON.
    """
    try:
        return json.loads(printed.read_text())
    except ValueError as error:
        raise StepError(f"step {step} printed no JSON report ({error}); its output is in {printed}") from error


@contextmanager
def _alone(out: Path) -> Iterator[int]:
    """Make and lock the pipeline's directory, and yield the descriptor of the lock, which steps inherit.

    Raises: ConfigError if another process holds it; StorageError.
    """
    try:
        (out / REPORTS).mkdir(parents=True, exist_ok=True)
        lock = lock_file(out / LOCK, verb="run", of=out)
    except OSError as error:
        raise StorageError(f"the pipeline's directory {out} cannot be created: {error}") from error
    try:
        yield lock
    finally:
        os.close(lock)
