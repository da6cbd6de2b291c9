"""Layout of a store, without I/O: its specification, parts, arrays, and when two specifications are the same."""

from __future__ import annotations

import math
import re
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

FORMAT = 2
"""The newest format; a store without layers has format 1, which is the same without them."""
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
"""Kinds of token that `--tokens` takes: summaries, and the teacher's last dense map. A layer is a kind of its own."""
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
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Dense maps of earlier layers, by the layer's number from 1: `of`, the number of layers that the teacher has,
    `dim`, the map's channels, and `grids`, its cells along one side at each size. Empty if only the last map is
    stored."""
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
    def format(self) -> int:
        """Return the number of the format that the store is written in."""
        return FORMAT if self.layers else FORMAT - 1

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
        pixels = sum(3 * size * size for size in self.sizes) if self.pixels else 0
        return self.num_views * (self.bytes_per_view + pixels)

    @property
    def bytes_per_view(self) -> int:
        """Return the bytes of one view's raw fp16 features at all sizes."""
        return sum(2 * math.prod(self.shape(path)) for path in self.feature_paths)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of feature array at each size: those of `tokens`, then `dense-6` for layer 6."""
        return (*self.tokens, *map(layer_kind, self.layers))

    def dim(self, kind: str) -> int:
        """Return the number of channels of a kind."""
        number = layer_of(kind)
        return int(self.teacher[f"{kind}_dim"] if number is None else self.layers[number]["dim"])

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of one view's features in an array, before they are coded: (Ds,) or (g, g, D)."""
        size, _, kind = path.partition("/")
        if kind == SUMMARY:
            return (self.dim(kind),)
        number, place = layer_of(kind), self.sizes.index(int(size))
        grid = self.grids[place] if number is None else self.layers[number]["grids"][place]
        return (grid, grid, self.dim(kind))

    def precision_of(self, path: str) -> str:
        """Return the precision of a feature array; layers have that of the last dense map."""
        return self.precision[token_of(kind_of(path))]

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
        return [feature_path(size, kind) for size in self.sizes for kind in self.kinds]

    def array_calibration(self, path: str) -> Calibration | None:
        """Return the calibration that an int8 array is coded by; None for other arrays."""
        return Calibration.from_json(self.calibration[path]) if path in self.calibration else None

    def measured_fidelity(self, path: str) -> Mapping[str, float] | None:
        """Return what was measured of an array's precision: `mean`, `p5` and `share`; None if nothing was."""
        measured = self.fidelity.get("measured", {}).get(path, {})
        found: Mapping[str, float] | None = measured.get(self.precision_of(path))
        return found

    def to_json(self) -> dict[str, Any]:
        plain = to_plain(self)
        # stores without these lack the words as well, and `verify` compares with this
        for name in ("forward", "layers"):
            if not plain[name]:
                del plain[name]
        return {"format": self.format, **plain}

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
        if attributes["format"] not in range(1, FORMAT + 1):
            raise FormatVersionError(
                f"{where} is written in format {attributes['format']}, this version of eupe reads formats 1 to "
                f"{FORMAT}; upgrade eupe"
            )
        fields = from_plain({name: value for name, value in attributes.items() if name != "format"})
        try:
            spec = cls(**fields)
        except TypeError as error:
            raise StoreError(f"{where} has a damaged specification: {error}") from error
        wrong = next(_impossible(spec), None)
        if wrong is None and spec.format != attributes["format"]:
            wrong = f"format {attributes['format']} {'with' if spec.layers else 'without'} layers"
        if wrong:
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
    for name in ("teacher", "corpus", "views", "precision", "calibration", "fidelity", "forward", "versions", "layers"):
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
    yield from _impossible_layers(spec)


def _impossible_layers(spec: StoreSpec) -> Iterator[str]:
    if spec.layers and DENSE not in spec.tokens:
        yield "layers are stored without the last dense map"
    for number, layer in spec.layers.items():
        said = layer if isinstance(layer, Mapping) else {}
        of, dim, grids = (said.get(name) for name in ("of", "dim", "grids"))
        if re.fullmatch(r"[1-9]\d{0,3}", number) is None or not _is_count(of) or int(number) >= int(of or 0):
            yield f"layers.{number:.20} of {of!r:.80} is not a layer before the last one"
        if not _is_count(dim) or int(dim or 0) > MAX_CHANNELS:
            yield f"layers.{number:.20}.dim is {dim!r:.80}, not a valid number of channels"
        if not isinstance(grids, list | tuple) or len(grids) != len(spec.sizes) or not all(map(_is_count, grids)):
            yield f"layers.{number:.20}.grids is {grids!r:.80}, not a positive integer for each size"


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
        if (spec.precision_of(path) == INT8) != (path in spec.calibration):
            yield f"calibration and precision of {path} contradict each other"
        elif path in spec.calibration and not is_calibration(spec.calibration[path], spec.dim(kind_of(path))):
            yield f"calibration of {path} does not fit its channels"


def differences(stored: StoreSpec, asked: StoreSpec) -> list[str]:
    """Return the differences between two specs, one phrase each; empty for a cache hit."""
    old, new = _flat(stored.identity()), _flat(asked.identity())
    # follows from the layers, which are named already
    del old["format"], new["format"]
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


def kind_of(path: str) -> str:
    """Return the kind of a feature array from its path."""
    return path.rpartition("/")[2]


def layer_kind(number: int | str) -> str:
    """Return the kind of the dense map of an earlier layer: `dense-6`."""
    return f"{DENSE}-{number}"


def layer_of(kind: str) -> str | None:
    """Return the number of the layer that a kind is the map of; None for summaries and the last map."""
    return kind.removeprefix(f"{DENSE}-") if kind.startswith(f"{DENSE}-") else None


def token_of(kind: str) -> str:
    """Return `summary` or `dense`: what a token of this kind is, whatever its layer."""
    return SUMMARY if kind == SUMMARY else DENSE


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
    for size in spec.sizes:
        paths = [feature_path(size, kind) for kind in spec.kinds]
        layouts += [_summaries(spec, path) for path in paths if kind_of(path) == SUMMARY]
        layouts += [_dense_maps(spec, path) for path in paths if kind_of(path) != SUMMARY]
        if spec.pixels:
            layouts.append(_pixels(spec, size))
    return layouts


def statistics_shapes(spec: StoreSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of the statistics, by its path below `stats/`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in spec.feature_paths:
        *grid, dim = spec.shape(path)
        shapes |= {f"{path}/count": (), f"{path}/mean": (dim,), f"{path}/std": (dim,)}
        shapes |= {f"{path}/cov": (dim, dim), f"{path}/norms": (NORM_BINS,)}
        if grid:
            shapes[f"{path}/outliers"] = tuple(grid)
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
    channels = stored_channels(precision, spec.dim(SUMMARY))
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


def _dense_maps(spec: StoreSpec, path: str) -> ArrayLayout:
    n, k, p = spec.num_rows, spec.num_views, spec.samples_per_part
    precision, (*grid, dim) = spec.precision_of(path), spec.shape(path)
    maps = (*grid, stored_channels(precision, dim))
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
