"""Numbers to names and shapes, without I/O: which arrays a store has, what a part is, when two specs are the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from eupe.errors import FormatVersionError, StoreError

FORMAT = 1
ATTRIBUTE = "eupe"
PRECISION = "fp16"

PART_BYTES = 128 * 2**20
"""Upper bound on a part's raw features; with a power of two of samples a shard has 64 to 128 MB."""
SMALL_PART_BYTES = 2 * 2**20
"""A small corpus is cut finer, down to this, so that there is work to share and little to redo after a kill."""
MIN_PARTS = 16
SUMMARY_CHUNK_BYTES = 64 * 2**10
"""One summary row is too small a read; rows are chunked up to this many bytes."""

SUMMARY, DENSE = "summary", "dense"
KINDS = (SUMMARY, DENSE)


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """Everything that decides a store's content; kept as `attributes.eupe` of its root group."""

    teacher: Mapping[str, Any]
    """The teacher's card, with `weights_sha256` and the compute `dtype`."""
    corpus: Mapping[str, Any]
    """`fingerprint` and `num_samples`; `root` is for the reader's convenience and not compared."""
    views: Mapping[str, Any]
    """Policy, `num_views`, seed and ranges: see `eupe.corpus.views.ViewSpec.to_json`."""
    sizes: tuple[int, ...]
    """Sides in pixels of the square input, one group of arrays each."""
    grids: tuple[int, ...]
    """Cells along one side of the dense map, for each size."""
    tokens: tuple[str, ...]
    """`summary`, `dense`, or both."""
    samples_per_part: int
    precision: str = PRECISION
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the libraries that made it; recorded, not compared."""

    @property
    def num_samples(self) -> int:
        return int(self.corpus["num_samples"])

    @property
    def num_views(self) -> int:
        return int(self.views["num_views"])

    @property
    def num_parts(self) -> int:
        return -(-self.num_samples // self.samples_per_part)

    def part_rows(self, part: int) -> slice:
        """Rows of the arrays that belong to a part."""
        start = part * self.samples_per_part
        return slice(start, min(start + self.samples_per_part, self.num_samples))

    def to_json(self) -> dict[str, Any]:
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"format": FORMAT, **plain}

    def identity(self) -> dict[str, Any]:
        """The spec without what says nothing about the content: equal identities are a cache hit."""
        plain = self.to_json()
        del plain["versions"], plain["samples_per_part"]
        plain["corpus"] = {k: v for k, v in plain["corpus"].items() if k != "root"}
        descriptive = ("name", "model", "note", "licence", "native_size")
        plain["teacher"] = {k: v for k, v in plain["teacher"].items() if k not in descriptive}
        return plain

    @classmethod
    def from_json(cls, attributes: Mapping[str, Any], *, where: str) -> StoreSpec:
        """Raises: FormatVersionError if the store is newer than this code; StoreError if it is no store."""
        if "format" not in attributes:
            raise StoreError(f"{where} is a Zarr group but not a feature store (its attributes lack eupe.format)")
        if attributes["format"] != FORMAT:
            raise FormatVersionError(
                f"{where} is written in format {attributes['format']}, this version of eupe reads format {FORMAT}; "
                "upgrade eupe"
            )
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in attributes.items()}
        del fields["format"]
        try:
            spec = cls(**fields)
        except TypeError as error:
            raise StoreError(f"{where} has a damaged specification: {error}") from error
        if spec.precision != PRECISION:
            raise FormatVersionError(f"{where} is stored as {spec.precision}, which this version of eupe cannot read")
        return spec


def differences(stored: StoreSpec, asked: StoreSpec) -> list[str]:
    """What keeps two specs from being the same, one phrase each; empty for a cache hit."""
    old, new = _flat(stored.identity()), _flat(asked.identity())
    return [
        f"{name}: stored {old.get(name, 'nothing')}, asked {new.get(name, 'nothing')}"
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
    """Samples in a part: a power of two, by bytes; finer for a small corpus.

    Args:
        bytes_per_sample: raw fp16 features of all views and sizes of one picture.
    """
    largest = _power_of_two(PART_BYTES // bytes_per_sample)
    smallest = _power_of_two(SMALL_PART_BYTES // bytes_per_sample)
    return min(largest, max(smallest, _power_of_two(num_samples // MIN_PARTS)))


def _power_of_two(bound: int) -> int:
    """The largest power of two that is at most `bound`, and at least 1."""
    return 1 << max(bound.bit_length() - 1, 0)


def bytes_per_view(grids: tuple[int, ...], dense_dim: int, summary_dim: int) -> int:
    """Raw fp16 bytes of one view at all sizes; a dimension of 0 leaves that kind out."""
    return sum(2 * (grid * grid * dense_dim + summary_dim) for grid in grids)


@dataclass(frozen=True)
class ArrayLayout:
    """One array of a store, as Zarr sees it."""

    path: str
    shape: tuple[int, ...]
    shard: tuple[int, ...]
    """What one part writes: one object on disk."""
    chunk: tuple[int, ...]
    """What one read decodes; equal to `shard` for the small arrays, which are not sharded."""
    dtype: str
    dimensions: tuple[str, ...]
    order: tuple[int, ...] | None = None
    """Order of the axes in a chunk's bytes; a dense map lies channel by channel, which compresses a fifth better."""


def feature_path(size: int, kind: str) -> str:
    return f"{size}/{kind}"


def part_name(part: int) -> str:
    return f"{part:05d}.parquet"


def arrays(spec: StoreSpec) -> list[ArrayLayout]:
    """Every array of a store, the statistics aside."""
    n, k, p = spec.num_samples, spec.num_views, spec.samples_per_part
    sv = ("sample", "view")
    layouts = [
        ArrayLayout("boxes", (n, k, 4), (p, k, 4), (p, k, 4), "int32", (*sv, "corner")),
        ArrayLayout("flips", (n, k), (p, k), (p, k), "bool", sv),
        ArrayLayout("digests", (n, k), (p, k), (p, k), "uint64", sv),
    ]
    for size, grid in zip(spec.sizes, spec.grids, strict=True):
        if SUMMARY in spec.tokens:
            d = int(spec.teacher["summary_dim"])
            rows = min(p, _power_of_two(SUMMARY_CHUNK_BYTES // (2 * k * d)))
            layouts.append(
                ArrayLayout(
                    feature_path(size, SUMMARY),
                    (n, k, d),
                    (p, k, d),
                    (rows, k, d),
                    "float16",
                    (*sv, "channel"),
                )
            )
        if DENSE in spec.tokens:
            d = int(spec.teacher["dense_dim"])
            map_shape = (grid, grid, d)
            layouts.append(
                ArrayLayout(
                    feature_path(size, DENSE),
                    (n, k, *map_shape),
                    (p, k, *map_shape),
                    (1, 1, *map_shape),
                    "float16",
                    (*sv, "row", "column", "channel"),
                    order=(0, 1, 4, 2, 3),
                )
            )
    return layouts
