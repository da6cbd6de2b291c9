"""Verification of a store: every byte is compared with what was recorded when it was written.

A part's objects are compared with the size and CRC-32 in its commit file, which also finds a whole, valid object in
another's place; the commit files with their own checksums and the index; the arrays' metadata with the spec; the index
with the corpus's fingerprint; the statistics with their checksums and the parts that they cover.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eupe.common.cores import num_cores
from eupe.common.holding import LEASE
from eupe.common.reading import parse_json
from eupe.common.storage import AnyPath, StoragePath
from eupe.corpus.index import fingerprint, index_bytes, index_from_bytes
from eupe.corpus.views import are_possible
from eupe.errors import PartCorruptError, StorageError
from eupe.store.layout import (
    ATTRIBUTE,
    PHOTOMETRIC,
    ArrayLayout,
    StoreSpec,
    arrays,
    moments_name,
    part_name,
    segment_name,
    statistics_shapes,
)
from eupe.store.reader import (
    PART_STATS,
    ROOT_DOCUMENT,
    STATS,
    Store,
    encode_part,
    open_store,
    read_part,
)
from eupe.store.shard import crc32, crc_holds, decode_chunk, inspect_object, object_key
from eupe.store.writer import metadata_documents, statistics_documents, totals_of

INDEX = "corpus"
"""Folder of the index; also the name of damage to the index as a whole."""
MAX_THREADS = 8
"""Upper bound on threads; each holds a block of an object, or a whole object that failed, in memory."""
STATS_MARK = f"{STATS}/{ROOT_DOCUMENT}"
CONTRADICTION = "counts otherwise than its parts"
HEADERS_DIFFER = "its headers are not those of its content"
INDEXED = ("key", "sha256", "label")

Progress = Callable[[int, int], None]
"""Callback that takes (done, total)."""


@dataclass(frozen=True)
class PartDamage:
    """One object that is not as it was written."""

    part: int | None
    """Number of its part; None for metadata, the index and the statistics."""
    what: str
    """Name of the object below the store."""
    reason: str
    rows: tuple[int, int] | None = None
    """First and last row of the arrays that cannot be trusted; None if the object holds no features."""

    def __str__(self) -> str:
        if self.part is None:
            return f"{self.what} {self.reason}"
        where = f"part {self.part}" if self.rows is None else f"part {self.part}, rows {self.rows[0]} to {self.rows[1]}"
        return f"{where}: {self.what} {self.reason}"


@dataclass(frozen=True)
class VerifyReport:
    """Result of verifying a store."""

    store: str
    num_parts: int
    num_objects: int
    """Number of the parts' objects, read to the last byte."""
    num_bytes: int
    missing: tuple[int, ...]
    """Parts that are not committed."""
    damages: tuple[PartDamage, ...]
    strays: tuple[str, ...]
    """Objects that do not belong to a store of this layout; they do no harm."""

    @property
    def whole(self) -> bool:
        """Return whether the store is complete and undamaged."""
        return not self.missing and not self.damages

    @property
    def damaged_parts(self) -> list[int]:
        """Return the committed parts whose samples, views or features are damaged."""
        return sorted({d.part for d in self.damages if d.part is not None and d.rows is not None})


@dataclass(frozen=True)
class Commit:
    """A part's commit file that passed its checks."""

    part: int
    samples: pa.Table
    facts: Mapping[str, Any]


def verify(path: AnyPath, *, progress: Progress = lambda done, of: None) -> VerifyReport:
    """Read every byte of a store and compare it with what was recorded.

    Args:
        progress: called with (objects read, objects in total).
    Raises: StoreError if the store does not exist, or its specification cannot be read; StorageError.
    """
    store = open_store(path)
    names = set(store.path.list())
    documents = metadata_documents(store.spec)
    statistics = statistics_documents(_blank_statistics(store.spec), {})
    damages = list(_metadata_damages(store, documents))
    index, found = _read_index(store)
    damages += found
    parts = store.committed_parts()
    with ThreadPoolExecutor(_num_threads()) as pool:
        read = list(pool.map(lambda part: _read_commit(store, part, index), parts))
        commits = {commit.part: commit for commit in read if isinstance(commit, Commit)}
        damages += [damage for damage in read if isinstance(damage, PartDamage)]
        checks = [check for commit in commits.values() for check in _object_checks(store, commit, names)]
        num_bytes = 0
        for done, (size, damage) in enumerate(pool.map(lambda check: check(), checks), 1):
            num_bytes += size
            damages += [] if damage is None else [damage]
            progress(done, len(checks))
    missing = tuple(sorted(set(range(store.spec.num_parts)) - set(parts)))
    if any(name.startswith(f"{STATS}/") for name in names):
        damages += _statistics_damages(store, statistics, commits, complete=not missing)
    elif not missing:
        damages.append(PartDamage(None, STATS, "is missing"))
    known = {*documents, *(f"{STATS}/{name}" for name in statistics), *_names_of_parts(store.spec)}
    return VerifyReport(
        store=str(store.path),
        num_parts=store.spec.num_parts,
        num_objects=len(checks),
        num_bytes=num_bytes,
        missing=missing,
        damages=tuple(damages),
        strays=tuple(sorted(names - known - {LEASE})),
    )


def _num_threads() -> int:
    return min(MAX_THREADS, 2 * num_cores())


def _metadata_damages(store: Store, documents: Mapping[str, bytes]) -> Iterator[PartDamage]:
    def is_of_a_first_store(name: str, found: bytes) -> bool:
        # these shuffled int8 byte by byte
        return _same_json(found, metadata_documents(store.spec, pairs=False)[name])

    for name, document in documents.items():
        try:
            found = store.path.read(name)
            if not _same_json(found, document) and not is_of_a_first_store(name, found):
                yield PartDamage(None, name, "differs from what the store's specification says")
        except FileNotFoundError:
            yield PartDamage(None, name, "is missing")


def _same_json(found: bytes, expected: bytes) -> bool:
    try:
        return found == expected or parse_json(found) == parse_json(expected)
    except ValueError:
        return False


def _read_index(store: Store) -> tuple[pa.Table | None, list[PartDamage]]:
    """Read all segments of the index, one after the other; None if they cannot be trusted, with the damage found."""
    tables, damages = [], []
    for segment, count in enumerate(store.spec.corpus["segments"]):
        name = segment_name(segment)
        try:
            table = _segment(store.path.read(name), str(store.path / name))
        except FileNotFoundError:
            damages.append(PartDamage(None, name, "is missing"))
        except ValueError as error:
            damages.append(PartDamage(None, name, f"is damaged ({error.__cause__ or error})"))
        else:
            tables.append(table)
            if len(table) != count:
                damages.append(PartDamage(None, name, f"lists {len(table)} pictures, the specification says {count}"))
    if damages:
        return None, damages
    index = pa.concat_tables(tables, promote_options="default")
    found = fingerprint(index)
    if found != store.spec.corpus["fingerprint"]:
        reason = f"lists pictures with fingerprint {found}, the specification says {store.spec.corpus['fingerprint']}"
        return None, [PartDamage(None, INDEX, reason)]
    return index, []


def _segment(data: bytes, where: str) -> pa.Table:
    """Read one segment of the index; check every byte of it if this version of pyarrow wrote it.

    Raises: ValueError if it is damaged.
    """
    corpus = index_from_bytes(data, where)
    writer = pq.read_metadata(pa.BufferReader(data)).created_by
    another = re.fullmatch(r"parquet-cpp-arrow version [\d.]+", writer) and not writer.endswith(f" {pa.__version__}")
    # Parquet's checksums leave out headers and footer; the same pyarrow writes the same bytes again
    if not another and index_bytes(corpus) != data:
        raise ValueError(HEADERS_DIFFER)
    return corpus.samples


def _read_commit(store: Store, part: int, index: pa.Table | None) -> Commit | PartDamage:
    name = f"parts/{part_name(part)}"
    try:
        table = read_part(store.path, part)
        facts = json.loads(table.schema.metadata[PART_STATS])
        _require_own_bytes(store.path.read(name), table, facts)
        samples = table.replace_schema_metadata()
        _require_samples(samples, index, store.spec.part_samples(part))
        if facts["objects"].keys() != _object_keys(store.spec, part):
            raise ValueError("records other objects than the part has")
    except PartCorruptError as error:
        return PartDamage(part, name, f"is damaged ({error.__cause__})", _rows(store.spec, part))
    except ValueError as error:
        return PartDamage(part, name, str(error), _rows(store.spec, part))
    return Commit(part, samples, facts)


def _require_own_bytes(data: bytes, table: pa.Table, facts: Mapping[str, Any]) -> None:
    """Raise ValueError if a commit file's bytes are not those that its content is encoded to.

    Parquet's own checksums leave out its headers and footer; the same version of pyarrow writes the same bytes again.
    """
    if facts["versions"].get("pyarrow") == pa.__version__ and encode_part(table) != data:
        raise ValueError(f"is damaged ({HEADERS_DIFFER})")


def _require_samples(samples: pa.Table, index: pa.Table | None, places: slice) -> None:
    """Raise ValueError if a part's samples are not those of the index, by number or content."""
    count = places.stop - places.start
    if len(samples) != count:
        raise ValueError(f"has {len(samples)} rows, the store's layout asks for {count}")
    if index is None:
        return
    listed = index.slice(places.start, count)
    for column in INDEXED:
        if samples[column].to_pylist() != listed[column].to_pylist():
            raise ValueError(f"has another {column} than the index lists")


def _object_keys(spec: StoreSpec, part: int) -> set[str]:
    return {*(object_key(layout, part) for layout in arrays(spec)), _moments_key(part)}


def _moments_key(part: int) -> str:
    return f"parts/{moments_name(part)}"


def _rows(spec: StoreSpec, part: int) -> tuple[int, int]:
    rows = spec.part_rows(part)
    return rows.start, rows.stop - 1


Check = Callable[[], tuple[int, PartDamage | None]]
"""Check that reads an object and returns its size, with the damage if there is any."""


def _object_checks(store: Store, commit: Commit, names: set[str]) -> list[Check]:
    checks: list[Check] = [
        lambda layout=layout: _check_object(store, commit, layout)  # type: ignore[misc]
        for layout in arrays(store.spec)
    ]
    if _moments_key(commit.part) in names:  # they are removed once they are merged
        checks.append(lambda: _check_moments(store.path, commit))
    return checks


def _check_object(store: Store, commit: Commit, layout: ArrayLayout) -> tuple[int, PartDamage | None]:
    key, rows = object_key(layout, commit.part), _rows(store.spec, commit.part)
    try:
        size, crc = _measure(store.path, key)
        if not _as_recorded(commit, key, size, crc):
            return size, _diagnosis(store, commit, layout, size)
        implausible = IMPLAUSIBLE.get(layout.path)
        if implausible and (reason := implausible(decode_chunk(store.path.read(key), layout), commit)):
            return size, PartDamage(commit.part, key, reason, rows)
        return size, None
    except FileNotFoundError:
        return 0, PartDamage(commit.part, key, "is missing", rows)
    except StorageError as error:
        return 0, PartDamage(commit.part, key, f"cannot be read ({error.__cause__})", rows)


def _measure(place: StoragePath, key: str) -> tuple[int, int]:
    """Return size and CRC-32 of an object."""
    size = crc = 0
    for block in place.blocks(key):
        size += len(block)
        crc = crc32(block, crc)
    return size, crc


def _as_recorded(commit: Commit, key: str, size: int, crc: int) -> bool:
    recorded = commit.facts["objects"][key]
    return bool(size == recorded["bytes"] and f"{crc:08x}" == recorded["crc32"])


def _diagnosis(store: Store, commit: Commit, layout: ArrayLayout, size: int) -> PartDamage:
    """Return what is wrong with an object that is not the one committed, and from which row on."""
    key, (first, last) = object_key(layout, commit.part), _rows(store.spec, commit.part)
    damage = inspect_object(store.path.read(key), layout, len(commit.samples))
    if damage is None:
        return PartDamage(commit.part, key, "is whole, but not the object that was committed", (first, last))
    reason = damage.reason
    if size != (recorded := commit.facts["objects"][key]["bytes"]):
        reason = f"{reason} ({size} bytes, {recorded} were committed)"
    return PartDamage(commit.part, key, reason, (first + (damage.first_row or 0), last))


def _implausible_boxes(boxes: np.ndarray[Any, Any], commit: Commit) -> str | None:
    """Return why the boxes cannot be those of the samples; None if they can."""
    boxes = boxes[: len(commit.samples)]
    ok = np.array(commit.samples["status"].to_pylist()) == "ok"
    if boxes[~ok].any():
        return "holds boxes of samples that failed"
    x0, y0, x1, y1 = np.moveaxis(boxes[ok], -1, 0)
    width, height = (np.array(commit.samples[side].to_pylist())[ok, None] for side in ("width", "height"))
    inside = (x0 >= 0) & (x0 < x1) & (x1 <= width) & (y0 >= 0) & (y0 < y1) & (y1 <= height)
    return None if inside.all() else "holds boxes that do not lie in their pictures"


def _implausible_photometric(params: np.ndarray[Any, Any], commit: Commit) -> str | None:
    """Return why these cannot be the parameters of the samples' views; None if they can."""
    params = params[: len(commit.samples)]
    ok = np.array(commit.samples["status"].to_pylist()) == "ok"
    if not np.isnan(params[~ok]).all():
        return "holds photometric parameters of samples that failed"
    return None if are_possible(params[ok]).all() else "holds photometric parameters that cannot be applied"


IMPLAUSIBLE = {"boxes": _implausible_boxes, PHOTOMETRIC: _implausible_photometric}
"""Check of the content of an array whose bytes are those recorded, by the array's path."""


def _check_moments(place: StoragePath, commit: Commit) -> tuple[int, PartDamage | None]:
    key = _moments_key(commit.part)
    try:
        size, crc = _measure(place, key)
    except StorageError as error:
        return 0, PartDamage(commit.part, key, f"cannot be read ({error.__cause__})")
    return size, None if _as_recorded(commit, key, size, crc) else PartDamage(commit.part, key, "fails its checksum")


def _statistics_damages(
    store: Store, expected: Mapping[str, bytes], commits: Mapping[int, Commit], *, complete: bool
) -> list[PartDamage]:
    """Return the damage of `stats/`.

    Args:
        expected: the documents of `stats/`; only the metadata among them is compared.
        complete: True if no part is missing.
    """
    try:
        totals = store.totals
        covered = totals.get("num_parts", 0)
    except PartCorruptError as error:
        return [PartDamage(None, STATS_MARK, f"is damaged ({error.__cause__})")]
    # statistics cover whole segments: all, or those from before an extension that is not finished
    if covered not in store.spec.segment_ends or (complete and covered != store.spec.num_parts):
        return [PartDamage(None, STATS, f"is of {covered} of {store.spec.num_parts} parts")]
    facts = [commits[part].facts for part in range(covered) if part in commits]
    known = len(facts) == covered
    damages = [] if not known or totals == totals_of(facts) else [PartDamage(None, STATS_MARK, CONTRADICTION)]
    damages += _statistics_objects(store.path, expected)
    return damages or list(_statistics_values(store, facts if known else None))


def _statistics_objects(place: StoragePath, expected: Mapping[str, bytes]) -> Iterator[PartDamage]:
    for name, document in expected.items():
        key = f"{STATS}/{name}"
        try:
            found = place.read(key)
        except FileNotFoundError:
            yield PartDamage(None, key, "is missing")
            continue
        if key == STATS_MARK:
            found = _without_attributes(found)
        if name.endswith(ROOT_DOCUMENT):
            if not _same_json(found, document):
                yield PartDamage(None, key, "differs from what the store's specification says")
        elif not crc_holds(found):
            yield PartDamage(None, key, "fails its checksum")


def _without_attributes(mark: bytes) -> bytes:
    """Return the statistics' group document with empty attributes; the real ones are checked elsewhere."""
    return json.dumps({**parse_json(mark), "attributes": {ATTRIBUTE: {}}}).encode()


def _blank_statistics(spec: StoreSpec) -> dict[str, np.ndarray[Any, Any]]:
    """Return zeros with the names, shapes and dtypes of the statistics."""
    whole = {"count", "norms", "outliers"}
    return {
        path: np.zeros(shape, np.int64 if path.rpartition("/")[2] in whole else np.float64)
        for path, shape in statistics_shapes(spec).items()
    }


def _statistics_values(store: Store, facts: Sequence[Mapping[str, Any]] | None) -> Iterator[PartDamage]:
    """Yield damage where statistics contradict each other, or what the parts record."""
    for path in store.spec.feature_paths:
        key = f"{STATS}/{path}"
        names = ("count", "std", "cov", "norms")
        try:
            count, std, cov, norms = (store.statistic(f"{path}/{name}") for name in names)
        except PartCorruptError as error:
            yield PartDamage(None, key, f"is damaged ({error.__cause__})")
            continue
        recorded = norms if facts is None else np.sum([part["norms"][path] for part in facts], axis=0)
        if not np.array_equal(norms, recorded) or norms.sum() != count:
            yield PartDamage(None, key, CONTRADICTION)
        elif not np.allclose(std**2, np.diagonal(cov), rtol=1e-9, atol=0):
            yield PartDamage(None, key, "has a standard deviation that is not that of its covariance")


def _names_of_parts(spec: StoreSpec) -> Iterator[str]:
    """Yield the names of all objects that the index and the parts, committed or not, may have."""
    yield from (segment_name(segment) for segment in range(len(spec.corpus["segments"])))
    for part in range(spec.num_parts):
        yield from (f"parts/{part_name(part)}", *_object_keys(spec, part))
