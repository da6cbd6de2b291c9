"""Cost of an extraction before it starts, measured on a few pictures.

A sample of the corpus goes through the worker's own stages, each timed alone, into a store in a temporary folder. What
takes neither weights nor pictures is in `plan_on_paper`.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from eupe.common.compute import compute_dtype, dtype_name, pick_device
from eupe.common.cores import num_cores
from eupe.common.storage import StoragePath
from eupe.corpus.index import Corpus, open_corpus
from eupe.corpus.left_out import Patterns
from eupe.errors import StorageError
from eupe.extract.calibrate import Measured, candidates, fastest_batch, measure, require_features, sample_task, settle
from eupe.extract.config import ExtractConfig
from eupe.extract.count import counter
from eupe.extract.job import (
    checked_teachers,
    picked,
    place_of_store,
    stored_index,
    wanted_spec,
    with_absolute_paths,
)
from eupe.extract.load import LoadedSample, Loader, PartTask
from eupe.extract.plan_on_paper import Need, free_bytes, nearest_folder, need_of, require_room
from eupe.extract.process import prepare_process
from eupe.extract.worker import PartExtractor
from eupe.store import Store, open_store
from eupe.store.layout import StoreSpec, arrays, differences, kind_of
from eupe.store.precision import FP16, INT8
from eupe.store.reader import ROOT_DOCUMENT
from eupe.store.shard import bytes_of_index
from eupe.store.writer import Part, StoreWriter, create_store
from eupe.teachers.preprocess import where_from
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import Teacher, load_teacher

SHOWN = (FP16, "bitround:7", "bitround:5", "bitround:3", INT8)
"""The precisions that are compared."""
STUDENT_IMAGES_PER_S = 1000
"""Training speed that the reported read bandwidth is for."""
READ_VIEWS = 64
"""Views of one read, as in a training step."""


@dataclass(frozen=True)
class Rates:
    """Views per second of each stage alone, with all of this machine's cores, or its GPU, to itself."""

    decode: float
    """Rate of reading, decoding and rendering pictures."""
    forward: float
    encode: float
    """Rate of coding, compressing, counting and writing tokens."""
    read: float
    """Rate of reading tokens from the store, warm, as a training step does."""

    def pipeline(self, *, on_gpu: bool) -> float:
        """Return one worker's views per second: stages on the same cores take turns, a GPU runs beside them."""
        cores = 1 / self.decode + 1 / self.encode
        return 1 / (max(cores, 1 / self.forward) if on_gpu else cores + 1 / self.forward)

    def break_even_epochs(self, *, on_gpu: bool) -> float | None:
        """Return the number of epochs after which the cache has saved time over running the teacher at every step.

        Returns: None if reading is not faster than the teacher.
        """
        saved = 1 / self.forward - 1 / self.read
        return 1 / self.pipeline(on_gpu=on_gpu) / saved if saved > 0 else None


@dataclass(frozen=True)
class Choice:
    """One feature array at one precision."""

    path: str
    precision: str
    share: float
    """Stored bytes over raw fp16."""
    total_bytes: int
    """Size of this array over all views."""
    cosine_p5: float
    """5th percentile of the cosines of tokens before and after storage, standardised."""
    cosine_mean: float
    """Mean of these cosines."""


@dataclass(frozen=True)
class Estimate:
    """A measured plan for one teacher."""

    teacher: str
    device: str
    dtype: str
    num_images: int
    num_views: int
    sampled_views: int
    precision: dict[str, str]
    raw_bytes_per_view: int
    bytes_per_view: float
    need: Need
    rates: Rates
    views_per_s: float
    """Views per second of one worker that has a machine, or a GPU and its cores, like this one."""
    workers: int
    hours: float
    read_bytes_per_s: float
    """Read bandwidth of a student at `STUDENT_IMAGES_PER_S`."""
    epoch_hours_cached: float
    """Time to read the targets of every view once."""
    epoch_hours_online: float
    """Time of the teacher's forward pass over every view once, on one device."""
    break_even_epochs: float | None
    choices: tuple[Choice, ...]
    out: str
    free_bytes: int | None
    """Free space at `out`; None for an object store."""
    normalised_by: str
    """The file or table that defines how pixels are normalised."""
    held_bytes: int
    """Part of `need` that the store which this extraction would continue holds already; 0 for an object store."""


@dataclass(frozen=True)
class JointEstimate:
    """A measured plan for several teachers in one pass, which decodes each picture once."""

    num_images: int
    num_views: int
    """Views of each teacher."""
    bytes_per_view: float
    """Bytes of all teachers' tokens; all later fields are for all teachers, too."""
    need: Need
    held_bytes: int
    rates: Rates
    views_per_s: float
    workers: int
    hours: float
    read_bytes_per_s: float
    epoch_hours_cached: float
    epoch_hours_online: float
    break_even_epochs: float | None
    teachers: tuple[Estimate, ...]
    """Plan of each teacher as if it were extracted alone."""


def bytes_of_indexes(spec: StoreSpec) -> int:
    """Return the bytes of all shards' indexes, which are as long in a part that is not full."""
    return spec.num_parts * sum(bytes_of_index(layout) for layout in arrays(spec) if layout.sharded)


def held_bytes(place: StoragePath, spec: StoreSpec, corpus: Corpus, *, fidelity: float | None) -> int:
    """Return the bytes on disk of a store that an extraction would continue; 0 if there is none, or in an object store.

    Args:
        spec: the requested spec; its weights' hash is not compared.
    """
    if not place.is_local or not place.exists(ROOT_DOCUMENT):
        return 0
    store = open_store(place)
    same_teacher = {**spec.teacher, "weights_sha256": store.spec.teacher["weights_sha256"]}
    wanted = replace(spec, teacher=same_teacher, corpus=store.spec.corpus)
    if fidelity is not None and store.spec.fidelity.get("asked") == fidelity:
        wanted = replace(wanted, precision=store.spec.precision)
    if differences(store.spec, wanted) or not _pictures(stored_index(store)) <= _pictures(corpus):
        return 0
    return sum(path.stat().st_size for path in place.local.rglob("*") if path.is_file())


def _pictures(corpus: Corpus) -> set[tuple[str, str | None]]:
    return set(zip(corpus.samples["key"].to_pylist(), corpus.samples["sha256"].to_pylist(), strict=True))


def estimate(
    configs: Sequence[ExtractConfig], *, on_stage: Callable[[str], None] = lambda stage: None
) -> JointEstimate:
    """Run a sample of the corpus through each stage of an extraction, in this process.

    All teachers are in memory at once, as in each worker of the extraction.

    Args:
        configs: one for each teacher, as `extract_together` takes them.
        on_stage: called with the name of each stage as it begins.
    Raises: an EupeError as `extract` does; ConfigError if the stores do not fit on their disks; StorageError if the
        sample cannot be written to the temporary folder.
    """
    configs = [with_absolute_paths(config) for config in configs]
    described = checked_teachers(configs)
    first = configs[0]
    on_stage("indexing")
    patterns = Patterns(first.include, first.exclude)
    corpus = picked(first, open_corpus(first.corpus, patterns=patterns, choice=first.choice))
    device = pick_device()
    dtype = compute_dtype(first.dtype, device)
    specs = [
        wanted_spec(config, teacher, corpus, weights_sha256="", dtype=dtype_name(dtype))
        for config, teacher in zip(configs, described, strict=True)
    ]
    on_stage("loading teacher")
    teachers = [
        load_teacher(
            teacher, weights=config.weights, key=config.weights_key, device=device, dtype=dtype, sizes=spec.sizes
        )
        for config, teacher, spec in zip(configs, described, specs, strict=True)
    ]
    prepare_process()
    alone = tuple(
        _estimate_one(config, spec, teacher, corpus, on_stage)
        for config, spec, teacher in zip(configs, specs, teachers, strict=True)
    )
    _require_room_for_all(alone)
    decode = alone[0].rates.decode if len(alone) == 1 else _decoded_per_s(first, specs, corpus)
    return _together(alone, decode)


def _estimate_one(
    config: ExtractConfig, spec: StoreSpec, teacher: Teacher, corpus: Corpus, on_stage: Callable[[str], None]
) -> Estimate:
    task = sample_task(spec, corpus)
    num_views = len(task.samples) * spec.num_views
    on_stage("decoding and computing")
    part, decode_s, forward_s = _timed_part(config, teacher, spec, corpus.root, task)
    require_features(spec, part)
    on_stage("measuring precision")
    asked = candidates(spec, config.fidelity)
    measured = measure(spec, part.features, {k: tuple(dict.fromkeys((*SHOWN, *asked[k]))) for k in spec.tokens})
    spec = settle(spec, measured, config.fidelity)
    on_stage("writing and reading")
    with _full_disk_in_words():
        chunk_bytes, encode_s, read_s = _timed_store(spec, teacher, part)
    rates = Rates(*(num_views / s for s in (decode_s, forward_s, encode_s, read_s)))
    held = held_bytes(place_of_store(config), spec, corpus, fidelity=config.fidelity)
    return _estimate(config, spec, rates, measured, chunk_bytes / num_views, teacher.device.type, held)


def _decoded_per_s(config: ExtractConfig, specs: Sequence[StoreSpec], corpus: Corpus) -> float:
    """Measure views per second of reading, decoding and rendering a sample once for all stores, as a worker does."""
    samples = sample_task(specs[0], corpus).samples
    loader = Loader(corpus.root, config.views, specs, ahead=len(samples), cores=num_cores())
    began = time.perf_counter()
    num_loaded = sum(1 for _ in loader.load(samples))
    return num_loaded * specs[0].num_views / (time.perf_counter() - began)


def _together(alone: tuple[Estimate, ...], decode: float) -> JointEstimate:
    """Combine the teachers' plans: pictures are decoded once, all other work is done for each teacher.

    Args:
        decode: views per second of decoding once for the sizes of all teachers.
    """
    first = alone[0]
    each = [plan.rates for plan in alone]
    forward, encode, read = (
        1 / sum(1 / rate for rate in stage)
        for stage in ([r.forward for r in each], [r.encode for r in each], [r.read for r in each])
    )
    rates = Rates(decode, forward, encode, read)
    on_gpu = first.device == "cuda"
    views_per_s = rates.pipeline(on_gpu=on_gpu)
    return JointEstimate(
        num_images=first.num_images,
        num_views=first.num_views,
        bytes_per_view=sum(plan.bytes_per_view for plan in alone),
        need=_sum_of(alone),
        held_bytes=sum(plan.held_bytes for plan in alone),
        rates=rates,
        views_per_s=views_per_s,
        workers=first.workers,
        hours=first.num_views / views_per_s / first.workers / 3600,
        read_bytes_per_s=sum(plan.read_bytes_per_s for plan in alone),
        epoch_hours_cached=first.num_views / rates.read / 3600,
        epoch_hours_online=first.num_views / rates.forward / 3600,
        break_even_epochs=rates.break_even_epochs(on_gpu=on_gpu),
        teachers=alone,
    )


def _sum_of(plans: Sequence[Estimate]) -> Need:
    return Need(sum(plan.need.stored for plan in plans), sum(plan.need.peak for plan in plans))


def _require_room_for_all(plans: Sequence[Estimate]) -> None:
    """Raise ConfigError if a disk cannot hold all the stores that are meant for it."""
    disks: dict[int, list[Estimate]] = {}
    for plan in plans:
        if (place := StoragePath.of(plan.out)).is_local:
            disks.setdefault(nearest_folder(place).stat().st_dev, []).append(plan)
    for there in disks.values():
        free = min(plan.free_bytes for plan in there if plan.free_bytes is not None)
        where = " and ".join(plan.out for plan in there) + (" (one disk)" if len(there) > 1 else "")
        require_room(_sum_of(there), free, where, held=sum(plan.held_bytes for plan in there))


@contextmanager
def _full_disk_in_words() -> Iterator[None]:
    """Turn an OSError into a StorageError that says what to do about the temporary folder."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"the sample cannot be written to the temporary folder ({error.__cause__ or error}); free some space "
            "there, or set TMPDIR to a folder on another disk"
        ) from error


def _estimate(
    config: ExtractConfig,
    spec: StoreSpec,
    rates: Rates,
    measured: Measured,
    chunks_per_view: float,
    device: str,
    held: int,
) -> Estimate:
    num_views = spec.num_samples * spec.num_views
    on_gpu = device == "cuda"
    raw = {path: 2 * math.prod(spec.shape(path)) for path in spec.feature_paths}
    stored = num_views * chunks_per_view + bytes_of_indexes(spec)
    choices = tuple(
        Choice(path, precision, kept.share, round(num_views * raw[path] * kept.share), kept.p5, kept.mean)
        for path, by in measured.fidelity.items()
        for precision, kept in by.items()
    )
    need = need_of(
        stored,
        num_samples=spec.num_samples,
        per_part=spec.samples_per_part,
        dims=[spec.dim(kind_of(path)) for path in spec.feature_paths],
    )
    place = place_of_store(config)
    views_per_s = rates.pipeline(on_gpu=on_gpu)
    workers = config.workers or 1
    return Estimate(
        teacher=str(spec.teacher["name"]),
        device=device,
        dtype=str(spec.teacher["dtype"]),
        num_images=spec.num_samples,
        num_views=num_views,
        sampled_views=measured.num_views,
        precision=dict(spec.precision),
        raw_bytes_per_view=sum(raw.values()),
        bytes_per_view=chunks_per_view,
        need=need,
        rates=rates,
        views_per_s=views_per_s,
        workers=workers,
        hours=num_views / views_per_s / workers / 3600,
        read_bytes_per_s=STUDENT_IMAGES_PER_S * chunks_per_view,
        epoch_hours_cached=num_views / rates.read / 3600,
        epoch_hours_online=num_views / rates.forward / 3600,
        break_even_epochs=rates.break_even_epochs(on_gpu=on_gpu),
        choices=choices,
        out=str(place),
        free_bytes=free_bytes(place),
        normalised_by=where_from(TeacherSpec.from_json(spec.teacher), config.weights),
        held_bytes=held,
    )


def _timed_part(
    config: ExtractConfig, teacher: Teacher, spec: StoreSpec, root: StoragePath, task: PartTask
) -> tuple[Part, float, float]:
    """Return the sample's features, the seconds of decoding, and those of the forward passes."""
    batch_size = config.batch_size or fastest_batch(teacher, spec.sizes, tuple(map(int, spec.layers)))
    extractor = PartExtractor(teacher, spec, corpus_root=root, views=config.views, batch_size=batch_size)
    began = time.perf_counter()
    samples = list(extractor.load_ahead(task.samples))
    decode_s = time.perf_counter() - began
    extractor.compute(task, samples[: -(-batch_size // spec.num_views)])  # the first batch on a device is slow
    began = time.perf_counter()
    part = extractor.compute(task, samples)
    forward_s = time.perf_counter() - began
    num_views = len(samples) * spec.num_views
    # too few views for a batch on each core, which the extraction itself will have
    if num_views < min(batch_size * extractor.forward.batches_at_once, spec.num_samples * spec.num_views):
        forward_s = num_views * _seconds_a_view_on_all_cores(extractor, samples)
    return part, decode_s, forward_s


def _seconds_a_view_on_all_cores(extractor: PartExtractor, samples: Sequence[LoadedSample]) -> float:
    """Return seconds per view with a full batch on every core, as in a job; views repeat if there are too few."""
    size, count = extractor.forward.batch_size, extractor.forward.batches_at_once
    views = [
        {side: sample.views[side][k] for side in extractor.spec.sizes}
        for sample in samples
        if sample.row.error is None
        for k in range(extractor.spec.num_views)
    ]
    endless = cycle(views)
    batches = [list(islice(endless, size)) for _ in range(count if views else 0)]
    began = time.perf_counter()
    for pending in [extractor.forward.begin(batch) for batch in batches]:
        pending.wait()
    return (time.perf_counter() - began) / (size * count)


def _timed_store(spec: StoreSpec, teacher: Teacher, part: Part) -> tuple[int, float, float]:
    """Return the sample's stored bytes without shard indexes, and the seconds of writing and of reading it."""
    num_samples = len(part.rows)
    # the whole sample in one part, whose size must be a power of two
    one_part = 1 << (num_samples - 1).bit_length()
    as_one = replace(spec, corpus={**spec.corpus, "segments": [num_samples]}, samples_per_part=one_part)
    with tempfile.TemporaryDirectory(prefix="eupe-plan-") as folder:
        path = Path(folder) / "sample.zarr"
        create_store(path, as_one)
        writer = StoreWriter(path, count=counter(teacher.device))
        began = time.perf_counter()
        writer.commit(part)
        encode_s = time.perf_counter() - began
        store = open_store(path)
        _read_all(store)  # warm up
        began = time.perf_counter()
        _read_all(store)
        return store.stored_bytes - bytes_of_indexes(as_one), encode_s, time.perf_counter() - began


def _read_all(store: Store) -> None:
    rows = np.repeat(np.arange(store.spec.num_samples), store.spec.num_views)
    views = np.tile(np.arange(store.spec.num_views), store.spec.num_samples)
    for start in range(0, len(rows), READ_VIEWS):
        batch = slice(start, start + READ_VIEWS)
        places = rows[batch].tolist(), views[batch].tolist()
        for path in store.spec.feature_paths:
            store.read_tokens(path, *places)
        for size in store.spec.sizes if store.spec.pixels else ():
            store.read_pixels(*places, size=size)
