"""Reading of a store: its spec, its samples, its statistics, and features in any order."""

from __future__ import annotations

import io
import json
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eupe.common.kinds import RUN_FILES
from eupe.common.reading import parse_json
from eupe.common.storage import StoragePath
from eupe.corpus.own_table import read_own_table
from eupe.errors import ConfigError, PartCorruptError, StoreError
from eupe.store.backends import Array, LocalViews, open_array, read_result
from eupe.store.features import Clipped, Features, StoredFeatures, StoredViews
from eupe.store.layout import (
    ATTRIBUTE,
    DENSE,
    PHOTOMETRIC,
    PIXELS,
    SUMMARY,
    StoreSpec,
    arrays,
    feature_path,
    kind_of,
    layer_kind,
    layer_of,
    part_name,
    statistics_shapes,
)
from eupe.store.precision import FP16_MAX, Tokens
from eupe.store.stats import ChannelStats, FullStats, Moments, norm_histogram

ROOT_DOCUMENT = "zarr.json"
VIEWS_PER_READ = 64
PART_STATS = b"eupe.part"
PART_CHECKSUM = b"eupe.crc32"
"""Metadata key of the CRC-32 of `eupe.part`, in eight hexadecimal digits; Parquet's page checksums do not cover it."""
STATS = "stats"
NOT_FINITE = "the teacher's features are not finite"
"""Beginning of the error of a sample that could be read, but whose features hold NaN or infinity."""
FIRST_NOT_FINITE = "the teacher gave non-finite values"
"""Beginning of the same error in the first stores."""
CLIPPED_BIN = int(norm_histogram(np.array([0.99 * FP16_MAX])).argmax())
"""First bin of norms that a token with a clipped value can have; int8 changes values by less than a hundredth."""
ROW_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("label", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)


class PendingFeatures:
    """Reads in progress; `result()` waits for them."""

    def __init__(self, store: Store, size: int, futures: dict[str, Any]) -> None:
        self._store = store
        self._size = size
        self._futures = futures

    def stored(self) -> StoredFeatures:
        """Wait for the reads and return the features as stored.

        Raises: PartCorruptError if bytes are missing or fail their checksum.
        """
        values = {name: read_result(future, self._store.path) for name, future in self._futures.items()}
        views = (values.pop("boxes"), values.pop("flips"), values.pop(PHOTOMETRIC, None))
        # what is left are features, by kind
        read = {kind: self._store.tokens(feature_path(self._size, kind), each) for kind, each in values.items()}
        layers = {number: tokens for kind, tokens in read.items() if (number := layer_of(kind)) is not None}
        return StoredFeatures(*views, read.get(SUMMARY), read.get(DENSE), layers)

    def result(self) -> Features:
        """Wait for the reads and return the decoded features.

        Raises: PartCorruptError if bytes are missing or fail their checksum.
        """
        stored = self.stored()
        summary, dense = (None if t is None else t.decode() for t in (stored.summary, stored.dense))
        layers = {number: tokens.decode() for number, tokens in stored.layers.items()}
        return Features(stored.boxes, stored.flips, stored.photometric, summary, dense, layers)


@dataclass(frozen=True)
class PendingPixels:
    """A read in progress; `result()` waits for it."""

    store: StoragePath
    future: Any

    def result(self) -> NDArray[np.uint8]:
        """Wait for the read and return the pixels, uint8 RGB [B, size, size, 3].

        Raises: PartCorruptError if bytes are missing or fail their checksum.
        """
        pixels: NDArray[np.uint8] = read_result(self.future, self.store)
        return pixels


class Store:
    """A store opened for reading."""

    def __init__(self, path: StoragePath, spec: StoreSpec) -> None:
        self.path = path
        self.spec = spec
        self._layouts = {layout.path: layout for layout in arrays(spec)}
        self._handles: dict[str, LocalViews | Array] = {}
        self._calibrations = {name: spec.array_calibration(name) for name in spec.feature_paths}

    @property
    def finished(self) -> bool:
        """Return whether every part is committed and the statistics over all of them are written."""
        return self._statistics_cover() == self.spec.num_parts and not self.missing_parts()

    def _statistics_cover(self) -> int:
        """Return how many parts, counted from the first, the statistics cover."""
        return int(self.totals.get("num_parts", 0))

    @property
    def totals(self) -> dict[str, int]:
        """Return `num_parts`, `num_clipped` and `num_nonfinite` of the parts that the statistics cover; empty at first.

        Raises: PartCorruptError if their document is damaged.
        """
        try:
            document = parse_json(self.path.read_document(f"{STATS}/{ROOT_DOCUMENT}"))
            totals: dict[str, int] = document["attributes"][ATTRIBUTE]
            if any(type(value) is not int for value in totals.values()):
                raise ValueError("its totals are not numbers")
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PartCorruptError(
                f"{self.path / STATS / ROOT_DOCUMENT} is damaged ({error}); run `eupe store repair {self.path}`"
            ) from error
        return totals

    def corpus_root(self, named: Iterable[StoragePath] = ()) -> StoragePath:
        """Return where the pictures are, as noted when the store was made.

        Args:
            named: other places that the user has named.
        Raises: ConfigError if that is a bucket that only the store names.
        """
        root = StoragePath.of(self.spec.corpus["root"])
        # an untrusted store must not send requests with the reader's credentials to a bucket of its choice
        if root.bucket not in ("", self.path.bucket, *(place.bucket for place in named)):
            raise ConfigError(
                f"{self.path} records that its pictures are in {root}; to allow reading that bucket, give "
                f"--corpus {root}"
            )
        return root

    def missing_parts(self) -> list[int]:
        """Return the parts that are not committed, in order."""
        missing = np.ones(self.spec.num_parts, bool)
        missing[self.committed_parts()] = False
        return np.flatnonzero(missing).tolist()

    def committed_parts(self) -> list[int]:
        """Return the parts whose commit file exists, in order."""
        # an extension may have added parts since this store was opened
        return [part for part in committed_parts(self.path) if part < self.spec.num_parts]

    @cached_property
    def stored_bytes(self) -> int:
        """Return the bytes of the arrays' objects in all committed parts."""
        return sum(
            recorded["bytes"]
            for facts in self._facts()
            for key, recorded in facts["objects"].items()
            if not key.endswith(".moments")
        )

    @cached_property
    def _commits(self) -> list[pa.Table]:
        """Return the rows of every committed part; each file is read once."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self._part_rows, self.committed_parts()))

    @cached_property
    def samples(self) -> pa.Table:
        """Return one row per sample of every committed part: `row` in the arrays, and the columns of `ROW_SCHEMA`."""
        tables = [table.replace_schema_metadata() for table in self._commits]
        return pa.concat_tables(tables) if tables else _with_rows(ROW_SCHEMA.empty_table(), 0)

    @cached_property
    def valid(self) -> pa.Table:
        """Return the rows of `samples` that have features."""
        return self.samples.filter(pc.equal(self.samples["status"], "ok"))

    @cached_property
    def failed(self) -> pa.Table:
        """Return the rows of `samples` that have no features; their `error` says why."""
        return self.samples.filter(pc.not_equal(self.samples["status"], "ok"))

    @cached_property
    def failures(self) -> dict[str, list[str]]:
        """Return the keys of samples without features by error, with its numbers written as N, most frequent first."""
        ledger: dict[str, list[str]] = {}
        for row in self.failed.to_pylist():
            ledger.setdefault(re.sub(r"\d+(\.\d+)?", "N", row["error"]), []).append(row["key"])
        return dict(sorted(ledger.items(), key=lambda item: -len(item[1])))

    @property
    def num_not_finite(self) -> int:
        """Return the number of samples without features because the teacher's are not finite."""
        reasons = self.failed["error"].to_pylist()
        return sum(reason.startswith((NOT_FINITE, FIRST_NOT_FINITE)) for reason in reasons)

    @cached_property
    def clipped(self) -> Clipped:
        """Return the count of values beyond float16's range in committed parts, and where they may be."""
        count, paths = 0, set()
        for facts in self._facts():
            if facts["num_clipped"]:
                count += facts["num_clipped"]
                paths |= {path for path, norms in facts["norms"].items() if any(norms[CLIPPED_BIN:])}
        return Clipped(count, tuple(path for path in self.spec.feature_paths if path in paths))

    def _facts(self) -> Iterator[dict[str, Any]]:
        """Return what every committed part records beside its samples; see FORMAT.md."""
        return (json.loads(table.schema.metadata[PART_STATS]) for table in self._commits)

    def failed_parts(self) -> list[int]:
        """Return the committed parts that hold samples without features."""
        return sorted({row // self.spec.samples_per_part for row in self.failed["row"].to_pylist()})

    @cached_property
    def _places(self) -> dict[str, int]:
        return dict(zip(self.valid["key"].to_pylist(), self.valid["row"].to_pylist(), strict=True))

    @property
    def keys(self) -> list[str]:
        """Return the keys of the samples that have features, in row order."""
        return list(self._places)

    def rows(self, keys: Iterable[str]) -> list[int]:
        """Return the rows of samples, for `read`.

        Raises: StoreError for a key that the store lacks, or whose sample failed.
        """
        try:
            return [self._places[key] for key in keys]
        except KeyError as error:
            raise StoreError(f"{self.path} has no features of {error}; `eupe store info` lists the failures") from error

    def items(self, *, size: int | None = None, layers: Sequence[str] = ()) -> Iterator[tuple[str, Features]]:
        """Yield every key with the features of its views, [K, ...], in row order; the arguments are those of `read`.

        Raises: PartCorruptError.
        """
        k = self.spec.num_views
        per_read = max(1, VIEWS_PER_READ // k)
        every_key = self.keys
        pending: deque[tuple[list[str], PendingFeatures]] = deque()
        for start in range(0, len(every_key), per_read):
            keys = every_key[start : start + per_read]
            rows = [row for row in self.rows(keys) for _ in range(k)]
            pending.append((keys, self.read_async(rows, list(range(k)) * len(keys), size=size, layers=layers)))
            if len(pending) > 1:  # the next read proceeds while the caller uses this one
                yield from _by_key(*pending.popleft(), k)
        for keys, features in pending:
            yield from _by_key(keys, features, k)

    def __getstate__(self) -> dict[str, Any]:
        # open files stay in their process; another opens its own
        return {"path": self.path, "spec": self.spec}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _part_rows(self, part: int) -> pa.Table:
        rows = self.spec.part_rows(part)
        table = read_part(self.path, part)
        if table.num_rows != rows.stop - rows.start:
            raise PartCorruptError(
                f"{self.path / 'parts' / part_name(part)} has {table.num_rows} rows, but the store's layout requires "
                f"{rows.stop - rows.start}; run `eupe store repair {self.path}` to extract it again"
            )
        return _with_rows(table, rows.start)

    def stats(self, size: int, kind: str) -> ChannelStats:
        """Return mean and standard deviation of a kind of token at a size: `summary`, `dense`, or `dense-6`.

        Raises: StoreError if the store is not finished; PartCorruptError.
        """
        self.require_finished()
        name = feature_path(size, kind)
        return ChannelStats(
            int(self.statistic(f"{name}/count")), *(self.statistic(f"{name}/{s}") for s in ("mean", "std"))
        )

    def full_stats(self, size: int, kind: str) -> FullStats:
        """Return all statistics of a kind of token at a size, as `stats` takes it.

        Raises: StoreError if the store is not finished; PartCorruptError.
        """
        name, simple = feature_path(size, kind), self.stats(size, kind)
        cov, norms = (self.statistic(f"{name}/{s}") for s in ("cov", "norms"))
        outliers = self.statistic(f"{name}/outliers") if kind != SUMMARY else None
        return FullStats(simple.count, simple.mean, simple.std, cov, norms, outliers)

    def merged_moments(self, name: str) -> Moments:
        """Return the moments of a feature array over the parts that the statistics cover."""
        count, mean, cov = (self.statistic(f"{name}/{s}") for s in ("count", "mean", "cov"))
        return Moments(int(count), mean, cov * int(count))

    def require_finished(self) -> None:
        """Raise StoreError if parts or their statistics are missing."""
        if not self.finished:
            raise StoreError(
                f"{self.path} is not finished: {len(self.missing_parts())} of {self.spec.num_parts} parts are missing; "
                "run its `eupe extract` or `eupe store convert` again to resume"
            )

    def require_layers(self, layers: Sequence[str]) -> None:
        """Raise StoreError if the dense map of a layer is not stored."""
        if lacking := [number for number in layers if number not in self.spec.layers]:
            stored = f"those of {', '.join(self.spec.layers)}" if self.spec.layers else "only that of the last layer"
            raise StoreError(
                f"{self.path} lacks the dense maps of layers {', '.join(lacking)}, and has {stored}; `eupe extract "
                "--layers` stores others"
            )

    def statistic(self, path: str) -> Any:
        """Read one array below `stats/`, such as `224/dense/mean`.

        Raises: PartCorruptError.
        """
        shape = statistics_shapes(self.spec)[path]
        return read_result(open_array(self.path, f"{STATS}/{path}", shape).read(), self.path)

    def read(
        self, rows: Sequence[int], views: Sequence[int], *, size: int | None = None, layers: Sequence[str] = ()
    ) -> Features:
        """Read the features of B views, in the given order.

        Args:
            rows, views: [B] each; indices along the first two axes.
            size: one of `spec.sizes`; the first by default.
            layers: numbers of the layers to read as well, of `spec.layers`; no byte of the others is read.
        Raises: PartCorruptError; StoreError for a layer, IndexError for a row or view that the store does not have.
        """
        return self.read_async(rows, views, size=size, layers=layers).result()

    def read_async(
        self, rows: Sequence[int], views: Sequence[int], *, size: int | None = None, layers: Sequence[str] = ()
    ) -> PendingFeatures:
        """Start a `read`, and return without waiting for it."""
        self.require_layers(layers)
        size = self.spec.sizes[0] if size is None else size
        kinds = (*self.spec.tokens, *map(layer_kind, layers))
        paths = {kind: feature_path(size, kind) for kind in kinds}
        futures = {name: self._begin(path, rows, views) for name, path in paths.items()}
        return PendingFeatures(self, size, self._begin_views(rows, views) | futures)

    def read_views(self, rows: Sequence[int], views: Sequence[int]) -> StoredViews:
        """Read only the parameters of B views.

        Raises: PartCorruptError; IndexError for a row or view that the store does not have.
        """
        return PendingFeatures(self, self.spec.sizes[0], self._begin_views(rows, views)).stored()

    def _begin_views(self, rows: Sequence[int], views: Sequence[int]) -> dict[str, Any]:
        names = ("boxes", "flips", *([PHOTOMETRIC] if self.spec.photometric else []))
        return {name: self._begin(name, rows, views) for name in names}

    def read_summaries(self, rows: Sequence[int], views: Sequence[int], *, size: int | None = None) -> NDArray[Any]:
        """Read only the summaries of B views, [B, Ds].

        Raises: PartCorruptError; IndexError for a row or view that the store does not have.
        """
        return self.read_tokens(
            feature_path(self.spec.sizes[0] if size is None else size, SUMMARY), rows, views
        ).decode()

    def read_tokens(self, path: str, rows: Sequence[int], views: Sequence[int]) -> Tokens:
        """Read B views of one feature array, as stored.

        Args:
            path: one of `spec.feature_paths`.
        Raises: PartCorruptError; IndexError for a row or view that the store does not have.
        """
        return self.tokens(path, read_result(self._begin(path, rows, views), self.path))

    def read_digests(self, rows: Sequence[int], views: Sequence[int]) -> NDArray[np.uint64]:
        """Read `eupe.corpus.views.view_digest` of B views rendered at the store's first size, [B].

        Raises: PartCorruptError; IndexError for a row or view that the store does not have.
        """
        digests: NDArray[np.uint64] = read_result(self._begin("digests", rows, views), self.path)
        return digests

    def read_pixels(self, rows: Sequence[int], views: Sequence[int], *, size: int | None = None) -> NDArray[np.uint8]:
        """Read the pixels of B views as the teacher saw them, uint8 RGB [B, size, size, 3].

        Raises: StoreError if the store keeps no pixels; PartCorruptError; IndexError for a row or view that it lacks.
        """
        return self.read_pixels_async(rows, views, size=size).result()

    def read_pixels_async(self, rows: Sequence[int], views: Sequence[int], *, size: int | None = None) -> PendingPixels:
        """Start a `read_pixels`, and return without waiting for it."""
        if not self.spec.pixels:
            raise StoreError(f"{self.path} keeps no pixels; extract with --pixels, or read the pictures themselves")
        path = feature_path(self.spec.sizes[0] if size is None else size, PIXELS)
        return PendingPixels(self.path, self._begin(path, rows, views))

    def tokens(self, path: str, stored: NDArray[Any]) -> Tokens:
        """Return what was read of a feature array; dense maps come channel first and are transposed without a copy."""
        kind = kind_of(path)
        turned = stored if kind == SUMMARY else np.moveaxis(stored, -3, -1)
        return Tokens(turned, self.spec.precision_of(path), self._calibrations[path])

    def _begin(self, path: str, rows: Sequence[int], views: Sequence[int]) -> Any:
        """Start to read views of an array.

        Raises: PartCorruptError if its metadata is damaged; IndexError for a row or view that the store does not have.
        """
        for name, places, count in (("row", rows, self.spec.num_rows), ("view", views, self.spec.num_views)):
            if len(places) and not 0 <= min(places) <= max(places) < count:
                raise IndexError(f"{self.path} has {name}s 0 to {count - 1}; got {min(places)} to {max(places)}")
        return self._handle(path).begin(rows, views)

    def _handle(self, path: str) -> LocalViews | Array:
        """Return the reader of an array, which is opened at its first use.

        Raises: PartCorruptError if the array's metadata is damaged.
        """
        if path not in self._handles:
            layout = self._layouts[path]
            array = Array.open(self.path, layout)  # also where it is not used: it checks the metadata
            single = layout.sharded and layout.chunk[:2] == (1, 1)
            self._handles[path] = LocalViews(self.path.local, layout) if single and self.path.is_local else array
        return self._handles[path]


def _by_key(keys: Sequence[str], pending: PendingFeatures, num_views: int) -> Iterator[tuple[str, Features]]:
    features = pending.result()
    for i, key in enumerate(keys):
        views = slice(i * num_views, (i + 1) * num_views)
        optional = (features.photometric, features.summary, features.dense)
        photometric, summary, dense = (None if x is None else x[views] for x in optional)
        layers = {number: maps[views] for number, maps in features.layers.items()}
        yield key, Features(features.boxes[views], features.flips[views], photometric, summary, dense, layers)


def open_store(path: str | Path | StoragePath) -> Store:
    """Open a store for reading: a local path, `s3://...` or `gs://...`.

    Raises: StoreError if it does not exist or its specification is damaged; FormatVersionError if this version does not
        know its format; StorageError.
    """
    place = StoragePath.of(path)
    try:
        document = place.read_document(ROOT_DOCUMENT)
    except FileNotFoundError as error:
        if place.is_local and any(place.exists(name) for name in RUN_FILES):
            raise StoreError(
                f"{place} is a training run, not a store; cache its student's features with "
                f"`eupe extract --teacher {place} --corpus PICTURES`, and give the resulting store"
            ) from error
        there = place.local.exists() if place.is_local else bool(place.list())
        what = f"is not a feature store (no {ROOT_DOCUMENT})" if there else "does not exist"
        raise StoreError(f"store {place} {what}; make one with `eupe extract --out {place}`") from error
    try:
        attributes = parse_json(document).get("attributes", {}).get(ATTRIBUTE, {})
        spec = StoreSpec.from_json(attributes, where=str(place))
    except (ValueError, AttributeError, TypeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"store {place} cannot be opened: its {ROOT_DOCUMENT} is damaged ({error})") from error
    return Store(place, spec)


def committed_parts(place: StoragePath) -> list[int]:
    """Return the parts whose commit file exists, in order."""
    names = (name.removeprefix("parts/") for name in place.list("parts/"))
    return sorted(int(name.split(".")[0]) for name in names if re.fullmatch(r"\d{5,}\.parquet", name))


def read_part_metadata(place: StoragePath, part: int) -> dict[str, Any]:
    """Read what a committed part records beside its samples; see FORMAT.md."""
    metadata: dict[str, Any] = json.loads(read_part(place, part).schema.metadata[PART_STATS])
    return metadata


def read_part(place: StoragePath, part: int) -> pa.Table:
    """Read a part's commit file: its samples, and in the schema's metadata the part's record.

    Raises: PartCorruptError; its cause says what is wrong.
    """
    name = f"parts/{part_name(part)}"
    try:
        table = read_own_table(place.read(name))
        if not table.schema.equals(ROW_SCHEMA):
            raise ValueError("its columns are not those of a part")
        if table.schema.metadata[PART_CHECKSUM] != checksum(table.schema.metadata[PART_STATS]):
            raise ValueError("its statistics fail their checksum")
        _require_samples(table)
        _require_facts(parse_json(table.schema.metadata[PART_STATS]))
        return table
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise PartCorruptError(
            f"{place / name} is damaged ({error}); run `eupe store repair {place}` to extract the part again"
        ) from error


def _require_samples(table: pa.Table) -> None:
    """Raise ValueError for a sample that is neither ok nor failed with a reason."""
    status = table["status"]
    odd = pc.not_equal(pc.is_valid(table["error"]), pc.equal(status, "failed"))
    if not pc.all(pc.is_in(status, pa.array(["ok", "failed"])), min_count=0).as_py() or pc.any(odd).as_py():
        raise ValueError("one of its samples is neither ok nor failed with a reason")


def _require_facts(facts: Any) -> None:
    """Raise ValueError, KeyError, TypeError or AttributeError for a record that no part has."""
    whole = [recorded["bytes"] for recorded in facts["objects"].values()]
    whole += [count for bins in facts["norms"].values() for count in bins]
    whole += [facts["num_clipped"], facts["num_nonfinite"]]
    words = [recorded["crc32"] for recorded in facts["objects"].values()]
    words += facts["versions"].values()
    if not all(type(value) is int and value >= 0 for value in whole) or not all(isinstance(w, str) for w in words):
        raise ValueError("its record does not consist of counts and checksums")


def encode_part(table: pa.Table) -> bytes:
    """Encode a commit file, the reverse of `read_part`; one version of pyarrow gives equal bytes for equal tables."""
    file = io.BytesIO()
    pq.write_table(table, file, write_page_checksum=True)
    return file.getvalue()


def checksum(data: bytes) -> bytes:
    """Return the CRC-32 in eight hexadecimal digits."""
    return b"%08x" % zlib.crc32(data)


def _with_rows(table: pa.Table, start: int) -> pa.Table:
    return table.add_column(0, "row", pa.array(np.arange(start, start + table.num_rows, dtype=np.int64)))
