"""Tables are written by pyarrow and read again by its `to_pylist`."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import png
from making import make_corpus

from eupe.common.storage import StoragePath
from eupe.corpus.index import Corpus, index_folder, open_corpus, write_index
from eupe.corpus.left_out import NO_PICTURE
from eupe.corpus.pictures import insides, read_picture
from eupe.corpus.tables import AGAIN, ELSEWHERE, WEB, RowReader
from eupe.errors import CorpusError

if TYPE_CHECKING:
    from object_store import S3Server

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def contents(corpus: Corpus) -> dict[str, bytes]:
    keys = corpus.samples["key"].to_pylist()
    return {key: read_picture(corpus.root, key, i) for key, i in zip(keys, insides(corpus.samples), strict=True)}


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema, *, group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group, write_page_checksum=True)
    return path


def hugging_face(path: Path, count: int, *, first: int = 0) -> Path:
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}}
    schema = pa.schema([("image", IMAGE), ("label", pa.int64()), ("text", pa.string())])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    rows = [
        {"image": {"bytes": png(first + i), "path": f"{i}.png"}, "label": i % 4 - 1, "text": f"number {i}"}
        for i in range(count)
    ]
    return write(path, rows, schema)


def test_hugging_faces_layout_with_names_of_classes_and_captions(tmp_path: Path) -> None:
    hugging_face(tmp_path / "t" / "train-0.parquet", 10)
    hugging_face(tmp_path / "t" / "train-1.parquet", 3, first=50)
    corpus = open_corpus(tmp_path / "t")
    expected = {
        f"train-{n}.parquet/{i:08d}": row["image"]["bytes"]
        for n in range(2)
        for i, row in enumerate(pq.read_table(tmp_path / "t" / f"train-{n}.parquet").to_pylist())
    }
    assert contents(corpus) == expected and len(expected) == 13
    rows = corpus.samples.to_pylist()
    assert [row["label"] for row in rows[:5]] == [None, "cat", "dog", "owl", None]
    assert [row["caption"] for row in rows[:2]] == ["number 0", "number 1"]
    for row in rows:
        assert row["sha256"] == hashlib.sha256(expected[row["key"]]).hexdigest()
        assert row["num_bytes"] == len(expected[row["key"]])
    assert open_corpus(f"{tmp_path}/t/train-{{0..1}}.parquet").samples.equals(corpus.samples)
    one = open_corpus(tmp_path / "t" / "train-1.parquet")
    assert one.samples.equals(corpus.pick(include=["train-1*"]).samples)
    write_index(corpus, tmp_path / "t" / "index.parquet")
    assert open_corpus(tmp_path / "t").samples.equals(corpus.samples)
    assert open_corpus(tmp_path / "t" / "index.parquet").samples.equals(corpus.samples)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_binary_column_and_rows_without_a_picture(tmp_path: Path, kind: pa.DataType) -> None:
    schema = pa.schema([("jpg", kind), ("class", pa.string()), ("other", pa.float32())])
    rows = [{"jpg": None if i == 2 else png(i), "class": f"c{i}", "other": 0.0} for i in range(6)]
    corpus = open_corpus(write(tmp_path / "x.parquet", rows, schema))
    assert contents(corpus) == {f"x.parquet/{i:08d}": png(i) for i in range(6) if i != 2}
    assert corpus.left_out == {NO_PICTURE: 1}
    assert corpus.samples["label"].to_pylist() == ["c0", "c1", "c3", "c4", "c5"]


def test_paths_name_files_below_the_tables_folder(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "p", count=6)
    keys = index_folder(folder).samples["key"].to_pylist()
    paths = [*keys[:4], f"./{keys[4]}", str(folder / keys[5])]
    schema = pa.schema([("file_name", pa.string()), ("label", pa.int32())])
    rows = [{"file_name": path, "label": i} for i, path in enumerate(paths)]
    corpus = open_corpus(write(folder / "meta.parquet", rows, schema))
    assert contents(corpus) == {key: (folder / key).read_bytes() for key in keys}
    assert corpus.fingerprint == index_folder(folder).fingerprint
    assert corpus.samples["label"].to_pylist() == [str(i) for i in range(6)]
    struct = pa.schema([("image", IMAGE)])
    same = write(folder / "same.parquet", [{"image": {"bytes": None, "path": path}} for path in paths], struct)
    assert open_corpus(same).fingerprint == corpus.fingerprint
    for bad, reason in (
        ("../x.png", ELSEWHERE),
        ("/etc/x.png", ELSEWHERE),
        ("a\0.png", ELSEWHERE),
        ("https://x.org/y.png", WEB),
    ):
        write(folder / "bad.parquet", [*rows, {"file_name": bad, "label": 9}], schema)
        found = open_corpus(folder / "bad.parquet")
        assert found.fingerprint == corpus.fingerprint and found.left_out == {reason: 1}
        write(folder / "bad.parquet", [{"file_name": bad, "label": 9}], schema)
        with pytest.raises(CorpusError, match="does not lie below" if reason == ELSEWHERE else "pictures on the web"):
            open_corpus(folder / "bad.parquet")
    write(folder / "twice.parquet", [*rows, {"file_name": keys[0], "label": 0}], schema)
    assert open_corpus(folder / "twice.parquet").left_out == {AGAIN: 1}
    write(folder / "twice.parquet", [*rows, {"file_name": keys[0], "label": 9}], schema)
    with pytest.raises(CorpusError, match="more than one row"):
        open_corpus(folder / "twice.parquet")
    write(folder / "long.parquet", [*rows, {"file_name": "x" * 9000, "label": 9}], schema)
    assert open_corpus(folder / "long.parquet").samples["sha256"].null_count == 1
    write(folder / "gone.parquet", [{"file_name": f"gone/{i}.png", "label": i} for i in range(3)], schema)
    with pytest.raises(CorpusError, match=r"none of the 3 files that table .* names exists, the first is .*gone/0"):
        open_corpus(folder / "gone.parquet")


def test_a_table_without_pictures_or_with_too_many_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", [{"key": "a"}], pa.schema([("key", pa.string())]))
    with pytest.raises(CorpusError, match=r"x\.parquet has no picture column among key"):
        open_corpus(tmp_path / "x.parquet")
    write(tmp_path / "x.parquet", [{"a": {"bytes": b""}}], pa.schema([("a", IMAGE), ("b", IMAGE)]))
    with pytest.raises(CorpusError, match=r"several picture columns, a, b"):
        open_corpus(tmp_path / "x.parquet")
    hugging_face(tmp_path / "x.parquet", 9)
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(CorpusError, match=r"x\.parquet cannot be read after \d+ rows"):
        open_corpus(tmp_path / "x.parquet")


def test_rows_in_order_are_decoded_once_within_bounds(tmp_path: Path) -> None:
    noise = [bytes([i]) + bytes(999) for i in range(200)]
    schema = pa.schema([("image", pa.binary())])
    write(tmp_path / "x.parquet", [{"image": data} for data in noise], schema, group=64)
    reader = RowReader(cache_bytes=70_000)
    root = StoragePath.of(tmp_path)
    assert [reader.read(root, "x.parquet", i) for i in range(200)] == noise
    assert reader.num_decoded == 200
    assert reader.read(root, "x.parquet", 0) == noise[0]
    assert reader.num_decoded == 264, "the first group had made room for the last"
    assert reader._num_bytes <= 70_000
    with ThreadPoolExecutor(8) as pool:
        places = [i * 37 % 200 for i in range(400)]
        assert list(pool.map(lambda i: reader.read(root, "x.parquet", i), places)) == [noise[i] for i in places]
    with pytest.raises(CorpusError, match="has no picture in row 200"):
        reader.read(root, "x.parquet", 200)


def test_a_table_of_the_same_time_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face(tmp_path / "0.parquet", 4)
    hugging_face(tmp_path / "1.parquet", 4, first=20)
    before = index_folder(tmp_path)
    hugging_face(tmp_path / "1.parquet", 3, first=30)
    hashed: list[str] = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda *data: hashed.append("x") or sha256(*data))
    again = index_folder(tmp_path, previous=before)
    assert len(hashed) == 3
    some = index_folder(tmp_path, previous=again.pick(limit=2))
    assert len(hashed) == 3 + 7, "an index of some rows does not stand in for the others"
    monkeypatch.undo()
    assert again.samples.equals(index_folder(tmp_path).samples) and some.samples.equals(again.samples)


def test_tables_in_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    from object_store import upload

    hugging_face(tmp_path / "t" / "0.parquet", 6)
    place = upload(tmp_path / "t", s3.bucket / "tables")
    ours, theirs = open_corpus(place), open_corpus(tmp_path / "t")
    columns = [name for name in theirs.samples.schema.names if name != "mtime_ns"]
    assert ours.samples.select(columns).equals(theirs.samples.select(columns))
    assert contents(ours) == contents(theirs)
