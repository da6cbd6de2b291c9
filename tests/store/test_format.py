"""Format 1 as `FORMAT.md` has it: these literals change only together with the format's number."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from store_cases import CODED, Case, make_case, make_spec, write_store

from eupe.store import layout
from eupe.store.layout import StoreSpec
from eupe.store.stats import Moments, merge_all
from eupe.store.writer import StoreWriter, create_store, finish_store

LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
CRC32C = {"name": "crc32c"}
ABSENT = 2**64 - 1
COMPRESSION = {"cname": "lz4", "clevel": 9}


def blosc(typesize: int, shuffle: str) -> dict[str, Any]:
    settings = {"typesize": typesize, **COMPRESSION, "shuffle": shuffle, "blocksize": 0}
    return {"name": "blosc", "configuration": settings}


def sharding(chunk_shape: list[int], *first: dict[str, Any], halves: bool = True) -> list[dict[str, Any]]:
    codecs = [*first, *([LITTLE] if halves else [{"name": "bytes"}]), blosc(2, "bitshuffle"), CRC32C]
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
CODED_METADATA = {
    **METADATA,
    "32/dense": ("int8", [11, 3, 2, 2, 8], [4, 3, 2, 2, 8], 127, sharding([1, 1, 2, 2, 8], TRANSPOSE, halves=False)),
    "48/dense": ("int8", [11, 3, 3, 3, 8], [4, 3, 3, 3, 8], 127, sharding([1, 1, 3, 3, 8], TRANSPOSE, halves=False)),
}
DIMENSIONS = {
    "boxes": ["sample", "view", "corner"],
    "flips": ["sample", "view"],
    "digests": ["sample", "view"],
    "summary": ["sample", "view", "channel"],
    "dense": ["sample", "view", "row", "column", "channel"],
}


@pytest.mark.parametrize("path", METADATA)
def test_array_metadata(whole: Path, coded_store: Path, path: str) -> None:
    for store, expected in ((whole, METADATA), (coded_store, CODED_METADATA)):
        metadata = json.loads((store / path / "zarr.json").read_text())
        data_type, shape, shard, fill_value, codecs = expected[path]
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
            "corpus": {"fingerprint": "cd" * 32, "segments": [11], "root": "/pictures"},
            "views": {"policy": "rrc", "num_views": 3, "seed": 0, "scale": [0.08, 1.0]},
            "sizes": [32, 48],
            "grids": [2, 3],
            "tokens": ["summary", "dense"],
            "samples_per_part": 4,
            "precision": {"summary": "fp16", "dense": "fp16"},
            "pixels": False,
            "calibration": {},
            "fidelity": {},
            "versions": {"eupe": "0"},
        }
    }


def test_attributes_of_a_coded_store(coded: Case, coded_store: Path) -> None:
    eupe = json.loads((coded_store / "zarr.json").read_text())["attributes"]["eupe"]
    assert eupe["precision"] == {"summary": "bitround:3", "dense": "int8"}
    assert eupe["calibration"] == coded.spec.calibration
    assert eupe["calibration"].keys() == {"32/dense", "48/dense"}


def test_the_tree(whole: Path) -> None:
    arrays = {f"{path}/zarr.json" for path in METADATA}
    objects = {
        f"{path}/c/{part}/{'/'.join('0' * (len(shape) - 1))}"
        for path, (_, shape, *_) in METADATA.items()
        for part in range(3)
    }
    features = [path for path in METADATA if "/" in path]
    statistics = {"count": "c", "mean": "c/0", "std": "c/0", "cov": "c/0/0", "norms": "c/0", "outliers": "c/0/0"}
    stats = {
        f"stats/{p}/{name}/{file}"
        for p in features
        for name, chunk in statistics.items()
        for file in ("zarr.json", chunk)
        if name != "outliers" or p.endswith("dense")
    }
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
    """Check the CRC-32C in the last four bytes, and return the bytes before it."""
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


def test_a_shard_has_its_chunks_in_order_and_nothing_else(whole: Path) -> None:
    data = (whole / "48/dense/c/2/0/0/0/0").read_bytes()
    index = np.frombuffer(data[-16 * 12 - 4 : -4], "<u8").reshape(12, 2)[:9].tolist()
    end = 0
    for offset, length in index:
        assert offset == end
        end += length
    assert end == len(data) - 16 * 12 - 4


def test_an_int8_shard_read_by_hand(coded: Case, coded_store: Path) -> None:
    """Channel-first bytes, two channels of them the tokens' scales, half by half."""
    calibration = coded.spec.array_calibration("48/dense")
    assert calibration is not None
    chunks = chunks_by_hand((coded_store / "48/dense/c/1/0/0/0/0").read_bytes(), 4 * 3)
    for place, chunk in enumerate(chunks):
        assert chunk is not None
        stored = np.frombuffer(chunk, "i1").reshape(8, 3, 3).transpose(1, 2, 0)
        sample, view = divmod(place, 3)
        if sample == 1:
            assert (stored == 127).all(), "sample 5 has failed"
            continue
        for token, expected in zip(
            stored.reshape(9, 8), coded.kept["48/dense"][4 + sample, view].reshape(9, 6), strict=True
        ):
            assert token[:6].min() >= -127
            scale = np.float32(struct.unpack("<e", token[6:].tobytes())[0])
            np.testing.assert_array_equal(token[:6] * scale * calibration.std + calibration.mean, expected)


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
    """A small array is not sharded: it has one chunk per part, padded with the fill value."""
    chunk = numcodecs.Blosc().decode(checked((whole / "boxes/c/2/0/0").read_bytes()))
    boxes = np.frombuffer(chunk, "<i4").reshape(4, 3, 4)
    np.testing.assert_array_equal(boxes[:3], case.arrays["boxes"][8:])
    assert not boxes[3].any()


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
    assert metadata.keys() == {"objects", "norms", "outliers", "num_clipped", "num_nonfinite", "versions"}
    assert table.schema.metadata[b"eupe.crc32"].decode() == f"{zlib.crc32(table.schema.metadata[b'eupe.part']):08x}"
    assert {name: np.shape(counts) for name, counts in metadata["norms"].items()} == dict.fromkeys(
        case.features, (128,)
    )
    assert {name: np.shape(counts) for name, counts in metadata["outliers"].items()} == {
        "32/dense": (2, 2),
        "48/dense": (3, 3),
    }
    for name, facts in metadata["objects"].items():
        if name == "parts/00001.moments":
            continue
        data = (whole / name).read_bytes()
        assert facts == {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    assert len(metadata["objects"]) == len(METADATA) + 1


def read_safetensors(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Read tensors by the specification of safetensors: a length, a JSON header, the tensors' bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    dtypes = {"F64": "<f8", "I64": "<i8"}
    return {
        name: np.frombuffer(data[8 + length :][slice(*entry["data_offsets"])], dtypes[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


@pytest.mark.parametrize("precision", [None, CODED], ids=["fp16", "coded"])
def test_moments_and_statistics(tmp_path: Path, precision: dict[str, str] | None) -> None:
    """Each part's moments are numpy's; the statistics are these moments merged in order, equal to the last bit."""
    case = make_case(make_spec(precision=precision), failed={5})
    path = tmp_path / "s.zarr"
    create_store(path, case.spec)
    for part in range(3):
        StoreWriter(path).commit(case.part(part))
    parts = [read_safetensors((path / f"parts/{part:05d}.moments").read_bytes()) for part in range(3)]
    finish_store(path)
    group = zarr.open_group(path / "stats", mode="r")
    assert group.attrs["eupe"] == {"num_parts": 3, "num_clipped": 3, "num_nonfinite": 6}
    for name in case.features:
        found = []
        for part, tensors in enumerate(parts):
            rows = slice(4 * part, 4 * part + 4)
            vectors = case.kept[name][rows][case.ok[rows]].astype(np.float64)
            vectors = vectors.reshape(-1, vectors.shape[-1])
            centred = vectors - vectors.mean(axis=0)
            dim = vectors.shape[1]
            count, mean, upper = (tensors[f"{name}/{what}"] for what in ("count", "mean", "scatter"))
            assert count.tolist() == [len(vectors)]
            np.testing.assert_allclose(mean, vectors.mean(axis=0), rtol=1e-12, atol=1e-7)
            expected = [centred[:, i] @ centred[:, j] for i in range(dim) for j in range(i, dim)]
            np.testing.assert_allclose(upper, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())
            scatter = np.zeros((dim, dim))
            scatter[np.triu_indices(dim)] = upper
            scatter.T[np.triu_indices(dim)] = upper
            found.append(Moments(len(vectors), mean, scatter))
        merged = merge_all(found)
        assert (group[name]["count"].dtype, group[name]["count"].shape) == (np.int64, ())
        assert group[name]["count"][()] == merged.count
        for what, values in (("mean", merged.mean), ("std", merged.std), ("cov", merged.covariance)):
            assert group[name][what].dtype == np.float64
            assert group[name][what][:].tobytes() == values.tobytes()


# The page itself

PAGE = Path(layout.__file__).with_name("FORMAT.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def test_the_page_shows_what_is_written(tmp_path: Path) -> None:
    root, dense, *_ = map(json.loads, blocks("json"))
    (shortened,) = root["attributes"]["eupe"]["calibration"].values()
    for word, triple in shortened.items():
        assert len(base64.b64decode(triple)) == 3 * 4
        shortened[word] = base64.b64encode(base64.b64decode(triple) * 128).decode()
    spec = StoreSpec.from_json(root["attributes"]["eupe"], where="FORMAT.md")
    create_store(tmp_path / "store.zarr", spec)
    assert json.loads((tmp_path / "store.zarr/zarr.json").read_text()) == root
    assert json.loads((tmp_path / "store.zarr/112/dense/zarr.json").read_text()) == dense


def test_the_page_shows_a_part(whole: Path) -> None:
    row, metadata = map(json.loads, blocks("json")[2:])
    table = pq.read_table(whole / "parts/00000.parquet")
    assert list(row) == table.schema.names
    assert metadata.keys() == json.loads(table.schema.metadata[b"eupe.part"]).keys()


def test_the_python_example_runs(case: Case, whole: Path, coded: Case, coded_store: Path) -> None:
    reading, dequantise = blocks("python")
    names: dict[str, Any] = {}
    exec(reading.replace("dinov2.zarr", str(whole)), names)
    assert names["sample"]["key"] == case.rows[6].key
    assert names["dense"].tobytes() == case.arrays["32/dense"][6, 0].tobytes()
    exec(reading.replace("dinov2.zarr", str(coded_store)) + dequantise, names)
    tokens = names["dequantise"](names["dense"], names["spec"]["calibration"][names["path"]])
    np.testing.assert_array_equal(tokens, coded.kept["32/dense"][6, 0])


def test_the_page_names_every_field(whole: Path) -> None:
    eupe = json.loads((whole / "zarr.json").read_text())["attributes"]["eupe"]
    table = PAGE.read_text("utf-8").partition("| field | meaning |")[2].partition("## Arrays")[0]
    for field in eupe:
        assert re.search(rf"`{field}[`.]", table), field
