"""Creation of a store and commit of its parts: features first, the commit file last."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from zarr.codecs import Crc32cCodec, TransposeCodec, ZstdCodec
from zarr.storage import MemoryStore

from eupe.common.cores import num_cores
from eupe.common.files import remove_unfinished
from eupe.common.holding import LEASE
from eupe.common.prefetch import map_ahead
from eupe.common.storage import StoragePath
from eupe.errors import IncompleteError, SpecMismatchError, StoreError
from eupe.store.layout import (
    ATTRIBUTE,
    PHOTOMETRIC,
    PIXELS,
    SUMMARY,
    ArrayLayout,
    StoreSpec,
    arrays,
    differences,
    feature_path,
    kind_of,
    moments_name,
    part_name,
)
from eupe.store.precision import Calibration, decode, encode
from eupe.store.reader import (
    NOT_FINITE,
    PART_CHECKSUM,
    PART_STATS,
    ROOT_DOCUMENT,
    ROW_SCHEMA,
    STATS,
    Store,
    checksum,
    encode_part,
    open_store,
    read_part_metadata,
)
from eupe.store.shard import chunks_of, crc32, encode_chunk, object_key, shard_blocks, zarr_codec
from eupe.store.stats import Counted, Moments

RECORDED_LIBRARIES = (
    "eupe",
    "torch",
    "timm",
    "transformers",
    "open_clip_torch",
    "pillow",
    "numpy",
    "zarr",
    "tensorstore",
    "pyarrow",
)
"""Libraries whose versions are recorded with the features."""

VECTORS_PER_JOB = 4096
"""Number of tokens that one thread codes, compresses and counts at a time."""


@dataclass(frozen=True)
class Row:
    """One sample of a part."""

    key: str
    sha256: str | None
    label: str | None
    width: int | None = None
    height: int | None = None
    error: str | None = None
    """Reason why the sample has no features; None if it has."""


@dataclass(frozen=True)
class Part:
    """Content of one part, committed at once. Samples with an error hold NaN features and zero boxes."""

    index: int
    rows: Sequence[Row]
    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]
    digests: NDArray[np.uint64]
    features: Mapping[str, NDArray[Any]]
    """Array path (`224/dense`) to [samples, views, ...]: float16, as the teacher gave them, or int8 as it is stored."""
    pixels: Mapping[int, NDArray[np.uint8]] = field(default_factory=dict)
    """Size to [samples, views, size, size, 3]; empty unless the store keeps pixels."""
    num_clipped: int = 0
    """Number of values beyond fp16's range, stored as its largest value."""
    num_nonfinite: int = 0
    """Number of values that were NaN or infinite; their samples have failed."""
    versions: Mapping[str, str] = field(default_factory=dict)
    photometric: NDArray[np.float32] | None = None
    """[samples, views, 8], NaN for samples with an error; None unless the store's views are recoloured."""


def installed_versions() -> dict[str, str]:
    """Return the versions on this machine of the libraries that a feature may depend on."""
    return {name: _version(name) for name in RECORDED_LIBRARIES}


_version = cache(version)
"""Cached `version`, which searches the disk and is called for every part."""


def create_store(path: str | Path | StoragePath, spec: StoreSpec) -> Store:
    """Create an empty store, or open the one that is there if its spec is the same.

    The root's document is claimed first, so only one of two writers creates the store. The arrays' documents follow
    from it, and the next writer adds those that a killed one left out.

    Raises: SpecMismatchError listing the differences; StoreError if something else is at `path`; StorageError.
    """
    place = StoragePath.of(path)
    if not place.exists(ROOT_DOCUMENT):
        require_empty(place)
    documents = metadata_documents(spec)
    if not place.create(ROOT_DOCUMENT, documents[ROOT_DOCUMENT]):
        store = open_store(place)
        require_same_spec(store, spec)
        # specs that count as the same may differ in `samples_per_part`, on which the shapes depend
        documents = metadata_documents(store.spec)
    for name, document in documents.items():
        place.create(name, document)
    return open_store(place)


def require_same_spec(store: Store, spec: StoreSpec) -> None:
    """Raise SpecMismatchError listing the differences if the store was made to another spec."""
    if different := differences(store.spec, spec):
        raise SpecMismatchError(
            f"{store.path} holds features of another specification ({'; '.join(different)}); "
            "give another --out, or the options it was made with"
        )


def extend_store(store: Store, *, fingerprint: str, num_new: int) -> Store:
    """Make room for new samples of the corpus; their parts are missing until they are committed.

    Args:
        fingerprint: fingerprint of the whole corpus, with the new samples.
        num_new: number of new samples.
    Raises: StorageError.
    """
    segments = [*store.spec.corpus["segments"], num_new]
    spec = replace(store.spec, corpus={**store.spec.corpus, "fingerprint": fingerprint, "segments": segments})
    documents = metadata_documents(spec)
    root = documents.pop(ROOT_DOCUMENT)
    for name, document in documents.items():
        store.path.write(name, document)
    # last: until then the store is the old one, and an extension that was killed can be done again
    store.path.write(ROOT_DOCUMENT, root)
    return open_store(store.path)


def require_empty(place: StoragePath) -> None:
    """Raise StoreError if a place holds anything but a writer's lease."""
    if (place.is_local and place.local.is_file()) or set(place.list()) - {LEASE}:
        raise StoreError(f"{place} exists and is not a feature store (no zarr.json); give another --out")


def metadata_documents(spec: StoreSpec, *, pairs: bool = True) -> dict[str, bytes]:
    """Return every `zarr.json` of a store by name, as zarr-python writes them: a pure function of the spec.

    Args:
        pairs: False for the first stores, see `eupe.store.shard.typesize_of`.
    """
    memory: dict[str, Any] = {}
    group = zarr.open_group(MemoryStore(memory), mode="w", zarr_format=3, attributes={ATTRIBUTE: spec.to_json()})
    for layout in arrays(spec):
        group.create_array(
            layout.path,
            shape=layout.shape,
            dtype=layout.dtype,
            chunks=layout.chunk,
            shards=layout.shard if layout.sharded else None,
            fill_value=layout.fill,
            filters=None if layout.order is None else [TransposeCodec(order=layout.order)],
            compressors=[zarr_codec(layout, pairs=pairs), Crc32cCodec()],
            dimension_names=layout.dimensions,
        )
    return _as_bytes(memory)


def _as_bytes(memory: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: buffer.to_bytes() for name, buffer in memory.items()}


class StoreWriter:
    """Writer that commits parts to an existing store."""

    def __init__(
        self,
        path: str | Path | StoragePath,
        *,
        threads: int | None = None,
        count: Callable[[NDArray[Any]], Counted] = Counted.of,
    ) -> None:
        """Open a store for writing.

        Args:
            threads: number of threads that code and compress; one per core by default.
            count: function that takes the statistics of [views, ..., D] tokens: `Counted.of`, or the same on a GPU.
        Raises: StoreError if the store does not exist; StorageError.
        """
        self.place = StoragePath.of(path)
        self.spec = open_store(self.place).spec
        self._layouts = {layout.path: layout for layout in arrays(self.spec)}
        self._calibrations = {path: self.spec.array_calibration(path) for path in self._layouts}
        threads = threads or num_cores()
        # bounded: chunks that are compressed faster than the disk takes them would fill the memory
        self._in_pool = partial(map_ahead, ThreadPoolExecutor(threads), ahead=2 * threads)
        self._count = count

    def commit(self, part: Part) -> None:
        """Write every array of the part, then atomically the commit file that makes the part exist.

        On a local disk chunks are written as they are compressed: little more than the part itself is in memory.

        Raises: StorageError; then nothing of the part is visible.
        """
        objects: dict[str, tuple[int, int]] = {}
        params: dict[str, NDArray[Any]] = {"boxes": part.boxes, "flips": part.flips, "digests": part.digests}
        assert (part.photometric is not None) == self.spec.photometric
        if part.photometric is not None:
            params[PHOTOMETRIC] = part.photometric
        for name, values in params.items():
            layout = self._layouts[name]
            self._write_object(object_key(layout, part.index), (encode_chunk(values, layout),), objects)
        for size, pixels in part.pixels.items():
            layout = self._layouts[feature_path(size, PIXELS)]
            chunks = self._in_pool(partial(encode_chunk, layout=layout), chunks_of(pixels, layout))
            self._write_object(object_key(layout, part.index), shard_blocks(chunks, layout), objects)
        counted = {path: self._write_features(path, part, objects) for path in part.features}
        moments = save_tensors(_moment_tensors({path: c.moments for path, c in counted.items()}))
        self._write_object(f"parts/{moments_name(part.index)}", (moments,), objects)
        # last, when everything else is on the disk: readers take the part as whole from here on
        self._commit_rows(part, counted, objects)

    def _write_object(self, key: str, blocks: Iterable[bytes], objects: dict[str, tuple[int, int]]) -> None:
        size, crc = 0, 0

        # measured as the blocks pass: a local object is never in memory as a whole
        def noted() -> Iterator[bytes]:
            nonlocal size, crc
            for block in blocks:
                size, crc = size + len(block), crc32(block, crc)
                yield block

        self.place.write_blocks(key, noted())
        objects[key] = (size, crc)

    def _write_features(self, path: str, part: Part, objects: dict[str, tuple[int, int]]) -> Counted:
        layout = self._layouts[path]
        chunks = chunks_of(part.features[path], layout)
        vectors_per_chunk = chunks[0].size // chunks[0].shape[-1]
        per_job = max(1, VECTORS_PER_JOB // vectors_per_chunk)
        code = partial(
            _code_chunks,
            layout=layout,
            precision=self.spec.precision_of(path),
            calibration=self._calibrations[path],
            count=self._count,
        )
        counted: list[Counted] = []

        # groups of a fixed size, merged in order: the number of threads changes no bit of the statistics
        def encoded() -> Iterator[bytes]:
            groups = [chunks[i : i + per_job] for i in range(0, len(chunks), per_job)]
            for group, statistics in self._in_pool(code, groups):
                counted.append(statistics)
                yield from group

        self._write_object(object_key(layout, part.index), shard_blocks(encoded(), layout), objects)
        return Counted.total(counted)

    def _commit_rows(self, part: Part, counted: Mapping[str, Counted], objects: Mapping[str, tuple[int, int]]) -> None:
        table = pa.Table.from_pylist(
            [{**row.__dict__, "status": "ok" if row.error is None else "failed"} for row in part.rows],
            schema=ROW_SCHEMA,
        )
        facts = {
            "objects": {key: {"bytes": size, "crc32": f"{crc:08x}"} for key, (size, crc) in objects.items()},
            "norms": {path: c.norms.tolist() for path, c in counted.items()},
            "outliers": {path: c.outliers.tolist() for path, c in counted.items() if kind_of(path) != SUMMARY},
            "num_clipped": part.num_clipped,
            "num_nonfinite": part.num_nonfinite,
            "versions": dict(part.versions),
        }
        encoded = json.dumps(facts, sort_keys=True).encode()
        table = table.replace_schema_metadata({PART_STATS: encoded, PART_CHECKSUM: checksum(encoded)})
        self.place.write(f"parts/{part_name(part.index)}", encode_part(table))


def _code_chunks(
    chunks: Sequence[NDArray[Any]],
    *,
    layout: ArrayLayout,
    precision: str,
    calibration: Calibration | None,
    count: Callable[[NDArray[Any]], Counted],
) -> tuple[list[bytes], Counted]:
    """Encode chunks; return them with the statistics of what a reader will get from them."""
    encoded, read_back = [], []
    for chunk in chunks:
        stored = encode(chunk, precision, calibration)
        encoded.append(encode_chunk(stored, layout))
        tokens = decode(stored, precision, calibration)
        read_back.append(tokens.reshape(-1, *tokens.shape[2:]))
    return encoded, count(np.concatenate(read_back))


def _moment_tensors(moments: Mapping[str, Moments]) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {}
    for path, m in moments.items():
        upper = m.scatter[np.triu_indices(len(m.mean))]
        tensors |= {f"{path}/count": np.array([m.count]), f"{path}/mean": m.mean, f"{path}/scatter": upper}
    return tensors


def finish_store(path: str | Path | StoragePath) -> Store:
    """Merge the parts' statistics into `stats/`, whose group document marks the store as finished.

    Repeating it does no harm.

    Raises: StoreError if parts are missing, or no picture could be read; IncompleteError if no sample has features for
        another reason.
    """
    store = open_store(path)
    if missing := store.missing_parts():
        raise StoreError(f"{store.path} lacks {len(missing)} of {store.spec.num_parts} parts and cannot be finished")
    if not store.finished:
        _write_statistics(store)
    remove_leftovers(store)
    return open_store(path)


def forget_parts(store: Store, parts: Sequence[int]) -> Store:
    """Remove parts and the statistics from a store, so that the parts are extracted again.

    Raises: StorageError.
    """
    if not parts:
        return store
    # first, so that no statistics cover a part that is gone
    remove_statistics(store.path)
    for part in parts:
        store.path.delete(f"parts/{part_name(part)}")
    return open_store(store.path)


def remove_statistics(place: StoragePath) -> None:
    """Delete `stats/`, first the document that marks it as complete."""
    place.delete(f"{STATS}/{ROOT_DOCUMENT}")
    for name in place.list(f"{STATS}/"):
        place.delete(name)


def _write_statistics(store: Store) -> None:
    place, spec = store.path, store.spec
    merged, facts = merged_statistics(store)
    values: dict[str, NDArray[Any]] = {}
    for name in spec.feature_paths:
        total = merged[name]
        if total.count == 0:
            raise without_features(store)
        statistics = {
            "count": np.array(total.count),
            "mean": total.mean,
            "std": total.std,
            "cov": total.covariance,
            "norms": np.sum([part["norms"][name] for part in facts], axis=0),
        }
        if kind_of(name) != SUMMARY:
            statistics["outliers"] = np.sum([part["outliers"][name] for part in facts], axis=0)
        values |= {f"{name}/{statistic}": array for statistic, array in statistics.items()}
    documents = statistics_documents(values, totals_of(facts))
    # the mark goes first and comes last, so that it never stands beside statistics that are incomplete
    mark = documents.pop(ROOT_DOCUMENT)
    place.delete(f"{STATS}/{ROOT_DOCUMENT}")
    for name, document in documents.items():
        place.write(f"{STATS}/{name}", document)
    place.write(f"{STATS}/{ROOT_DOCUMENT}", mark)


def without_features(store: Store) -> StoreError | IncompleteError:
    """Return the error for a store in which no sample has features."""
    see = f"`eupe store info {store.path} --json` lists them"
    if not store.num_not_finite:
        return StoreError(f"{store.path}: no picture of the corpus could be read; {see}")
    unreadable = len(store.failed) - store.num_not_finite
    others = f", and {unreadable} could not be read" if unreadable else ""
    return IncompleteError(
        f"{store.path}: no picture has features: for {store.num_not_finite} pictures {NOT_FINITE}{others} ({see}); "
        f"{what_to_do(store.spec)}"
    )


def what_to_do(spec: StoreSpec) -> str:
    """Return advice for a teacher whose features are not finite."""
    dtype = spec.teacher.get("dtype")
    if dtype in ("fp16", "bf16"):
        return f"they were computed in {dtype}: give --dtype fp32, and another --out"
    return (
        "they were computed in fp32, so the checkpoint itself is likely damaged (NaN among its weights): give the "
        "right one, and another --out"
    )


def totals_of(facts: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Compute the totals that `stats/` notes, from what the commit files of its parts record."""
    counts = {name: sum(part[name] for part in facts) for name in ("num_clipped", "num_nonfinite")}
    return {"num_parts": len(facts), **counts}


def statistics_documents(values: Mapping[str, NDArray[Any]], totals: Mapping[str, int]) -> dict[str, bytes]:
    """Return every object of `stats/` by its name there.

    Args:
        values: arrays by path, such as `224/dense/mean`.
        totals: attributes of the group, see `totals_of`.
    """
    memory: dict[str, Any] = {}
    attributes = {ATTRIBUTE: dict(totals)}
    group = zarr.open_group(MemoryStore(memory), mode="w", zarr_format=3, attributes=attributes)
    for path, array in values.items():
        group.create_array(
            path,
            data=array,
            chunks=array.shape,
            compressors=[ZstdCodec(), Crc32cCodec()],
            config={"write_empty_chunks": True},  # zeros are content; a missing chunk would read as damage
        )
    return _as_bytes(memory)


def merged_statistics(store: Store) -> tuple[dict[str, Moments], list[dict[str, Any]]]:
    """Merge the moments of each feature array over all parts, in order; return them with what each part records.

    Moments that the statistics cover already are not read again.
    """
    covered = store.totals.get("num_parts", 0)
    merged = {name: store.merged_moments(name) for name in store.spec.feature_paths} if covered else {}
    facts = []
    threads = num_cores()
    inner_ends = set(store.spec.segment_ends[:-1])

    def recorded(part: int) -> tuple[dict[str, Any], dict[str, Moments]]:
        noted = read_part_metadata(store.path, part)
        return noted, _part_moments(store, part, noted) if part >= covered else {}

    with ThreadPoolExecutor(threads) as pool:
        for part, (noted, of_part) in enumerate(
            map_ahead(pool, recorded, range(store.spec.num_parts), ahead=2 * threads)
        ):
            facts.append(noted)
            if part < covered:
                continue
            for name, moments in of_part.items():
                merged[name] = merged[name].merge(moments) if name in merged else moments
            # with the rounding of `stats/`: finishing the store before it was extended must change no bit
            if part + 1 in inner_ends:
                merged = {name: moments.as_kept() for name, moments in merged.items()}
    return merged, facts


def _part_moments(store: Store, part: int, facts: Mapping[str, Any]) -> dict[str, Moments]:
    """Return the moments of each feature array: those that the writer left, or else computed from the features."""
    key = f"parts/{moments_name(part)}"
    try:
        data = store.path.read(key)
    except FileNotFoundError:
        data = b""
    if f"{crc32(data):08x}" != facts["objects"][key]["crc32"]:
        return {name: _moments_of_features(store, part, name) for name in store.spec.feature_paths}
    tensors = load_tensors(data)
    moments = {}
    for name in store.spec.feature_paths:
        mean = tensors[f"{name}/mean"]
        scatter = np.zeros((len(mean), len(mean)))
        scatter[np.triu_indices(len(mean))] = tensors[f"{name}/scatter"]
        moments[name] = Moments(int(tensors[f"{name}/count"][0]), mean, scatter + np.triu(scatter, 1).T)
    return moments


def _moments_of_features(store: Store, part: int, name: str) -> Moments:
    """Compute moments from the features, in the same groups as the writer, so that the bits are the same."""
    layout = next(layout for layout in arrays(store.spec) if layout.path == name)
    rows = store.spec.part_rows(part)
    places = [(row, view) for row in range(rows.start, rows.stop) for view in range(store.spec.num_views)]
    views_per_chunk = layout.chunk[0] * layout.chunk[1]
    vectors_per_view = int(np.prod(layout.shape[2:-1]))
    per_job = views_per_chunk * max(1, VECTORS_PER_JOB // (views_per_chunk * vectors_per_view))
    counted = []
    for start in range(0, len(places), per_job):
        group = places[start : start + per_job]
        tokens = store.read_tokens(name, [row for row, _ in group], [view for _, view in group])
        counted.append(Counted.of(np.ascontiguousarray(tokens.decode())))
    return Counted.total(counted).moments


def remove_leftovers(store: Store) -> None:
    """Delete the parts' own moments, which are merged by now, and the unfinished files of killed writers."""
    for name in store.path.list("parts/"):
        if name.endswith(".moments"):
            store.path.delete(name)
    if store.path.is_local:
        remove_unfinished(store.path.local)
