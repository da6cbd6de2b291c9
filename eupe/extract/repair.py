"""Repair of a store: makes again what `eupe store verify` reports, and nothing else.

Metadata and statistics are rebuilt from the rest of the store. Parts need the teacher, the weights and the pictures
that the store was made with; the index needs the pictures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from eupe.common.holding import Holder
from eupe.common.storage import AnyPath, StoragePath
from eupe.corpus.choice import AS_FOUND, Choice
from eupe.corpus.index import Corpus, fingerprint, index_bytes, index_from_bytes, open_corpus
from eupe.corpus.views import ViewSpec
from eupe.errors import CorpusError, EupeError, IncompleteError, PartCorruptError
from eupe.extract.actors import JobActors
from eupe.extract.config import ExtractConfig, require_in_range
from eupe.extract.dispatch import Status, run_parts
from eupe.extract.job import stored_index
from eupe.extract.parts import plan_parts
from eupe.extract.provenance import (
    require_dtype,
    require_same_teacher,
    require_unchanged,
    stored_pictures,
    stored_teacher,
    weights_file,
)
from eupe.store import Store, open_store
from eupe.store.layout import moments_name, part_name, segment_name
from eupe.store.reader import STATS, read_part, read_part_metadata
from eupe.store.verify import INDEX, PartDamage, VerifyReport, verify
from eupe.store.writer import finish_store, metadata_documents, remove_statistics
from eupe.teachers.spec import TeacherSpec

OnStatus = Callable[[Status], None]


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """The options of one repair, as on the command line; everything that decides the content is in the store."""

    store: AnyPath
    corpus: AnyPath | None = None
    """Current folder of the pictures; by default the one recorded in the store."""
    weights: Path | None = None
    """Local weights in place of the hub's; must be the file that the store was made with."""
    weights_key: str | None = None
    """Key of the teacher's tensors among others in the weights file; found automatically if only one fits."""
    teacher: str | None = None
    """Current name or folder of the teacher; by default the one recorded in the store."""
    batch_size: int | None = None
    """Views per forward pass; by default as when the store was made."""
    workers: int | None = None
    gpus_per_worker: float | None = None
    ray_address: str | None = None


@dataclass(frozen=True)
class RepairReport:
    """The result of a repair."""

    store: str
    parts: tuple[int, ...]
    """Parts that were extracted again."""
    documents: tuple[str, ...]
    """Names of the metadata documents and index segments that were written again."""
    statistics: bool
    """True if the statistics were taken again."""
    num_bytes: int
    """Bytes of arrays that were verified at the end."""
    seconds: float


class Crew(Protocol):
    """The workers that extract parts with one teacher."""

    @property
    def weights_sha256(self) -> str: ...

    def prepare(self, store: Store) -> None: ...

    def run_parts(self, store: Store, on_status: OnStatus) -> float: ...


class RayCrew:
    """The Ray actors of a job with one teacher."""

    def __init__(self, config: ExtractConfig, teacher: TeacherSpec, corpus: Corpus) -> None:
        self._actors = JobActors([config], [teacher], corpus)

    def __enter__(self) -> RayCrew:
        return self

    def __exit__(self, *_: object) -> None:
        self._actors.__exit__()

    @property
    def weights_sha256(self) -> str:
        return self._actors.weights_sha256[0]

    def prepare(self, store: Store) -> None:
        self._actors.prepare({0: store})

    def run_parts(self, store: Store, on_status: OnStatus) -> float:
        return run_parts(self._actors, {0: store}, stored_index(store).samples, on_status)


OpenCrew = Callable[[ExtractConfig, TeacherSpec, Corpus], AbstractContextManager[Crew]]


def repair(
    config: RepairConfig, *, open_crew: OpenCrew = RayCrew, on_status: OnStatus = lambda status: None
) -> RepairReport:
    """Restore a store to the state that it would have without the damage.

    A teacher is loaded only if a part must be extracted. No part is deleted until everything that is needed to make it
    again is available.

    Raises: an EupeError for anything that the user can fix; IncompleteError if there is still damage at the end.
    """
    place = StoragePath.of(config.store)
    open_store(place)
    with Holder("store repair") as holder:
        holder.hold(place)
        return _repaired(config, place, open_crew, on_status)


def _repaired(config: RepairConfig, place: StoragePath, open_crew: OpenCrew, on_status: OnStatus) -> RepairReport:
    """Repair a store that this process holds; see `repair`."""
    began = time.monotonic()
    found = _verified(place, "verifying", on_status)
    documents = _restore_metadata(open_store(place), found)
    if segments := _restore_index(open_store(place), found, config.corpus, on_status):
        # the commit files can be checked against the index only now
        found = _verified(place, "verifying", on_status)
    store = open_store(place)
    parts = sorted({*found.missing, *found.damaged_parts})
    statistics = any(damage.part is None and damage.what.startswith(STATS) for damage in found.damages)
    if parts:
        changed = _extract_again(config, store, parts, found.damaged_parts, open_crew, on_status)
        # in other batches the last bits may differ, and the statistics are of what is stored
        statistics |= any(part < _covered(store) for part in changed)
    _remove_damaged_moments(place, found.damages)
    if statistics:
        remove_statistics(place)
    if not found.whole:
        finish_store(place)
        after = _verified(place, "verifying again", on_status)
        if not after.whole:
            raise IncompleteError(
                f"{place} is still damaged after its repair ({after.damages[0]}); if its storage works, run the "
                "repair again"
            )
        found = after
    seconds = time.monotonic() - began
    return RepairReport(str(place), tuple(parts), (*documents, *segments), statistics, found.num_bytes, seconds)


def _verified(place: StoragePath, stage: str, on_status: OnStatus) -> VerifyReport:
    return verify(place, progress=lambda done, of: on_status(Status(stage, done, of)))


def _restore_metadata(store: Store, found: VerifyReport) -> list[str]:
    """Write damaged metadata again from the specification; return the names of the documents."""
    documents = metadata_documents(store.spec)
    names = [damage.what for damage in found.damages if damage.part is None and damage.what in documents]
    for name in names:
        store.path.write(name, documents[name])
    return names


def _restore_index(store: Store, found: VerifyReport, corpus: AnyPath | None, on_status: OnStatus) -> list[str]:
    """Make damaged segments of the index again from the pictures; return their names.

    Raises: CorpusError if the pictures are not those that were indexed.
    """
    damages = [damage for damage in found.damages if damage.part is None and damage.what.startswith(INDEX)]
    if not damages:
        return []
    every = range(len(store.spec.corpus["segments"]))
    named = {damage.what for damage in damages}
    bad = [segment for segment in every if segment_name(segment) in named or INDEX in named]
    try:
        root = stored_pictures(store, corpus)
        pictures = open_corpus(
            corpus or root,
            progress=lambda done, of: on_status(Status("indexing", done, of)),
            choice=_choice(store, bad),
        )
        segments = _segments(store, bad, pictures.samples)
    except CorpusError as error:
        raise CorpusError(
            f"{store.path / damages[0].what} {damages[0].reason}, and the commit files hold only part of its content, "
            f"so the pictures are needed to make it again: {error}; until then the store can be read, but not repaired "
            "or extended"
        ) from error
    for segment in bad:
        index = replace(pictures, root=StoragePath.of(store.spec.corpus["root"]), samples=segments[segment])
        store.path.write(segment_name(segment), index_bytes(index))
    return [segment_name(segment) for segment in bad]


def _choice(store: Store, bad: Sequence[int]) -> Choice:
    """Return the choice that the store was made with, from an undamaged segment; the default if there is none."""
    whole = [segment for segment in range(len(store.spec.corpus["segments"])) if segment not in bad]
    names = [segment_name(segment) for segment in whole[:1]]
    return next((index_from_bytes(store.path.read(name), name).choice for name in names), AS_FOUND)


def _segments(store: Store, bad: Sequence[int], pictures: pa.Table) -> list[pa.Table]:
    """Return the segments of the index.

    An undamaged segment is read. A damaged one lists the pictures that its parts name or, if their commit files are
    damaged, too, the pictures that are in no other segment.

    Raises: CorpusError if two segments and their commit files are damaged, or the fingerprint differs from the store's.
    """
    counts = store.spec.corpus["segments"]
    keys = [_keys_of_parts(store, segment) if segment in bad else None for segment in range(len(counts))]
    segments = {
        segment: index_from_bytes(store.path.read(segment_name(segment)), segment_name(segment)).samples
        for segment in range(len(counts))
        if segment not in bad
    }
    segments |= {segment: _listed(pictures, names) for segment, names in enumerate(keys) if names is not None}
    unknown = [segment for segment in bad if segment not in segments]
    if len(unknown) > 1:  # nothing tells which of the remaining pictures belong to which segment
        raise CorpusError(f"{len(unknown)} segments of the index are damaged, and so are commit files of their parts")
    if unknown:
        taken = [key for segment in segments.values() for key in segment["key"].to_pylist()]
        left = pictures.filter(pc.invert(pc.is_in(pictures["key"], pa.array(taken, pa.string()))))["key"].to_pylist()
        segments[unknown[0]] = _listed(pictures, left[: counts[unknown[0]]])
    tables = [segments[segment] for segment in range(len(counts))]
    whole = pa.concat_tables(tables, promote_options="default")
    made = fingerprint(whole)
    if made != store.spec.corpus["fingerprint"]:
        raise CorpusError(
            f"the pictures found have fingerprint {made}, but the store was made from pictures with fingerprint "
            f"{store.spec.corpus['fingerprint']}; restore the original pictures, or give their folder with --corpus"
        )
    return tables


def _listed(pictures: pa.Table, keys: Iterable[str]) -> pa.Table:
    return pictures.filter(pc.is_in(pictures["key"], pa.array(list(keys), pa.string())))


def _keys_of_parts(store: Store, segment: int) -> list[str] | None:
    """Return the keys of a segment's pictures from the commit files of its parts; None if one of them is damaged."""
    ends = [0, *store.spec.segment_ends]
    keys: list[str] = []
    for part in range(ends[segment], ends[segment + 1]):
        try:
            keys += read_part(store.path, part)["key"].to_pylist()
        except PartCorruptError:
            return None
    return keys


def _extract_again(
    config: RepairConfig,
    store: Store,
    parts: Sequence[int],
    damaged: Iterable[int],
    open_crew: OpenCrew,
    on_status: OnStatus,
) -> list[int]:
    """Extract parts again; return those whose features may differ from before.

    Raises: an EupeError, before any part is deleted, if something that is needed is not available.
    """
    teacher = stored_teacher(store, config.teacher, config.weights)
    pictures = stored_pictures(store, config.corpus)
    samples = stored_index(store).samples
    extraction = _extraction(config, store, teacher, pictures)
    require_in_range(extraction)
    if config.ray_address is None:
        require_dtype(store)
    done = set(range(store.spec.num_parts)) - set(parts)
    require_unchanged(pictures, (sample for task in plan_parts(store.spec, samples, done) for sample in task.samples))
    before = {part: _features_recorded(store, part) for part in parts}
    with open_crew(extraction, teacher, Corpus(pictures, samples)) as crew:
        require_same_teacher(store, teacher, crew.weights_sha256)
        crew.prepare(store)
        for part in damaged:  # only now: teacher, weights and pictures have all been checked
            store.path.delete(f"parts/{part_name(part)}")
        crew.run_parts(store, on_status)
    return [part for part in parts if before[part] is None or before[part] != _features_recorded(store, part)]


def _extraction(config: RepairConfig, store: Store, teacher: TeacherSpec, pictures: StoragePath) -> ExtractConfig:
    spec = store.spec
    return ExtractConfig(
        teacher=teacher.name,
        corpus=pictures,
        out=store.path,
        weights=weights_file(teacher, config.weights),
        weights_key=config.weights_key,
        sizes=spec.sizes,
        views=ViewSpec.from_json(spec.views),
        tokens=spec.tokens,
        layers=tuple(map(int, spec.layers)),
        dtype=spec.teacher["dtype"],
        batch_size=config.batch_size,
        workers=config.workers,
        gpus_per_worker=config.gpus_per_worker,
        ray_address=config.ray_address,
    )


def _features_recorded(store: Store, part: int) -> dict[str, str] | None:
    """Return the checksums of a part's feature objects from its commit file; None if that is damaged."""
    try:
        objects = read_part_metadata(store.path, part)["objects"]
    except EupeError:
        return None
    paths = tuple(f"{path}/" for path in store.spec.feature_paths)
    return {key: recorded["crc32"] for key, recorded in objects.items() if key.startswith(paths)}


def _covered(store: Store) -> int:
    """Return the number of parts in the statistics; 0 if these are damaged, because they are taken again anyway."""
    try:
        return store.totals.get("num_parts", 0)
    except PartCorruptError:
        return 0


def _remove_damaged_moments(place: StoragePath, damages: Iterable[PartDamage]) -> None:
    """Delete damaged moments; `finish_store` then computes them from the features."""
    for damage in damages:
        if damage.part is not None and damage.what == f"parts/{moments_name(damage.part)}":
            place.delete(damage.what)
