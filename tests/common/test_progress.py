"""What a long verb tells: a bar on a terminal, lines in a log."""

import io

import pytest
from rich.console import Console

from eupe.common import progress
from eupe.common.progress import duration, report_progress

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


def test_pictures_are_called_so_and_what_is_not_counted_has_no_count() -> None:
    file = io.StringIO()
    with report_progress(Console(file=file, width=40), "views", quiet=False) as reporter:
        reporter.update("indexing", 1, 130)
        reporter.update("trying the teacher", 0, 0)
        reporter.update("extracting", 1, 260)
    said = file.getvalue().splitlines()
    assert said == ["indexing: 1/130 pictures, 0 failed", "trying the teacher", "extracting: 1/260 views, 0 failed"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.00123, "0.0012 s"), (6.9, "6.9 s"), (59, "59 s"), (90, "1.5 min"), (5400, "1.5 h"), (7.2e6, "2,000 h")],
)
def test_a_duration_has_the_unit_that_suits_it(seconds: float, said: str) -> None:
    assert duration(seconds) == said
