"""A store's statistics as a user meets them: printed, as JSON, and as a page in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from charts import drawn_in, titled

from eupe.errors import ConfigError
from eupe.report.charts import MAX_POINTS
from eupe.report.stats_page import render_stats_page, thin_out, write_stats_page
from eupe.store import Store, open_store
from eupe.store.layout import feature_path
from eupe.store.summary import StoreSummary, summarise
from eupe.store.writer import Part, Row, StoreWriter, create_store, finish_store

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DEAD = 5
CELL = (1, 2)
HOSTILE = "<img src=x onerror=alert(1)>&\"'${name}"
Run = Callable[..., Any]


def commit_again(store: Store, path: Path, *, parts: int | None = None) -> None:
    """The same features with a dense channel that never changes and a cell that is loud in every view."""
    spec = replace(store.spec, teacher={**store.spec.teacher, "licence": HOSTILE})
    create_store(path, spec)
    writer = StoreWriter(path)
    size = spec.sizes[0]
    rows = store.samples.to_pylist()
    for index in range(spec.num_parts if parts is None else parts):
        places = range(*spec.part_rows(index).indices(spec.num_rows))
        pairs = [(row, view) for row in places for view in range(spec.num_views)]
        features = store.read([row for row, _ in pairs], [view for _, view in pairs])
        assert features.dense is not None and features.summary is not None
        dense = features.dense.copy()
        dense[:, *CELL] *= 16
        dense[..., DEAD] = 0.25
        shape = (len(places), spec.num_views)
        writer.commit(
            Part(
                index,
                [Row(rows[i]["key"], rows[i]["sha256"], rows[i]["label"], 80, 64) for i in places],
                features.boxes.reshape(*shape, 4),
                features.flips.reshape(shape),
                np.zeros(shape, np.uint64),
                {
                    feature_path(size, "summary"): features.summary.reshape(*shape, -1),
                    feature_path(size, "dense"): dense.reshape(*shape, *dense.shape[1:]),
                },
                num_clipped=7,
            )
        )


@pytest.fixture(scope="module")
def planted(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished store with a hostile name, a constant channel and a loud cell; tests must not change it."""
    path = tmp_path_factory.mktemp("stats") / f"{HOSTILE}.zarr"
    commit_again(tiny_store, path)
    finish_store(path)
    return path


@pytest.fixture(scope="module")
def summary(planted: Path) -> StoreSummary:
    return summarise(open_store(planted))


@pytest.fixture(scope="module")
def page(summary: StoreSummary) -> str:
    return render_stats_page(summary)


def texts(page: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).split())


class TestCommandLine:
    def test_prints_a_table_of_each_kind(self, planted: Path, summary: StoreSummary, run_eupe: Run) -> None:
        outcome = run_eupe("store", "stats", planted)
        assert outcome.code == 0
        words = " ".join(outcome.out.split())
        dense = next(t for t in summary.tokens if t.kind == "dense")
        for fact in (
            "64 px summary",
            "64 px dense",
            f"vectors {dense.count:,}",
            "quarter octaves",
            f"{dense.mean_norm:.4g} / {dense.median_norm:.4g}",
            f"dead channels 1 ({DEAD})",
            f"row {CELL[0]}, column {CELL[1]} (100.0%)",
            f"effective rank† {dense.effective_rank:.1f} of {dense.num_channels}",
            f"values clipped / not finite: {7 * summary.spec.num_parts} / 0",
            f"licence of the weights: {HOSTILE}",
        ):
            assert fact in words

    def test_json_is_one_line_of_the_same_numbers(self, planted: Path, summary: StoreSummary, run_eupe: Run) -> None:
        outcome = run_eupe("store", "stats", planted, "--json")
        assert outcome.out.count("\n") == 1
        assert json.loads(outcome.out) == {**json.loads(json.dumps(summary.to_json())), "page": None}

    def test_writes_the_page(self, planted: Path, page: str, tmp_path: Path, run_eupe: Run) -> None:
        place = tmp_path / "new" / "page.html"
        outcome = run_eupe("store", "stats", planted, "--out", place, "--json")
        assert json.loads(outcome.out)["page"] == str(place)
        assert place.read_text() == page
        assert [path.name for path in place.parent.iterdir()] == ["page.html"]

    def test_another_ending_is_refused(self, planted: Path, tmp_path: Path, run_eupe: Run) -> None:
        outcome = run_eupe("store", "stats", planted, "--out", tmp_path / "page.pdf")
        assert outcome.code == 2
        assert "page.pdf must end in .html" in " ".join(outcome.err.split())
        assert not list(tmp_path.iterdir())

    def test_an_unfinished_store_says_so(self, tiny_store: Store, tmp_path: Path, run_eupe: Run) -> None:
        commit_again(tiny_store, tmp_path / "s.zarr", parts=0)
        outcome = run_eupe("store", "stats", tmp_path / "s.zarr", "--out", tmp_path / "page.html")
        assert outcome.code == 2
        assert "is not finished: 1 of 1 parts are missing" in " ".join(outcome.err.split())
        assert not (tmp_path / "page.html").exists()

    def test_no_store(self, tmp_path: Path, run_eupe: Run) -> None:
        assert "does not exist" in run_eupe("store", "stats", tmp_path / "none.zarr").err


class TestPage:
    def test_says_what_the_store_is(self, page: str, summary: StoreSummary) -> None:
        words = texts(page)
        for fact in ("timm: test_vit", HOSTILE, "2 random resized crops", "dense fp16", "not measured", "64 px (4 × 4"):
            assert fact in words
        assert f"finished, all {summary.spec.num_parts} part" in words

    def test_nothing_from_outside_is_markup(self, page: str) -> None:
        assert "<img" not in page
        assert "<script" not in page
        assert re.findall(r"https?://[^\"'\s]+", page) == []

    def test_draws_every_kind(self, page: str) -> None:
        labels = drawn_in(page).keys()
        for kind in ("summary", "dense"):
            for what in ("Histogram of norms", "Standard deviation of the channels", "Eigenvalues"):
                assert f"{what}: 64 px {kind}" in labels
        assert "Outlier tokens by position: 64 px dense" in labels
        assert len(labels) == 7

    def test_the_bars_count_every_token(self, page: str, summary: StoreSummary) -> None:
        for token in summary.tokens:
            titles = titled(drawn_in(page)[f"Histogram of norms: 64 px {token.kind}"])
            counted = [int(re.findall(r": ([\d,]+) \(", title)[0].replace(",", "")) for title in titles]
            assert counted == token.norms[token.norms > 0].tolist()
            assert sum(counted) == token.count

    def test_the_outlier_and_the_dead_channel_are_shown(self, page: str) -> None:
        cells = titled(drawn_in(page)["Outlier tokens by position: 64 px dense"])
        loudest = cells[f"row {CELL[0]}, column {CELL[1]}: 100.00% of views"]
        assert loudest.attrib["style"] == "fill: var(--c1)", "no opacity below 1"
        assert f"1 ({DEAD})" in texts(page)
        assert "Not drawn: constant channels (1)." in texts(page)

    def test_without_outliers_there_is_no_map(self, tiny_store: Store) -> None:
        words = render_stats_page(summarise(tiny_store))
        assert "No token of any view is an outlier." in words
        assert len(drawn_in(words)) == 6

    def test_where_nothing_varies_there_is_no_line(self, summary: StoreSummary) -> None:
        token = summary.tokens[0]
        still = replace(token, std=np.zeros_like(token.std), eigenvalues=np.zeros_like(token.eigenvalues))
        drawn = render_stats_page(replace(summary, tokens=(still,)))
        assert drawn.count("Nothing varies.") == 2

    def test_a_place_that_cannot_be_written(self, summary: StoreSummary, tmp_path: Path) -> None:
        (tmp_path / "folder.html").mkdir()
        with pytest.raises(ConfigError, match="is a folder; name a file in it"):
            write_stats_page(summary, tmp_path / "folder.html")
        with pytest.raises(ConfigError, match=r"must end in \.html"):
            write_stats_page(summary, tmp_path / "page")


@pytest.mark.parametrize("length", [1, 2, MAX_POINTS, MAX_POINTS + 1, 4096])
def test_a_long_line_keeps_its_ends_and_its_values(length: int) -> None:
    values = np.geomspace(1, 1e-6, length)
    points = thin_out(values)
    assert len(points) <= MAX_POINTS
    assert points[0] == (1, values[0])
    assert points[-1] == (length, values[-1])
    assert all(value == values[int(rank) - 1] for rank, value in points)
    if length <= MAX_POINTS:
        assert len(points) == length


PROBE = """<script>
window.alert = () => { document.title = "attacked"; };
addEventListener("load", () => {
  const page = document.documentElement, data = document.body.dataset;
  data.overflow = page.scrollWidth - page.clientWidth;
  data.charts = [...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 100).length;
});
</script></body>"""


def browse(place: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    always = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --virtual-time-budget=5000 --dump-dom"
    quiet = "--disable-background-networking --disable-component-update --disable-sync --enable-logging=stderr"
    words = [str(CHROMIUM), *always.split(), *quiet.split(), f"--user-data-dir={profile}", *flags, place.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: chromium, chromium-browser or google-chrome")
class TestBrowser:
    def test_has_nothing_to_complain_of(self, page: str, tmp_path: Path) -> None:
        (tmp_path / "page.html").write_text(page)
        ran = browse(tmp_path / "page.html", tmp_path / "profile")
        assert "</html>" in ran.stdout
        assert "CONSOLE" not in ran.stderr

    @pytest.mark.parametrize("width", [1280, 500])
    def test_everything_has_its_place(self, page: str, tmp_path: Path, width: int) -> None:
        """A copy with a probe, for which alone scripts are allowed; a hostile name would have its chance here."""
        probed = page.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
        (tmp_path / "probed.html").write_text(probed.replace("</body>", PROBE))
        ran = browse(tmp_path / "probed.html", tmp_path / "profile", f"--window-size={width},900")
        assert dict(re.findall(r'data-(\w+)="(-?\d+)"', ran.stdout)) == {"overflow": "0", "charts": "7"}
        assert "<title>attacked" not in ran.stdout
