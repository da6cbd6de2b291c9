"""Numbers to names and shapes: exhaustively where cases are few, by properties where they are many."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from store_cases import make_case, make_spec

from eupe.errors import FormatVersionError, StoreError
from eupe.store.layout import (
    FORMAT,
    MIN_PARTS,
    PART_BYTES,
    SMALL_PART_BYTES,
    SUMMARY_CHUNK_BYTES,
    StoreSpec,
    arrays,
    differences,
    samples_per_part,
)
from eupe.store.reader import open_store

SAMPLE_BYTES = (1, 768, 2**13, 393_216, SMALL_PART_BYTES - 1, SMALL_PART_BYTES, PART_BYTES, PART_BYTES + 1)


def check_samples_per_part(num_samples: int, sample_bytes: int) -> None:
    samples = samples_per_part(num_samples, sample_bytes)
    num_parts = -(-num_samples // samples)
    assert samples >= 1 and samples & (samples - 1) == 0, "a power of two"
    assert samples == 1 or samples * sample_bytes <= PART_BYTES
    if num_parts < MIN_PARTS:
        assert samples == 1 or samples * sample_bytes <= SMALL_PART_BYTES, "could have been cut finer"
    double = 2 * samples
    too_large = double * sample_bytes > PART_BYTES
    too_few = double * sample_bytes > SMALL_PART_BYTES and double > num_samples // MIN_PARTS
    assert too_large or too_few, "twice as many would have been allowed"


def test_samples_per_part_for_every_small_corpus() -> None:
    for sample_bytes in SAMPLE_BYTES:
        for num_samples in range(1, 600):
            check_samples_per_part(num_samples, sample_bytes)


@given(num_samples=st.integers(1, 10**11), sample_bytes=st.integers(1, 10**10))
def test_samples_per_part(num_samples: int, sample_bytes: int) -> None:
    check_samples_per_part(num_samples, sample_bytes)


@given(num_samples=st.integers(1, 10**9), more=st.integers(0, 10**9), sample_bytes=st.integers(1, 10**10))
def test_a_larger_corpus_never_has_smaller_parts(num_samples: int, more: int, sample_bytes: int) -> None:
    assert samples_per_part(num_samples, sample_bytes) <= samples_per_part(num_samples + more, sample_bytes)


def test_parts_of_a_large_corpus_have_64_to_128_megabytes() -> None:
    for sample_bytes in (2_000, 393_216, 5_000_000):
        part_bytes = samples_per_part(10**9, sample_bytes) * sample_bytes
        assert PART_BYTES / 2 < part_bytes <= PART_BYTES


def test_parts_partition_the_rows() -> None:
    for num_samples in range(1, 40):
        for per_part in (1, 2, 4, 8, 16, 32, 64):
            spec = make_spec(num_samples=num_samples, samples_per_part=per_part)
            parts = [list(range(num_samples))[spec.part_rows(part)] for part in range(spec.num_parts)]
            assert list(chain.from_iterable(parts)) == list(range(num_samples))
            assert all(len(part) == per_part for part in parts[:-1]) and 1 <= len(parts[-1]) <= per_part
            for index, part in enumerate(parts):
                assert part == [index * per_part + i for i in range(len(part))]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_segments_begin_parts(segments: list[int], per_part: int) -> None:
    """Against rows laid out one by one: a segment's first sample goes to the next row that begins a part."""
    spec = make_spec(segments=segments, samples_per_part=per_part)
    row_of_sample, row = [], 0
    for segment in segments:
        while row % per_part:
            row += 1
        row_of_sample += range(row, row + segment)
        row += segment
    assert (spec.num_samples, spec.num_rows) == (sum(segments), row)
    assert spec.num_parts == len({row // per_part for row in row_of_sample})
    seen: list[int] = []
    for part in range(spec.num_parts):
        rows, samples = spec.part_rows(part), spec.part_samples(part)
        assert row_of_sample[samples] == list(range(rows.start, rows.stop))
        assert rows.start == part * per_part and 1 <= rows.stop - rows.start <= per_part
        seen += range(samples.start, samples.stop)
    assert seen == list(range(sum(segments)))
    with pytest.raises(IndexError):
        spec.part_samples(spec.num_parts)


@given(
    segments=st.lists(st.integers(1, 10_000), min_size=1, max_size=3),
    num_views=st.integers(1, 16),
    per_part=st.sampled_from([1, 2, 16, 128, 4096]),
    dims=st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    grid=st.integers(1, 64),
    precision=st.sampled_from(["fp16", "bitround:4", "int8"]),
)
def test_an_array_has_one_shard_per_part(
    segments: list[int], num_views: int, per_part: int, dims: tuple[int, int], grid: int, precision: str
) -> None:
    spec = make_spec(
        segments=segments,
        precision=dict.fromkeys(("summary", "dense"), precision),
        num_views=num_views,
        samples_per_part=per_part,
        grids={64: grid},
        summary_dim=dims[0],
        dense_dim=dims[1],
    )
    channels = {"summary": dims[0], "dense": dims[1]}
    for array in arrays(spec):
        assert array.shape[:2] == (spec.num_rows, num_views)
        if array.sharded:
            stored = channels[array.path.partition("/")[2]] + (2 if precision == "int8" else 0)
            assert array.shape[-1] == stored
            assert array.dtype == ("int8" if precision == "int8" else "float16")
            assert array.fill == 127 if precision == "int8" else np.isnan(array.fill)
        assert len(array.shape) == len(array.shard) == len(array.chunk) == len(array.dimensions)
        assert array.shard == (per_part, *array.shape[1:])
        assert all(shard % chunk == 0 for shard, chunk in zip(array.shard, array.chunk, strict=True))
        assert array.order is None or sorted(array.order) == list(range(len(array.shape)))
        if array.path == "64/summary":
            assert array.chunk[0] == 1 or 2 * np.prod(array.chunk) <= SUMMARY_CHUNK_BYTES
            assert array.chunk[0] == per_part or 4 * np.prod(array.chunk) > SUMMARY_CHUNK_BYTES
        if array.path == "64/dense":
            assert array.chunk == (1, 1, *array.shape[2:])


@pytest.mark.parametrize("tokens", [("summary",), ("dense",), ("summary", "dense")])
def test_only_what_was_asked_for_has_an_array(tokens: tuple[str, ...]) -> None:
    names = [array.path for array in arrays(make_spec(tokens=tokens))]
    kinds = [f"{size}/{kind}" for size in (32, 48) for kind in ("summary", "dense") if kind in tokens]
    assert names == ["boxes", "flips", "digests", *kinds]


def test_bytes_per_view_counts_the_stored_arrays() -> None:
    spec = make_spec(num_samples=1, num_views=1)
    raw = sum(values.nbytes for values in make_case(spec).features.values())
    assert spec.bytes_per_view == raw


json_scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text()
specs = st.dictionaries(st.text(), json_scalars | st.lists(json_scalars, max_size=3), max_size=5)


@given(teacher=specs, views=specs, sizes=st.lists(st.integers(1, 999), min_size=1, max_size=3, unique=True))
def test_a_spec_survives_json(teacher: dict[str, Any], views: dict[str, Any], sizes: list[int]) -> None:
    base = make_spec()
    spec = replace(
        base, teacher=teacher | base.teacher, views=views | {"num_views": 3}, sizes=tuple(sizes), grids=tuple(sizes)
    )
    again = StoreSpec.from_json(json.loads(json.dumps(spec.to_json())), where="here")
    assert again == spec
    assert differences(spec, again) == []


CHANGES: list[tuple[dict[str, Any], list[str]]] = [
    ({"sizes": (32, 64)}, ["sizes: stored [32, 48], requested [32, 64]"]),
    ({"grids": (2, 4)}, ["grids: stored [2, 3], requested [2, 4]"]),
    ({"tokens": ("dense",)}, ["tokens: stored ['summary', 'dense'], requested ['dense']"]),
    ({"samples_per_part": 8}, []),
    ({"precision": {"dense": "int8"}}, ["precision.dense: stored fp16, requested int8"]),
    ({"teacher": {"dtype": "bf16"}}, ["teacher.dtype: stored fp32, requested bf16"]),
    ({"teacher": {"mean": [0.0, 0.5, 0.5]}}, ["teacher.mean: stored [0.5, 0.5, 0.5], requested [0.0, 0.5, 0.5]"]),
    ({"teacher": {"weights_sha256": "ef"}}, [f"teacher.weights_sha256: stored {'ab' * 32}, requested ef"]),
    ({"teacher": {"registers": 4}}, ["teacher.registers: stored nothing, requested 4"]),
    ({"corpus": {"fingerprint": "ef"}}, [f"corpus.fingerprint: stored {'cd' * 32}, requested ef"]),
    ({"corpus": {"segments": [6, 5]}}, []),
    (
        {"views": {"seed": 1, "scale": [0.2, 1.0]}, "samples_per_part": 2},
        [
            "views.scale: stored [0.08, 1.0], requested [0.2, 1.0]",
            "views.seed: stored 0, requested 1",
        ],
    ),
]


def changed(spec: StoreSpec, change: dict[str, Any]) -> StoreSpec:
    """A copy in which some fields, or some entries of a mapping field, are others."""
    merged = {k: {**getattr(spec, k), **v} if isinstance(v, dict) else v for k, v in change.items()}
    return replace(spec, **merged)


@pytest.mark.parametrize(("change", "phrases"), CHANGES, ids=lambda value: str(value)[:40])
def test_differences_lists_exactly_what_changed(change: dict[str, Any], phrases: list[str]) -> None:
    assert differences(make_spec(), changed(make_spec(), change)) == phrases


def test_an_entry_that_was_dropped_is_a_difference() -> None:
    spec = make_spec()
    views = {name: value for name, value in spec.views.items() if name != "seed"}
    assert differences(spec, replace(spec, views=views)) == ["views.seed: stored 0, requested nothing"]


@pytest.mark.parametrize(
    "change",
    [
        {"versions": {"torch": "9"}},
        {"calibration": {"32/dense": {"mean": "", "std": ""}}},
        {"fidelity": {"asked": 0.99}},
        {"corpus": {"root": "/elsewhere"}},
        {"teacher": {"name": "alias", "model": "toy.other", "note": "x", "licence": "MIT", "native_size": 9}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_decide_the_content_is_not_compared(change: dict[str, Any]) -> None:
    assert differences(make_spec(), changed(make_spec(), change)) == []


def test_a_newer_format_is_refused_whatever_else_it_says(tmp_path: Path) -> None:
    attributes = {"eupe": {"format": FORMAT + 1, "unheard": "of"}}
    zarr.open_group(tmp_path / "new.zarr", mode="w", zarr_format=3, attributes=attributes)
    with pytest.raises(FormatVersionError, match=r"new\.zarr is written in format 3.*reads formats 1 to 2.*upgrade"):
        open_store(tmp_path / "new.zarr")


def test_a_foreign_group_is_no_store(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "foreign.zarr", mode="w", zarr_format=3, attributes={"made": "elsewhere"})
    with pytest.raises(StoreError, match=r"foreign\.zarr is a Zarr group but not a feature store"):
        open_store(tmp_path / "foreign.zarr")


def test_nothing_there_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        open_store(tmp_path / "none.zarr")
    with pytest.raises(StoreError, match="is not a feature store"):
        open_store(tmp_path)


def test_a_damaged_or_unknown_specification_is_refused() -> None:
    plain = make_spec().to_json()
    with pytest.raises(StoreError, match="damaged specification"):
        StoreSpec.from_json({k: v for k, v in plain.items() if k != "sizes"}, where="here")
    with pytest.raises(StoreError, match="damaged specification"):
        StoreSpec.from_json({**plain, "colour": 1}, where="here")
    with pytest.raises(FormatVersionError, match=r"here: precision 'int2' is unknown.*cannot read it"):
        StoreSpec.from_json({**plain, "precision": {"summary": "fp16", "dense": "int2"}}, where="here")


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b"null", b'{"attributes": 3}', b'{"attributes": {"eupe": 3}}'])
def test_a_damaged_root_is_refused(tmp_path: Path, document: bytes) -> None:
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr/zarr.json").write_bytes(document)
    with pytest.raises(StoreError, match=r"s\.zarr"):
        open_store(tmp_path / "s.zarr")
