"""Stores made twice: as plain arrays in memory, the oracle, and as the parts that a writer commits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eupe.store import Features, Store
from eupe.store.layout import StoreSpec
from eupe.store.writer import Part, Row, StoreWriter, create_store, finish_store

Arrays = dict[str, NDArray[Any]]
"""Array path to [samples, views, ...]."""


def make_spec(
    *,
    num_samples: int = 11,
    num_views: int = 3,
    samples_per_part: int = 4,
    grids: dict[int, int] | None = None,
    tokens: tuple[str, ...] = ("summary", "dense"),
    summary_dim: int = 5,
    dense_dim: int = 6,
) -> StoreSpec:
    grids = {32: 2, 48: 3} if grids is None else grids
    return StoreSpec(
        teacher={
            "name": "toy",
            "backend": "timm",
            "model": "toy.none",
            "patch": 16,
            "dense_dim": dense_dim,
            "summary_dim": summary_dim,
            "mean": [0.5, 0.5, 0.5],
            "licence": "none",
            "weights_sha256": "ab" * 32,
            "dtype": "fp32",
        },
        corpus={"fingerprint": "cd" * 32, "num_samples": num_samples, "root": "/pictures"},
        views={"policy": "rrc", "num_views": num_views, "seed": 0, "scale": [0.08, 1.0]},
        sizes=tuple(grids),
        grids=tuple(grids.values()),
        tokens=tokens,
        samples_per_part=samples_per_part,
        versions={"eupe": "0"},
    )


@dataclass(frozen=True)
class Case:
    """A store's whole content."""

    spec: StoreSpec
    rows: list[Row]
    arrays: Arrays

    @property
    def ok(self) -> NDArray[np.bool_]:
        """[samples]: which have features."""
        return np.array([row.error is None for row in self.rows])

    @property
    def features(self) -> Arrays:
        return {path: values for path, values in self.arrays.items() if "/" in path}

    def part(self, index: int) -> Part:
        start = index * self.spec.samples_per_part
        rows = slice(start, start + self.spec.samples_per_part)
        return Part(
            index,
            self.rows[rows],
            self.arrays["boxes"][rows],
            self.arrays["flips"][rows],
            self.arrays["digests"][rows],
            {path: values[rows] for path, values in self.features.items()},
            num_clipped=index,
            versions=self.spec.versions,
        )

    def expected(self, rows: Sequence[int], views: Sequence[int], size: int) -> Arrays:
        """What `Store.read` is to give, one view at a time."""
        paths = {"boxes": "boxes", "flips": "flips", "digests": "digests"}
        paths |= {kind: f"{size}/{kind}" for kind in self.spec.tokens}
        return {
            name: np.stack([self.arrays[path][row, view] for row, view in zip(rows, views, strict=True)])
            for name, path in paths.items()
        }


def make_case(spec: StoreSpec, *, failed: Iterable[int] = (), seed: int = 0) -> Case:
    """Random content: every finite float16 there is, and NaN with zero boxes where a sample has failed."""
    rng = np.random.default_rng(seed)
    n, k = spec.num_samples, spec.num_views
    arrays: Arrays = {
        "boxes": rng.integers(1, 4000, (n, k, 4), dtype=np.int32),
        "flips": rng.random((n, k)) < 0.5,
        "digests": rng.integers(1, 2**64, (n, k), dtype=np.uint64),
    }
    for size, grid in zip(spec.sizes, spec.grids, strict=True):
        shapes = {
            "summary": (n, k, spec.teacher["summary_dim"]),
            "dense": (n, k, grid, grid, spec.teacher["dense_dim"]),
        }
        for kind in spec.tokens:
            arrays[f"{size}/{kind}"] = finite_halves(rng, shapes[kind])
    failed = set(failed)
    rows = [
        Row(f"folder ü/{i}.jpg", None, None, error="the file is empty")
        if i in failed
        else Row(f"folder ü/{i}.jpg", f"{i:064x}", f"label {i % 3}", 640 + i, 480)
        for i in range(n)
    ]
    for i in failed:
        for values in arrays.values():
            values[i] = np.nan if values.dtype == np.float16 else 0
    return Case(spec, rows, arrays)


def finite_halves(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """Any bit pattern but infinities and NaN: subnormals, both zeros and the largest among them."""
    bits = rng.integers(0, 2**16, shape, dtype=np.uint16)
    bits[(bits & 0x7C00) == 0x7C00] ^= 0x4000
    return bits.view(np.float16)


def write_store(case: Case, path: Path, *, order: Iterable[int] | None = None) -> Store:
    """Commit every part, in `order` where given, and finish."""
    create_store(path, case.spec)
    writer = StoreWriter(path)
    for index in range(case.spec.num_parts) if order is None else order:
        writer.commit(case.part(index))
    return finish_store(path)


def every_view(spec: StoreSpec, samples: Iterable[int]) -> tuple[list[int], list[int]]:
    """Rows and views of all views of some samples."""
    pairs = [(sample, view) for sample in samples for view in range(spec.num_views)]
    return [row for row, _ in pairs], [view for _, view in pairs]


def as_arrays(features: Features) -> Arrays:
    return {name: values for name, values in vars(features).items() if values is not None}


def assert_same_bits(got: Arrays, expected: Arrays) -> None:
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert got[name].dtype == values.dtype, name
        assert got[name].shape == values.shape, name
        assert got[name].tobytes() == values.tobytes(), f"{name} differs"


def tree_digest(path: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file()
    }


def with_error(case: Case, message: str) -> Case:
    """The same rows, all failed."""
    return replace(case, rows=[replace(row, error=message) for row in case.rows])
