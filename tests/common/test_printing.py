"""Tables and reports for people: nothing is cut off, and nothing is Python."""

import io
import re

import pytest
from rich.console import Console
from rich.table import Column, Table

from eupe.common.printing import print_table, report_lines

LONG = "store/a-teacher-of-a-very-long-name-at-112-pixels.zarr, untrained"


def printed(table: Table, width: int, *, terminal: bool = True) -> list[str]:
    file = io.StringIO()
    print_table(Console(file=file, width=width, force_terminal=terminal, color_system=None, highlight=False), table)
    return file.getvalue().splitlines()


def scores(*, subjects: int, measures: int) -> Table:
    """The score of subject s in measure m is s.000m."""
    names = (Column(f"measure {m}", justify="right") for m in range(measures))
    table = Table("subject", *names, box=None)
    for s in range(subjects):
        table.add_row(f"{s} {LONG}", *(f"{s}.{m:04d}" for m in range(measures)))
    return table


@pytest.mark.parametrize(("subjects", "measures"), [(1, 3), (2, 25), (9, 25), (30, 4), (30, 25)])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_number_and_no_name_is_cut_at_any_width(subjects: int, measures: int, width: int) -> None:
    lines = printed(scores(subjects=subjects, measures=measures), width)
    text = "\n".join(lines)
    assert "…" not in text
    numbers = re.findall(r"\b\d+\.\d{4}\b", text)
    assert sorted(numbers) == sorted(f"{s}.{m:04d}" for s in range(subjects) for m in range(measures))
    assert max(map(len, lines)) <= width


def test_a_table_of_more_measures_than_fit_has_a_row_for_each_of_them() -> None:
    lines = printed(scores(subjects=2, measures=25), 80)
    assert max(map(len, lines)) <= 80
    rows = {line[:12].strip(): line.split()[-2:] for line in lines}
    assert rows["measure 24"] == ["0.0024", "1.0024"]


def test_many_subjects_of_many_measures_come_in_pieces_that_fit() -> None:
    lines = printed(scores(subjects=9, measures=25), 80)
    assert max(map(len, lines)) <= 80
    assert sum(line.split()[:2] == ["measure", "7"] for line in lines) > 1


def test_what_is_no_terminal_gets_one_line_a_row() -> None:
    lines = printed(scores(subjects=3, measures=25), 80, terminal=False)
    assert len(lines) == 4
    assert lines[2].split("  ")[0].strip() == f"1 {LONG}"
    assert lines[2].split()[-1] == "1.0024"


def test_names_with_brackets_are_measured_as_they_are_shown() -> None:
    table = Table("model", "accuracy", box=None)
    table.add_row(r"\[odd]", "[bold]0.5[/]")
    assert printed(table, 80) == [" model  accuracy ", " [odd]  0.5      "]


def test_a_report_is_words() -> None:
    report = {
        "run": "runs/tiny",
        "cached": False,
        "num_views": 24,
        "stored_bytes": 123_456_789,
        "views_per_s": None,
        "parts": [],
        "failures": {},
        "left_out": {"store/dinov2_s.zarr": 0},
        "counts": {"segmentation": 3, "depth": 4},
        "models": (("dinov2", "tiny"), ("proxy", "tiny")),
        "sizes": [112, 224],
        "least": {"summary": 0.9999283746152, "dense": 1.0},
        "validation": {"dinov2": {"summary": {"cosine": 0.12345678}, "dense": {"cosine": 0.5, "extra": None}}},
        "judged": [{"name": "a", "score": 0.123456}, {"name": "b", "score": 2}],
        "seconds": 12345.678,
    }
    assert list(report_lines(report)) == [
        "run: runs/tiny",
        "cached: no",
        "views: 24",
        "stored bytes: 123.5 MB",
        "left out: store/dinov2_s.zarr 0",
        "counts: segmentation 3, depth 4",
        "models: dinov2 tiny, proxy tiny",
        "sizes: 112, 224",
        "least: summary 0.9999, dense 1",
        "validation:",
        "  dinov2:",
        "    summary: cosine 0.1235",
        "    dense: cosine 0.5",
        "judged:",
        "  name a, score 0.1235",
        "  name b, score 2",
        "seconds: 12,346",
    ]


def test_a_long_dict_has_a_line_for_each_member() -> None:
    lines = list(report_lines({"teacher": {"name": "x" * 60, "note": "y" * 60, "licence": ""}}))
    assert lines == ["teacher:", f"  name: {'x' * 60}", f"  note: {'y' * 60}"]
