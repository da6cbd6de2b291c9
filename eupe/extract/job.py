"""The extraction job: from the options to finished stores."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from eupe.common.compute import compute_dtype, pick_device
from eupe.common.holding import Holder
from eupe.common.option import options_of
from eupe.common.storage import StoragePath
from eupe.corpus.index import Corpus, index_bytes, index_from_bytes, open_corpus, some_keys
from eupe.corpus.left_out import Patterns
from eupe.errors import ConfigError, CorpusError, IncompleteError, StoreError
from eupe.extract.actors import JobActors, require_cluster
from eupe.extract.calibrate import settle
from eupe.extract.config import STORES, ExtractConfig, require_in_range
from eupe.extract.dispatch import Status, run_parts
from eupe.extract.parts import layers_of, require_common_sizes, shape_of, store_spec
from eupe.models.checkpoints import require_readable
from eupe.store import Store, open_store
from eupe.store.catalogue import find_store
from eupe.store.layout import StoreSpec, segment_name
from eupe.store.precision import FP16, parse_precision
from eupe.store.reader import ROOT_DOCUMENT
from eupe.store.writer import (
    create_store,
    extend_store,
    finish_store,
    forget_parts,
    remove_leftovers,
    require_empty,
    require_same_spec,
)
from eupe.teachers.preprocess import where_from
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import require_weights


@dataclass(frozen=True)
class ExtractReport:
    """The result of an extraction for one store."""

    store: str
    cached: bool
    """True if the store was finished before."""
    num_samples: int
    num_views: int
    num_failed: int
    """Samples without features."""
    failures: dict[str, int]
    """Kind of reason to number of failed samples."""
    num_not_finite: int
    """Failed samples whose features are not finite."""
    clipped_values: int
    """Values beyond float16's range, stored as its largest value."""
    clipped_arrays: tuple[str, ...]
    """Paths of the arrays with clipped values."""
    stored_bytes: int
    raw_bytes: int
    """Size of the same features as uncompressed fp16."""
    seconds: float
    views_per_s: float | None
    """Views per second of all stores of the pass, since the teachers were loaded; None for a cache hit."""
    forward: Mapping[str, Any]
    """The batch size and the tokens' cosines to float32, as measured when the store was made."""
    num_found: int
    """Files of a folder, members of tars and rows of tables that were found now, pictures or not."""
    left_out: Mapping[str, int]
    """Reason to the number of these that are left out; the others are the requested samples."""
    notes: tuple[str, ...]
    """Notes on what was taken where the corpus offered a choice and the user made none."""
    normalised_by: str
    """The file or table that defines how pixels are normalised."""


def extract(config: ExtractConfig, *, on_status: Callable[[Status], None] = lambda status: None) -> ExtractReport:
    """Run a teacher once over a corpus and write its features to a store.

    Raises: an EupeError for anything that the user can fix; IncompleteError if parts are missing at the end.
    """
    return extract_together([config], on_status=on_status)[0]


def extract_together(
    configs: Sequence[ExtractConfig], *, on_status: Callable[[Status], None] = lambda status: None
) -> list[ExtractReport]:
    """Run several teachers in one pass that decodes each picture once; fill a store for each teacher.

    Args:
        configs: one for each teacher; equal in all options but those that say `may_differ`.
    Raises: as `extract`.
    """
    began = time.monotonic()
    configs = [with_absolute_paths(config) for config in configs]
    teachers = checked_teachers(configs)
    with Holder("extract") as holder:
        stores, corpus, unfinished, views_per_s = _filled(configs, teachers, holder, on_status)
    seconds = time.monotonic() - began
    return [
        _report(
            store,
            corpus,
            seconds=seconds,
            views_per_s=views_per_s if i in unfinished else None,
            normalised_by=where_from(teachers[i], configs[i].weights),
        )
        for i, store in enumerate(stores)
    ]


def _filled(
    configs: Sequence[ExtractConfig],
    teachers: Sequence[TeacherSpec],
    holder: Holder,
    on_status: Callable[[Status], None],
) -> tuple[list[Store], Corpus, Collection[int], float | None]:
    """Return the finished stores, the corpus, the stores that were unfinished (by index), and views per second."""

    def told(status: Status) -> None:
        holder.require_held()
        on_status(status)

    places = [place_of_store(config) for config in configs]
    existing = [_opened(place) for place in places]
    for i, (place, store) in enumerate(zip(places, existing, strict=True)):
        if store is None:
            require_empty(place)
        if store is None or not store.finished:
            holder.hold(place)
            existing[i] = _opened(place)  # another process may have written until this one held the place
    require_cluster(configs[0].ray_address)
    indexes = [stored_index(store) if store is not None and has_index(store) else None for store in existing]
    previous = next((index for index in indexes if index is not None), None)
    corpus = open_corpus(
        configs[0].corpus,
        previous=previous,
        patterns=Patterns(configs[0].include, configs[0].exclude),
        progress=lambda done, of: on_status(Status("indexing", done, of)),
        choice=configs[0].choice,
    )
    corpus = picked(configs[0], corpus)
    with JobActors(configs, teachers, corpus) as actors:
        stores = [
            _store_to_fill(
                actors, i, teachers[i], _as_stored(corpus, indexes[i]), places[i], existing[i], holder, on_status
            )
            for i in range(len(configs))
        ]
        if configs[0].retry_failed:
            for store in stores:
                holder.hold(store.path)
            stores = [forget_parts(store, store.failed_parts()) for store in stores]
        unfinished = {i: store for i, store in enumerate(stores) if not store.finished}
        views_per_s = None
        if unfinished:
            views_per_s = run_parts(actors, unfinished, _common_index(list(unfinished.values())), told)
        holder.require_held()
        stores = _finish(stores, unfinished)
    return stores, corpus, unfinished, views_per_s


def _opened(place: StoragePath) -> Store | None:
    return open_store(place) if place.exists(ROOT_DOCUMENT) else None


def _finish(stores: Sequence[Store], unfinished: Collection[int]) -> list[Store]:
    """Finish every store that can be finished.

    Raises: the error of the first store that cannot.
    """
    finished, problems = [], []
    for i, store in enumerate(stores):
        if i not in unfinished:
            remove_leftovers(store)  # a driver may have been killed just after it finished the store
            finished.append(store)
            continue
        try:
            finished.append(finish_store(store.path))
        except (StoreError, IncompleteError) as error:
            problems.append(error)
    if problems:
        raise problems[0]
    return finished


def _require_one_pass(configs: Sequence[ExtractConfig]) -> None:
    """Raise ConfigError unless all teachers can take the same views of the same pictures."""
    own = {name for name, option in options_of(ExtractConfig).items() if option.may_differ}
    for config in configs[1:]:
        for field in fields(ExtractConfig):
            if field.name not in own and getattr(config, field.name) != getattr(configs[0], field.name):
                raise ConfigError(f"teachers in one pass must have the same {field.name}; extract them separately")
    places = [str(place_of_store(config)) for config in configs]
    if twice := {place for place in places if places.count(place) > 1}:
        raise ConfigError(f"{twice.pop()} cannot hold the features of two teachers; give an --out for each --teacher")


def _store_to_fill(
    actors: JobActors,
    i: int,
    teacher: TeacherSpec,
    corpus: Corpus,
    place: StoragePath,
    existing: Store | None,
    holder: Holder,
    on_status: Callable[[Status], None],
) -> Store:
    """Open, extend or create the store of one teacher."""
    config = actors.configs[i]
    spec = wanted_spec(config, teacher, corpus, weights_sha256=actors.weights_sha256[i], dtype=actors.dtype_name)
    if config.out is None and (twin := find_store(STORES, spec, fidelity=config.fidelity)) is not None:
        place, existing = twin.path, twin
    # a finished store of the same pictures is only read, and needs no hold
    if existing is None or not existing.finished or existing.spec.corpus["fingerprint"] != corpus.fingerprint:
        holder.hold(place)
    return _open_or_create(actors, i, place, spec, corpus, existing, on_status)


def _as_stored(corpus: Corpus, stored: Corpus | None) -> Corpus:
    """Return the corpus without hashes for the pictures that could not be read when the store was indexed.

    These pictures may be anything by now, and must not change the corpus's fingerprint.
    """
    if stored is None or not stored.samples["sha256"].null_count:
        return corpus
    unreadable = stored.samples.filter(pc.is_null(stored.samples["sha256"]))["key"].combine_chunks()
    hashes = pc.if_else(pc.is_in(corpus.samples["key"], unreadable), None, corpus.samples["sha256"])
    place = corpus.samples.schema.get_field_index("sha256")
    return replace(corpus, samples=corpus.samples.set_column(place, corpus.samples.schema.field(place), hashes))


def _common_index(stores: Sequence[Store]) -> pa.Table:
    """Return the index of all samples, in the order of the stores' parts.

    Raises: ConfigError if the stores have the samples in different orders.
    """
    indexes = [stored_index(store).samples for store in stores]
    for store, index in zip(stores[1:], indexes[1:], strict=True):
        if not index["key"].equals(indexes[0]["key"]):
            raise ConfigError(
                f"{stores[0].path} and {store.path} were extended at different times, so their samples are in "
                "different orders; extract the teachers separately"
            )
    return indexes[0]


def with_absolute_paths(config: ExtractConfig) -> ExtractConfig:
    """Return the config with absolute paths, because workers have working directories of their own."""
    weights = None if config.weights is None else config.weights.absolute()
    out = None if config.out is None else StoragePath.of(config.out)
    return replace(config, corpus=StoragePath.of(config.corpus), out=out, weights=weights)


def place_of_store(config: ExtractConfig) -> StoragePath:
    """Return the place of the store: as given, or under the teacher's name in the directory of stores."""
    return StoragePath.of(config.out or STORES / f"{teacher_name(config.teacher)}.zarr")


def wanted_spec(
    config: ExtractConfig, teacher: TeacherSpec, corpus: Corpus, *, weights_sha256: str, dtype: str
) -> StoreSpec:
    """Return the spec of the requested store; see `store_spec`."""
    return store_spec(
        teacher,
        corpus,
        views=config.views,
        sizes=config.sizes,
        tokens=config.tokens,
        weights_sha256=weights_sha256,
        dtype=dtype,
        precision=config.precision,
        grid=config.grid,
        pixels=config.pixels,
        layers=config.layers,
        weights=config.weights,
    )


def picked(config: ExtractConfig, corpus: Corpus) -> Corpus:
    """Return the requested pictures, in the requested order.

    Raises: CorpusError if there are none.
    """
    shuffle = config.views.seed if config.shuffle else None
    return corpus.pick(include=config.include, exclude=config.exclude, shuffle=shuffle, limit=config.limit)


def teacher_name(words: str) -> str:
    """Return the default name of a teacher's store."""
    return Path(words).name.replace(":", "-")


def checked_teachers(configs: Sequence[ExtractConfig]) -> list[TeacherSpec]:
    """Return the specs of teachers that are to share a pass, after all checks; see `checked`.

    Raises: ConfigError, TeacherError.
    """
    _require_one_pass(configs)
    teachers = [resolve_teacher(config.teacher, config.weights) for config in configs]
    if len({config.sizes for config in configs}) == 1:
        require_common_sizes(teachers, configs[0].sizes)
    return [checked(config, teacher) for config, teacher in zip(configs, teachers, strict=True)]


def checked(config: ExtractConfig, teacher: TeacherSpec) -> TeacherSpec:
    """Return the teacher's spec after checking all options, before any picture is touched.

    Raises: ConfigError, TeacherError.
    """
    sizes, _, kept = shape_of(teacher, sizes=config.sizes, tokens=config.tokens, grid=config.grid)
    parse_precision(config.precision, kept)
    layers_of(teacher, config.layers, sizes=sizes, tokens=kept, grid=config.grid, weights=config.weights)
    require_in_range(config)
    if config.ray_address is None:  # on a cluster, the workers' machines decide
        compute_dtype(config.dtype, pick_device())
    if config.weights is not None:
        require_weights(teacher, config.weights)
    elif config.weights_key is not None:
        raise ConfigError(f"--weights-key {config.weights_key} needs a weights file; give --weights, too")
    elif teacher.backend in ("hf", "timm") and teacher.place.is_dir():
        require_readable(teacher.place)
    if config.fidelity is not None and config.precision != "fp16":
        raise ConfigError("--fidelity sets the precision automatically; remove --precision")
    return teacher.at(teacher.place.absolute()) if teacher.place.exists() else teacher


def _open_or_create(
    actors: JobActors,
    i: int,
    place: StoragePath,
    spec: StoreSpec,
    corpus: Corpus,
    existing: Store | None,
    on_status: Callable[[Status], None],
) -> Store:
    """Return the store to fill: new, as it was left, or extended by the pictures that the corpus gained."""
    if existing is not None and has_index(existing):
        require_same_choice(existing, corpus)
    fidelity = actors.configs[i].fidelity
    if existing is not None and fidelity is not None and existing.spec.fidelity.get("asked") == fidelity:
        spec = replace(spec, precision=existing.spec.precision)  # measured for the same fidelity before
    elif existing is None and (fidelity is not None or set(spec.precision.values()) != {FP16}):
        on_status(Status("measuring precision", 0, 0))
        spec = settle(spec, actors.measure(i, spec), fidelity)
    if existing is not None and existing.spec.corpus["fingerprint"] != spec.corpus["fingerprint"]:
        return _extend(existing, spec, corpus)
    if existing is None:
        on_status(Status("trying the teacher", 0, 0))
        spec = replace(spec, forward=actors.try_forward(i, spec))
    # of an existing store this checks the spec, and completes what a killed maker left out
    store = create_store(place, spec)
    store.path.create(segment_name(0), index_bytes(corpus))
    return store


def require_same_choice(store: Store, corpus: Corpus) -> None:
    """Raise ConfigError if the store's pictures and labels were chosen by other options than those given now."""
    stored = stored_index(store)
    if stored.choice != corpus.choice:
        now = corpus.choice.words() or "no such option"
        raise ConfigError(
            f"{store.path} was made {stored.choice.told()}, but now {now} was given, which may select other pictures "
            "or labels; give the original options, or another --out"
        )


def has_index(store: Store) -> bool:
    """Return whether the store has its index; False if its maker was killed before any part began."""
    return store.path.exists(segment_name(0))


def stored_index(store: Store) -> Corpus:
    """Return the index of all samples that a store was made for, in the order of its parts.

    Raises: CorpusError if the index is damaged; StorageError.
    """
    try:
        names = [segment_name(i) for i in range(len(store.spec.corpus["segments"]))]
        segments = [index_from_bytes(store.path.read(name), str(store.path / name)) for name in names]
    except FileNotFoundError as error:
        raise CorpusError(f"the store's index of pictures is incomplete: {error}") from error
    samples = pa.concat_tables([segment.samples for segment in segments], promote_options="default")
    last = segments[-1]
    return Corpus(segments[0].root, samples, last.left_out, last.choice, last.notes)


def _extend(store: Store, spec: StoreSpec, corpus: Corpus) -> Store:
    """Extend a store by the pictures that the corpus gained.

    Raises: SpecMismatchError; StoreError naming pictures that are gone or have changed.
    """
    require_same_spec(store, replace(spec, corpus=store.spec.corpus))
    stored = stored_index(store).samples
    old = dict(zip(stored["key"].to_pylist(), stored["sha256"].to_pylist(), strict=True))
    new = dict(zip(corpus.samples["key"].to_pylist(), corpus.samples["sha256"].to_pylist(), strict=True))
    lost, gained = sorted(old.keys() - new.keys()), new.keys() - old.keys()
    changed = sorted(key for key in old.keys() & new.keys() if old[key] != new[key])
    if lost or changed:
        what = [
            f"{len(keys)} {word} ({some_keys(keys)})" for keys, word in ((lost, "gone"), (changed, "changed")) if keys
        ]
        raise StoreError(
            f"{store.path} cannot be extended, because pictures in {corpus.root} that it was made from are gone or "
            f"have changed: {' and '.join(what)}; restore them, or give another --out"
        )
    new_samples = corpus.samples.filter(pc.is_in(corpus.samples["key"], pa.array(sorted(gained))))
    added = replace(corpus, samples=new_samples)
    # the index first: once `extend_store` has written the spec, the store counts on the new segment's index
    store.path.write(segment_name(len(store.spec.corpus["segments"])), index_bytes(added))
    return extend_store(store, fingerprint=corpus.fingerprint, num_new=len(added))


def _report(
    store: Store, corpus: Corpus, *, seconds: float, views_per_s: float | None, normalised_by: str
) -> ExtractReport:
    spec = store.spec
    num_views = spec.num_samples * spec.num_views
    failures = {reason: len(keys) for reason, keys in store.failures.items()}
    return ExtractReport(
        store=str(store.path),
        cached=views_per_s is None,
        num_samples=spec.num_samples,
        num_views=num_views,
        num_failed=sum(failures.values()),
        failures=failures,
        num_not_finite=store.num_not_finite,
        clipped_values=store.clipped.count,
        clipped_arrays=store.clipped.paths,
        stored_bytes=store.stored_bytes,
        raw_bytes=num_views * spec.bytes_per_view,
        seconds=seconds,
        views_per_s=views_per_s,
        forward=spec.forward,
        num_found=corpus.num_found,
        left_out=corpus.left_out,
        notes=tuple(corpus.notes),
        normalised_by=normalised_by,
    )
