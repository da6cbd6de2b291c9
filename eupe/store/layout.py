"""Layout of a store, without I/O: its specification, parts, arrays, and when two specifications are the same."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from eupe.common.reading import from_plain, to_plain
from eupe.corpus.views import Photometric
from eupe.errors import ConfigError, FormatVersionError, StoreError
from eupe.store.precision import INT8, INT8_FILL, Calibration, is_calibration, require_known, stored_channels
from eupe.store.stats import NORM_BINS

FORMAT = 1
ATTRIBUTE = "eupe"

PART_BYTES = 128 * 2**20
"""Upper bound on a part's raw features; a part has a power of two of samples, so a shard has 64 to 128 MB."""
SMALL_PART_BYTES = 2 * 2**20
"""Lower bound for a small corpus, which is cut finer: there is work to share, and little to redo after a kill."""
MIN_PARTS = 16
"""Number of parts of a small corpus, as far as `SMALL_PART_BYTES` allows."""
SUMMARY_CHUNK_BYTES = 64 * 2**10
"""Upper bound on a chunk of summaries; one row alone would be too small a read."""

MAX_SAMPLES = 2**40
MAX_PARTS = 10**7
MAX_CHANNELS = 8192
"""Upper bound on a teacher's channels; a store keeps their covariance."""
MAX_CHUNK_BYTES = 2**29
"""Upper bound far above our stores' chunks; a specification with more is damaged, or made to exhaust memory."""

SUMMARY, DENSE = "summary", "dense"
PIXELS = "pixels"
PHOTOMETRIC = "photometric"
KINDS = (SUMMARY, DENSE)
DESCRIPTIVE = ("name", "model", "note", "licence", "native_size")
"""Fields of a teacher's spec that do not decide its features."""


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """Specification of a store: everything that decides its content; stored as `attributes.eupe` of the root group."""

    teacher: Mapping[str, Any]
    """The teacher's spec, with `weights_sha256` and the compute `dtype`."""
    corpus: Mapping[str, Any]
    """`fingerprint` of all samples; `segments`, the number of samples at first and of each extension; `root`, the place
    of the pictures, for the reader's convenience. Only the fingerprint is compared."""
    views: Mapping[str, Any]
    """View policy, `num_views`, seed and ranges; see `eupe.corpus.views.ViewSpec.to_json`."""
    sizes: tuple[int, ...]
    """Sides in pixels of the teacher's square input; each has its own group of arrays."""
    grids: tuple[int, ...]
    """Cells along one side of the stored dense map, for each size; fewer than the teacher's if the map was pooled."""
    tokens: tuple[str, ...]
    """`summary`, `dense`, or both."""
    samples_per_part: int
    precision: Mapping[str, str]
    """Precision of each kind of token: `fp16`, `bitround:B` or `int8`."""
    pixels: bool = False
    """True if the rendered views are stored beside their features, at every size."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """Calibration that each int8 array is coded by (`Calibration.to_json`), by the array's path."""
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    """Measurements made when the precision was chosen; recorded, not compared."""
    forward: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the teacher's forward pass when the store was made: `batch_size`, and unless it computed in float32
    `cosine_to_fp32`, the lowest cosine of each kind of token; recorded, not compared."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the libraries that made the store; recorded, not compared."""

    @property
    def num_samples(self) -> int:
        return self._sample_ends[-1] if self._sample_ends else 0

    @property
    def num_views(self) -> int:
        return int(self.views["num_views"])

    @property
    def photometric(self) -> bool:
        """Return whether views are recoloured, by parameters that are stored beside their boxes."""
        return PHOTOMETRIC in self.views

    @property
    def num_parts(self) -> int:
        return self.segment_ends[-1] if self.segment_ends else 0

    @property
    def bytes_per_sample(self) -> int:
        """Return the bytes of one sample's raw fp16 features at all sizes, and of its pixels if they are kept."""
        dims = [int(self.teacher[f"{kind}_dim"]) if kind in self.tokens else 0 for kind in (DENSE, SUMMARY)]
        pixels = sum(3 * size * size for size in self.sizes) if self.pixels else 0
        return self.num_views * (bytes_per_view(self.grids, *dims) + pixels)

    @property
    def num_rows(self) -> int:
        """Return the length of the arrays; an extension begins a new part, so some rows before it may stay empty."""
        return int(self.part_rows(self.num_parts - 1).stop)

    def part_samples(self, part: int) -> slice:
        """Return the slice of a part's samples in the corpus's index, whose segments follow one another.

        Raises: IndexError if there is no such part.
        """
        if not 0 <= part < self.num_parts:
            raise IndexError(f"no part {part}")
        # a search: planning calls this for every part, and each extension adds a segment
        segment = bisect_right(self.segment_ends, part)
        first_part = self.segment_ends[segment - 1] if segment else 0
        start = self._sample_ends[segment - 1] if segment else 0
        start += (part - first_part) * self.samples_per_part
        return slice(start, min(start + self.samples_per_part, self._sample_ends[segment]))

    def part_rows(self, part: int) -> slice:
        """Return the slice of the arrays' rows that belong to a part."""
        samples = self.part_samples(part)
        start = part * self.samples_per_part
        return slice(start, start + samples.stop - samples.start)

    @cached_property
    def segment_ends(self) -> list[int]:
        """Return the number of parts up to the end of each segment."""
        return list(accumulate(-(-segment // self.samples_per_part) for segment in self.corpus["segments"]))

    @cached_property
    def _sample_ends(self) -> list[int]:
        """Return the number of samples up to the end of each segment."""
        return list(accumulate(self.corpus["segments"]))

    @property
    def feature_paths(self) -> list[str]:
        """Return the paths of the feature arrays: `224/summary`, `224/dense`, ..."""
        return [feature_path(size, kind) for size in self.sizes for kind in self.tokens]

    def array_calibration(self, path: str) -> Calibration | None:
        """Return the calibration that an int8 array is coded by; None for other arrays."""
        return Calibration.from_json(self.calibration[path]) if path in self.calibration else None

    def measured_fidelity(self, path: str) -> Mapping[str, float] | None:
        """Return what was measured of an array's precision: `mean`, `p5` and `share`; None if nothing was."""
        measured = self.fidelity.get("measured", {}).get(path, {})
        found: Mapping[str, float] | None = measured.get(self.precision[path.rpartition("/")[2]])
        return found

    def to_json(self) -> dict[str, Any]:
        plain = to_plain(self)
        if not self.forward:  # the first stores lack it, and `verify` compares with this
            del plain["forward"]
        return {"format": FORMAT, **plain}

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the content; equal identities are a cache hit."""
        plain = self.to_json()
        for recorded in ("versions", "samples_per_part", "calibration", "fidelity", "forward"):
            plain.pop(recorded, None)
        plain["corpus"] = {k: v for k, v in plain["corpus"].items() if k == "fingerprint"}
        plain["teacher"] = {k: v for k, v in plain["teacher"].items() if k not in DESCRIPTIVE}
        return plain

    @classmethod
    def from_json(cls, attributes: Mapping[str, Any], *, where: str) -> StoreSpec:
        """Build a spec from a root group's attributes, and check that its numbers are possible.

        Raises: FormatVersionError if this version does not know the store's format or precision; StoreError if it is
            not a store, or its specification is damaged.
        """
        if "format" not in attributes:
            raise StoreError(f"{where} is a Zarr group but not a feature store (its attributes lack eupe.format)")
        # before anything else: another format may have other fields
        if attributes["format"] != FORMAT:
            raise FormatVersionError(
                f"{where} is written in format {attributes['format']}, this version of eupe reads format {FORMAT}; "
                "upgrade eupe"
            )
        fields = from_plain({name: value for name, value in attributes.items() if name != "format"})
        try:
            spec = cls(**fields)
        except TypeError as error:
            raise StoreError(f"{where} has a damaged specification: {error}") from error
        if wrong := next(_impossible(spec), None):
            raise StoreError(f"{where} has a damaged specification: {wrong}; fetch the store again, or make it again")
        try:
            for precision in spec.precision.values():
                require_known(precision)
        except ConfigError as error:
            raise FormatVersionError(f"{where}: {error}; this version of eupe cannot read it") from error
        # last: it computes shapes, which takes possible numbers and known precisions
        if wrong := next(_too_large(spec), None):
            raise StoreError(f"{where} has a damaged specification: {wrong}; fetch the store again, or make it again")
        return spec


def _impossible(spec: StoreSpec) -> Iterator[str]:
    """Yield what is impossible in a specification; an untrusted file is checked before its numbers are used."""
    for name in ("teacher", "corpus", "views", "precision", "calibration", "fidelity", "forward", "versions"):
        if not isinstance(getattr(spec, name), Mapping):
            yield f"{name} is {getattr(spec, name)!r:.80}, not an object"
            return
    for name, value in (("samples_per_part", spec.samples_per_part), ("views.num_views", spec.views.get("num_views"))):
        if not _is_count(value):
            yield f"{name} is {value!r:.80}, not a positive integer"
    for name, values in (
        ("sizes", spec.sizes),
        ("grids", spec.grids),
        ("corpus.segments", spec.corpus.get("segments")),
    ):
        if not isinstance(values, list | tuple) or not values or not all(map(_is_count, values)):
            yield f"{name} is {values!r:.80}, not a list of positive integers"
            return
    if len(spec.sizes) != len(spec.grids) or len(set(spec.sizes)) < len(spec.sizes):
        yield f"sizes {spec.sizes} and grids {spec.grids} do not match"
    if not isinstance(spec.tokens, tuple) or spec.tokens not in (KINDS, KINDS[:1], KINDS[1:], KINDS[::-1]):
        yield f"tokens is {spec.tokens!r:.80}, not summary, dense or both"
        return
    for kind in spec.tokens:
        dim = spec.teacher.get(f"{kind}_dim")
        if not _is_count(dim) or int(dim or 0) > MAX_CHANNELS:
            yield f"teacher.{kind}_dim is {dim!r:.80}, not a valid number of channels"
        if not isinstance(spec.precision.get(kind), str):
            yield f"precision.{kind} is {spec.precision.get(kind)!r:.80}, not a string"
    words = {f"corpus.{name}": spec.corpus.get(name) for name in ("root", "fingerprint")}
    words["teacher.name"] = spec.teacher.get("name")
    for name, value in words.items():
        if not isinstance(value, str):
            yield f"{name} is {value!r:.80}, not a string"
    if not isinstance(spec.pixels, bool):
        yield f"pixels is {spec.pixels!r:.80}, not true or false"


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0  # not isinstance: True is an int, too


def _too_large(spec: StoreSpec) -> Iterator[str]:
    """Yield what would not fit into memory, and calibrations that do not fit their arrays."""
    if sum(spec.corpus["segments"]) > MAX_SAMPLES or spec.num_parts > MAX_PARTS:
        yield f"{spec.num_samples} samples in {spec.num_parts} parts are more than a store can have"
        return
    for layout in arrays(spec):
        if math.prod(layout.chunk) * np.dtype(layout.dtype).itemsize > MAX_CHUNK_BYTES:
            yield f"a chunk of {layout.path} has shape {list(layout.chunk)}, more than {MAX_CHUNK_BYTES} bytes"
    for path in spec.feature_paths:
        kind = path.rpartition("/")[2]
        if (spec.precision[kind] == INT8) != (path in spec.calibration):
            yield f"calibration and precision of {path} contradict each other"
        elif path in spec.calibration and not is_calibration(spec.calibration[path], spec.teacher[f"{kind}_dim"]):
            yield f"calibration of {path} does not fit its channels"


def differences(stored: StoreSpec, asked: StoreSpec) -> list[str]:
    """Return the differences between two specs, one phrase each; empty for a cache hit."""
    old, new = _flat(stored.identity()), _flat(asked.identity())
    return [
        f"{name}: stored {old.get(name, 'nothing')}, requested {new.get(name, 'nothing')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def _flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def samples_per_part(num_samples: int, bytes_per_sample: int) -> int:
    """Return the number of samples in a part: a power of two, chosen by bytes; smaller for a small corpus.

    Args:
        bytes_per_sample: bytes of one picture's raw fp16 features, of all views and sizes.
    """
    largest = _power_of_two(PART_BYTES // bytes_per_sample)
    smallest = _power_of_two(SMALL_PART_BYTES // bytes_per_sample)
    return min(largest, max(smallest, _power_of_two(num_samples // MIN_PARTS)))


def _power_of_two(bound: int) -> int:
    """Return the largest power of two that is at most `bound`, and at least 1."""
    return 1 << max(bound.bit_length() - 1, 0)


def bytes_per_view(grids: tuple[int, ...], dense_dim: int, summary_dim: int) -> int:
    """Return the bytes of one view's raw fp16 features at all sizes; a dimension of 0 leaves that kind out."""
    return sum(2 * (grid * grid * dense_dim + summary_dim) for grid in grids)


@dataclass(frozen=True)
class ArrayLayout:
    """Layout of one array of a store, as Zarr sees it."""

    path: str
    shape: tuple[int, ...]
    shard: tuple[int, ...]
    """Shape of what one part writes: one object on disk."""
    chunk: tuple[int, ...]
    """Shape of what one read decodes; equal to `shard` for the small arrays, which are not sharded."""
    dtype: str
    dimensions: tuple[str, ...]
    fill: float = 0
    """Value of what was never written; in feature arrays one that no feature has."""
    sharded: bool = False
    order: tuple[int, ...] | None = None
    """Order of the axes in a chunk's bytes; a dense map lies channel by channel, which compresses better
    (docs/decisions/0002-channel-first-chunks.md)."""


def feature_path(size: int, kind: str) -> str:
    return f"{size}/{kind}"


def part_name(part: int) -> str:
    return f"{part:05d}.parquet"


def segment_name(segment: int) -> str:
    """Return the name of the index of a segment's samples."""
    return f"corpus/{segment:05d}.parquet"


def moments_name(part: int) -> str:
    return f"{part:05d}.moments"


def arrays(spec: StoreSpec) -> list[ArrayLayout]:
    """Return the layout of every array of a store, without the statistics."""
    n, k, p = spec.num_rows, spec.num_views, spec.samples_per_part
    sv = ("sample", "view")
    layouts = [
        ArrayLayout("boxes", (n, k, 4), (p, k, 4), (p, k, 4), "int32", (*sv, "corner")),
        ArrayLayout("flips", (n, k), (p, k), (p, k), "bool", sv),
        ArrayLayout("digests", (n, k), (p, k), (p, k), "uint64", sv),
    ]
    if spec.photometric:
        values = len(Photometric._fields)
        shapes = ((n, k, values), (p, k, values), (p, k, values))
        layouts.append(ArrayLayout(PHOTOMETRIC, *shapes, "float32", (*sv, "parameter"), fill=float("nan")))
    for size, grid in zip(spec.sizes, spec.grids, strict=True):
        if SUMMARY in spec.tokens:
            layouts.append(_summaries(spec, feature_path(size, SUMMARY)))
        if DENSE in spec.tokens:
            layouts.append(_dense_maps(spec, feature_path(size, DENSE), grid))
        if spec.pixels:
            layouts.append(_pixels(spec, size))
    return layouts


def statistics_shapes(spec: StoreSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of the statistics, by its path below `stats/`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for size, grid in zip(spec.sizes, spec.grids, strict=True):
        for kind in spec.tokens:
            path, dim = feature_path(size, kind), int(spec.teacher[f"{kind}_dim"])
            shapes |= {f"{path}/count": (), f"{path}/mean": (dim,), f"{path}/std": (dim,)}
            shapes |= {f"{path}/cov": (dim, dim), f"{path}/norms": (NORM_BINS,)}
            if kind == DENSE:
                shapes[f"{path}/outliers"] = (grid, grid)
    return shapes


def _pixels(spec: StoreSpec, size: int) -> ArrayLayout:
    n, k, p = spec.num_rows, spec.num_views, spec.samples_per_part
    view = (size, size, 3)
    dimensions = ("sample", "view", "row", "column", "colour")
    shapes = ((n, k, *view), (p, k, *view), (1, 1, *view))
    return ArrayLayout(feature_path(size, PIXELS), *shapes, "uint8", dimensions, sharded=True)


def _summaries(spec: StoreSpec, path: str) -> ArrayLayout:
    n, k, p = spec.num_rows, spec.num_views, spec.samples_per_part
    precision = spec.precision[SUMMARY]
    channels = stored_channels(precision, int(spec.teacher["summary_dim"]))
    # two bytes a channel whatever the dtype, as FORMAT.md says
    rows = min(p, _power_of_two(SUMMARY_CHUNK_BYTES // (2 * k * channels)))
    return ArrayLayout(
        path,
        (n, k, channels),
        (p, k, channels),
        (rows, k, channels),
        _dtype(precision),
        ("sample", "view", "channel"),
        fill=_fill(precision),
        sharded=True,
    )


def _dense_maps(spec: StoreSpec, path: str, grid: int) -> ArrayLayout:
    n, k, p = spec.num_rows, spec.num_views, spec.samples_per_part
    precision = spec.precision[DENSE]
    maps = (grid, grid, stored_channels(precision, int(spec.teacher["dense_dim"])))
    return ArrayLayout(
        path,
        (n, k, *maps),
        (p, k, *maps),
        (1, 1, *maps),
        _dtype(precision),
        ("sample", "view", "row", "column", "channel"),
        fill=_fill(precision),
        sharded=True,
        order=(0, 1, 4, 2, 3),
    )


def _dtype(precision: str) -> str:
    return "int8" if precision == INT8 else "float16"


def _fill(precision: str) -> float:
    # both decode to NaN, so that what is absent never passes for zeros
    return INT8_FILL if precision == INT8 else float("nan")
