"""Labels and captions of pictures from `metadata.*` beside them, as Hugging Face's image folders have it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import make_tar, png

from eupe.corpus.choice import AS_FOUND, Choice
from eupe.corpus.index import index_bytes, index_folder, open_corpus, read_index
from eupe.corpus.pictures import insides, read_picture
from eupe.errors import CorpusError

Words = Mapping[str, tuple[str | None, str | None]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures under one folder, whose name is no label of theirs."""
    (tmp_path / "d" / "images").mkdir(parents=True)
    for i in range(4):
        (tmp_path / "d" / "images" / f"{i}.png").write_bytes(png(i))
    return tmp_path / "d"


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)


def words(folder: Path, choice: Choice = AS_FOUND) -> Words:
    corpus = open_corpus(folder, choice=choice)
    for key, inside in zip(corpus.samples["key"].to_pylist(), insides(corpus.samples), strict=True):
        assert read_picture(corpus.root, key, inside) == (folder / key).read_bytes()
    columns = (corpus.samples[name].to_pylist() for name in ("key", "label", "caption"))
    return {key.removeprefix("images/"): (label, caption) for key, label, caption in zip(*columns, strict=True)}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_labels_and_captions_are_those_of_the_metadata(folder: Path, name: str) -> None:
    plain = index_folder(folder)
    rows = [{"file_name": f"images/{i}.png", "label": i % 2, "text": f"number {i}, or so"} for i in range(4)]
    write(folder / name, rows)
    assert words(folder) == {f"{i}.png": (str(i % 2), f"number {i}, or so") for i in range(4)}
    corpus = open_corpus(folder)
    assert corpus.fingerprint == plain.fingerprint and corpus.left_out == {"files of metadata": 1} and not corpus.notes
    chosen = Choice(label_column="text")
    assert words(folder, chosen)["2.png"] == ("number 2, or so", "number 2, or so")
    with pytest.raises(CorpusError, match=r"has no column breed; --label-column may be .*label"):
        open_corpus(folder, choice=Choice(label_column="breed"))
    (folder / name).rename(folder / "images" / name)
    write(folder / "images" / name, [{**row, "file_name": row["file_name"].removeprefix("images/")} for row in rows])
    assert words(folder)["3.png"] == ("1", "number 3, or so"), "paths are relative to the metadata's own folder"


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_what_metadata_lacks_and_what_it_names_in_vain_is_said(folder: Path, name: str) -> None:
    rows = [{"file_name": f"images/{i}.png", "label": label} for i, label in ((0, 1.0), (1, None), (8, 2.0), (9, 2.0))]
    write(folder / name, [*rows, {"file_name": "../x.png", "label": 3.0}])
    assert words(folder) == {"0.png": ("1", None), "1.png": (None, None), "2.png": (None, None), "3.png": (None, None)}
    assert open_corpus(folder).notes == (
        f"1 rows of {name} do not name a file in the corpus folder",
        f"2 files listed in {name} are missing, the first is images/8.png",
        "2 pictures have no label, because no metadata file lists them",
    )


def test_the_nearest_metadata_counts_and_one_without_labels_leaves_the_folders(folder: Path) -> None:
    write(folder / "metadata.csv", [{"file_name": f"images/{i}.png", "category": "far"} for i in range(3)])
    write(folder / "images" / "metadata.jsonl", [{"file_name": "0.png", "label": "near"}])
    assert [label for label, _ in words(folder).values()] == ["near", "far", "far", None]
    write(folder / "images" / "metadata.csv", [{"file_name": "0.png"}])
    with pytest.raises(CorpusError, match=r"images holds more than one of metadata\.csv"):
        open_corpus(folder)
    for path in folder.rglob("metadata.*"):
        path.unlink()
    write(folder / "metadata.jsonl", [{"file_name": "images/0.png", "caption": "one"}])
    assert words(folder)["0.png"] == ("images", "one")
    write(folder / "metadata.jsonl", [{"name": "images/0.png", "label": "one"}])
    assert words(folder)["0.png"] == ("images", None)
    assert open_corpus(folder).notes[0] == (
        "metadata.jsonl has no column file_name, so no label or caption was taken from it"
    )


def test_odd_lines_cost_themselves(folder: Path) -> None:
    lines = (
        b"\xef\xbb\xbffile_name,label,text\n"
        + b'images/0.png,a,"two,\nlines"\nimages/1.png,caf\xe9,caf\xe9\nimages/2.png,,\n'
    )
    (folder / "metadata.csv").write_bytes(lines)
    assert words(folder) == {"0.png": ("a", "two,\nlines"), **dict.fromkeys(("1.png", "2.png", "3.png"), (None, None))}
    assert "2 labels and captions of metadata.csv are not UTF-8 text, and are left out" in open_corpus(folder).notes
    (folder / "metadata.csv").unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "images/0.png", "label": 0.5}\n{"file\n[1]\n\n' + "[" * 10**5)
    assert words(folder)["0.png"] == (None, None)
    assert open_corpus(folder).notes[:2] == (
        "3 lines of metadata.jsonl are not JSON objects, and are left out",
        "column label of metadata.jsonl holds numbers such as 0.5, which are not classes, so no label was taken",
    )
    (folder / "metadata.jsonl").rename(folder / "metadata.parquet")
    with pytest.raises(CorpusError, match=r"metadata\.parquet cannot be read as Parquet"):
        open_corpus(folder)


def test_an_index_keeps_them(folder: Path, tmp_path: Path, run_eupe: Any) -> None:
    write(folder / "metadata.csv", [{"file_name": "images/0.png", "fine_label": "a", "coarse_label": "b"}])
    out = tmp_path / "i.parquet"
    outcome = run_eupe("index", "--corpus", folder, "--label-column", "coarse_label", "--out", out)
    assert outcome.code == 0 and "note: 3 pictures have no label" in outcome.out, outcome.err
    corpus = open_corpus(folder, choice=Choice(label_column="coarse_label"))
    assert index_bytes(read_index(out)) == index_bytes(corpus) and corpus.samples["label"][0].as_py() == "b"


def test_a_choice_that_means_nothing_is_refused(folder: Path, tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "x.tar", {"a.png": png(1)})
    pq.write_table(pa.table({"image": [png(1)]}), table := tmp_path / "x.parquet")
    for source, choice, sentence in (
        (folder, Choice(image_key="jpg"), "--image-key jpg is for tars .* holds pictures as files; omit it"),
        (folder, Choice(image_column="x"), "--image-column x is for tables, but .* holds pictures as files"),
        (folder, Choice(label_column="x"), "--label-column x has no effect: .* has no usable metadata file"),
        (tar, Choice(image_column="x"), "--image-column x is for tables, but .* holds tars"),
        (table, Choice(image_key="x"), "--image-key x is for tars .* holds tables"),
    ):
        with pytest.raises(CorpusError, match=sentence):
            open_corpus(source, choice=choice)
