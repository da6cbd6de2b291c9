"""A page is written whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from eupe.common.outputs import HEAD_BYTES, MARK, begins_with_mark
from eupe.common.storage import StoragePath
from eupe.errors import StorageError
from eupe.evaluate.result import Result, keep_results
from eupe.report import report_page
from eupe.report.comparison import merge
from eupe.report.page import make_place, render_template, write_whole


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_that_is_too_long_for_a_page(length: int, tmp_path: Path) -> None:
    out = tmp_path / ("x" * length)
    with pytest.raises(StorageError, match=r"cannot be written: .*File name too long"):
        make_place(out)
        write_whole(out, b"12345")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_keeps_the_page_before(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot be written: .*File too large"):
            write_whole(tmp_path / "page.html", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_report_that_is_interrupted_says_so_and_leaves_the_page_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Callable[..., Any]
) -> None:
    result = Result(task="knn", subject="dinov2-s", kind="teacher", scores={"accuracy": 0.5}, protocol={}, data={})
    keep_results([result], tmp_path / "r.jsonl")
    (tmp_path / "page.html").write_text(f"old {MARK}")

    def interrupted(*_: object, **__: object) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "new"

    monkeypatch.setattr(report_page, "render_report", interrupted)
    outcome = run_eupe("eval", "report", tmp_path / "r.jsonl", "--out", tmp_path / "page.html")
    assert outcome.code == 130 and outcome.err.strip() == "error: interrupted; run the same command again"
    assert (tmp_path / "page.html").read_text() == f"old {MARK}" and len(list(tmp_path.iterdir())) == 2


def test_a_page_is_known_by_its_mark_however_long_its_title(tmp_path: Path) -> None:
    name = "<b>" * HEAD_BYTES
    result = Result(task="knn", subject=name, kind="teacher", scores={"accuracy": 0.5}, protocol={}, data={})
    page = report_page.render_report(merge([result]), title=name, sources=[], licences=[], maps=None)
    assert page.index("<title>") < page.index("&lt;b&gt;") and "<b><b>" not in page
    (tmp_path / "page.html").write_text(page)
    assert begins_with_mark(StoragePath.of(tmp_path / "page.html"))


def test_a_template_that_asks_for_what_is_not_given_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'path' is undefined"):
        render_template("stats.html", title="t", name="n")
