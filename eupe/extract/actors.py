"""The Ray actors of a job: where they run, and the calls that they serve."""

from __future__ import annotations

import math
import os
import re
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import ray
import torch

from eupe.common.cluster import join_ray, start_ray
from eupe.common.compute import compute_dtype, dtype_name, pick_device
from eupe.common.cores import num_cores
from eupe.common.storage import StoragePath
from eupe.corpus.index import Corpus
from eupe.errors import ConfigError, CorpusError, EupeError, TeacherError, WorkerDiedError
from eupe.extract.calibrate import (
    Measured,
    candidates,
    cosine_to_fp32,
    fastest_batch,
    measure,
    require_features,
    sample_task,
)
from eupe.extract.config import ExtractConfig
from eupe.extract.isolate import find_crashing
from eupe.extract.load import PartTask, StuckError, WorkUnit
from eupe.extract.process import prepare_process
from eupe.extract.worker import PartExtractor, Worker
from eupe.store import Store, open_store
from eupe.store.layout import StoreSpec
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import Teacher, file_digest, load_teacher, weights_digest
from eupe.teachers.weights import own_weights

UNITS_IN_FLIGHT = 2
"""Work units per worker: one uses the teachers while the other is written."""
MAX_LOADS = 3
"""Failed loads in a row, after which a worker is given up."""
DEFAULT_BATCH = 16
"""Batch size until a device has been tried, and for stores that record none."""
COMPARED_VIEWS = 8
"""Views on which a teacher's tokens are compared with those in float32."""
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(: |$)")
"""The line of a traceback that names the exception."""
_EXIT = re.compile(r"Worker exit type: (\w+) Worker exit detail: (.*?)(?:\. |\.?$)")
"""How the process ended, as far as Ray knows, in its line on an actor that died: `NODE_OUT_OF_MEMORY`, for example."""


Process = tuple[str, int]
"""Ray's ID of a node (a host may run several), and the ID of a process on it."""


@dataclass(frozen=True)
class Whereabouts:
    """The host and the process that an actor currently runs in."""

    host: str
    process: Process

    @property
    def node(self) -> str:
        return self.process[0]


def this_process() -> Process:
    return ray.get_runtime_context().get_node_id(), os.getpid()


class JobActors:
    """The Ray actors of a job: started on first use, ended with the `with` block."""

    def __init__(self, configs: Sequence[ExtractConfig], teachers: Sequence[TeacherSpec], corpus: Corpus) -> None:
        """Store what the actors need; they start on first use.

        Args:
            configs: one for each teacher; equal in every option that does not concern a single teacher.
            teachers: their specs, in the same order.
        """
        self.configs = configs
        self._shared = configs[0]
        self._teachers = teachers
        self._corpus = corpus
        self._ray_started = False

    def __enter__(self) -> JobActors:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ray_started:
            ray.shutdown()

    @cached_property
    def weights_sha256(self) -> list[str]:
        """Return each teacher's digest: of a local file, without loading it, or of the tensors that were fetched."""
        return [self._digest(i) for i in range(len(self._teachers))]

    def _digest(self, teacher: int) -> str:
        spec = self._teachers[teacher]
        weights = self.configs[teacher].weights or own_weights(spec)
        if weights is not None:
            return file_digest(weights, self.configs[teacher].weights_key)
        return str(self._ask("weights_sha256", teacher))

    @cached_property
    def dtype_name(self) -> str:
        """Return the name of the compute dtype, as decided on the machine that does the work."""
        if self._shared.ray_address is None:
            return dtype_name(compute_dtype(self._shared.dtype, pick_device()))
        return str(self._ask("dtype_name"))

    def measure(self, teacher: int, spec: StoreSpec) -> Measured:
        """Measure the candidate precisions on the features of a sample of the corpus."""
        measured: Measured = self._ask_of_sample("measure", teacher, spec)
        return measured

    def try_forward(self, teacher: int, spec: StoreSpec) -> dict[str, Any]:
        """Try how a teacher runs on a worker's device; return what `StoreSpec.forward` records."""
        noted: dict[str, Any] = self._ask_of_sample("try_forward", teacher, spec)
        return noted

    def _ask_of_sample(self, method: str, teacher: int, spec: StoreSpec) -> Any:
        """Ask the first actor about a sample; if it dies or hangs, ask again without the pictures that kill."""
        task = sample_task(spec, self._corpus)
        actor = self.handles[0]
        try:
            return get_loaded(getattr(actor, method).remote(teacher, spec, task, isolate=False))
        except WorkerDiedError:
            pass
        except StuckError:
            ray.kill(actor, no_restart=False)
        return self._ask(method, teacher, spec, task, isolate=True)

    def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Ask the first actor; if its process dies, retry in the next process, for `MAX_LOADS` attempts in all."""
        actor = self.handles[0]
        for _ in range(MAX_LOADS - 1):
            get_loaded(when_there(actor))
            with suppress(WorkerDiedError):
                return get_loaded(getattr(actor, method).remote(*arguments, **named))
        get_loaded(when_there(actor))
        return get_loaded(getattr(actor, method).remote(*arguments, **named))

    def prepare(self, stores: Mapping[int, Store]) -> None:
        """Load the teachers, so that their errors appear before any part begins.

        Args:
            stores: index of the teacher in the job to its store.
        Raises: TeacherError.
        """
        targets = [(teacher, store.path) for teacher, store in stores.items()]
        get_loaded([actor.prepare.remote(targets) for actor in self.handles])

    @cached_property
    def handles(self) -> list[Any]:
        """Return the actors, and start them on first use; `grow` adds to them."""
        self._start_ray()
        num_workers, self._num_cpus, self._num_gpus = self._placed()
        return [self._start_actor() for _ in range(num_workers)]

    def grow(self) -> list[Any]:
        """Start actors on GPUs that have joined the cluster; return the new actors."""
        if self._shared.workers is not None or self._shared.ray_address is None:
            return []
        try:
            places = self._placed()[0]
        except ConfigError:  # the nodes that are alive now have no room for the workers
            return []
        new = [self._start_actor() for _ in range(places - len(self.handles))]
        self.handles.extend(new)
        return new

    def stop(self, actor: Any) -> None:
        """Kill an actor for good, which frees its CPUs and GPUs."""
        self.handles.remove(actor)
        ray.kill(actor)

    def _placed(self) -> tuple[int, int, float]:
        nodes = [Node.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        return place_workers(nodes, self._shared.workers, self._shared.gpus_per_worker)

    def _start_actor(self) -> Any:
        actor = ray.remote(ExtractActor).options(
            num_cpus=self._num_cpus,
            num_gpus=self._num_gpus,
            max_restarts=-1,  # a worker whose node is taken waits for another that has room
            max_concurrency=UNITS_IN_FLIGHT + 1,  # one thread more, so that `progress` answers beside the work
        )
        return actor.remote(self.configs, self._teachers, self._corpus.root, self._num_cpus)

    def _start_ray(self) -> None:
        address = self._shared.ray_address
        if address is not None:
            join_ray(address)
        else:
            # each worker takes at least one of Ray's CPUs, and there may be more workers than cores
            start_ray(num_cpus=max(num_cores(), self._shared.workers or 1))
        self._ray_started = True


def require_cluster(address: str | None) -> None:
    """Raise ConfigError if a cluster was requested and does not answer; called before the work begins."""
    if address is not None and not ray.is_initialized():
        join_ray(address)
        ray.shutdown()


@dataclass(frozen=True)
class Node:
    """The CPUs and GPUs of one machine of the cluster."""

    cpus: int
    gpus: float

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Node:
        return cls(int(resources.get("CPU", 0)), resources.get("GPU", 0))


def place_workers(nodes: Sequence[Node], workers: int | None, gpus_per_worker: float | None) -> tuple[int, int, float]:
    """Return the number of workers, and the CPUs and GPUs of each: the most CPUs with which all run at once.

    Args:
        workers: number of workers; None for one per GPU, or one without GPUs.
        gpus_per_worker: GPUs of each worker; None for an even share of at most one GPU.
    Raises: ConfigError if they cannot all run at once; Ray itself would wait silently.
    """
    total_gpus = sum(node.gpus for node in nodes)
    num_workers = workers or max(1, int(total_gpus))
    even_share = 1 / math.ceil(num_workers / total_gpus) if total_gpus else 0.0
    num_gpus = even_share if gpus_per_worker is None else gpus_per_worker

    def places(node: Node, cpus: int) -> int:
        # the quotient of a share like 1/3 may be rounded to just below a whole number
        by_gpu = int(node.gpus / num_gpus + 1e-6) if num_gpus else node.cpus
        return min(node.cpus // cpus, by_gpu)

    for cpus in range(max((node.cpus for node in nodes), default=0), 0, -1):
        if sum(places(node, cpus) for node in nodes) >= num_workers:
            return num_workers, cpus, num_gpus
    raise ConfigError(
        f"{num_workers} workers with {num_gpus:g} GPUs each do not fit on the {len(nodes)} nodes of Ray, which have "
        f"{sum(node.cpus for node in nodes)} CPUs and {total_gpus:g} GPUs in total; lower --workers or "
        "--gpus-per-worker"
    )


class ExtractActor:
    """The Ray actor of a worker: holds the teachers of a job in a process of its own."""

    def __init__(
        self, configs: Sequence[ExtractConfig], teachers: Sequence[TeacherSpec], corpus_root: StoragePath, num_cpus: int
    ) -> None:
        torch.set_num_threads(num_cpus)
        self._cores = num_cpus
        prepare_process()
        self._configs = configs
        self._specs = teachers
        self._corpus_root = corpus_root
        self._loading = threading.Lock()  # Ray runs the calls in several threads
        self._loaded: dict[int, Teacher] = {}
        self._worker: Worker | None = None

    def process(self) -> Process:
        return this_process()

    def _teacher(self, i: int) -> Teacher:
        if i not in self._loaded:
            config, spec = self._configs[i], self._specs[i]
            device = pick_device()
            sizes = config.sizes or (spec.native_size,)
            dtype = compute_dtype(config.dtype, device)
            self._loaded[i] = load_teacher(
                spec, weights=config.weights, key=config.weights_key, device=device, dtype=dtype, sizes=sizes
            )
        return self._loaded[i]

    def _extractor(self, i: int, spec: StoreSpec) -> PartExtractor:
        """Build the part extractor of a teacher.

        Raises: CorpusError if this host does not see the pictures; ConfigError if it would compute in another dtype.
        """
        host = socket.gethostname()
        if self._corpus_root.is_local and not self._corpus_root.local.is_dir():
            # otherwise every picture would be recorded as unreadable
            raise CorpusError(
                f"the worker on {host} cannot see the corpus folder {self._corpus_root}; make it available there"
            )
        teacher, config = self._teacher(i), self._configs[i]
        computed, agreed = dtype_name(teacher.dtype), spec.teacher["dtype"]
        if computed != agreed:  # `auto` may mean another dtype on this machine
            raise ConfigError(
                f"the worker on {host} would compute in {computed}, but the store's dtype is {agreed}; give --dtype"
            )
        batch_size = config.batch_size or spec.forward.get("batch_size", DEFAULT_BATCH)
        return PartExtractor(
            teacher,
            spec,
            corpus_root=self._corpus_root,
            views=config.views,
            batch_size=batch_size,
            cores=self._cores,
        )

    def weights_sha256(self, i: int) -> str:
        with self._loading:
            return weights_digest(self._teacher(i).module)

    def measure(self, i: int, spec: StoreSpec, task: PartTask, *, isolate: bool) -> Measured:
        """Measure the candidate precisions on the features of a task.

        Args:
            isolate: a picture of the task may have killed a process: leave out those that kill.
        """
        with self._loading:
            task = self._without_crashing(task, spec) if isolate else task
            part = self._extractor(i, spec).compute(task)
            require_features(spec, part)
            return measure(spec, part.features, candidates(spec, self._configs[i].fidelity))

    def try_forward(self, i: int, spec: StoreSpec, task: PartTask, *, isolate: bool) -> dict[str, Any]:
        """Choose the batch size, and measure the cosine to float32; `isolate` as in `measure`."""
        with self._loading:
            task = self._without_crashing(task, spec) if isolate else task
            teacher, asked = self._teacher(i), self._configs[i].batch_size
            layers = tuple(map(int, spec.layers))
            noted: dict[str, Any] = {"batch_size": asked or fastest_batch(teacher, spec.sizes, layers)}
            if teacher.dtype != torch.float32:
                pixels = self._some_views(self._extractor(i, spec), task)
                if cosines := cosine_to_fp32(teacher, pixels, tuple(map(int, spec.layers))):
                    noted["cosine_to_fp32"] = cosines
            if teacher.device.type == "cuda":
                torch.cuda.empty_cache()  # workers that share the device need what the largest batch took
            return noted

    def _without_crashing(self, task: PartTask, spec: StoreSpec) -> PartTask:
        crashing = find_crashing(task.samples, self._corpus_root, self._configs[0].views, spec.sizes)
        return replace(task, samples=tuple(sample for sample in task.samples if sample.key not in crashing))

    def _some_views(self, extractor: PartExtractor, task: PartTask) -> torch.Tensor:
        """Return some rendered views at the first size, uint8 [at most COMPARED_VIEWS, S, S, 3]."""
        size = extractor.spec.sizes[0]
        loaded = extractor.load_ahead(task.samples[:COMPARED_VIEWS])
        views = [view for sample in loaded if sample.row.error is None for view in sample.views[size]]
        return torch.from_numpy(np.array(views[:COMPARED_VIEWS]))

    def dtype_name(self) -> str:
        return dtype_name(compute_dtype(self._configs[0].dtype, pick_device()))

    def prepare(self, targets: Sequence[tuple[int, StoragePath]]) -> Whereabouts:
        """Load the teachers, so that their errors appear before any part begins.

        Args:
            targets: pairs of a teacher's index in the job and its store.
        """
        with self._loading:
            if self._worker is None:
                extractors = [self._extractor(i, open_store(store).spec) for i, store in targets]
                self._worker = Worker(extractors, [store for _, store in targets])
        return Whereabouts(socket.gethostname(), this_process())

    def run(self, unit: WorkUnit, crashing: Mapping[str, str], isolate: bool) -> int:
        """Compute and commit a work unit; see `Worker.run`."""
        assert self._worker is not None
        return self._worker.run(unit, crashing=crashing, isolate=isolate)

    def progress(self) -> tuple[int, int]:
        """Return the views done and the samples failed of the work in progress."""
        return (0, 0) if self._worker is None else self._worker.progress.counts


def when_there(actor: Any) -> Any:
    """Return a reference to an actor's process, which is ready once the process is up, also after a restart."""
    # any other call fails if it is made while the actor restarts; this one is retried by Ray
    return actor.process.options(max_task_retries=-1).remote()


def cause_of(error: Exception) -> str:
    """Return one line from Ray's report of a death: the exception that ended the worker, or what happened and how."""
    first, *others = _ANSI.sub("", str(error)).splitlines() or [type(error).__name__]
    if raised := [line for line in others if _EXCEPTION.match(line)] if "creation task" in first else []:
        return raised[-1]
    exits = [": ".join(found.groups()) for line in others if (found := _EXIT.search(line))]
    return f"{first} ({exits[0]})" if exits else first


def get(reference: Any) -> Any:
    """Return the result of a call; raise an actor's own EupeError instead of Ray's wrapper."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EupeError):
            raise error.cause from None
        raise


def get_loaded(reference: Any) -> Any:
    """Return the result of a call that loads the teacher.

    Raises: an EupeError of the actor's; TeacherError for any other failure (out of memory, for example);
        WorkerDiedError if the worker died; StuckError.
    """
    try:
        return get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, StuckError):
            raise error.cause from None
        raise TeacherError(f"the teacher cannot be loaded: {type(error.cause).__name__}: {error.cause}") from error
    except ray.exceptions.RayError as error:
        raise WorkerDiedError(f"a worker died while it loaded the teacher: {cause_of(error)}") from error
