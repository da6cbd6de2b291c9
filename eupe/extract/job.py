"""The extraction job: the only place that schedules Ray.

Each actor holds one teacher and pulls parts; results that come back are counts, never features. A worker that dies
is restarted by Ray and its part done again.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from eupe.corpus.index import Corpus, index_bytes, index_from_bytes, open_corpus, some_keys
from eupe.corpus.views import ViewSpec
from eupe.device import compute_dtype, dtype_name, pick_device
from eupe.encoder import WEIGHTS_FILE
from eupe.errors import (
    ConfigError,
    CorpusError,
    EupeError,
    IncompleteError,
    StoreError,
    TeacherError,
)
from eupe.extract.calibrate import Measured, candidates, measure, sample_task, settle
from eupe.extract.count import limit_blas
from eupe.extract.plan import PartTask, plan_parts, shape_of, store_spec
from eupe.extract.worker import Computer, PartResult, Worker
from eupe.place import Place, Where
from eupe.stopping import stop_signals
from eupe.store import Store, open_store
from eupe.store.catalogue import find_store
from eupe.store.layout import DENSE, KINDS, SUMMARY, StoreSpec, bytes_per_view, segment_name
from eupe.store.precision import FP16
from eupe.store.reader import ROOT_DOCUMENT, committed_parts
from eupe.store.writer import create_store, extend_store, finish_store, require_same_spec
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import Teacher, file_digest, load_teacher, weights_digest

PARTS_IN_FLIGHT = 2
"""Per worker: one has the teacher while the other is written."""
TASK_RETRIES = 2
POLL_SECONDS = 0.5
STORES = Path("store")
"""The directory of stores that have not been given a place."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """One extraction, as asked for on the command line."""

    teacher: str
    """Registry name, `timm:ARCH`, `hf:REPO_OR_DIR`, `open_clip:ARCH[@TAG]`, or a training run's directory."""
    corpus: Where
    """A folder of pictures or an index; also `s3://...` or `gs://...`."""
    out: Where | None = None
    """The store: a folder, `s3://...` or `gs://...`. Where not given: the one in `store/` that was made to the same
    specification under whatever name, or `store/TEACHER.zarr`."""
    weights: Path | None = None
    """Local weights in place of the hub's."""
    sizes: tuple[int, ...] = ()
    """Sides of the square input in pixels; the teacher's native size where none is given."""
    views: ViewSpec = field(default_factory=ViewSpec)
    tokens: tuple[str, ...] = KINDS
    precision: str = "fp16"
    """`fp16`, `bitround:B`, `int8`, or one for each kind: `dense=int8,summary=fp16`."""
    fidelity: float | None = None
    """In place of a precision: the cheapest one whose tokens' cosines, standardised, have this 5th percentile."""
    grid: int | None = None
    """Cells along one side to which dense maps are pooled; the teacher's own where not given."""
    pixels: bool = False
    """Keep the views themselves as well, so that the store trains without the corpus."""
    dtype: str = "auto"
    """`auto`, `fp32`, `bf16` or `fp16`: the teacher's arithmetic."""
    batch_size: int = 16
    workers: int | None = None
    """Ray actors with one teacher each; one per GPU, or one, where not given."""
    gpus_per_worker: float | None = None
    """The GPUs shared evenly, one per worker at most, where not given."""
    ray_address: str | None = None
    """`auto` or `ray://...`; a Ray of its own on this machine where not given."""
    limit: int | None = None
    """Only the first pictures of the corpus."""
    include: tuple[str, ...] = ()
    """Patterns of keys; only pictures that match one of them, see `Corpus.pick`."""
    exclude: tuple[str, ...] = ()
    """Patterns of keys; no picture that matches one of them."""
    shuffle: bool = False
    """Take the pictures in an order drawn by the views' seed; with a limit, a random sample."""


@dataclass(frozen=True)
class Status:
    """Where a running job stands."""

    stage: str
    done: int
    total: int
    failed: int = 0


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction made."""

    store: str
    cached: bool
    """Everything was there already."""
    num_samples: int
    num_views: int
    num_failed: int
    stored_bytes: int
    raw_bytes: int
    """The same features as bare fp16."""
    seconds: float
    views_per_s: float | None
    """Since the teacher was loaded; None for a cache hit."""
    without_picture: int = 0
    """Samples of tars, or rows of tables, that are none of `num_samples` for want of one."""


def extract(config: ExtractConfig, *, on_status: Callable[[Status], None] = lambda status: None) -> ExtractReport:
    """Run a teacher once over a corpus and leave its features in a store.

    Raises: an EupeError for whatever the user can mend; IncompleteError if parts are missing at the end.
    """
    began = time.monotonic()
    config = with_absolute_paths(config)
    teacher = checked_teacher(config)
    place = place_of_store(config)
    existing = open_store(place) if place.exists(ROOT_DOCUMENT) else None
    previous = None if existing is None else stored_index(existing)
    corpus = open_corpus(
        config.corpus, previous=previous, progress=lambda done, of: on_status(Status("indexing", done, of))
    )
    corpus = picked(config, corpus)
    with JobActors(config, teacher, corpus) as actors:
        spec = wanted_spec(config, teacher, corpus, weights_sha256=actors.weights_sha256, dtype=actors.dtype_name)
        if config.out is None and (twin := find_store(STORES, spec, fidelity=config.fidelity)) is not None:
            place, existing = twin.path, twin
        store = _open_or_create(actors, place, spec, corpus, existing, on_status)
        views_per_s = None
        if not (cached := store.finished):
            views_per_s = actors.run_parts(store, on_status)
            store = finish_store(place)
    report = _report(store, cached=cached, seconds=time.monotonic() - began, views_per_s=views_per_s)
    return replace(report, without_picture=corpus.without_picture)


def with_absolute_paths(config: ExtractConfig) -> ExtractConfig:
    """Workers have working directories of their own."""
    weights = None if config.weights is None else config.weights.absolute()
    out = None if config.out is None else Place.of(config.out)
    return replace(config, corpus=Place.of(config.corpus), out=out, weights=weights)


def place_of_store(config: ExtractConfig) -> Place:
    """As given, or in the directory of stores under the teacher's name."""
    return Place.of(config.out or STORES / f"{teacher_name(config.teacher)}.zarr")


def wanted_spec(
    config: ExtractConfig, teacher: TeacherSpec, corpus: Corpus, *, weights_sha256: str, dtype: str
) -> StoreSpec:
    """Of the store that was asked for; see `store_spec`."""
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
    )


def picked(config: ExtractConfig, corpus: Corpus) -> Corpus:
    """The pictures that were asked for, in their order.

    Raises: CorpusError if there are none.
    """
    shuffle = config.views.seed if config.shuffle else None
    return corpus.pick(include=config.include, exclude=config.exclude, shuffle=shuffle, limit=config.limit)


def teacher_name(words: str) -> str:
    """What a store of a teacher is called where no name is given."""
    return Path(words).name.replace(":", "-")


def checked_teacher(config: ExtractConfig) -> TeacherSpec:
    """The teacher's card, with everything that can be wrong about the options said at once."""
    teacher = resolve_teacher(config.teacher)
    shape_of(teacher, sizes=config.sizes, tokens=config.tokens, grid=config.grid)
    if config.weights is not None and not config.weights.exists():
        raise TeacherError(f"weights {config.weights} do not exist")
    require_counts(config)
    if config.fidelity is not None and not 0 < config.fidelity < 1:
        raise ConfigError(f"--fidelity must lie between 0 and 1, got {config.fidelity:g}")
    if config.fidelity is not None and config.precision != "fp16":
        raise ConfigError("--fidelity chooses the precision by itself; leave out --precision")
    if Path(teacher.model).exists():
        return replace(teacher, model=str(Path(teacher.model).absolute()))
    return teacher


def require_counts(config: ExtractConfig) -> None:
    """Raises: ConfigError for a number that no job can have."""
    for name, value in (
        ("--batch-size", config.batch_size),
        ("--workers", config.workers),
        ("--limit", config.limit),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if config.gpus_per_worker is not None and config.gpus_per_worker < 0:
        raise ConfigError(f"--gpus-per-worker must be at least 0, got {config.gpus_per_worker:g}")


def _open_or_create(
    actors: JobActors,
    place: Place,
    spec: StoreSpec,
    corpus: Corpus,
    existing: Store | None,
    on_status: Callable[[Status], None],
) -> Store:
    """The store to fill: new, as it was left, or extended by what came to the corpus."""
    fidelity = actors.config.fidelity
    if existing is not None and fidelity is not None and existing.spec.fidelity.get("asked") == fidelity:
        spec = replace(spec, precision=existing.spec.precision)
    elif existing is None and (fidelity is not None or set(spec.precision.values()) != {FP16}):
        on_status(Status("measuring precision", 0, 0))
        spec = settle(spec, actors.measure(spec), fidelity)
    if existing is not None and existing.spec.corpus["fingerprint"] != spec.corpus["fingerprint"]:
        return _extend(existing, spec, corpus)
    store = create_store(place, spec)
    store.path.create(segment_name(0), index_bytes(corpus))
    return store


def stored_index(store: Store) -> Corpus:
    """The index of all samples that a store was made for, in the order of its parts.

    Raises: CorpusError if it is damaged; StorageError.
    """
    try:
        names = [segment_name(i) for i in range(len(store.spec.corpus["segments"]))]
        segments = [index_from_bytes(store.path.read(name), str(store.path / name)) for name in names]
    except FileNotFoundError as error:
        raise CorpusError(f"the store's index of pictures is incomplete: {error}") from error
    return Corpus(
        segments[0].root, pa.concat_tables([segment.samples for segment in segments], promote_options="default")
    )


def _extend(store: Store, spec: StoreSpec, corpus: Corpus) -> Store:
    """Raises: SpecMismatchError; StoreError naming the pictures that are gone or have changed."""
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
            f"{store.path} cannot be extended: of the pictures of {corpus.root} that it was made from, "
            f"{' and '.join(what)}; put them back, or give another --out"
        )
    added = Corpus(corpus.root, corpus.samples.filter(pc.is_in(corpus.samples["key"], pa.array(sorted(gained)))))
    store.path.write(segment_name(len(store.spec.corpus["segments"])), index_bytes(added))
    return extend_store(store, fingerprint=corpus.fingerprint, num_new=len(added))


class JobActors:
    """The Ray actors of a job, started when first needed and gone when the block ends."""

    def __init__(self, config: ExtractConfig, teacher: TeacherSpec, corpus: Corpus) -> None:
        self.config = config
        self._teacher = teacher
        self._corpus = corpus
        self._ray_started = False
        own = Path(teacher.model) / WEIGHTS_FILE if teacher.backend == "run" else None
        self._weights = config.weights or own

    def __enter__(self) -> JobActors:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ray_started:
            ray.shutdown()

    @cached_property
    def weights_sha256(self) -> str:
        """Of a local file without loading it; of the loaded tensors where the hub gives the weights."""
        if self._weights is not None:
            return file_digest(self._weights)
        return str(_get_loaded(self.handles[0].weights_sha256.remote()))

    @cached_property
    def dtype_name(self) -> str:
        """The arithmetic in words, decided by the machine that does the work."""
        if self.config.ray_address is None:
            return dtype_name(compute_dtype(self.config.dtype, pick_device()))
        return str(_get_loaded(self.handles[0].dtype_name.remote()))

    def measure(self, spec: StoreSpec) -> Measured:
        """Features of a sample of the corpus, coded as may be asked."""
        task = sample_task(spec, self._corpus)
        measured: Measured = _get_loaded(self.handles[0].measure.remote(spec, task))
        return measured

    def prepare(self, store: Store) -> None:
        """Load the teachers, so that what is wrong with them is said before any part begins.

        Raises: TeacherError.
        """
        _get_loaded([actor.prepare.remote(store.path) for actor in self.handles])

    def run_parts(self, store: Store, on_status: Callable[[Status], None]) -> float:
        """Make the parts that are missing; see `_run_parts`."""
        return _run_parts(self, store, on_status)

    @cached_property
    def handles(self) -> list[Any]:
        self._start_ray()
        config = self.config
        nodes = [Node.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        num_workers, num_cpus, num_gpus = place_workers(nodes, config.workers, config.gpus_per_worker)
        actor = ray.remote(ExtractActor).options(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=-1,
            max_task_retries=TASK_RETRIES,
            max_concurrency=PARTS_IN_FLIGHT + 1,
        )
        return [actor.remote(config, self._teacher, self._corpus.root, num_cpus) for _ in range(num_workers)]

    def _start_ray(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = self.config.ray_address
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if address is not None:
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, ValueError) as error:
                raise ConfigError(f"no Ray cluster answers at --ray-address {address}: {error}") from error
            self._ray_started = True
            return
        cpus = max(os.cpu_count() or 1, self.config.workers or 1)
        ray.init(address="local", include_dashboard=False, num_cpus=cpus, **quiet)
        self._ray_started = True


@dataclass(frozen=True)
class Node:
    """What a machine of the cluster offers."""

    cpus: int
    gpus: float

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Node:
        return cls(int(resources.get("CPU", 0)), resources.get("GPU", 0))


def place_workers(nodes: Sequence[Node], workers: int | None, gpus_per_worker: float | None) -> tuple[int, int, float]:
    """How many workers, and the CPUs and GPUs of each: as many CPUs as still let all of them run at once.

    Args:
        workers: None for one per GPU, or one where there is none.
        gpus_per_worker: None for an even share, one GPU at most.
    Raises: ConfigError if so many cannot run at once, which Ray would wait for without a word.
    """
    total_gpus = sum(node.gpus for node in nodes)
    num_workers = workers or max(1, int(total_gpus))
    even_share = 1 / math.ceil(num_workers / total_gpus) if total_gpus else 0.0
    num_gpus = even_share if gpus_per_worker is None else gpus_per_worker

    def places(node: Node, cpus: int) -> int:
        by_gpu = int(node.gpus / num_gpus + 1e-6) if num_gpus else node.cpus
        return min(node.cpus // cpus, by_gpu)

    for cpus in range(max(node.cpus for node in nodes), 0, -1):
        if sum(places(node, cpus) for node in nodes) >= num_workers:
            return num_workers, cpus, num_gpus
    raise ConfigError(
        f"{num_workers} workers with {num_gpus:g} GPUs each do not fit the {len(nodes)} nodes with "
        f"{sum(node.cpus for node in nodes)} CPUs and {total_gpus:g} GPUs that Ray has; give fewer --workers or "
        "--gpus-per-worker"
    )


class ExtractActor:
    """One teacher in a process of its own."""

    def __init__(self, config: ExtractConfig, teacher: TeacherSpec, corpus_root: Place, num_cpus: int) -> None:
        torch.set_num_threads(num_cpus)
        limit_blas()
        self._config = config
        self._spec = teacher
        self._corpus_root = corpus_root
        self._loading = threading.Lock()
        self._workers: dict[Place, Worker] = {}

    @cached_property
    def _teacher(self) -> Teacher:
        config = self._config
        device = pick_device()
        sizes = config.sizes or (self._spec.native_size,)
        dtype = compute_dtype(config.dtype, device)
        return load_teacher(self._spec, weights=config.weights, device=device, dtype=dtype, sizes=sizes)

    def _computer(self, spec: StoreSpec) -> Computer:
        host = socket.gethostname()
        if self._corpus_root.is_local and not self._corpus_root.local.is_dir():
            raise CorpusError(f"worker on {host} does not see the corpus folder {self._corpus_root}; share it there")
        arithmetic, agreed = dtype_name(self._teacher.dtype), spec.teacher["dtype"]
        if arithmetic != agreed:
            raise ConfigError(f"worker on {host} would compute in {arithmetic}, the store is {agreed}; give --dtype")
        return Computer(
            self._teacher,
            spec,
            corpus_root=self._corpus_root,
            views=self._config.views,
            batch_size=self._config.batch_size,
        )

    def _worker(self, store: Place) -> Worker:
        with self._loading:
            if store not in self._workers:
                self._workers[store] = Worker(self._computer(open_store(store).spec), store)
            return self._workers[store]

    def weights_sha256(self) -> str:
        with self._loading:
            return weights_digest(self._teacher.module)

    def measure(self, spec: StoreSpec, task: PartTask) -> Measured:
        with self._loading:
            features = self._computer(spec).compute(task).features
            return measure(spec, features, candidates(spec, self._config.fidelity))

    def dtype_name(self) -> str:
        return dtype_name(compute_dtype(self._config.dtype, pick_device()))

    def prepare(self, store: Place) -> None:
        """Load the teacher, so that what is wrong with it is said before any part begins."""
        self._worker(store)

    def run(self, task: PartTask, store: Place) -> PartResult:
        return self._worker(store).run(task)

    def progress(self) -> tuple[int, int]:
        """Views done and samples failed since this process started."""
        running = [worker.progress for worker in self._workers.values()]
        return sum(progress.views for progress in running), sum(progress.failed for progress in running)


def _get(reference: Any) -> Any:
    """`ray.get` that raises what the actor raised, not Ray's wrapping of it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EupeError):
            raise error.cause from None
        raise


def _get_loaded(reference: Any) -> Any:
    """`_get` for what needs the teacher in memory.

    Raises: TeacherError if loading it failed in a way of its own (out of memory, say).
    """
    try:
        return _get(reference)
    except ray.exceptions.RayTaskError as error:
        raise TeacherError(f"the teacher cannot be loaded: {type(error.cause).__name__}: {error.cause}") from error
    except ray.exceptions.RayError as error:
        raise TeacherError(f"a worker died while it loaded the teacher: {str(error).splitlines()[0]}") from error


def _run_parts(actors: JobActors, store: Store, on_status: Callable[[Status], None]) -> float:
    """Keep every actor busy until each part is committed or given up.

    SIGTERM, as spot instances get it, lets the parts under way be committed and begins no other.

    Returns: views per second since the teachers were loaded.
    Raises: IncompleteError naming the gaps and their first reason; StorageError and TeacherError as they come.
    """
    tasks = plan_parts(store.spec, stored_index(store).samples, committed_parts(store.path))
    num_views = store.spec.num_views
    total = store.spec.num_samples * num_views
    before = total - num_views * sum(len(task.samples) for task in tasks)
    reasons: dict[int, str] = {}
    with _interruptible(store):
        on_status(Status("loading teacher", before, total))
        actors.prepare(store)
    began = time.monotonic()
    with _interruptible(store), stop_signals(signal.SIGTERM) as stop_asked:  # Ray, begun by now, had set its own
        queue = iter(tasks)
        running: dict[Any, tuple[Any, PartTask]] = {}

        def begin_next(actor: Any) -> None:
            task = None if stop_asked() else next(queue, None)
            if task is not None:
                running[actor.run.remote(task, store.path)] = (actor, task)

        for actor in actors.handles * PARTS_IN_FLIGHT:
            begin_next(actor)
        while running:
            ready, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for reference in ready:
                actor, task = running.pop(reference)
                if reason := _failure(reference):
                    reasons[task.index] = reason
                begin_next(actor)
            views, failed = _progress(actors.handles)
            on_status(Status("extracting", min(before + views, total), total, failed))
    missing = store.missing_parts()
    if missing and stop_asked():
        raise _stopped(store)
    if missing:
        reason = next(iter(reasons.values()), "no reason was recorded")
        raise IncompleteError(
            f"{len(missing)} of {store.spec.num_parts} parts are missing from {store.path} (first reason: {reason}); "
            "the others are committed: run the same command again to go on"
        )
    return (total - before) / (time.monotonic() - began)


def _failure(reference: Any) -> str | None:
    """Why a part was not made; None if it was.

    Raises: the worker's EupeError, which no other part would escape.
    """
    try:
        _get(reference)
    except EupeError:
        raise
    except ray.exceptions.RayTaskError as error:
        return f"{type(error.cause).__name__}: {error.cause}"
    except ray.exceptions.RayError as error:
        return f"the worker died {TASK_RETRIES + 1} times: {str(error).splitlines()[0]}"
    return None


def _progress(handles: list[Any]) -> tuple[int, int]:
    """Summed over the actors that answer; one that restarts counts from its part again."""
    ready, _ = ray.wait([actor.progress.remote() for actor in handles], num_returns=len(handles), timeout=POLL_SECONDS)
    counts = []
    for reference in ready:
        try:
            counts.append(ray.get(reference))
        except ray.exceptions.RayError:
            continue
    return sum(views for views, _ in counts), sum(failed for _, failed in counts)


@contextmanager
def _interruptible(store: Store) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise _stopped(store) from None


def _stopped(store: Store) -> IncompleteError:
    done = len(committed_parts(store.path))
    return IncompleteError(
        f"stopped: {done} of {store.spec.num_parts} parts of {store.path} are committed; "
        "run the same command again to go on"
    )


def _report(store: Store, *, cached: bool, seconds: float, views_per_s: float | None) -> ExtractReport:
    spec = store.spec
    dense_dim = int(spec.teacher["dense_dim"]) if DENSE in spec.tokens else 0
    summary_dim = int(spec.teacher["summary_dim"]) if SUMMARY in spec.tokens else 0
    num_views = spec.num_samples * spec.num_views
    status = store.samples["status"].to_pylist()
    return ExtractReport(
        store=str(store.path),
        cached=cached,
        num_samples=spec.num_samples,
        num_views=num_views,
        num_failed=sum(word != "ok" for word in status),
        stored_bytes=store.stored_bytes,
        raw_bytes=num_views * bytes_per_view(spec.grids, dense_dim, summary_dim),
        seconds=seconds,
        views_per_s=views_per_s,
    )
