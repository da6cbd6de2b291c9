"""Format 1 as `FORMAT.md` has it: these literals change only together with the format's number."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.typing import NDArray
from store_cases import Case, make_case, make_spec, write_store

from eupe.store import layout
from eupe.store.layout import StoreSpec
from eupe.store.stats import Moments, merge_all
from eupe.store.writer import create_store

LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
CRC32C = {"name": "crc32c"}
ABSENT = 2**64 - 1


def blosc(typesize: int, shuffle: str) -> dict[str, Any]:
    settings = {"typesize": typesize, "cname": "zstd", "clevel": 3, "shuffle": shuffle, "blocksize": 0}
    return {"name": "blosc", "configuration": settings}


def sharding(chunk_shape: list[int], *first: dict[str, Any]) -> list[dict[str, Any]]:
    codecs = [*first, LITTLE, blosc(2, "bitshuffle"), CRC32C]
    settings = {
        "chunk_shape": chunk_shape,
        "codecs": codecs,
        "index_codecs": [LITTLE, CRC32C],
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": settings}]


TRANSPOSE = {"name": "transpose", "configuration": {"order": [0, 1, 4, 2, 3]}}
METADATA: dict[str, tuple[str, list[int], list[int], Any, list[dict[str, Any]]]] = {
    "boxes": ("int32", [11, 3, 4], [4, 3, 4], 0, [LITTLE, blosc(4, "shuffle"), CRC32C]),
    "flips": ("bool", [11, 3], [4, 3], False, [{"name": "bytes"}, blosc(1, "shuffle"), CRC32C]),
    "digests": ("uint64", [11, 3], [4, 3], 0, [LITTLE, blosc(8, "shuffle"), CRC32C]),
    "32/summary": ("float16", [11, 3, 5], [4, 3, 5], "NaN", sharding([4, 3, 5])),
    "48/summary": ("float16", [11, 3, 5], [4, 3, 5], "NaN", sharding([4, 3, 5])),
    "32/dense": ("float16", [11, 3, 2, 2, 6], [4, 3, 2, 2, 6], "NaN", sharding([1, 1, 2, 2, 6], TRANSPOSE)),
    "48/dense": ("float16", [11, 3, 3, 3, 6], [4, 3, 3, 3, 6], "NaN", sharding([1, 1, 3, 3, 6], TRANSPOSE)),
}
DIMENSIONS = {
    "boxes": ["sample", "view", "corner"],
    "flips": ["sample", "view"],
    "digests": ["sample", "view"],
    "summary": ["sample", "view", "channel"],
    "dense": ["sample", "view", "row", "column", "channel"],
}


@pytest.mark.parametrize("path", METADATA)
def test_array_metadata(whole: Path, path: str) -> None:
    metadata = json.loads((whole / path / "zarr.json").read_text())
    data_type, shape, shard, fill_value, codecs = METADATA[path]
    assert metadata["zarr_format"] == 3 and metadata["node_type"] == "array"
    assert metadata["data_type"] == data_type
    assert metadata["shape"] == shape
    assert metadata["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": shard}}
    assert metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
    assert metadata["fill_value"] == fill_value
    assert metadata["codecs"] == codecs
    assert metadata["dimension_names"] == DIMENSIONS[path.rpartition("/")[2]]


def test_root_attributes(case: Case, whole: Path) -> None:
    attributes = json.loads((whole / "zarr.json").read_text())["attributes"]
    assert attributes == {
        "eupe": {
            "format": 1,
            "teacher": case.spec.teacher,
            "corpus": {"fingerprint": "cd" * 32, "num_samples": 11, "root": "/pictures"},
            "views": {"policy": "rrc", "num_views": 3, "seed": 0, "scale": [0.08, 1.0]},
            "sizes": [32, 48],
            "grids": [2, 3],
            "tokens": ["summary", "dense"],
            "samples_per_part": 4,
            "precision": "fp16",
            "versions": {"eupe": "0"},
        }
    }


def test_the_tree(whole: Path) -> None:
    arrays = {f"{path}/zarr.json" for path in METADATA}
    objects = {
        f"{path}/c/{part}/{'/'.join('0' * (len(shape) - 1))}"
        for path, (_, shape, *_) in METADATA.items()
        for part in range(3)
    }
    features = [path for path in METADATA if "/" in path]
    stats = {f"stats/{p}/{name}/zarr.json" for p in features for name in ("count", "mean", "std")}
    stats |= {f"stats/{p}/{name}" for p in features for name in ("count/c", "mean/c/0", "std/c/0")}
    groups = {"", "32/", "48/", "stats/", "stats/32/", "stats/48/", *(f"stats/{p}/" for p in features)}
    parts = {f"parts/{part:05d}.parquet" for part in range(3)}
    found = {file.relative_to(whole).as_posix() for file in whole.rglob("*") if file.is_file()}
    assert found == arrays | objects | stats | {f"{group}zarr.json" for group in groups} | parts


def crc32c(data: bytes) -> int:
    """Castagnoli's, bit by bit."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF


def checked(data: bytes) -> bytes:
    """What stands before the four bytes of its checksum."""
    assert int.from_bytes(data[-4:], "little") == crc32c(data[:-4])
    return data[:-4]


def chunks_by_hand(shard: bytes, num_chunks: int) -> list[bytes | None]:
    """A shard's chunks, decompressed, None where one is absent."""
    index = np.frombuffer(checked(shard[-16 * num_chunks - 4 :]), "<u8").reshape(num_chunks, 2).tolist()
    return [
        None if start == ABSENT else bytes(numcodecs.Blosc().decode(checked(shard[start : start + length])))
        for start, length in index
    ]


def test_a_dense_shard_read_by_hand(case: Case, whole: Path) -> None:
    """Index, checksums, blosc, channel-first bytes: a reader needs nothing else. The last part lacks a sample."""
    chunks = chunks_by_hand((whole / "48/dense/c/2/0/0/0/0").read_bytes(), 4 * 3)
    for place, chunk in enumerate(chunks):
        sample, view = divmod(place, 3)
        if 8 + sample >= case.spec.num_samples:
            assert chunk is None
            continue
        assert chunk is not None
        dense = np.frombuffer(chunk, "<f2").reshape(6, 3, 3).transpose(1, 2, 0)
        assert dense.tobytes() == case.arrays["48/dense"][8 + sample, view].tobytes()


def test_a_failed_sample_is_stored_as_nan_and_not_left_out(whole: Path) -> None:
    chunks = chunks_by_hand((whole / "32/dense/c/1/0/0/0/0").read_bytes(), 4 * 3)
    assert None not in chunks
    for chunk in chunks[3:6]:
        assert chunk is not None and np.isnan(np.frombuffer(chunk, "<f2")).all(), "sample 5"


def test_a_summary_shard_read_by_hand(tmp_path: Path) -> None:
    """Chunks of 32 rows: 32 rows of 1000 halves are the largest power of two below 64 KiB."""
    case = make_case(make_spec(num_samples=70, num_views=1, samples_per_part=64, summary_dim=1000, grids={32: 1}))
    write_store(case, tmp_path / "store.zarr")
    chunks = chunks_by_hand((tmp_path / "store.zarr/32/summary/c/0/0/0").read_bytes(), 2)
    for i, chunk in enumerate(chunks):
        assert chunk == case.arrays["32/summary"][32 * i : 32 * i + 32].tobytes()


def test_a_small_array_read_by_hand(case: Case, whole: Path) -> None:
    """Not sharded: one chunk per part, padded with the fill value."""
    chunk = numcodecs.Blosc().decode(checked((whole / "boxes/c/2/0/0").read_bytes()))
    boxes = np.frombuffer(chunk, "<i4").reshape(4, 3, 4)
    np.testing.assert_array_equal(boxes[:3], case.arrays["boxes"][8:])
    assert not boxes[3].any()


def decode(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), "<f8")


def test_a_parts_file(case: Case, whole: Path) -> None:
    table = pq.read_table(whole / "parts/00001.parquet")
    assert [f"{field.name} {field.type}{'' if field.nullable else ' not null'}" for field in table.schema] == [
        "key string not null",
        "sha256 string",
        "width int32",
        "height int32",
        "label string",
        "status string not null",
        "error string",
    ]
    assert table.slice(0, 2).to_pylist() == [
        {
            "key": "folder ü/4.jpg",
            "sha256": f"{4:064x}",
            "width": 644,
            "height": 480,
            "label": "label 1",
            "status": "ok",
            "error": None,
        },
        {
            "key": "folder ü/5.jpg",
            "sha256": None,
            "width": None,
            "height": None,
            "label": None,
            "status": "failed",
            "error": "the file is empty",
        },
    ]
    metadata = json.loads(table.schema.metadata[b"eupe.part"])
    assert metadata.keys() == {"moments", "num_clipped", "versions"}
    for path, values in case.features.items():
        moments = metadata["moments"][path]
        assert moments.keys() == {"count", "mean", "m2"}
        vectors = values[4:8][case.ok[4:8]].reshape(-1, values.shape[-1]).astype(np.float64)
        assert moments["count"] == len(vectors)
        np.testing.assert_allclose(decode(moments["mean"]), vectors.mean(axis=0), rtol=1e-12, atol=1e-7)
        np.testing.assert_allclose(decode(moments["m2"]), vectors.var(axis=0) * len(vectors), rtol=1e-12)


def test_statistics_are_the_parts_merged_in_order_to_the_last_bit(case: Case, whole: Path) -> None:
    group = zarr.open_group(whole / "stats", mode="r")
    for path in case.features:
        files = (pq.read_schema(whole / f"parts/{part:05d}.parquet").metadata for part in range(3))
        parts = [json.loads(metadata[b"eupe.part"])["moments"][path] for metadata in files]
        merged = merge_all(Moments(part["count"], decode(part["mean"]), decode(part["m2"])) for part in parts)
        count, mean, std = (group[path][name] for name in ("count", "mean", "std"))
        assert (count.dtype, count.shape, int(count[()])) == (np.int64, (), merged.count)
        assert mean.dtype == std.dtype == np.float64
        assert mean[:].tobytes() == merged.mean.tobytes()
        assert std[:].tobytes() == merged.std.tobytes()


# The page itself

PAGE = Path(layout.__file__).with_name("FORMAT.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def test_the_page_shows_what_is_written(tmp_path: Path) -> None:
    root, dense, *_ = map(json.loads, blocks("json"))
    spec = StoreSpec.from_json(root["attributes"]["eupe"], where="FORMAT.md")
    create_store(tmp_path / "store.zarr", spec)
    assert json.loads((tmp_path / "store.zarr/zarr.json").read_text()) == root
    assert json.loads((tmp_path / "store.zarr/112/dense/zarr.json").read_text()) == dense


def test_the_page_shows_a_part(whole: Path) -> None:
    row, metadata = map(json.loads, blocks("json")[2:])
    table = pq.read_table(whole / "parts/00000.parquet")
    assert list(row) == table.schema.names
    assert metadata.keys() == json.loads(table.schema.metadata[b"eupe.part"]).keys()


def test_the_python_example_runs(case: Case, whole: Path) -> None:
    (example,) = blocks("python")
    names: dict[str, Any] = {}
    exec(example.replace("dinov2.zarr", str(whole)), names)
    assert names["sample"]["key"] == case.rows[6].key
    assert names["dense"].tobytes() == case.arrays["32/dense"][6, 0].tobytes()
