"""What a long verb tells: a bar on a terminal, lines in a log."""

import io

import pytest
from rich.console import Console

from eupe import progress
from eupe.progress import report_progress

NODES = ["node-a: 2 workers, 71.3 views/s, 0 failed", "node-b: 1 workers, 35.0 views/s, 3 failed"]


def test_a_log_gets_a_line_for_each_part_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    file = io.StringIO()
    with report_progress(Console(file=file, width=40), "views", quiet=False) as reporter:
        for done in range(4):
            reporter.update("extracting", done, 9, failed=3, lines=NODES)
            now += progress.LOG_SECONDS / 2 + 1
    assert file.getvalue().splitlines() == [
        "extracting: 0/9 views, 3 failed",
        *(f"  {line}" for line in NODES),
        "extracting: 2/9 views, 3 failed",
        *(f"  {line}" for line in NODES),
    ]


def test_a_terminal_gets_them_below_the_bar() -> None:
    file = io.StringIO()
    with report_progress(Console(file=file, width=120, force_terminal=True), "views", quiet=True) as reporter:
        reporter.update("extracting", 5, 9, failed=3, lines=["an older line"])
        reporter.update("extracting", 6, 9, failed=3, lines=NODES)
    last = file.getvalue().rpartition("extracting")[2]
    assert "6/9" in last and "3 failed" in last and all(line in last for line in NODES)
    assert "an older line" not in last
