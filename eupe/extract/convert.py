"""Conversion of a store: its features at another precision or grid, in a new store, without the teacher.

Features go through the same steps as extraction's do after the teacher, part by part, so a store converted from fp16
has the bytes that extraction would have written. Pooled maps differ in their last bits: extraction pools what the
teacher gave, a conversion what fp16 kept of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from eupe.common.holding import Holder
from eupe.common.prefetch import map_ahead
from eupe.common.storage import AnyPath, StoragePath
from eupe.corpus.index import index_from_bytes
from eupe.errors import ConfigError, CorpusError, SpecMismatchError
from eupe.extract.calibrate import candidates, measure, sample_places, settle
from eupe.extract.parts import converted_spec
from eupe.extract.worker import pool_cells, to_fp16
from eupe.store import Store, open_store
from eupe.store.layout import StoreSpec, samples_per_part, segment_name
from eupe.store.precision import FP16
from eupe.store.reader import ROOT_DOCUMENT, VIEWS_PER_READ, read_part_metadata
from eupe.store.writer import (
    Part,
    Row,
    StoreWriter,
    create_store,
    finish_store,
    installed_versions,
    remove_leftovers,
    require_empty,
    require_same_spec,
)

WRITERS = ("eupe", "numpy", "zarr", "tensorstore", "pyarrow")
"""Libraries that code and write features; the recorded versions of all others are those that the features came from."""

Progress = Callable[[str, int, int], None]
Read = Callable[[Sequence[int], Sequence[int]], NDArray[Any]]
"""Function that reads B views, given their rows and views, in the given order: [B, ...]."""


@dataclass(frozen=True)
class ConvertReport:
    """The result of a conversion."""

    store: str
    source: str
    cached: bool
    """True if the store was finished before."""
    num_samples: int
    num_views: int
    num_failed: int
    """Samples without features."""
    precision: Mapping[str, str]
    grids: tuple[int, ...]
    fidelity: Mapping[str, Mapping[str, float]]
    """Path of each array to `mean` and `p5` of its tokens' cosines, and the `share` of raw fp16, as the store records
    them; empty if all is fp16."""
    source_bytes: int
    stored_bytes: int
    seconds: float


def convert(
    path: AnyPath,
    out: AnyPath,
    *,
    precision: str,
    grid: int | None = None,
    progress: Progress = lambda stage, done, of: None,
) -> ConvertReport:
    """Make a store with the features of a finished one at another precision or grid, or go on with one that was begun.

    Args:
        precision: as `eupe extract --precision` takes it.
        grid: cells along one side to which dense maps are pooled; None to leave them as they are.
        progress: called with a stage, and its numbers of views done and in all.
    Raises: ConfigError or StoreError, before anything is written, for a request that cannot be met; PartCorruptError
        for a damaged part of the source; StorageError; IncompleteError.
    """
    began = time.monotonic()
    source, place = open_store(path), StoragePath.of(out)
    _require_apart(source.path, place)
    spec = _in_parts(source.spec, converted_spec(source.spec, precision, grid, where=str(source.path)))
    source.require_finished()
    _ = source.samples  # reads every commit file, so that a damaged one is found before anything is written
    existing = open_store(place) if place.exists(ROOT_DOCUMENT) else None
    if existing is None:
        require_empty(place)
    else:
        require_same_spec(existing, spec)
    if existing is not None and existing.finished:
        remove_leftovers(existing)
        return _report(source, existing, cached=True, seconds=time.monotonic() - began)
    with Holder("store convert") as holder:
        holder.hold(place)
        store = _filled(source, spec, place, holder, progress)
    return _report(source, store, cached=False, seconds=time.monotonic() - began)


def _in_parts(before: StoreSpec, spec: StoreSpec) -> StoreSpec:
    """Return the spec of a conversion with the number of samples in a part, and the libraries that write it."""
    per_part = before.samples_per_part
    if (spec.grids, spec.layers) != (before.grids, before.layers):
        # the number that extraction takes, but no fewer than the source's, so that none of its parts is divided
        per_part = max(per_part, samples_per_part(before.corpus["segments"][0], spec.bytes_per_sample))
    return replace(spec, samples_per_part=per_part, versions=_with_writers(before.versions))


def _with_writers(versions: Mapping[str, str]) -> dict[str, str]:
    now = installed_versions()
    return {**versions, **{name: now[name] for name in WRITERS}}


def _require_apart(source: StoragePath, place: StoragePath) -> None:
    """Raise ConfigError if one of the two stores would lie in the other."""
    ours, theirs = (f"{each.resolved().url.rstrip('/')}/" for each in (place, source))
    if ours.startswith(theirs) or theirs.startswith(ours):
        raise ConfigError(f"--out {place} is {source} itself, lies in it or holds it; give a place beside it")


def _filled(source: Store, spec: StoreSpec, place: StoragePath, holder: Holder, progress: Progress) -> Store:
    """Return the finished store after making what it lacks; this process holds its place."""
    samples = source.samples.combine_chunks()  # in one piece, so that taking a part's rows takes the same time for all
    indexes = _indexes(source)
    if not place.exists(ROOT_DOCUMENT):
        progress("measuring precision", 0, 0)
        spec = _measured(source, samples, spec)
    # of an existing store this checks the spec, and completes what a killed maker left out
    store = create_store(place, spec)
    _require_begun_alike(source, store, spec)
    _copy_indexes(source, store, indexes)
    writer = StoreWriter(place)
    done, total = store.samples.num_rows, spec.num_samples
    with ThreadPoolExecutor(1) as pool:
        read = partial(_converted, source, samples, store.spec)
        for part in map_ahead(pool, read, store.missing_parts(), ahead=1):  # the next is read while this one is written
            holder.require_held()
            writer.commit(part)
            done += len(part.rows)
            progress("converting", done * spec.num_views, total * spec.num_views)
    holder.require_held()
    return finish_store(place)


def _indexes(source: Store) -> list[bytes]:
    """Return the source's index of pictures, segment by segment.

    Raises: CorpusError if it is damaged or missing.
    """
    found = []
    for segment in range(len(source.spec.corpus["segments"])):
        name = segment_name(segment)
        try:
            found.append(source.path.read(name))
            index_from_bytes(found[-1], str(source.path / name))
        except (FileNotFoundError, CorpusError) as error:
            raise CorpusError(
                f"the index of pictures {source.path / name} is damaged or missing ({error}); run `eupe store repair "
                f"{source.path}` to make it again"
            ) from error
    return found


def _require_begun_alike(source: Store, store: Store, spec: StoreSpec) -> None:
    """Raise SpecMismatchError if an unfinished store was begun from a source with other content, or in other parts."""
    recorded = store.spec.fidelity.get("measured", {})
    calibrations = source.spec.calibration, store.spec.calibration
    parts, asked = ((each.corpus["segments"], each.samples_per_part) for each in (store.spec, spec))
    alike = parts == asked and all(
        _lost_before(source.spec, path).keys() <= recorded.get(path, {}).keys()
        # values that stay as they are stored have a meaning only with their own calibration
        and not (_stays(source.spec, spec, path) and calibrations[0].get(path) != calibrations[1].get(path))
        for path in spec.feature_paths
    )
    if not alike:
        raise _begun_otherwise(source, store)


def _begun_otherwise(source: Store, store: Store) -> SpecMismatchError:
    return SpecMismatchError(
        f"{store.path} is unfinished, and was begun from something else than {source.path} as it is now, or in other "
        "parts; finish it as it was begun, or give another --out"
    )


def _copy_indexes(source: Store, store: Store, indexes: Sequence[bytes]) -> None:
    """Give a new store the source's index of pictures.

    Raises: SpecMismatchError if an unfinished store has another one, which may have the pictures in another order.
    """
    for segment, index in enumerate(indexes):
        store.path.create(segment_name(segment), index)
        if store.path.read(segment_name(segment)) != index:
            raise _begun_otherwise(source, store)


def _measured(source: Store, samples: pa.Table, spec: StoreSpec) -> StoreSpec:
    """Return the spec with its calibration and fidelity, measured on the pictures that extraction takes for it.

    Arrays that stay as they are keep those of the source. Of an array that lost something before, what the source
    records of that is kept as well.

    Raises: ConfigError if none of these pictures has features.
    """
    if set(spec.precision.values()) == {FP16}:
        return spec
    # an extended store was measured before it was extended
    sample = samples.take(sample_places(spec.corpus["segments"][0], spec.num_views))
    if not pc.any(pc.equal(sample["status"], "ok")).as_py():
        raise ConfigError(
            f"none of the {sample.num_rows} pictures of {source.path} on which the precision is measured has features; "
            f"`eupe store info {source.path}` says why"
        )
    rows = sample["row"].to_pylist()
    changed = [path for path in spec.feature_paths if not _stays(source.spec, spec, path)]
    features = {path: _features(source, spec, path, rows) for path in changed}
    settled = settle(spec, measure(spec, features, candidates(spec, None)), None)
    fresh = settled.fidelity["measured"]
    measured = {path: _lost_before(source.spec, path) | fresh.get(path, {}) for path in spec.feature_paths}
    calibrated = {path: each for path, each in source.spec.calibration.items() if path not in changed}
    return replace(
        settled,
        calibration={**calibrated, **settled.calibration},
        fidelity={**settled.fidelity, "measured": measured},
    )


def _lost_before(spec: StoreSpec, path: str) -> dict[str, Mapping[str, float]]:
    """Return what a store records of an array's precision, by that precision; empty for fp16, which loses nothing."""
    precision, kept = spec.precision_of(path), spec.measured_fidelity(path)
    return {} if precision == FP16 or kept is None else {precision: kept}


def _stays(before: StoreSpec, after: StoreSpec, path: str) -> bool:
    """Return whether an array that lost something already is stored as it was."""
    pooled = before.shape(path) != after.shape(path)
    return before.precision_of(path) == after.precision_of(path) != FP16 and not pooled


def _converted(source: Store, samples: pa.Table, spec: StoreSpec, part: int) -> Part:
    """Return the content of a part: of one part of the source, or of several if maps are pooled.

    Args:
        samples: the source's samples, in the order of its index.
    """
    there = spec.part_samples(part)
    table = samples.slice(there.start, there.stop - there.start)
    rows, shape = table["row"].to_pylist(), (table.num_rows, spec.num_views)
    places = _places(rows, spec.num_views)
    views = source.read_views(*places)
    facts = [read_part_metadata(source.path, p) for p in sorted({row // source.spec.samples_per_part for row in rows})]
    columns = [field.name for field in fields(Row)]
    return Part(
        index=part,
        rows=[Row(**{name: row[name] for name in columns}) for row in table.to_pylist()],
        boxes=views.boxes.reshape(*shape, 4),
        flips=views.flips.reshape(shape),
        digests=source.read_digests(*places).reshape(shape),
        features={path: _features(source, spec, path, rows) for path in spec.feature_paths},
        pixels={
            size: _gathered(partial(source.read_pixels, size=size), rows, spec.num_views)
            for size in spec.sizes
            if spec.pixels
        },
        num_clipped=sum(fact["num_clipped"] for fact in facts),
        num_nonfinite=sum(fact["num_nonfinite"] for fact in facts),
        versions=_with_writers(facts[0]["versions"]),
        photometric=None if views.photometric is None else views.photometric.reshape(*shape, -1),
    )


def _features(source: Store, spec: StoreSpec, path: str, rows: Sequence[int]) -> NDArray[Any]:
    """Return the features of one array, before they are coded; int8 that is not pooled is returned as stored."""
    grid, *others = spec.shape(path)
    return _gathered(partial(_read_pooled, source, path, grid if others else None), rows, spec.num_views)


def _read_pooled(source: Store, path: str, grid: int | None, rows: Sequence[int], views: Sequence[int]) -> NDArray[Any]:
    tokens = source.read_tokens(path, rows, views)
    if grid is None or tokens.stored.shape[1] == grid:
        return tokens.stored
    # channels are last in memory, as in the teacher's own map: the same sums in the same order
    dense_BhwD = torch.from_numpy(np.ascontiguousarray(tokens.decode()))
    return to_fp16(pool_cells(dense_BhwD, grid))[0].numpy()


def _gathered(read: Read, rows: Sequence[int], num_views: int) -> NDArray[Any]:
    """Return all views of some rows, [samples, views, ...], read in groups so that only the result is large."""
    per_read = max(1, VIEWS_PER_READ // num_views)
    groups = (rows[start : start + per_read] for start in range(0, len(rows), per_read))
    values = np.concatenate([read(*_places(group, num_views)) for group in groups])
    return values.reshape(len(rows), num_views, *values.shape[1:])


def _places(rows: Sequence[int], num_views: int) -> tuple[list[int], list[int]]:
    """Return row and view of all views of some rows."""
    return [row for row in rows for _ in range(num_views)], list(range(num_views)) * len(rows)


def _report(source: Store, store: Store, *, cached: bool, seconds: float) -> ConvertReport:
    spec = store.spec
    return ConvertReport(
        store=str(store.path),
        source=str(source.path),
        cached=cached,
        num_samples=spec.num_samples,
        num_views=spec.num_samples * spec.num_views,
        num_failed=source.failed.num_rows,
        precision=spec.precision,
        grids=spec.grids,
        fidelity={path: kept for path in spec.feature_paths if (kept := spec.measured_fidelity(path)) is not None},
        source_bytes=source.stored_bytes,
        stored_bytes=store.stored_bytes,
        seconds=seconds,
    )
