"""Results side by side: what is compared with what, and the page, Markdown and JSON that say so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser, needs_browser
from charts import drawn_in, places, titled
from feature_stores import plant_store
from making import make_corpus

from eupe.cli.console import out as console
from eupe.common.compute import normalise
from eupe.corpus.pictures import decode_image
from eupe.corpus.views import ViewSpec, draw_view, render_view
from eupe.errors import ConfigError, RunError
from eupe.evaluate.result import Result, keep_results
from eupe.models.encoder import build_encoder, save_encoder
from eupe.models.pca import fit_pca
from eupe.report.comparison import Cell, Column, Merged, gather, merge
from eupe.report.comparison_text import heads, marked, number
from eupe.report.report_page import draw_maps, licences, write_report
from eupe.train.targets import is_held_out

HOSTILE = "<img src=x onerror=alert(1)>&\"'${name}"
Run = Callable[..., Any]


def result(subject: str = "runs/a", value: float = 0.5, **changed: Any) -> Result:
    plain: dict[str, Any] = {
        "task": "knn",
        "subject": subject,
        "kind": "run",
        "scores": {"accuracy": value, "majority": 0.1},
        "protocol": {"size": 224, "dtype": "fp32", "k": 10},
        "data": {"path": "data/digits", "val": 100},
    }
    return Result(**{**plain, **changed})


def shown(column: Column, merged: Merged) -> dict[str, Cell]:
    return {merged.models[i].name: cell for i, cell in column.cells.items()}


class TestMerging:
    def test_the_best_of_those_that_may_be_compared_is_marked(self) -> None:
        merged = merge([result("runs/a", 0.5), result("runs/b", 0.7), result("runs/c", 0.6)])
        (column,) = merged.columns
        assert {name: cell.best for name, cell in shown(column, merged).items()} == {"a": False, "b": True, "c": False}
        lower = merge([result("runs/a", 0.5, lower_is_better=True), result("runs/b", 0.7, lower_is_better=True)])
        assert shown(lower.columns[0], lower)["a"].best and not shown(lower.columns[0], lower)["b"].best

    def test_one_alone_is_not_the_best_and_equals_are_both(self) -> None:
        assert not any(cell.best for cell in merge([result()]).columns[0].cells.values())
        both = merge([result("runs/a"), result("runs/b")]).columns[0].cells
        assert [cell.best for cell in both.values()] == [True, True]

    def test_what_is_not_finite_is_no_rival(self) -> None:
        merged = merge([result("runs/a", float("nan")), result("runs/b", 0.5), result("runs/c", 0.4)])
        assert [name for name, cell in shown(merged.columns[0], merged).items() if cell.best] == ["b"]

    def test_baselines_are_apart_and_said_to_be_ahead_where_they_are(self) -> None:
        pixels = result("pixels", 0.6, kind="pixels", protocol={"size": 224, "shades": 4, "k": 10})
        fresh = result("runs/b", 0.4, untrained=True)
        merged = merge([fresh, pixels, result("runs/a", 0.5), result("runs/b", 0.3)])
        assert [model.name for model in merged.models] == ["a", "b", "b, untrained", "pixels"]
        (column,) = merged.columns
        cells = shown(column, merged)
        assert [name for name, cell in cells.items() if cell.best] == ["a"]
        assert [name for name, cell in cells.items() if cell.ahead] == ["pixels"]
        assert not merged.marks, "pixels have no arithmetic to differ in"

    @pytest.mark.parametrize(
        "changed",
        [
            {"task": "linear"},
            {"protocol": {"size": 224, "dtype": "fp32", "k": 20}},
            {"data": {"path": "data/digits", "val": 99}},
            {"data": {"path": "other/digits", "val": 100}},
            {"scores": {"top5": 0.9}},
            {"lower_is_better": True},
        ],
    )
    def test_another_task_protocol_data_set_or_measure_is_another_column(self, changed: dict[str, Any]) -> None:
        merged = merge([result("runs/a", 0.5), result("runs/b", 0.7, **changed)])
        assert len(merged.columns) == 2
        assert not any(cell.best for column in merged.columns for cell in column.cells.values())
        names = [head.words for head in heads(merged.columns)]
        assert len(set(names)) == 2

    def test_other_features_get_a_mark_and_are_not_compared(self) -> None:
        odd = result("dinov2", 0.9, kind="teacher", protocol={"size": 238, "dtype": "fp32", "k": 10})
        store = result("s.zarr", 0.1, kind="store", protocol={"size": 224, "views": "rrc", "num_views": 2, "k": 10})
        merged = merge([odd, result("runs/a", 0.5), result("runs/b", 0.6), store])
        cells = shown(merged.columns[0], merged)
        assert [name for name, cell in cells.items() if cell.best] == ["b"]
        assert (cells["dinov2"].mark, cells["s.zarr"].mark) == ("a", "b")
        assert merged.marks["a"] == "238 px; the others: 224 px"
        assert merged.marks["b"] == "a store's rrc views, 2 views per picture; the others: dtype fp32"

    def test_one_subject_judged_at_two_sizes_has_two_columns(self) -> None:
        small = {"size": 112, "dtype": "fp32", "k": 10}
        merged = merge(
            [result("runs/a", 0.5), result("runs/a", 0.4, protocol=small), result("runs/b", 0.3, protocol=small)]
        )
        assert [len(column.cells) for column in merged.columns] == [1, 2]
        assert [column.features["size"] for column in merged.columns] == [224, 112]
        assert [head.data for head in heads(merged.columns)] == ["digits, 224 px", "digits, 112 px"]
        rounded = {**small, "dtype": "bf16"}
        again = merge([result("runs/a", 0.5, protocol=small), result("runs/a", 0.4, protocol=rounded)])
        assert len(again.columns) == 2

    def test_nothing_is_lost(self) -> None:
        """Every result that is not a newer one of the same is in one cell, or in a table of its own."""
        generator = np.random.default_rng(0)
        made = [
            result(
                f"runs/{generator.integers(3)}",
                float(i),
                task=str(generator.choice(["knn", "linear", "agreement"])),
                untrained=bool(generator.integers(2)),
                protocol={"size": int(generator.choice([112, 224])), "k": int(generator.choice([5, 10]))},
            )
            for i in range(60)
        ]
        distinct = {(r.task, r.subject, r.untrained, str(r.protocol)): r for r in made}
        merged = merge(list(distinct.values()))
        found = [cell.result for column in merged.columns for cell in column.cells.values()]
        found += merged.apart["agreement"]
        assert sorted(r.scores["accuracy"] for r in found) == sorted(r.scores["accuracy"] for r in distinct.values())

    def test_costs_come_last_and_tasks_in_their_order(self) -> None:
        tasks = ("latency", "made-up", "depth", "linear", "knn")
        merged = merge([result(task=task) for task in tasks])
        assert [column.task for column in merged.columns] == ["knn", "linear", "depth", "made-up", "latency"]

    def test_names_are_short_where_that_tells_them_apart(self) -> None:
        merged = merge([result("x/a"), result("y/a"), result("y/b"), result("dinov2", kind="teacher")])
        assert [model.name for model in merged.models] == ["x/a", "y/a", "b", "dinov2"]


def make_run(path: Path, *, targets: list[dict[str, Any]] | None = None, seed: int = 0) -> Path:
    """A finished run as far as a report asks."""
    torch.manual_seed(seed)
    save_encoder(build_encoder("test_vit", size=64), path)
    spec = {"config": {"holdout": 0.3, "seed": seed}, "targets": targets or [], "mix": [], "pictures": []}
    (path / "config.json").write_text(json.dumps({**spec, "total_steps": 1}))
    return path


class TestGathering:
    def test_a_run_is_called_by_its_place_and_its_own_file_has_the_newest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        make_run(tmp_path / "run")
        keep_results([result("run", 0.1), result("pixels", 0.2, kind="pixels")], tmp_path / "all.jsonl")
        keep_results([result(str(tmp_path / "run"), 0.3)])
        found = gather([Path("run"), Path("all.jsonl")])
        assert [(r.subject, r.scores["accuracy"]) for r in found] == [("run", 0.3), ("pixels", 0.2)]

    def test_a_run_that_was_moved_keeps_its_results(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "old")
        keep_results([result(str(run), 0.3)])
        run.rename(tmp_path / "new")
        assert [r.subject for r in gather([tmp_path / "new"])] == [str(tmp_path / "new")]

    def test_the_last_of_a_file_counts(self, tmp_path: Path) -> None:
        keep_results(
            [result("dinov2", 0.1, kind="teacher"), result("dinov2", 0.2, kind="teacher")], tmp_path / "r.jsonl"
        )
        assert [r.scores["accuracy"] for r in gather([tmp_path / "r.jsonl"])] == [0.2]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "holds no results"),
            ('{"task": "knn"', "line 1 of .* holds no valid result of an evaluation"),
            ("[1, 2]", "line 1 of .* holds no valid result"),
            ('{"task": "knn"}', "line 1 of .* holds no valid result"),
            (json.dumps({**result().to_json(), "scores": {"accuracy": "high"}}), "its scores are not numbers"),
            (json.dumps({**result().to_json(), "scores": {}}), "its scores are not numbers"),
            (json.dumps({**result().to_json(), "data": None}), "not all objects"),
            (json.dumps(result().to_json()) + "\n" + '{"tas', "line 2 of .* holds no valid result"),
            ("\x00\x01", "line 1 of .* holds no valid result"),
        ],
    )
    def test_a_damaged_file_is_one_sentence(self, tmp_path: Path, text: str, said: str, run_eupe: Run) -> None:
        (tmp_path / "r.jsonl").write_text(text)
        outcome = run_eupe("eval", "report", tmp_path / "r.jsonl", "--out", tmp_path / "page.html")
        assert outcome.code == 2
        assert re.search(said, " ".join(outcome.err.split()))
        assert "Traceback" not in outcome.err
        assert not (tmp_path / "page.html").exists()

    def test_what_is_no_file_of_text(self, tmp_path: Path) -> None:
        (tmp_path / "r.jsonl").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(RunError, match=r"r\.jsonl holds no valid result"):
            gather([tmp_path / "r.jsonl"])

    def test_runs_that_cannot_be_reported(self, tmp_path: Path) -> None:
        run = make_run(tmp_path / "run")
        with pytest.raises(ConfigError, match=r"run .*run has not been evaluated"):
            gather([run])
        (run / "student.json").unlink()
        with pytest.raises(RunError, match="is not finished; finish it with"):
            gather([run])
        (tmp_path / "folder").mkdir()
        with pytest.raises(ConfigError, match="is a folder but not a training run"):
            gather([tmp_path / "folder"])
        with pytest.raises(ConfigError, match="nowhere does not exist"):
            gather([tmp_path / "nowhere"])
        with pytest.raises(ConfigError, match="nothing to report"):
            gather([])


class TestLicences:
    def test_those_of_a_runs_targets_through_the_runs_between(self, tmp_path: Path) -> None:
        proxy = make_run(
            tmp_path / "proxy",
            targets=[{"teacher": "dinov2-s", "licence": "Apache-2.0"}, {"teacher": "sam-b", "licence": "X"}],
        )
        student = make_run(tmp_path / "student", targets=[{"teacher": str(proxy), "licence": "own"}])
        store = plant_store(
            tmp_path / "s.zarr", ["a"], {"summary": np.ones((1, 1, 2))}, teacher="toy", licence="CC-BY-NC"
        )
        gone = make_run(tmp_path / "gone", targets=[{"teacher": str(tmp_path / "lost"), "licence": "own"}])
        merged = merge(
            [
                result(str(student)),
                result(str(student), untrained=True),
                result(str(store.path), kind="store"),
                result("clip-b16", kind="teacher"),
                result("pixels", kind="pixels"),
                result("nobody", kind="teacher"),
                result(str(gone)),
            ]
        )
        said = [(each.model, Path(each.teacher).name, each.through, each.licence) for each in licences(merged.models)]
        assert said == [
            ("student", "dinov2-s", "proxy", "Apache-2.0"),
            ("student", "sam-b", "proxy", "X"),
            ("s.zarr", "toy", "", "CC-BY-NC"),
            ("clip-b16", "clip-b16", "", "MIT"),
            ("nobody", "nobody", "", "unknown: it is not here"),
            ("gone", "lost", "", "unknown: no run is here that could tell which teachers it had"),
        ]

    def test_runs_that_taught_each_other_end(self, tmp_path: Path) -> None:
        one = make_run(tmp_path / "one", targets=[{"teacher": str(tmp_path / "two"), "licence": "own"}])
        make_run(tmp_path / "two", targets=[{"teacher": str(one), "licence": "own"}])
        assert licences(merge([result(str(one))]).models) == []


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.12345, "0.123"),
        (-0.5, "-0.500"),
        (12.34, "12.3"),
        (1234.5, "1,234.5"),
        (21_600_000, "21.60M"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_have_about_four_digits(value: float, said: str) -> None:
    assert number(value) == said


def test_numbers_of_a_column_have_as_many_decimals() -> None:
    assert [number(value, largest=70.5) for value in (5.0, 70.5, float("inf"))] == ["5.0", "70.5", "inf"]
    merged = merge([cost("runs/a", 256, 5.0), cost("runs/b", 256, 70.5)])
    assert [marked(cell) for cell in merged.columns[0].cells.values()] == ["5.0", "70.5"]


def cost(subject: str, size: int, ms: float, **changed: Any) -> Result:
    scores = {"ms": ms, "ms_p25": ms, "ms_p75": ms, "parameters": 2.2e6, "gflops": 2.0, "gmacs": 1.0}
    protocol = {"asked_size": size, "size": size, "dtype": "fp32", "threads": 2, "cpu": "A CPU"}
    plain: dict[str, Any] = {"task": "latency", "scores": scores, "protocol": protocol, "lower_is_better": True}
    return result(subject, **{**plain, "data": {}, **changed})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs, one of a hostile name, with results of every kind beside them. Not to be changed."""
    folder = tmp_path_factory.mktemp("report")
    target = [{"teacher": "dinov2-s", "licence": HOSTILE}]
    good = make_run(folder / "good", targets=target)
    hostile = make_run(folder / HOSTILE.replace("/", ""), targets=target, seed=1)
    for run, value in ((good, 0.9), (hostile, 0.8)):
        normal = {"normalised": value, "normalised/dense": value, "normalised/summary": value, "cka/dense": 0.5}
        about = {"path": "t.zarr", "target": HOSTILE, "views": 30}
        keep_results(
            [
                result(str(run), value),
                result(str(run), 0.95, untrained=True),
                result(str(run), 1 - value, task="depth", scores={"rmse": 1 - value}, lower_is_better=True),
                cost(str(run), 256, 10 * value),
                cost(str(run), 512, 90 * value),
                result(str(run), task="agreement", scores=normal, data=about),
                result(str(run), task="agreement", scores=normal, data=about, untrained=True),
            ]
        )
    others = folder / "others.jsonl"
    verdict = {"word": "may fight", "why": HOSTILE}
    keep_results(
        [
            result("dinov2-s", 0.99, kind="teacher", protocol={"size": 238, "dtype": "fp32", "k": 10}),
            cost("dinov2-s", 256, 30.0, kind="teacher"),
            result("pixels", 0.1, kind="pixels", protocol={"size": 224, "shades": 4, "k": 10}),
            result(
                "x/a.zarr ~ x/b.zarr",
                task="conflict",
                kind="store",
                scores={"cka/dense": 0.1, "r2/dense": 0.2, "r2_back/dense": 0.25, "mutual_neighbours": 0.3},
                data={"stores": ["x/a.zarr", "x/b.zarr"], "verdict": verdict},
            ),
        ],
        others,
    )
    pictures = make_corpus(folder / "pictures", count=12)
    return {"good": good, "hostile": hostile, "others": others, "pictures": pictures}


@pytest.fixture(scope="module")
def page(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "page.html"
    places = [world[name] for name in ("good", "hostile", "others")]
    write_report(places, out=out, images=world["pictures"], limit=4, title=f"All of {HOSTILE}")
    return out.read_text()


def texts(page: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).split())


class TestPage:
    def test_scores_and_what_may_be_compared(self, page: str) -> None:
        table = page[page.index('<section class="scores">') : page.index("</section>")]
        assert re.findall(r'class="best"><span>([\d.]+)</span>', table) == ["0.900", "0.100", "8.0", "72.0"]
        assert table.count('<td class="ahead">') == 2
        assert '<td class="marked"><span>0.990</span><sup>a</sup></td>' in table
        words = texts(table)
        assert "Depth digits, 224 px RMSE ↓" in words and "Latency 256 px ms per picture ↓" in words
        assert "a other features than the column's, so not compared: 238 px; the others: 224 px" in words
        baselines = words.index("baselines")
        assert words.index("good run") < words.index("dinov2-s teacher") < baselines < words.index("pixels pixels")

    def test_every_section_is_there(self, page: str) -> None:
        words = texts(page)
        for heading in ("Quality and time", "Agreement with targets", "Teachers against each other", "Dense features"):
            assert f"{heading}" in words
        for fact in (f"{HOSTILE}: 30 held-out views", f"may fight : {HOSTILE}", "Judged: redundant is", "threads 2"):
            assert fact in words
        assert page.count("<details>") == 4
        assert f"dinov2-s – {HOSTILE}" in words, "the licence of what taught the runs"

    def test_a_chart_for_each_task_of_quality(self, page: str) -> None:
        svgs = drawn_in(page)
        assert list(svgs) == [
            "k-NN, digits, 224 px over ms per picture at 256 px",
            "Depth, digits, 224 px over ms per picture at 256 px",
        ]
        first, second = svgs.values()
        assert [len(titled(first)), len(titled(second))] == [3, 2]
        (hollow,) = (title for title, dot in titled(first).items() if "fill: var(--card)" in dot.attrib["style"])
        assert hollow == "dinov2-s (a): 0.99 at 30", "what has a mark is not compared"
        (line,) = (path for path in first.iter("path") if "stroke-dasharray: 2,4" in path.attrib["style"])
        assert len(places(line)) == 2

    def test_maps_are_of_the_runs_on_the_centres_of_the_pictures(self, world: dict[str, Path]) -> None:
        maps = draw_maps({"g": world["good"]}, world["pictures"], limit=4)
        keys = [picture.key for picture in maps.pictures]
        held = [is_held_out(key, 0.3) for key in keys]
        assert held == sorted(held, reverse=True) == [picture.held_out for picture in maps.pictures]
        images = [decode_image((world["pictures"] / key).read_bytes()) for key in keys]
        views = [draw_view(ViewSpec(), "", 0, image.width, image.height) for image in images]
        rendered = np.stack([render_view(i, v, 64) for i, v in zip(images, views, strict=True)])
        torch.manual_seed(0)
        encoder = build_encoder("test_vit", size=64).eval()
        with torch.inference_mode():
            pixels = normalise(torch.from_numpy(rendered), encoder.spec.mean, encoder.spec.std)
            dense = encoder(pixels).dense.numpy()
        (run,) = maps.runs
        difference = run.colours.maps_PhwC.astype(int) - fit_pca(dense).rgb(dense).astype(int)
        assert (run.size, np.abs(difference).mean() < 4) == (64, True)

    def test_is_one_file_without_scripts_or_links_and_nothing_from_outside_is_markup(self, page: str) -> None:
        assert "default-src 'none'" in page
        tags = set(re.findall(r"<([a-z0-9]+)", page))
        assert not tags & {"script", "link", "iframe", "object", "a", "base", "form"}
        assert "<img src=x" not in page
        assert not re.search(r"https?:|url\(|@import|(src|href)=[\"'](?!data:)", page.replace("arXiv", ""))
        assert "$" not in page.replace("${name}", "")

    def test_the_same_results_give_the_same_bytes(self, world: dict[str, Path], page: str, tmp_path: Path) -> None:
        places = [world[name] for name in ("good", "hostile", "others")]
        for name in ("a", "b"):
            write_report(places, out=tmp_path / f"{name}.html", title="t")
        assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "b.html"]


class TestCommandLine:
    def test_json_is_the_merged_table(self, world: dict[str, Path], tmp_path: Path, run_eupe: Run) -> None:
        out = tmp_path / "page.html"
        outcome = run_eupe("eval", "report", world["good"], world["others"], "--out", out, "--json")
        report = json.loads(outcome.out)
        assert outcome.out.count("\n") == 1 and report["out"] == str(out) and out.exists()
        names = [model["name"] for model in report["models"]]
        assert names == ["good", "dinov2-s", "good, untrained", "pixels"]
        knn = next(column for column in report["columns"] if column["task"] == "knn")
        assert [cell["value"] for cell in knn["cells"]] == [0.9, 0.99, 0.95, 0.1]
        assert [cell["mark"] for cell in knn["cells"]] == ["", "a", "", ""]
        assert [cell["ahead"] for cell in knn["cells"]] == [False, False, True, False]
        assert knn["protocol"] == {"k": 10} and knn["features"] == {"size": 224, "dtype": "fp32"}
        assert [r["untrained"] for r in report["agreement"]] == [False, True]
        assert report["conflict"][0]["subject"] == "a.zarr ~ b.zarr"

    def test_markdown_has_the_tables(self, world: dict[str, Path], tmp_path: Path, run_eupe: Run) -> None:
        out = tmp_path / "new" / "table.md"
        words = ("eval", "report", world["good"], world["hostile"], world["others"], "--out", out, "--title", "Mine")
        assert run_eupe(*words).code == 0
        text = out.read_text()
        lines = text.splitlines()
        assert lines[0] == "# Mine"
        first = text.partition("## ")[0].splitlines()
        rows = {line.split("|")[1].strip(): line for line in first if line.startswith("| ")}
        assert "| **0.900** |" in rows["good"] and "0.950 ▲" in rows["good, untrained"]
        assert "0.990 (a)" in rows["dinov2-s"]
        assert "- (a) other features than the column's, so not compared: 238 px; the others: 224 px" in lines
        assert "## Agreement with targets" in lines and "## Teachers against each other" in lines

    def test_without_a_place_the_table_is_printed(
        self, world: dict[str, Path], monkeypatch: pytest.MonkeyPatch, run_eupe: Run
    ) -> None:
        monkeypatch.setattr(console, "width", 250)
        outcome = run_eupe("eval", "report", world["good"], world["hostile"], world["others"])
        rows = [" ".join(line.split()) for line in outcome.out.splitlines()]
        assert any(row.startswith("good 0.900* 0.100* 9.0 81.0") for row in rows)
        assert any(row.startswith("good, untrained 0.950 ▲") for row in rows), outcome.out

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--out", "page.pdf"], "--out page.pdf must end in .html for a page or in .md for Markdown"),
            (["--out", "t.md", "--images", "p"], "--images is for pages"),
            (["--images", "p"], "--images is for pages"),
            (["--out", "p.html", "--images", "nowhere"], "nowhere does not exist"),
            (["--out", "p.html", "--images", "p", "--limit", "0"], "--limit must be at least 1"),
        ],
    )
    def test_options_that_make_no_sense(
        self,
        world: dict[str, Path],
        options: list[str],
        said: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        run_eupe: Run,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        outcome = run_eupe("eval", "report", world["good"], *options)
        assert outcome.code == 2
        assert said in " ".join(outcome.err.split())
        assert not list(tmp_path.iterdir())

    def test_maps_without_a_run_are_refused(self, world: dict[str, Path], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="none of the evaluated runs is here"):
            write_report([world["others"]], out=tmp_path / "p.html", images=world["pictures"])

    def test_limit_is_the_number_of_pictures(self, world: dict[str, Path], tmp_path: Path) -> None:
        for limit in (1, 3):
            write_report([world["good"]], out=tmp_path / "p.html", images=world["pictures"], limit=limit)
            assert (tmp_path / "p.html").read_text().count("<img") == 2 * limit

    def test_pictures_their_number_and_the_title_are_options(
        self, world: dict[str, Path], tmp_path: Path, run_eupe: Run
    ) -> None:
        def page(*options: object) -> str:
            outcome = run_eupe("eval", "report", world["good"], "--out", tmp_path / "p.html", *options)
            assert outcome.code == 0, outcome.err
            return (tmp_path / "p.html").read_text()

        images = ("--images", world["pictures"])
        counts = [page(*options).count("<img") for options in ((), (*images, "--limit", 1), images)]
        assert counts == [0, 2, 12], "a view and a map of each"
        assert "<title>Models, side by side</title>" in page()
        assert "<title>Digits &lt;b&gt;</title>" in page("--title", "Digits <b>")


@needs_browser
class TestReportInABrowser:
    def test_a_browser_has_nothing_to_complain_of(self, page: str, tmp_path: Path, browser: Browser) -> None:
        (tmp_path / "page.html").write_text(page)
        browser.open(tmp_path / "page.html")
        assert browser.complaints() == []

    @pytest.mark.parametrize("width", [1280, 500])
    def test_all_images_are_seen_and_nothing_sticks_out(
        self, page: str, tmp_path: Path, browser: Browser, width: int
    ) -> None:
        (tmp_path / "page.html").write_text(page)
        browser.open(tmp_path / "page.html", width=width, any_script=True)
        seen = "image.naturalWidth > 0 && image.getBoundingClientRect().width > 20"
        assert browser.run(f"[...document.images].map(image => {seen})") == [True] * 12
        assert browser.run("[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 100)")
        sticks_out = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert browser.run(sticks_out) == 0
        browser.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert browser.run(sticks_out) == 0
        assert browser.complaints() == [], "hostile names have no chance"
