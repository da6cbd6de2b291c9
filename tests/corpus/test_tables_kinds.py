"""What people call columns of tables, and of what types: pictures, labels, paths; Arrow as Hugging Face saves it."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import make_tar, png
from making import make_corpus

from eupe.common.storage import StoragePath
from eupe.corpus import table_files, tables
from eupe.corpus.choice import AS_FOUND, Choice
from eupe.corpus.index import index_folder, open_corpus
from eupe.corpus.left_out import NO_PICTURE, NO_TABLE
from eupe.corpus.pictures import insides, read_picture
from eupe.corpus.resumable import make_index
from eupe.corpus.tables import table_rows
from eupe.errors import CorpusError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
BYTES = [png(i) for i in range(5)]
STRUCTS = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(BYTES)]
OTHERS = [{"bytes": png(50 + i), "path": None} for i in range(5)]


def opened(path: Path, choice: Choice = AS_FOUND) -> dict[str, dict[str, Any]]:
    """Rows of an index by what follows the table's name; the pictures are those that were hashed."""
    corpus = open_corpus(path, choice=choice)
    if path.suffix == ".parquet" and not any(".0" in key for key in corpus.samples["key"].to_pylist()):
        assert corpus.num_found == pq.read_metadata(path).num_rows, "every row is taken or counted"
    rows = {}
    for row, inside in zip(corpus.samples.to_pylist(), insides(corpus.samples), strict=True):
        data = read_picture(corpus.root, row["key"], inside)
        assert hashlib.sha256(data).hexdigest() == row["sha256"] and len(data) == row["num_bytes"]
        rows[row["key"].removeprefix(f"{path.name}/")] = row | {"data": data}
    return rows


def table(path: Path, /, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def encoded_struct() -> pa.Array:
    return pa.StructArray.from_arrays(
        [pa.array(BYTES).dictionary_encode(), pa.nulls(5, pa.string())], ["bytes", "path"]
    )


SPARK = {
    "path": [f"file:/dbfs/x/{i}.png" for i in range(5)],
    "modificationTime": [1] * 5,
    "length": [len(data) for data in BYTES],
    "content": BYTES,
}
NESTED = pa.array([{"image": image, "id": i} for i, image in enumerate(STRUCTS)])


@pytest.mark.parametrize(
    "columns",
    [
        {"image": pa.array(BYTES, pa.large_binary())},
        {"image": pa.array(BYTES).cast(pa.binary_view())},
        {"image": pa.array(BYTES).dictionary_encode()},
        {"image": encoded_struct()},
        {"image": pa.array(STRUCTS, pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]))},
        {"image_bytes": BYTES, "sha256": ["x"] * 5},
        {"image_bytes": BYTES, "image_path": ["nowhere.png"] * 5},
        {"blob": BYTES},
        {"sample": NESTED},
        SPARK,
    ],
    ids=lambda columns: "-".join(columns),
)
def test_bytes_are_found_whatever_their_type_and_name(tmp_path: Path, columns: dict[str, Any]) -> None:
    rows = opened(table(tmp_path / "x.parquet", **columns))
    assert {key: row["data"] for key, row in rows.items()} == {f"{i:08d}": data for i, data in enumerate(BYTES)}


def test_a_table_beside_tars_that_names_files_twice_is_counted(tmp_path: Path) -> None:
    """Two columns of paths are not clear, but they are no pictures beside tars."""
    make_tar(tmp_path / "0.tar", {"a.png": BYTES[0]})
    table(tmp_path / "0.parquet", path=["a.png"], file_name=["a.png"])
    corpus = open_corpus(tmp_path)
    assert len(corpus) == 1 and corpus.left_out == {NO_TABLE: 1}


@pytest.mark.parametrize("images", [[STRUCTS[:2], [], STRUCTS[2:], None], [BYTES[:2], None, BYTES[2:], []]])
def test_each_picture_of_a_list_is_one(tmp_path: Path, images: list[Any]) -> None:
    kind = pa.list_(IMAGE if isinstance(images[0][0], dict) else pa.binary())
    path = table(tmp_path / "x.parquet", images=pa.array(images, kind), label=pa.array(list("abcd")))
    rows = opened(path)
    keys = ["00000000.0", "00000000.1", "00000002.0", "00000002.1", "00000002.2"]
    assert {key: row["data"] for key, row in rows.items()} == dict(zip(keys, BYTES, strict=True))
    assert [row["label"] for row in rows.values()] == list("aaccc")
    assert open_corpus(path).left_out == {NO_PICTURE: 2}


def test_a_column_of_pictures_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "x.parquet", image=pa.array(STRUCTS, IMAGE), mask=pa.array(OTHERS, IMAGE), sample=NESTED)
    plain = opened(path)
    assert [row["data"] for row in plain.values()] == BYTES and next(iter(plain)) == "00000000"
    assert "pictures are taken from column image; there is also mask" in str(open_corpus(path).notes)
    assert opened(path, Choice(image_column="image")) == plain
    masks = opened(path, Choice(image_column="mask"))
    assert next(iter(masks)) == "00000000@mask" and [row["data"] for row in masks.values()] == [
        o["bytes"] for o in OTHERS
    ]
    assert list(opened(path, Choice(image_column="sample.image")))[4] == "00000004@sample.image"
    before = open_corpus(path)
    assert open_corpus(path, previous=before, choice=Choice(image_column="mask")).samples["sha256"][0].as_py() != (
        before.samples["sha256"][0].as_py()
    ), "hashes of another column do not vouch for this one"
    with pytest.raises(CorpusError, match=r"has no column nope; --image-column may be image, mask, sample\.image$"):
        open_corpus(path, choice=Choice(image_column="nope"))
    with pytest.raises(CorpusError, match=r"column sample\.id of table .* holds int64, not pictures"):
        open_corpus(path, choice=Choice(image_column="sample.id"))
    table(path, left=pa.array(STRUCTS, IMAGE), right=pa.array(OTHERS, IMAGE))
    with pytest.raises(CorpusError, match=r"several picture columns, left, right; choose one .* --image-column"):
        open_corpus(path)
    assert [row["data"] for row in opened(path, Choice(image_column="right")).values()] == [o["bytes"] for o in OTHERS]


def test_text_that_is_no_path_is_refused(tmp_path: Path) -> None:
    import base64

    path = table(tmp_path / "x.parquet", image=[base64.b64encode(data).decode() for data in BYTES])
    with pytest.raises(CorpusError, match=r"column image of table .* holds pictures as base64 text; decode it"):
        open_corpus(path)
    table(path, url=["https://x.org/1.png"])
    with pytest.raises(CorpusError, match=r"names pictures on the web, such as https://x\.org/1\.png; download them"):
        open_corpus(path, choice=Choice(image_column="url"))


LABELS: list[tuple[str, Any, list[str | None]]] = [
    ("label", pa.array(["cat", "dog", None, "cat", "dog"]).dictionary_encode(), ["cat", "dog", None, "cat", "dog"]),
    ("label", pa.array([3, 4, 5, None, 3]).dictionary_encode(), ["3", "4", "5", None, "3"]),
    ("label", pa.array([0.0, 1.0, None, float("nan"), 2.0]), ["0", "1", None, None, "2"]),
    ("label", pa.array(np.array([0, 1, 2, 0, 1], np.float16)), ["0", "1", "2", "0", "1"]),
    ("label", pa.array([True, False, True, None, True]), ["True", "False", "True", None, "True"]),
    ("label", pa.array(list("abcde"), pa.large_string()), list("abcde")),
    ("label", pa.array(list("abcde")).cast(pa.string_view()), list("abcde")),
    *((name, pa.array(list("abcde")), list("abcde")) for name in ("labels", "fine_label", "category", "class_name")),
    *((name, pa.array(range(5)), list("01234")) for name in ("class_id", "coarse_label", "target", "label_id")),
]


@pytest.mark.parametrize(("name", "column", "expected"), LABELS)
def test_labels_of_every_type_and_name(tmp_path: Path, name: str, column: pa.Array, expected: list[str | None]) -> None:
    path = table(tmp_path / "x.parquet", image=BYTES, **{name: column})
    assert [row["label"] for row in opened(path).values()] == expected
    assert not open_corpus(path).notes


def test_a_column_of_labels_is_chosen_and_said(tmp_path: Path) -> None:
    features = {"coarse_label": {"names": ["animal", "plant"], "_type": "ClassLabel"}}
    made = pa.table({"image": BYTES, "fine_label": list("abcde"), "coarse_label": [0, 1, 0, 1, -1], "many": [[1]] * 5})
    made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(made, path := tmp_path / "x.parquet")
    assert [row["label"] for row in opened(path).values()] == list("abcde")
    assert open_corpus(path).notes == (
        "labels are taken from column fine_label; there is also coarse_label: choose with --label-column",
    )
    chosen = opened(path, Choice(label_column="coarse_label"))
    assert [row["label"] for row in chosen.values()] == ["animal", "plant", "animal", "plant", None]
    with pytest.raises(CorpusError, match=r"has no column breed; --label-column may be fine_label, coarse_label"):
        open_corpus(path, choice=Choice(label_column="breed"))
    with pytest.raises(CorpusError, match=r"column many of table .* holds list.* not labels"):
        open_corpus(path, choice=Choice(label_column="many"))


def test_what_is_no_label_is_said(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", image=BYTES, label=[0.25, 1.0, 2.0, 3.0, None])
    assert [row["label"] for row in opened(path).values()] == [None] * 5
    assert "holds numbers such as 0.25, which are not classes" in str(open_corpus(path).notes)
    table(path, image=BYTES, labels=[[1, 2]] * 5)
    assert "column labels holds list" in str(open_corpus(path).notes)
    odd = pa.array([b"caf\xe9", b"ok", b"ok", b"ok", None]).view(pa.string())
    table(path, image=BYTES, label=odd, caption=odd)
    assert [row["label"] for row in opened(path).values()] == [None, "ok", "ok", "ok", None]
    assert "2 labels and captions of table" in str(open_corpus(path).notes)


def test_paths_as_tools_write_them(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "my pictures", count=5)
    keys = index_folder(folder).samples["key"].to_pylist()
    (tmp_path / "link").symlink_to(folder)
    spaced = folder / "class0" / "a b%20c.png"
    spaced.write_bytes(png(77))
    paths = [
        (folder / keys[0]).as_uri(),
        f"file:{folder / keys[1]}",
        f"file://localhost{folder / keys[2]}",
        keys[3].replace("/", "\\"),
        str(tmp_path / "link" / keys[4]),
        spaced.as_uri(),
    ]
    expected = [*keys, "class0/a b%20c.png"]
    for column in (pa.array(paths), pa.array([{"bytes": None, "path": path} for path in paths], IMAGE)):
        name = "path" if pa.types.is_string(column.type) else "image"
        path = table(folder / "t.parquet", **{name: column})
        assert list(opened(path)) == expected
    assert list(opened(table(folder / "t.parquet", filename=pa.array(keys)))) == keys
    table(folder / "t.parquet", image_path=pa.array(keys), image_bytes=BYTES)
    assert list(opened(folder / "t.parquet")) == keys, "files that are there go first"
    assert "there is also image_bytes" in str(open_corpus(folder / "t.parquet").notes)
    stored = opened(folder / "t.parquet", Choice(image_column="image_bytes"))
    assert [row["data"] for row in stored.values()] == BYTES
    foreign = [f"/home/someone/.cache/{i}.png" for i in range(5)]
    table(folder / "t.parquet", image=pa.array([{"bytes": None, "path": path} for path in foreign], IMAGE))
    with pytest.raises(CorpusError, match=r"names /home/someone/\.cache/0\.png, which does not lie below"):
        open_corpus(folder / "t.parquet")


def save_to_disk(folder: Path, tables: list[pa.Table], *, batch: int = 2) -> Path:
    """Write tables as `datasets` does: streams of record batches, and JSON files that list them. Return the folder."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, made in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
            writer.write_table(made, max_chunksize=batch)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def repeated(value: Any, count: int) -> pa.Array:
    """A column in which every row has the same value, which is in memory once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))


def write_repeated(path: Path, layout: str, count: int) -> Path:
    """Write pictures of a megabyte, all the same one, and captions of as much; a file of two megabytes."""
    image = repeated(bytes(2**20), count)
    struct = pa.StructArray.from_arrays([image, pa.array([f"{i}.png" for i in range(count)])], ["bytes", "path"])
    caption = repeated("x" * 2**20, 1 if layout == "list" else count)
    listed = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), struct)
    columns = pa.table({"image": {"binary": image, "list": listed}.get(layout, struct), "text": caption})
    if layout == "arrow":
        with pa.ipc.new_file(path.with_suffix(".arrow"), columns.schema) as file:
            file.write_table(columns)
        return path.with_suffix(".arrow")
    pq.write_table(columns, path, dictionary_pagesize_limit=2**30, store_schema=False, compression="none")
    return path


@pytest.mark.parametrize("layout", ["binary", "struct", "list", "arrow"])
def test_a_long_value_under_many_rows_is_decoded_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """A file of two megabytes that stands for 600."""
    monkeypatch.setattr(table_files, "REPEATED_BYTES", 16 * 2**20)
    monkeypatch.setattr(tables, "_rows", tables.RowReader(cache_bytes=16 * 2**20))
    path = write_repeated(tmp_path / "x.parquet", layout, 300)
    allocated = [0]
    for kind in (table_files.ParquetTable, table_files.ArrowTable):

        def batches(*args: Any, real: Any = kind.batches) -> Iterator[pa.RecordBatch]:
            for batch in real(*args):
                allocated.append(pa.total_allocated_bytes() - before)
                yield batch

        monkeypatch.setattr(kind, "batches", batches)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        corpus = open_corpus(path)
        inside = insides(corpus.samples)[7]
        assert read_picture(corpus.root, corpus.samples["key"][7].as_py(), inside) == bytes(2**20)
        python_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(corpus) == 300 and corpus.samples["caption"].null_count == 300
    assert any("longer than 65536 characters, and are left out" in note for note in corpus.notes)
    assert max(allocated) < 80 * 2**20 and python_bytes < 80 * 2**20


def arrow_table(rows: list[dict[str, Any]]) -> pa.Table:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    schema = pa.schema([("image", IMAGE), ("label", pa.int64())])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return pa.Table.from_pylist([{"image": row, "label": i % 2} for i, row in enumerate(rows)], schema=schema)


def test_an_arrow_file_is_read_by_rows(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "d", [arrow_table(STRUCTS)])
    (path,) = folder.glob("*.arrow")
    assert {key: row["data"] for key, row in opened(path).items()} == {f"{i:08d}": d for i, d in enumerate(BYTES)}
    assert [row["label"] for row in opened(path).values()] == ["cat", "dog", "cat", "dog", "cat"]
    data = path.read_bytes()
    for cut in (8, len(data) // 2):
        path.write_bytes(data[:-cut])
        with pytest.raises(CorpusError, match=r"arrow (is truncated after \d rows|cannot be read as Arrow)"):
            open_corpus(path)
    os.truncate(path, 0)
    with pytest.raises(CorpusError, match="cannot be read as Arrow"):
        table_rows(StoragePath.of(folder), path.name, {})


def test_a_folder_of_save_to_disk_opens_as_it_is(tmp_path: Path) -> None:
    whole = tmp_path / "dict"
    save_to_disk(whole / "train", [arrow_table(STRUCTS[:3]), arrow_table(STRUCTS[3:])])
    save_to_disk(whole / "test", [arrow_table(OTHERS[:2])])
    (whole / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name in ("cache-0a1b.arrow", "tmpq1w2"):
        (whole / "train" / name).write_bytes(b"of a map that was cut off")
    corpus = open_corpus(whole)
    data = {
        key: read_picture(corpus.root, key, inside)
        for key, inside in zip(corpus.samples["key"].to_pylist(), insides(corpus.samples), strict=True)
    }
    shards = ["test/data-00000-of-00001", "train/data-00000-of-00002", "train/data-00001-of-00002"]
    keys = [f"{shards[0]}.arrow/{i:08d}" for i in range(2)] + [f"{shards[1]}.arrow/{i:08d}" for i in range(3)]
    keys += [f"{shards[2]}.arrow/{i:08d}" for i in range(2)]
    assert data == dict(zip(keys, [*(other["bytes"] for other in OTHERS[:2]), *BYTES], strict=True))
    assert corpus.left_out == {
        "Arrow files of what was computed from a data set": 1,
        "files of kinds that are not read: .json": 3,
        "files of kinds that are not read: no suffix": 1,
        "files of metadata": 2,
    }
    assert (
        open_corpus(f"{whole}/train/data-{{00000..00001}}-of-00002.arrow")
        .samples["sha256"]
        .equals(corpus.samples["sha256"][2:])
    )
    (whole / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(CorpusError, match=r"data-00001-of-00002\.arrow, listed in state\.json next to it, is missing"):
        open_corpus(whole)
    pq.write_table(pa.table({"image": BYTES}), whole / "x.parquet")
    with pytest.raises(
        CorpusError, match=r"holds Arrow \(test/data-.*\) and Parquet \(x\.parquet\).*name the files of one kind"
    ):
        open_corpus(whole)


def test_a_table_of_paths_and_bytes_is_indexed_again(tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "pictures", count=3)
    rows = [{"bytes": None, "path": key} for key in index_folder(folder).samples["key"].to_pylist()]
    table(folder / "a.parquet", image=pa.array([*rows, {"bytes": png(8), "path": None}], IMAGE))
    table(folder / "b.parquet", image=pa.array([{"bytes": png(9), "path": None}], IMAGE))
    first, again = (make_index(folder / "{a,b}.parquet", tmp_path / "i.parquet") for _ in range(2))
    assert len(first) == 5 and again.samples.equals(first.samples)
