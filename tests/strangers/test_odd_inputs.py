"""Files of strangers that lie about lengths, places and sizes, or would be heard by the terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from making import TINY_STUDENT, make_corpus, tiny_config

from eupe.common.reading import MOST_VALUES, parse_yaml
from eupe.common.storage import StoragePath, storage_error
from eupe.corpus.index import CONTAINED, ROOT_KEY, SCHEMA, open_corpus, read_index
from eupe.corpus.own_table import read_own_table
from eupe.corpus.pictures import insides, read_picture
from eupe.errors import ConfigError, CorpusError, PartCorruptError
from eupe.store import Store, open_store
from eupe.train.loop import train

Run = Callable[..., Any]


def index_of(root: Path, path: Path, **row: Any) -> Path:
    """An index of one picture, of whose row some columns are as given."""
    plain = {"key": "t.tar/x.png", "sha256": "0" * 64, "file": "t.tar", "start": 0, "length": 10, **row}
    table = pa.Table.from_pylist([plain], schema=CONTAINED)
    pq.write_table(table.replace_schema_metadata({ROOT_KEY: str(root)}), path)
    return path


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"file": "/etc/passwd"}, "does not lie below"),
        ({"file": "../secret"}, "does not lie below"),
        ({"file": "a/../../secret"}, "does not lie below"),
        ({"start": -1}, "start is out of range: -1"),
        ({"length": 2**62}, "length is out of range"),
        ({"start": 2**62}, "start is out of range"),
        ({"start": None}, "a file but no position in it"),
        ({"file": None}, "a position but no file"),
    ],
)
def test_places_that_no_picture_has(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=said):
        read_index(index_of(tmp_path, tmp_path / "i.parquet", **row))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_tar_that_is_no_file_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "t.tar"
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        place.mkdir()
    corpus = read_index(index_of(tmp_path, tmp_path / "i.parquet"))
    with pytest.raises(CorpusError, match="is a pipe, a device or a folder"):
        read_picture(corpus.root, "t.tar/x.png", insides(corpus.samples)[0])


def test_a_length_that_is_more_than_a_picture_is_not_allocated(tmp_path: Path) -> None:
    with (tmp_path / "t.tar").open("wb") as file:
        file.truncate(2**40)
    corpus = read_index(index_of(tmp_path, tmp_path / "i.parquet", length=2**39))
    with pytest.raises(CorpusError, match="more than a picture has"):
        read_picture(corpus.root, "t.tar/x.png", insides(corpus.samples)[0])


@pytest.mark.timeout(60)
def test_a_terabyte_called_a_picture_is_counted_not_read(tmp_path: Path) -> None:
    photos = make_corpus(tmp_path / "p", count=2)
    with (photos / "x.jpg").open("wb") as file:
        file.truncate(2**40)
    corpus = open_corpus(photos)
    rows = {row["key"]: row for row in corpus.samples.to_pylist()}
    assert rows["x.jpg"]["sha256"] is None and rows["x.jpg"]["num_bytes"] == 2**40
    with pytest.raises(CorpusError, match=r"1099511627776 bytes are more than a picture has"):
        read_picture(corpus.root, "x.jpg")


@pytest.mark.parametrize("rows", [{"key": ["a"] * 10**6}, {"key": ["k" * 10**6] * 1000, "label": ["x"] * 1000}])
def test_a_small_table_that_fills_the_memory_is_refused(rows: dict[str, list[str]], tmp_path: Path) -> None:
    table = pa.table({name: pa.array(values, pa.string()) for name, values in rows.items()})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd")
    data = (tmp_path / "t.parquet").read_bytes()
    assert len(data) < 10**6
    with pytest.raises(ValueError, match=r"it claims to have|it expands to"):
        read_own_table(data)


def test_an_index_of_other_columns_is_refused(tmp_path: Path) -> None:
    table = pa.table({name: pa.array([1]) for name in SCHEMA.names})
    pq.write_table(table.replace_schema_metadata({ROOT_KEY: str(tmp_path)}), tmp_path / "i.parquet")
    with pytest.raises(CorpusError, match="is not an index of pictures"):
        read_index(tmp_path / "i.parquet")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("corpus.segments", [10**12], "more than a store can have"),
        ("corpus.segments", [0], "not a list of positive integers"),
        ("corpus.segments", "x", "not a list of positive integers"),
        ("samples_per_part", 0, "not a positive integer"),
        ("samples_per_part", 2**40, "a chunk of"),
        ("sizes", [], "not a list of positive integers"),
        ("sizes", [10**9, 24], "contradict|a chunk of"),
        ("grids", [10**5, 10**5], "a chunk of"),
        ("teacher.dense_dim", 10**9, "not a valid number of channels"),
        ("tokens", ["dense", "dense"], "not summary, dense or both"),
        ("precision", {"dense": 5, "summary": "fp16"}, "not a string"),
        ("views.num_views", True, "not a positive integer"),
        ("calibration", {"64/dense": {"mean": "", "std": ""}}, "contradict each other"),
    ],
)
def test_a_specification_that_no_store_has(
    field: str, value: Any, said: str, tmp_path: Path, tiny_store: Store, run_eupe: Run
) -> None:
    shutil.copytree(tiny_store.path.local, out := tmp_path / "s.zarr")
    document = json.loads((out / "zarr.json").read_text())
    *path, last = field.split(".")
    holder = document["attributes"]["eupe"]
    for name in path:
        holder = holder[name]
    holder[last] = value
    (out / "zarr.json").write_text(json.dumps(document))
    for verb in ("info", "verify", "stats"):
        outcome = run_eupe("store", verb, out)
        assert outcome.code == 2 and "damaged specification" in outcome.err


@pytest.mark.parametrize("path", ["boxes", "64/summary", "stats/64/dense/mean"])
def test_an_array_of_another_rank_is_damage(path: str, tmp_path: Path, tiny_store: Store) -> None:
    shutil.copytree(tiny_store.path.local, out := tmp_path / "s.zarr")
    shutil.copy(out / "stats/64/dense/count/zarr.json", out / path / "zarr.json")
    store = open_store(out)
    with pytest.raises(PartCorruptError, match=r"has shape \[\], the specification says"):
        store.stats(64, "dense") if path.startswith("stats") else store.read([0], [0])


ESCAPES = "\x1b]52;c;ZXZpbA==\x07\x1b[2J"


def test_words_of_a_store_are_not_heard_by_the_terminal(tmp_path: Path, tiny_store: Store, run_eupe: Run) -> None:
    shutil.copytree(tiny_store.path.local, out := tmp_path / "s.zarr")
    document = json.loads((out / "zarr.json").read_text())
    spec = document["attributes"]["eupe"]
    spec["teacher"] |= {"name": f"dino{ESCAPES}", "licence": f"MIT{ESCAPES}", "note": ESCAPES}
    spec["corpus"]["root"] = f"/photos{ESCAPES}"
    spec["versions"] = {"eupe": ESCAPES}
    (out / "zarr.json").write_text(json.dumps(document))
    spec["forward"] = {ESCAPES: ESCAPES}
    train_words = ["train", "--targets", out, "--student", TINY_STUDENT, "--out", tmp_path / "r", "--steps", 2]
    for words in (
        ["store", "info", out],
        ["store", "ls", tmp_path],
        ["store", "stats", out],
        ["store", "verify", out],
        ["eval", "knn", out, "--k", 3],
        [*train_words, "--batch-size", 8, "--head-width", 16, "--dtype", "fp32"],
    ):
        outcome = run_eupe(*words)
        assert not {"\x1b", "\x07"} & set(outcome.out + outcome.err), words


def test_aliases_that_multiply_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    with pytest.raises(ValueError, match=f"more than {MOST_VALUES} values"):
        parse_yaml("\n".join(lines))
    with pytest.raises(ValueError, match="contains itself"):
        parse_yaml("a: &a [*a]")
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_yaml("[" * 100_000)
    assert parse_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}


def test_a_password_of_the_server_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:secret@127.0.0.1:9")
    said = str(
        storage_error(ValueError("UNAVAILABLE: CURL error: http://me:secret@127.0.0.1:9"), StoragePath.of("s3://b/x"))
    )
    assert "secret" not in said and "the server http://127.0.0.1:9 does not answer" in said


def test_a_bucket_that_only_the_store_names_is_asked_for(tmp_path: Path, tiny_store: Store, run_eupe: Run) -> None:
    shutil.copytree(tiny_store.path.local, out := tmp_path / "s.zarr")
    document = json.loads((out / "zarr.json").read_text())
    document["attributes"]["eupe"]["corpus"]["root"] = "s3://strangers/photos"
    (out / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="give --corpus s3://strangers/photos"):
        open_store(out).corpus_root([StoragePath.of("s3://mine/photos")])
    assert str(open_store(out).corpus_root([StoragePath.of("s3://strangers/x")])) == "s3://strangers/photos"
    words = ["--targets", out, "--student", TINY_STUDENT, "--steps", 2, "--batch-size", 8, "--out", tmp_path / "r"]
    outcome = run_eupe("train", *words)
    assert outcome.code == 2 and "--corpus s3://strangers/photos" in " ".join(outcome.err.split())


def test_a_finished_run_without_its_log_is_not_trained_over(tmp_path: Path, tiny_store: Store) -> None:
    config = tiny_config(tiny_store.path, tmp_path / "r", steps=2, head_width=16)
    train(config)
    (tmp_path / "r/metrics.jsonl").unlink()
    before = (tmp_path / "r/student.safetensors").read_bytes()
    assert train(config).cached
    assert (tmp_path / "r/student.safetensors").read_bytes() == before


def test_all_that_is_imported_is_declared() -> None:
    """Packages of the standard library and of `dependencies`, or of an extra where a verb imports it when asked."""
    import ast
    import tomllib

    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    words = [re.split(r"[\[<>=]", line)[0].lower().replace("-", "_") for line in [*project["dependencies"], *extras]]
    called = {"pillow": "pil", "pyyaml": "yaml", "open_clip_torch": "open_clip"}
    names = {called.get(word, word) for word in words} | {"eupe", "wandb"}
    imported = set()
    for file in (root / "eupe").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.split(".")[0])
    assert {name for name in imported if name.lower() not in names} <= sys.stdlib_module_names
