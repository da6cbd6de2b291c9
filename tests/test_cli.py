"""What a user types, and what a mistake gets: one sentence, exit code 2, no traceback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from making import TINY_STUDENT, TINY_TEACHER, make_corpus, make_store, picture

from eupe.store import Store

Run = Callable[..., Any]


def sentence(outcome: Any) -> str:
    assert "Traceback" not in outcome.err
    progress, found, text = outcome.err.partition("error: ")
    assert found
    assert all(line.startswith("indexing:") for line in progress.splitlines())
    assert outcome.out == ""
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["extract", "--teacher", "dinov2", "--corpus", "nowhere"], 2, "nowhere does not exist"),
        (["extract", "--teacher", "dinov2", "--corpus", "empty"], 2, "holds no picture"),
        (["extract", "--teacher", "dinov22", "--corpus", "pictures"], 2, "dinov2-s"),
        (["extract", "--teacher", "timm:vit_tinny", "--corpus", "pictures"], 2, "did you mean"),
        (["extract", "--teacher", "dinov2", "--corpus", "pictures", "--size", "100"], 2, "use --size 98 or --size 112"),
        (["extract", "--teacher", "dinov2", "--corpus", "pictures", "--views", "rrc"], 2, "rrc:K"),
        (
            ["extract", "--teacher", "dinov2", "--corpus", "pictures", "--photometric", "dino"],
            2,
            "--photometric 'dino' is unknown; give none or eupe",
        ),
        (["extract", "--teacher", "dinov2", "--corpus", "pictures", "--tokens", "cls"], 2, "--tokens takes"),
        (["extract", "--teacher", "dinov2", "--corpus", "pictures", "--batch-size", "0"], 2, "--batch-size must be"),
        (["extract", "--teacher", "dinov2", "--corpus", "pictures", "--weights", "no"], 2, "no do not exist"),
        (
            ["extract", "--teacher", "dinov2", "--corpus", "pictures", "--weights", "pictures", "--dtype", "x"],
            2,
            "--dtype x",
        ),
        (
            ["train", "--targets", "nowhere.zarr", "--student", "test_vit", "--out", "r"],
            2,
            "nowhere.zarr does not exist",
        ),
        (["train", "--targets", "empty", "--student", "test_vit", "--out", "r"], 2, "is not a feature store"),
        (["eval", "agreement", "empty"], 2, "is not a training run"),
        (["eval", "knn", "nowhere"], 2, "is not a store"),
        (["store", "info", "empty"], 2, "is not a feature store"),
        (["index", "--corpus", "pictures", "--out", "index.csv"], 2, "must end in .parquet"),
        (["teachers", "nobody"], 2, "nobody"),
        (["viz", "nowhere", "--images", "pictures", "--out", "p.html"], 2, "nowhere"),
        (["viz", "dinov2", "--images", "pictures", "--out", "p.html", "--weights", "x"], 2, "TEACHER=PATH, got x"),
    ],
)
def test_mistakes_get_one_sentence(
    words: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "pictures").mkdir()
    picture(1).save(tmp_path / "pictures" / "one.png")
    outcome = run_eupe(*words)
    assert outcome.code == code
    assert said in sentence(outcome)
    assert not list(tmp_path.rglob("*.__lock"))
    assert not (tmp_path / "r").exists()


def test_a_store_of_a_newer_format_is_refused(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, run_eupe: Run
) -> None:
    store = make_store(tmp_path / "s.zarr", tiny_corpus, tiny_weights)
    group = zarr.open_group(store.path.local, mode="r+")
    group.attrs["eupe"] = {**group.attrs["eupe"], "format": 3}  # type: ignore[dict-item]
    outcome = run_eupe("train", "--targets", store.path, "--student", TINY_STUDENT, "--out", tmp_path / "r")
    assert outcome.code == 2
    assert "written in format 3" in sentence(outcome)


def test_a_corpus_folder_that_cannot_be_read_is_named(tmp_path: Path, run_eupe: Run) -> None:
    out = tmp_path / "file"
    out.write_text("in the way")
    (tmp_path / "c").mkdir()
    picture(1).save(tmp_path / "c" / "a.png")
    outcome = run_eupe("index", "--corpus", tmp_path / "c", "--out", out / "i.parquet")
    assert outcome.code == 2
    assert "cannot be written" in sentence(outcome)


def test_index_then_extract_from_the_index(tiny_corpus: Path, tmp_path: Path, run_eupe: Run) -> None:
    report = json.loads(run_eupe("index", "--corpus", tiny_corpus, "--out", tmp_path / "i.parquet", "--json").out)
    assert report["pictures"] == 24
    again = json.loads(
        run_eupe("index", "--corpus", tmp_path / "i.parquet", "--out", tmp_path / "j.parquet", "--json").out
    )
    assert again["fingerprint"] == report["fingerprint"]


def test_index_tells_what_is_there_twice_or_cannot_be_read(tmp_path: Path, run_eupe: Run) -> None:
    corpus = make_corpus(tmp_path / "c", count=14)
    files = sorted(path for path in corpus.rglob("*.png"))
    for original, copy in [(0, "a.png"), (0, "b.png"), *((i, f"c{i}.png") for i in range(1, 7))]:
        shutil.copy(files[original], corpus / copy)
    (corpus / "gone.png").symlink_to(tmp_path / "nowhere.png")
    told = run_eupe("index", "--corpus", corpus, "--out", tmp_path / "i.parquet")
    assert told.code == 0
    lines = told.out.splitlines()
    assert {"duplicates: 8", "unreadable: 1"} <= set(lines)
    assert "the same picture: a.png, b.png, class0/0000.png" in lines
    assert sum(line.startswith("the same picture") for line in lines) == 5
    assert lines[-1] == "... and 2 more such groups; --json names them all"
    report = json.loads(run_eupe("index", "--corpus", corpus, "--out", tmp_path / "i.parquet", "--json").out)
    assert (report["pictures"], report["unreadable"], len(report["duplicates"])) == (23, 1, 7)
    assert ["a.png", "b.png", "class0/0000.png"] in report["duplicates"]


def test_train_evaluate_and_look_through_the_command_line(tiny_store: Store, tmp_path: Path, run_eupe: Run) -> None:
    words = ["train", "--targets", tiny_store.path, "--student", TINY_STUDENT, "--out", tmp_path / "run"]
    words += ["--steps", 3, "--batch-size", 8, "--head-width", 16, "--holdout", 0.3]
    first = json.loads(run_eupe(*words, "--json").out)
    assert (first["steps"], first["cached"]) == (3, False)
    assert json.loads(run_eupe(*words, "--json").out)["cached"]
    judged = json.loads(run_eupe("eval", "agreement", tmp_path / "run", "--json").out)
    assert set(judged["targets"][0]["kinds"]) == {"summary", "dense"}
    readable = run_eupe("eval", "agreement", tmp_path / "run")
    assert readable.code == 0
    assert "nearest neighbours in common" in " ".join(readable.out.split())
    page = run_eupe(
        "viz",
        tiny_store.path,
        tmp_path / "run",
        "--images",
        tiny_store.spec.corpus["root"],
        "--out",
        tmp_path / "p.html",
    )
    assert page.code == 0, page.err
    assert (tmp_path / "p.html").read_text().count("data:image/png") >= 8


def test_the_page_shows_a_teacher_with_local_weights(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, run_eupe: Run
) -> None:
    words = ["viz", "timm:test_vit", "--weights", f"timm:test_vit={tiny_weights}", "--images", tiny_corpus]
    outcome = run_eupe(*words, "--out", tmp_path / "p.html", "--limit", 2, "--json")
    assert outcome.code == 0, outcome.err
    assert len(json.loads(outcome.out)["pictures"]) == 2
    figure = run_eupe(*words, "--out", tmp_path / "f.png", "--limit", 2, "--cell", 40, "--foreground", "--json")
    assert figure.code == 0, figure.err
    assert json.loads(figure.out)["num_bytes"] == (tmp_path / "f.png").stat().st_size


def test_the_list_of_teachers_is_quick_and_complete(run_eupe: Run) -> None:
    outcome = run_eupe("teachers")
    assert outcome.code == 0
    assert "dinov3" in outcome.out
    spec = json.loads(run_eupe("teachers", "pe-core-g").out)
    assert (spec["dense_dim"], spec["summary"], spec["prefix_tokens"]) == (1536, "attention_pool", 0)


def test_every_verb_explains_itself() -> None:
    done = subprocess.run([sys.executable, "-m", "eupe", "--help"], capture_output=True, text=True, check=True)
    for verb in ("teachers", "index", "plan", "extract", "train", "eval", "store", "viz"):
        assert verb in done.stdout


def test_help_loads_no_heavy_library() -> None:
    heavy = {"torch", "ray", "zarr", "timm", "numpy", "tensorstore", "matplotlib"}
    code = f"import sys, eupe.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_process_ends_with_the_commands_code_and_all_that_it_said() -> None:
    """Through a pipe, with what was to be done at its exit, and a mistake with its own code."""
    code = (
        "import atexit, sys; from eupe.__main__ import run; atexit.register(print, 'at exit'); "
        "sys.argv[1:] = ['teachers']; run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("at exit\n") and "dinov2-s" in done.stdout
    wrong = subprocess.run([sys.executable, "-m", "eupe", "teachers", "nobody"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == "" and "nobody" in wrong.stderr


def test_a_family_and_its_options_through_the_command_line(tiny_store: Store, tmp_path: Path, run_eupe: Run) -> None:
    words = [
        "train",
        "--targets",
        tiny_store.path,
        "--batch-size",
        4,
        "--steps",
        2,
        "--head-width",
        16,
        "--holdout",
        0.3,
    ]
    words += [
        "--size",
        32,
        "--size",
        64,
        "--clip",
        1,
        "--ema",
        0.9,
        "--weight",
        "timm:test_vit/dense=2",
        "--views",
        "cycle",
    ]
    pair = ["--student", TINY_STUDENT, "--out", tmp_path / "a", "--student", "test_vit2", "--out", tmp_path / "b"]
    outcome = run_eupe(*words, *pair, "--json")
    assert outcome.code == 0, outcome.err
    reports = [json.loads(line) for line in outcome.out.splitlines()]
    assert [Path(report["run"]).name for report in reports] == ["a", "b"]
    config = json.loads((tmp_path / "b" / "config.json").read_text())["config"]
    assert config["size"] == [32, 64] and config["weight"]["timm:test_vit/dense"] == 2 and config["views"] == "cycle"
    assert config["clip"] == 1.0 and config["ema"] == 0.9 and config["student"] == "test_vit2"
    again = run_eupe("train", "--config", tmp_path / "a" / "options.yaml", "--out", tmp_path / "a")
    assert again.code == 0 and "already finished" in again.out
    third = ["--init", tmp_path / "a", "--out", tmp_path / "third", "--steps", 1]
    assert run_eupe(*words[:7], "--head-width", 16, "--holdout", 0.3, *third).code == 0


def test_the_package_is_found_beside_a_folder_of_its_name(tmp_path: Path) -> None:
    """The folder above a checkout holds a folder `eupe`, which must not hide the package."""
    (tmp_path / "eupe" / "store").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "eupe", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_whole_store_has_nothing_to_repair(tiny_store: Store, run_eupe: Run) -> None:
    told = run_eupe("store", "repair", tiny_store.path)
    assert told.code == 0 and told.out.splitlines()[-1] == "nothing to repair: the store is whole"
    assert "parts" not in told.out and "documents" not in told.out


def test_a_plan_says_short_times_in_seconds_and_whose_place_it_asked(
    tiny_corpus: Path, tiny_weights: Path, tmp_path: Path, run_eupe: Run
) -> None:
    words = ["plan", "--teacher", TINY_TEACHER, "--weights", tiny_weights, "--corpus", tiny_corpus, "--size", 64]
    outcome = run_eupe(*words)
    assert outcome.code == 0, outcome.err
    lines = dict(line.split(": ", 1) for line in outcome.out.splitlines() if ": " in line)
    assert lines["time, 1 worker like this"].endswith(" s")
    assert any(name.endswith("timm-test_vit.zarr, where the store will be without --out") for name in lines)
    given = run_eupe(*words, "--out", tmp_path / "s.zarr").out
    assert f"free at {tmp_path}/s.zarr: " in given and "bitround:B is fp16 rounded to B bits" in given
