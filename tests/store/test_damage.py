"""Damaged stores: whatever happens to the bytes, a read gives the stored bits or raises. Never anything else."""

from __future__ import annotations

import random
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from store_cases import CODED, Arrays, Case, as_arrays, assert_same_bits, every_view, make_spec

from eupe.common.storage import StoragePath
from eupe.errors import PartCorruptError
from eupe.store import open_store
from eupe.store.layout import ArrayLayout, arrays
from eupe.store.reader import read_part_metadata

FLIPS_PER_FILE = 25
PART = 1
ARRAYS = arrays(make_spec())
CODED_FEATURES = [array for array in arrays(make_spec(precision=CODED)) if array.sharded]


def shard(store: Path, path: str, part: int) -> Path:
    """The object that holds a part of an array."""
    (file,) = [file for file in (store / path / "c" / str(part)).rglob("*") if file.is_file()]
    return file


def read_samples(case: Case, store: Path, samples: range | list[int]) -> None:
    """Read some samples' views at every size and their digests, with nothing cached, and check each bit.

    Raises: PartCorruptError.
    """
    rows, views = every_view(case.spec, samples)
    opened = open_store(store)
    got: list[tuple[int, Arrays]] = [(size, as_arrays(opened.read(rows, views, size=size))) for size in case.spec.sizes]
    for size, features in got:
        assert_same_bits(features, case.expected(rows, views, size))
    np.testing.assert_array_equal(opened.read_digests(rows, views), case.arrays["digests"][rows, views])


def in_part(case: Case, part: int) -> range:
    return range(case.spec.num_samples)[case.spec.part_rows(part)]


@pytest.mark.parametrize("part", [PART, 2], ids=["full part", "partial last part"])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: array.path)
def test_a_flipped_bit_is_never_read(case: Case, copy: Path, array: ArrayLayout, part: int) -> None:
    """Every byte of an object is under some checksum, so reading the whole part always raises."""
    flip_bits(case, copy, array, part)


@pytest.mark.parametrize("array", CODED_FEATURES, ids=lambda array: array.path)
def test_a_flipped_bit_of_coded_features_is_never_read(
    coded: Case, coded_store: Path, tmp_path: Path, array: ArrayLayout
) -> None:
    """The scales of int8 tokens among them."""
    flip_bits(coded, shutil.copytree(coded_store, tmp_path / "copy.zarr"), array, 2)


def flip_bits(case: Case, store: Path, array: ArrayLayout, part: int) -> None:
    file = shard(store, array.path, part)
    data = file.read_bytes()
    rng = random.Random(f"{array.path} {part}")
    for position in {0, len(data) - 1, *rng.sample(range(len(data)), min(len(data), FLIPS_PER_FILE))}:
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(PartCorruptError, match=r"copy\.zarr.*`eupe store repair \S*copy\.zarr`"):
            read_samples(case, store, in_part(case, part))
    read_samples(case, store, in_part(case, 0))
    file.write_bytes(data)
    read_samples(case, store, range(case.spec.num_samples))


@pytest.mark.parametrize("statistic", ["count", "mean", "std", "cov", "norms", "outliers"])
def test_a_flipped_bit_of_the_statistics_is_never_read(copy: Path, statistic: str) -> None:
    (file,) = (
        file for file in (copy / "stats/48/dense" / statistic).rglob("*") if file.suffix != ".json" and file.is_file()
    )
    data = file.read_bytes()
    for position in range(0, len(data), max(1, len(data) // 20)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises(PartCorruptError):
            open_store(copy).full_stats(48, "dense")
    file.unlink()
    with pytest.raises(PartCorruptError):
        open_store(copy).full_stats(48, "dense")


def test_a_damaged_mark_of_the_statistics_is_refused(copy: Path) -> None:
    file = copy / "stats/zarr.json"
    data = file.read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"null", b"{}", b"\xff" + data):
        file.write_bytes(damaged)
        with pytest.raises(PartCorruptError, match=r"stats/zarr\.json is damaged"):
            _ = open_store(copy).finished


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: array.path)
def test_an_object_in_anothers_place_reads_well_and_the_commit_files_tell(
    case: Case, copy: Path, array: ArrayLayout
) -> None:
    """Its own checksums hold wherever it lies; `eupe store verify` compares with what the part's file records.

    Which is a CRC-32 of zlib's kind: the CRC-32C of bytes that end in their CRC-32C is always the same, so objects
    whose chunks have the same lengths, as here, would all have one.
    """
    files = [shard(copy, array.path, part) for part in (0, PART)]
    first, second = (file.read_bytes() for file in files)
    files[0].write_bytes(second)
    files[1].write_bytes(first)
    store = open_store(copy)
    store.read([0], [0])
    store.read([0], [0], size=48)
    names = [file.relative_to(copy).as_posix() for file in files]
    recorded = [
        read_part_metadata(store.path, p)["objects"][name]["crc32"] for p, name in zip((0, PART), names, strict=True)
    ]
    found = [f"{zlib.crc32(file.read_bytes()):08x}" for file in files]
    assert found == recorded[::-1] and recorded[0] != recorded[1]


@pytest.mark.parametrize("name", ["32/summary", "48/dense"])
def test_one_view_beside_a_flipped_bit_is_whole_or_refused(case: Case, copy: Path, name: str) -> None:
    """A read touches one chunk and the index: damage elsewhere in the shard need not stop it."""
    file = shard(copy, name, PART)
    data = file.read_bytes()
    outcomes = set()
    for position in range(0, len(data), max(1, len(data) // 20)):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        file.write_bytes(damaged)
        for sample in in_part(case, PART):
            try:
                read_samples(case, copy, [sample])
                outcomes.add("whole")
            except PartCorruptError:
                outcomes.add("refused")
    assert outcomes == ({"whole", "refused"} if name == "48/dense" else {"refused"})


def cut_last_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def cut_in_half(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def append_byte(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zero(file: Path) -> None:
    """Fill a file with zeros, as a file system may leave one whose blocks were not flushed."""
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [cut_last_byte, cut_in_half, append_byte, empty, zero, Path.unlink])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: array.path)
def test_a_damaged_or_missing_object_is_refused(
    case: Case, copy: Path, array: ArrayLayout, damage: Callable[[Path], None]
) -> None:
    damage(shard(copy, array.path, PART))
    for sample in in_part(case, PART):
        with pytest.raises(PartCorruptError):
            read_samples(case, copy, [sample])
    read_samples(case, copy, in_part(case, 0))
    read_samples(case, copy, in_part(case, 2))


def test_a_truncated_commit_file_is_refused(copy: Path) -> None:
    file = copy / "parts/00001.parquet"
    data = file.read_bytes()
    for size in [0, 3, 8, *range(20, len(data), 97), len(data) - 1]:
        file.write_bytes(data[:size])
        with pytest.raises(PartCorruptError, match=r"00001\.parquet is damaged.*eupe store repair"):
            _ = open_store(copy).samples
        with pytest.raises(PartCorruptError):
            read_part_metadata(StoragePath.of(copy), 1)


@pytest.mark.parametrize("num_rows", [3, 0])
def test_a_commit_file_that_lacks_rows_is_refused(copy: Path, num_rows: int) -> None:
    file = copy / "parts/00001.parquet"
    pq.write_table(pq.read_table(file).slice(0, num_rows), file, write_page_checksum=True)
    with pytest.raises(PartCorruptError, match=f"has {num_rows} rows, but the store's layout requires 4"):
        _ = open_store(copy).samples


def test_a_flipped_bit_in_a_commit_file_is_never_read(whole: Path, copy: Path) -> None:
    """Parquet has a few bytes without meaning: whole or refused."""
    file = copy / "parts/00001.parquet"
    data = file.read_bytes()
    samples, metadata = open_store(whole).samples, read_part_metadata(StoragePath.of(whole), 1)
    outcomes = set()
    for position in range(0, len(data), 13):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        try:
            assert open_store(copy).samples.equals(samples)
            assert read_part_metadata(StoragePath.of(copy), 1) == metadata
            outcomes.add("whole")
        except PartCorruptError:
            outcomes.add("refused")
    assert outcomes == {"whole", "refused"}
