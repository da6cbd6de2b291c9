"""Every command that writes, over whatever lies at `--out`: its own is gone on with or replaced, nothing else lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from making import TINY_STUDENT, make_corpus

from eupe.store import Store
from eupe.train.config import TrainConfig
from eupe.train.loop import train

FOREIGN = b"three years of work\n"
Words = Callable[[Path], list[object]]


@dataclass(frozen=True)
class World:
    """Files that the commands read. Not to be changed."""

    photos: Path
    store: Path
    run: Path
    results: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_store: Store) -> World:
    folder = tmp_path_factory.mktemp("world")
    options: dict[str, Any] = {"batch_size": 8, "head_width": 16, "holdout": 0.3, "dtype": "fp32"}
    config = TrainConfig(targets=(tiny_store.path,), student=TINY_STUDENT, out=folder / "run", steps=2, **options)
    train(config)
    line = {"task": "knn", "subject": "a", "kind": "teacher", "scores": {"accuracy": 0.5}, "protocol": {}, "data": {}}
    (folder / "results.jsonl").write_text(json.dumps(line) + "\n")
    return World(tiny_corpus, tiny_store.path.local, folder / "run", folder / "results.jsonl")


def file_verbs(world: World) -> dict[str, tuple[str, Words]]:
    """Return the suffix of the file and the command, by name."""
    return {
        "index": (".parquet", lambda out: ["index", "--corpus", world.photos, "--out", out]),
        "report": (".html", lambda out: ["eval", "report", world.results, "--out", out]),
        "markdown": (".md", lambda out: ["eval", "report", world.results, "--out", out]),
        "stats": (".html", lambda out: ["store", "stats", world.store, "--out", out]),
        "page": (".html", lambda out: ["viz", "pixels", "--images", world.photos, "--limit", 1, "--out", out]),
        "figure": (".png", lambda out: ["viz", "pixels", "--images", world.photos, "--limit", 1, "--out", out]),
    }


def folder_verbs(world: World) -> dict[str, Words]:
    train_words = ["train", "--targets", world.store, "--student", TINY_STUDENT, "--steps", 2, "--batch-size", 8]
    train_words += ["--head-width", 16, "--holdout", 0.3, "--dtype", "fp32"]
    extract = ["extract", "--teacher", "timm:test_vit", "--weights", world.run / "student.safetensors"]
    extract += ["--corpus", world.photos, "--size", 64]
    return {
        "train": lambda out: [*train_words, "--out", out],
        "export": lambda out: ["export", world.run, "--format", "timm", "--out", out],
        "scenes": lambda out: ["--pictures", 24, "--size", 32, "--only", "classification", "--out", out],
        "extract": lambda out: [*extract, "--out", out],
        "convert": lambda out: ["store", "convert", world.store, "--precision", "int8", "--out", out],
    }


FILES = ("index", "report", "markdown", "stats", "page", "figure")
READ_ONLY = {"index": 2}
"""Exit codes where the disk refuses; of all others 1, as of a disk that fills up."""
FOLDERS = ("train", "export", "scenes", "extract", "convert")


def refused(outcome: Any, code: int = 2) -> None:
    assert outcome.code == code, outcome.out + outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ") and "Traceback" not in outcome.err


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("verb", FILES)
def test_a_file(verb: str, world: World, tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    suffix, words = file_verbs(world)[verb]
    out = tmp_path / f"out{suffix}"

    foreign = tmp_path / f"foreign{suffix}"
    foreign.write_bytes(FOREIGN)
    refused(run_eupe(*words(foreign)))
    link = tmp_path / f"link{suffix}"
    link.symlink_to(foreign)
    refused(run_eupe(*words(link)))
    assert foreign.read_bytes() == FOREIGN

    (folder := tmp_path / f"folder{suffix}").mkdir()
    (folder / "x").write_bytes(FOREIGN)
    refused(run_eupe(*words(folder)))
    assert tree(folder) == {"x": FOREIGN}
    lost = tmp_path / f"lost{suffix}"
    lost.symlink_to(tmp_path / "nothing")
    refused(run_eupe(*words(lost)))
    assert not (tmp_path / "nothing").exists()
    refused(run_eupe(*words(Path(f"/proc/eupe/out{suffix}"))), code=READ_ONLY.get(verb, 1))

    (tmp_path / f"out{suffix}.0123{'.__lock'}").write_bytes(b"of a writer that was killed")
    first = run_eupe(*words(out))
    assert first.code == 0, first.err
    made = out.read_bytes()
    own_link = tmp_path / f"own{suffix}"
    own_link.symlink_to(out)
    for place in (out, own_link):
        again = run_eupe(*words(place))
        assert again.code == 0, again.err
    assert own_link.is_symlink() and len(out.read_bytes()) == len(made)

    over = run_eupe(*words(foreign), "--overwrite")
    assert over.code == 0, over.err
    assert foreign.read_bytes()[:8] == made[:8]


@pytest.fixture
def run(verb: str, run_eupe: Callable[..., Any], run_scenes: Callable[..., Any]) -> Callable[..., Any]:
    return run_scenes if verb == "scenes" else run_eupe


@pytest.mark.parametrize("verb", FOLDERS)
def test_a_folder(verb: str, world: World, tmp_path: Path, run: Callable[..., Any]) -> None:
    words = folder_verbs(world)[verb]
    (foreign := tmp_path / "foreign").mkdir()
    (foreign / "x").write_bytes(FOREIGN)
    (link := tmp_path / "link").symlink_to(foreign)
    (file := tmp_path / "file").write_bytes(FOREIGN)
    for place in (foreign, link, file):
        refused(run(*words(place)))
    refused(run(*words(Path("/proc/eupe"))), code=1)
    assert tree(tmp_path) == {"foreign/x": FOREIGN, "file": FOREIGN}
    assert link.is_symlink()
    if verb == "extract":
        return  # the rest takes Ray: tests/extract
    out = tmp_path / "out"
    first = run(*words(out), "--json")
    assert first.code == 0, first.err
    made = tree(out)
    (own_link := tmp_path / "own").symlink_to(out)
    for place in (out, own_link):
        again = run(*words(place), "--json")
        assert again.code == 0, again.err
        assert json.loads(again.out)["cached"] is True
    assert tree(out) == made and own_link.is_symlink()


def test_a_folder_of_features(world: World, tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    words = ["eval", "knn", world.run, "--data", world.photos, "--k", 3, "--size", 32, "--features"]
    (foreign := tmp_path / "foreign").mkdir()
    (foreign / "x").write_bytes(FOREIGN)
    (link := tmp_path / "link").symlink_to(foreign)
    (file := tmp_path / "file").write_bytes(FOREIGN)
    for place in (foreign, link, file):
        refused(run_eupe(*words, place))
    assert tree(tmp_path) == {"foreign/x": FOREIGN, "file": FOREIGN}
    for place in (Path("/proc/eupe"), file / "below"):
        outcome = run_eupe(*words, place)
        assert outcome.code == 0 and "features are not kept" in outcome.err, "an evaluation does without"
    out = tmp_path / "out"
    assert run_eupe(*words, out).code == 0
    made = tree(out)
    assert {Path(name).suffix for name in made} == {".TAG", ".npz"}
    (own_link := tmp_path / "own").symlink_to(out)
    for place in (out, own_link):
        assert run_eupe(*words, place).code == 0
    assert tree(out) == made and own_link.is_symlink()


@pytest.mark.parametrize("verb", ["export", "scenes"])
def test_a_link_in_place_of_an_unfinished_folder(
    verb: str, world: World, tmp_path: Path, run: Callable[..., Any]
) -> None:
    (victim := tmp_path / "victim").mkdir()
    (victim / "x").write_bytes(FOREIGN)
    (tmp_path / ".out.unfinished").symlink_to(victim)
    refused(run(*folder_verbs(world)[verb](tmp_path / "out")))
    assert tree(victim) == {"x": FOREIGN}


def test_a_table_of_pictures_is_no_place_for_its_index(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    """The index once replaced the table, and the pictures were lost."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [file.read_bytes() for file in sorted(make_corpus(tmp_path / "p", count=3).rglob("*.png"))]
    table = tmp_path / "photos.parquet"
    pq.write_table(pa.table({"image": pa.array(pictures, pa.binary())}), table)
    before = table.read_bytes()
    same = tmp_path / "same.parquet"
    same.hardlink_to(table)
    for out in (table, same):
        for more in ([], ["--overwrite"]):
            outcome = run_eupe("index", "--corpus", table, "--out", out, *more)
            refused(outcome)
            assert "is one of the inputs" in outcome.err
    other = shutil.copy(table, tmp_path / "other.parquet")
    refused(run_eupe("index", "--corpus", table, "--out", other))
    assert table.read_bytes() == other.read_bytes() == before


def test_a_picture_is_no_place_for_a_figure_of_it(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    photos = make_corpus(tmp_path / "p", count=3)
    before = tree(photos)
    picture = next(iter(sorted(photos.rglob("*.png"))))
    for more in ([], ["--overwrite"]):
        refused(run_eupe("viz", "pixels", "--images", photos, "--out", picture, *more))
    assert tree(photos) == before


def test_what_an_index_left_unfinished_is_told_from_a_users_files(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    photos = make_corpus(tmp_path / "p", count=3)
    (beside := tmp_path / "x.parquet.unfinished").mkdir()
    (beside / "notes.txt").write_bytes(FOREIGN)
    assert run_eupe("index", "--corpus", photos, "--out", tmp_path / "x.parquet").code == 0
    assert tree(beside) == {"notes.txt": FOREIGN}


@pytest.mark.parametrize("first", [FOREIGN, b'{"task": "knn"}\n', b"PAR1\0\0"])
def test_results_are_not_added_to_a_file_of_something_else(
    first: bytes, world: World, tmp_path: Path, run_eupe: Callable[..., Any]
) -> None:
    (file := tmp_path / "r.jsonl").write_bytes(first)
    words = ["eval", "knn", world.store, "--k", 3, "--results", file]
    outcome = run_eupe(*words)
    refused(outcome)
    assert "is not a file of results" in outcome.err and file.read_bytes() == first
    file.write_bytes(world.results.read_bytes())
    assert run_eupe(*words).code == 0
    assert file.read_bytes().startswith(world.results.read_bytes()) and file.read_bytes().count(b"\n") == 2
