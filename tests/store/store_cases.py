"""Stores made twice: as plain arrays in memory, the oracle, and as the parts that a writer commits.

What a precision keeps is worked out here once more, value by value, from `FORMAT.md`.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eupe.common.storage import StoragePath
from eupe.store import Features, Store
from eupe.store.layout import StoreSpec
from eupe.store.precision import Calibration
from eupe.store.writer import Part, Row, StoreWriter, create_store, finish_store

Arrays = dict[str, NDArray[Any]]
"""Array path to [samples, views, ...]."""

CODED = {"summary": "bitround:3", "dense": "int8"}
"""Precisions that lose something, one of either sort."""


def make_spec(
    *,
    num_samples: int = 11,
    segments: Sequence[int] | None = None,
    precision: Mapping[str, str] | None = None,
    num_views: int = 3,
    samples_per_part: int = 4,
    grids: dict[int, int] | None = None,
    tokens: tuple[str, ...] = ("summary", "dense"),
    summary_dim: int = 5,
    dense_dim: int = 6,
    layers: Mapping[str, int] | None = None,
) -> StoreSpec:
    """A specification; `layers` are numbers of layers of 12 and their channels, their maps one cell wider."""
    grids = {32: 2, 48: 3} if grids is None else grids
    precision = {kind: (precision or {}).get(kind, "fp16") for kind in tokens}
    dims = {"summary": summary_dim, "dense": dense_dim}
    dims |= {f"dense-{number}": dim for number, dim in (layers or {}).items()}
    kinds = [*tokens, *(kind for kind in dims if "-" in kind)]
    int8 = [(size, kind) for size in grids for kind in kinds if precision[kind.partition("-")[0]] == "int8"]
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
        corpus={"fingerprint": "cd" * 32, "segments": list(segments or [num_samples]), "root": "/pictures"},
        views={"policy": "rrc", "num_views": num_views, "seed": 0, "scale": [0.08, 1.0]},
        sizes=tuple(grids),
        grids=tuple(grids.values()),
        tokens=tokens,
        samples_per_part=samples_per_part,
        precision=precision,
        layers={
            number: {"of": 12, "dim": dim, "grids": [grid + 1 for grid in grids.values()]}
            for number, dim in (layers or {}).items()
        },
        calibration={f"{size}/{kind}": make_calibration(dims[kind], size).to_json() for size, kind in int8},
        versions={"eupe": "0"},
    )


def make_calibration(dim: int, seed: int = 0) -> Calibration:
    """Means and deviations as features have them: some channels far from zero, some a thousand times wider."""
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(0, 20, dim), 10 ** rng.uniform(-1, 3, dim)
    return Calibration(mean.astype(np.float32), std.astype(np.float32))


@dataclass(frozen=True)
class Case:
    """A store's whole content, as the teacher gave it."""

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

    @property
    def places(self) -> list[int]:
        """Row in the store of each sample: every segment begins at a part's start."""
        places: list[int] = []
        for length in self.spec.corpus["segments"]:
            first = places[-1] + 1 if places else 0
            while first % self.spec.samples_per_part:
                first += 1
            places += range(first, first + length)
        return places

    def part(self, index: int) -> Part:
        own = [i for i, place in enumerate(self.places) if place // self.spec.samples_per_part == index]
        samples = slice(own[0], own[-1] + 1)
        return Part(
            index,
            self.rows[samples],
            self.arrays["boxes"][samples],
            self.arrays["flips"][samples],
            self.arrays["digests"][samples],
            {path: values[samples] for path, values in self.features.items()},
            num_clipped=index,
            num_nonfinite=2 * index,
            versions=self.spec.versions,
        )

    @cached_property
    def kept(self) -> Arrays:
        """Return the arrays as a store gives them back: features as their precision leaves them."""
        return {path: self._kept(path, values) for path, values in self.arrays.items()}

    def _kept(self, path: str, values: NDArray[Any]) -> NDArray[Any]:
        precision = self.spec.precision.get(path.rpartition("/")[2].partition("-")[0], "fp16")
        if precision == "fp16":
            return values
        if precision == "int8":
            return naive_int8(values, Calibration.from_json(self.spec.calibration[path]))
        return naive_bitround(values, int(precision.removeprefix("bitround:")))

    def expected(self, rows: Sequence[int], views: Sequence[int], size: int, layers: Sequence[str] = ()) -> Arrays:
        """Return what `Store.read` must give for rows and views, put together one view at a time."""
        sample_at = {place: sample for sample, place in enumerate(self.places)}
        paths = {"boxes": "boxes", "flips": "flips"}
        paths |= {kind: f"{size}/{kind}" for kind in (*self.spec.tokens, *(f"dense-{n}" for n in layers))}
        return {
            name: np.stack([self.kept[path][sample_at[row], view] for row, view in zip(rows, views, strict=True)])
            for name, path in paths.items()
        }


def naive_bitround(values: NDArray[np.float16], bits: int) -> NDArray[np.float16]:
    """The nearest float16 of so many mantissa bits, found in the list of them all; of two, the even one."""
    grid = representable(bits)
    rounded = [_nearest(float(value), grid) for value in values.ravel()]
    return np.array(rounded, np.float16).reshape(values.shape)


@cache
def representable(bits: int) -> list[float]:
    """Every finite float16 from 0 up whose last mantissa bits are zero, ascending; of even places the even ones."""
    return np.arange(0, 0x7C00, 1 << (10 - bits), dtype=np.uint16).view(np.float16).astype(float).tolist()


def _nearest(value: float, grid: list[float]) -> float:
    size = abs(value)
    if size != size:
        return value
    above = bisect.bisect_left(grid, size)
    if above == len(grid):
        above -= 1
    elif above:
        to_below, to_above = size - grid[above - 1], grid[above] - size
        if to_below < to_above or (to_below == to_above and above % 2):
            above -= 1
    return float(np.copysign(grid[above], value))


def naive_int8(values: NDArray[np.float16], calibration: Calibration) -> NDArray[np.float32]:
    """Token by token and channel by channel, in float32."""
    tokens = values.reshape(-1, values.shape[-1])
    back = np.empty(tokens.shape, np.float32)
    for token, out in zip(tokens, back, strict=True):
        standard = [(np.float32(x) - m) / s for x, m, s in zip(token, calibration.mean, calibration.std, strict=True)]
        if any(np.isnan(z) for z in standard):
            out[:] = np.nan
            continue
        largest = max(abs(z) for z in standard)
        scale = np.float32(np.float16(min(max(largest / np.float32(127), np.float32(2**-14)), np.float32(65504))))
        if largest == 0:
            scale = np.float32(1)
        for i, z in enumerate(standard):
            q = np.float32(max(-127, min(127, round(float(z / scale)))))
            out[i] = q * scale * calibration.std[i] + calibration.mean[i]
    return back.reshape(values.shape)


def make_case(spec: StoreSpec, *, failed: Iterable[int] = (), seed: int = 0) -> Case:
    """Random content: every finite float16 there is, and NaN with zero boxes where a sample has failed."""
    rng = np.random.default_rng(seed)
    n, k = spec.num_samples, spec.num_views
    arrays: Arrays = {
        "boxes": rng.integers(1, 4000, (n, k, 4), dtype=np.int32),
        "flips": rng.random((n, k)) < 0.5,
        "digests": rng.integers(1, 2**64, (n, k), dtype=np.uint64),
    }
    for place, (size, grid) in enumerate(zip(spec.sizes, spec.grids, strict=True)):
        shapes = {
            "summary": (n, k, spec.teacher["summary_dim"]),
            "dense": (n, k, grid, grid, spec.teacher["dense_dim"]),
        }
        for kind in spec.tokens:
            arrays[f"{size}/{kind}"] = finite_halves(rng, shapes[kind])
        for number, layer in spec.layers.items():
            side = layer["grids"][place]
            arrays[f"{size}/dense-{number}"] = finite_halves(rng, (n, k, side, side, layer["dim"]))
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


def write_store(case: Case, path: Path | StoragePath, *, order: Iterable[int] | None = None) -> Store:
    """Commit every part, in `order` where given, and finish."""
    create_store(path, case.spec)
    writer = StoreWriter(path)
    for index in range(case.spec.num_parts) if order is None else order:
        writer.commit(case.part(index))
    return finish_store(path)


def every_view(spec: StoreSpec, rows: Iterable[int]) -> tuple[list[int], list[int]]:
    """Rows and views of all views of some rows."""
    pairs = [(row, view) for row in rows for view in range(spec.num_views)]
    return [row for row, _ in pairs], [view for _, view in pairs]


def as_arrays(features: Features) -> Arrays:
    whole = {name: values for name, values in vars(features).items() if name != "layers" and values is not None}
    return whole | {f"dense-{number}": maps for number, maps in features.layers.items()}


def assert_same_bits(got: Arrays, expected: Arrays) -> None:
    """Check that arrays are equal to the bit; only NaN in float32, as decoding int8 gives it, may have any bits."""
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        assert got[name].dtype == values.dtype, name
        assert got[name].shape == values.shape, name
        assert one_nan(got[name]).tobytes() == one_nan(values).tobytes(), f"{name} differs"


def one_nan(values: NDArray[Any]) -> NDArray[Any]:
    return np.where(np.isnan(values), np.float32("nan"), values) if values.dtype == np.float32 else values


def tree_digest(path: Path | StoragePath) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    path = Path(str(path))
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file()
    }


def with_error(case: Case, message: str) -> Case:
    """The same rows, all failed."""
    arrays = {
        path: np.full_like(values, np.nan if values.dtype == np.float16 else 0) for path, values in case.arrays.items()
    }
    return Case(case.spec, [replace(row, error=message) for row in case.rows], arrays)
