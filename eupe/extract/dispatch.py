"""Scheduler of a job: hands out work until each part is committed or given up.

A worker that dies, or that fails for a reason other than a user's mistake, is replaced. Its work is done again, with
care, because a picture may have been the cause. A storage outage is waited out. A user's mistake ends the job.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray

from eupe.common.signals import stop_signals
from eupe.errors import EupeError, IncompleteError, OutageError, WorkerDiedError
from eupe.extract.actors import (
    MAX_LOADS,
    UNITS_IN_FLIGHT,
    JobActors,
    Process,
    Whereabouts,
    cause_of,
    get_loaded,
    when_there,
)
from eupe.extract.isolate import ENDLESS
from eupe.extract.load import PICTURE_SECONDS, PartTask, StuckError, WorkUnit
from eupe.extract.parts import plan_work_units
from eupe.store import Store
from eupe.store.layout import part_name
from eupe.store.reader import committed_parts

POLL_SECONDS = 0.5
GROW_SECONDS = 30.0
"""Interval between checks for new room in the cluster."""
MAX_DEATHS = 5
"""Number of workers that one work unit may cost before it is given up."""
OUTAGE_SECONDS = 900.0
"""Longest outage of the storage that is waited out."""
OUTAGE_PAUSES = (2.0, 5.0, 10.0, 30.0, 60.0)
"""Pauses before the retries in an outage; the last one repeats."""
SILENT_SECONDS = 2 * PICTURE_SECONDS
"""A worker that does not answer for this long is stuck where Python cannot interrupt it."""


@dataclass(frozen=True)
class NodeStatus:
    """The contribution of one machine."""

    host: str
    workers: int
    views_per_s: float
    failed: int


@dataclass(frozen=True)
class Status:
    """The progress of a running job."""

    stage: str
    done: int
    total: int
    failed: int = 0
    nodes: tuple[NodeStatus, ...] = ()


@dataclass
class QueuedUnit:
    """A work unit and its history; times are of the monotonic clock."""

    unit: WorkUnit
    deaths: int = 0
    """Number of workers that died or failed on it."""
    outage_since: float | None = None
    num_outages: int = 0
    not_before: float = 0.0
    """Earliest time of the next attempt."""
    crashing: dict[str, str] = field(default_factory=dict)
    """Pictures that must not be decoded again, key to reason."""
    reason: str = ""
    """Reason of the last failure."""


@dataclass
class WorkerHandle:
    """A worker, as the driver sees it; times are of the monotonic clock."""

    actor: Any
    where: Whereabouts | None = None
    ready: bool = False
    """True while its teachers are loaded."""
    failed_loads: int = 0
    killed: Process | None = None
    """The process that was killed on purpose, until its replacement is ready."""
    load_at: float | None = None
    """Time of the next attempt to load, after an outage of the storage."""
    outage_since: float | None = None
    running: dict[Any, QueuedUnit] = field(default_factory=dict)
    views: int = 0
    """Views done of the work in progress."""
    failed: int = 0
    """Failed samples of the work in progress."""
    asked: Any = None
    """The pending request for its progress."""
    asked_at: float = 0.0


class Dispatch:
    """The work and the workers of one job."""

    def __init__(self, actors: JobActors, stores: Mapping[int, Store], samples: pa.Table) -> None:
        """Plan the missing parts of the stores.

        Args:
            stores: index of the teacher in the job to its store; all stores have the same views and samples.
            samples: the index of these samples.
        """
        self._actors = actors
        self._targets = [(teacher, store.path) for teacher, store in stores.items()]
        self._places = [place for _, place in self._targets]
        specs = [store.spec for store in stores.values()]
        self._num_views = specs[0].num_views
        done = [committed_parts(place) for place in self._places]
        self._todo = plan_work_units(specs, samples, done)
        self._requeued: list[QueuedUnit] = []
        self.given_up: list[str] = []
        """Reasons, one for each work unit that was given up."""
        self._workers: list[WorkerHandle] = []
        self._starting: dict[Any, WorkerHandle] = {}
        self._loading: dict[Any, WorkerHandle] = {}
        self.total = sum(spec.num_samples for spec in specs) * self._num_views
        self.before = self._num_views * sum(
            rows.stop - rows.start
            for spec, parts in zip(specs, done, strict=True)
            for part in parts
            for rows in [spec.part_samples(part)]
        )
        self._committed: Counter[str] = Counter()
        """Views by node, committed by this job."""
        self._failed: Counter[str] = Counter()
        """Failed samples by node, in work units that are done."""
        self._asked_at = 0.0
        self._any_was_ready = False
        self.began = time.monotonic()
        """Time at which the first worker had its teachers loaded."""

    def run(self, on_status: Callable[[Status], None], stop_asked: Callable[[], bool]) -> None:
        """Run until all work is done or given up, or a stop is requested.

        Raises: an EupeError that would stop every other part, too.
        """
        for actor in self._actors.handles:
            self._start_worker(actor)
        grown = time.monotonic()
        while True:
            for worker in self._workers:
                self._fill_slots(worker, stop_asked)
            running = {reference: worker for worker in self._workers for reference in worker.running}
            if not running and (stop_asked() or not self._has_work()):
                return
            self._wait(running)
            self._load_after_outages()
            self._ask_progress()
            on_status(self._status())
            if time.monotonic() - grown > GROW_SECONDS:
                grown = time.monotonic()
                for actor in self._actors.grow():
                    self._start_worker(actor)

    def _wait(self, running: Mapping[Any, WorkerHandle]) -> None:
        """Wait for the next event, for at most `POLL_SECONDS`, and handle it."""
        waited_for = [*running, *self._starting, *self._loading]
        if not waited_for:
            time.sleep(POLL_SECONDS)  # everything waits for the end of an outage: do not spin
            return
        for reference in ray.wait(waited_for, timeout=POLL_SECONDS)[0]:
            if reference in self._starting:
                self._begin_load(self._starting.pop(reference), reference)
            elif reference in self._loading:
                self._on_ready(self._loading.pop(reference), reference)
            else:
                self._settle(running[reference], reference)

    def _load_after_outages(self) -> None:
        for worker in self._workers:
            if worker.load_at is not None and worker.load_at <= time.monotonic():
                worker.load_at = None
                self._load(worker)

    def _start_worker(self, actor: Any) -> None:
        worker = WorkerHandle(actor)
        self._workers.append(worker)
        self._load(worker)

    def _load(self, worker: WorkerHandle) -> None:
        """Load the worker's teachers once its process is up."""
        worker.ready = False
        worker.views = worker.failed = 0
        self._starting[when_there(worker.actor)] = worker

    def _begin_load(self, worker: WorkerHandle, reference: Any) -> None:
        """Start to load the teachers in a process that is up.

        Raises: WorkerDiedError if the last worker is given up.
        """
        try:
            process: Process = get_loaded(reference)
        except WorkerDiedError as error:
            self._note_failed_load(worker, error)
            return
        if process == worker.killed:  # ray.kill does not wait: this is still the old process
            time.sleep(POLL_SECONDS)
            self._load(worker)
            return
        self._loading[worker.actor.prepare.remote(self._targets)] = worker

    def _on_ready(self, worker: WorkerHandle, reference: Any) -> None:
        """Take up a worker whose teachers are loaded, or plan another attempt.

        Raises: the error if no worker has ever loaded its teachers; afterwards an error counts against this worker.
            OutageError if the storage stays away for `OUTAGE_SECONDS`.
        """
        try:
            where: Whereabouts = get_loaded(reference)
        except OutageError as error:
            now = time.monotonic()
            worker.outage_since = worker.outage_since or now
            if now - worker.outage_since > OUTAGE_SECONDS:
                raise error
            worker.load_at = now + OUTAGE_PAUSES[-1]
            return
        except EupeError as error:
            # before any worker has loaded, an error is taken for the user's mistake; a death may be bad luck
            if not self._any_was_ready and not isinstance(error, WorkerDiedError):
                raise
            self._note_failed_load(worker, error)
            return
        if not self._any_was_ready:
            self._any_was_ready = True
            self.began = time.monotonic()  # the reported rate leaves out the start of Ray and the first load
        worker.where, worker.ready, worker.failed_loads, worker.killed, worker.outage_since = where, True, 0, None, None

    def _note_failed_load(self, worker: WorkerHandle, error: EupeError) -> None:
        """Let the worker load again, or dismiss it after `MAX_LOADS` failures in a row.

        Raises: the error if no worker is left.
        """
        worker.failed_loads += 1
        if worker.failed_loads < MAX_LOADS:
            self._load(worker)
            return
        self._workers.remove(worker)
        self._actors.stop(worker.actor)
        if not self._workers:
            raise error

    def _has_work(self) -> bool:
        if self._requeued:
            return True
        upcoming = next(self._todo, None)
        if upcoming is None:
            return False
        self._requeued.append(QueuedUnit(upcoming))  # keep it: `next` took it out of the generator
        return True

    def _fill_slots(self, worker: WorkerHandle, stop_asked: Callable[[], bool]) -> None:
        """Fill a worker's free slots.

        QueuedUnit that killed a worker goes only to an idle one, so that no other work is blamed.
        """
        while worker.ready and len(worker.running) < UNITS_IN_FLIGHT and not stop_asked():
            if any(queued.deaths for queued in worker.running.values()):  # suspect work runs alone
                return
            queued = self._next(idle=not worker.running)
            if queued is None:
                return
            isolate = queued.deaths > 0
            worker.running[worker.actor.run.remote(queued.unit, queued.crashing, isolate)] = queued

    def _next(self, *, idle: bool) -> QueuedUnit | None:
        """Return the next work for a worker, or None if there is nothing for it now."""
        now = time.monotonic()
        due = [queued for queued in self._requeued if queued.not_before <= now]
        suspect = next((queued for queued in due if queued.deaths), None)
        if suspect is not None and not idle:
            return None  # let this worker become idle: with new work all the time, none would ever take the suspect
        if due:
            queued = suspect or due[0]
            self._requeued.remove(queued)
            return queued
        upcoming = next(self._todo, None)
        return None if upcoming is None else QueuedUnit(upcoming)

    def _settle(self, worker: WorkerHandle, reference: Any) -> None:
        """Handle the end of a work unit: committed, failed, or lost with its worker.

        Raises: the worker's EupeError, which would stop every other part, too.
        """
        queued = worker.running.pop(reference)
        assert worker.where is not None
        try:
            self._failed[worker.where.node] += ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # the worker is alive and raised
            self._failed_with(worker, queued, error.cause)
        except ray.exceptions.RayError as error:  # the worker died
            if worker.killed is None:  # otherwise `_replace` killed it, and this work may be innocent
                queued.deaths += 1
                queued.reason = f"the worker died: {cause_of(error)}"
            queued.outage_since, queued.num_outages = None, 0
            if worker.ready:  # False if the other work unit of this worker was settled first
                self._load(worker)
            self._requeue(worker, queued)
        else:
            self._note_committed(worker.where.node, queued.unit)

    def _failed_with(self, worker: WorkerHandle, queued: QueuedUnit, cause: Any) -> None:
        """Requeue a work unit that raised: later after an outage, in a new process after anything unexpected.

        Raises: an EupeError, which a retry would meet again; OutageError after `OUTAGE_SECONDS`.
        """
        if isinstance(cause, OutageError):
            now = time.monotonic()
            queued.outage_since = queued.outage_since or now
            if now - queued.outage_since > OUTAGE_SECONDS:
                raise cause
            queued.not_before = now + OUTAGE_PAUSES[min(queued.num_outages, len(OUTAGE_PAUSES) - 1)]
            queued.num_outages += 1
            queued.reason = str(cause)
            self._requeue(worker, queued)
            return
        if isinstance(cause, EupeError):
            raise cause
        queued.deaths += 1
        queued.outage_since, queued.num_outages = None, 0
        if isinstance(cause, StuckError):
            queued.crashing[cause.key] = f"{ENDLESS} ({PICTURE_SECONDS:g} s)"
            queued.reason = f"{cause.key}: {ENDLESS}"
        else:
            queued.reason = f"{type(cause).__name__}: {cause}"
        self._replace(worker)
        self._requeue(worker, queued)

    def _replace(self, worker: WorkerHandle) -> None:
        """Kill a worker's process, so that Ray starts another; a process that has failed gets no more work."""
        assert worker.where is not None
        if worker.killed is None and worker.ready:
            worker.killed = worker.where.process
            ray.kill(worker.actor, no_restart=False)
            self._load(worker)

    def _requeue(self, worker: WorkerHandle, queued: QueuedUnit) -> None:
        """Requeue the parts that are not committed; give up after `MAX_DEATHS`."""
        assert worker.where is not None
        # only the store knows: a worker may have committed some parts before it died
        missing = tuple((store, task) for store, task in queued.unit.tasks if not self._is_committed(store, task))
        done = tuple(pair for pair in queued.unit.tasks if pair not in missing)
        self._note_committed(worker.where.node, WorkUnit(done))
        if not missing:
            return
        if queued.deaths >= MAX_DEATHS:
            self.given_up.append(f"{queued.reason}, {queued.deaths} times")
            return
        self._requeued.append(replace(queued, unit=WorkUnit(missing)))

    def _is_committed(self, store: int, task: PartTask) -> bool:
        """Return whether a part is committed; False in an outage, where at worst a part is made twice."""
        try:
            return self._places[store].exists(f"parts/{part_name(task.index)}")
        except OutageError:
            return False

    def _note_committed(self, node: str, unit: WorkUnit) -> None:
        self._committed[node] += self._num_views * sum(len(task.samples) for _, task in unit.tasks)

    def _ask_progress(self) -> None:
        """Poll the workers' progress, and replace those that have been silent for `SILENT_SECONDS`."""
        now = time.monotonic()
        if now - self._asked_at < POLL_SECONDS:
            return
        self._asked_at = now
        for worker in self._workers:
            if not worker.ready:
                continue
            if worker.asked is None:
                worker.asked, worker.asked_at = worker.actor.progress.remote(), now
                continue
            if not ray.wait([worker.asked], timeout=0)[0]:
                if now - worker.asked_at > SILENT_SECONDS and worker.running:
                    for queued in worker.running.values():  # nothing tells which of them is stuck
                        queued.deaths += 1
                        queued.reason = f"the worker did not answer for {SILENT_SECONDS:g} s"
                    self._replace(worker)
                continue
            try:
                worker.views, worker.failed = ray.get(worker.asked)
            except ray.exceptions.RayError:
                worker.views = worker.failed = 0
            worker.asked = None

    def _status(self) -> Status:
        seconds = max(time.monotonic() - self.began, 1e-9)
        committed = sum(self._committed.values())
        under_way = sum(worker.views for worker in self._workers)
        return Status(
            "extracting" if any(worker.where for worker in self._workers) else "loading teacher",
            min(self.before + committed + under_way, self.total),  # `under_way` lags: it may hold what is committed
            self.total,
            sum(self._failed.values()) + sum(worker.failed for worker in self._workers),
            tuple(self._node_status(node, host, seconds) for node, host in self._nodes().items()),
        )

    def _nodes(self) -> dict[str, str]:
        """Return node to host, sorted by host."""
        places = {worker.where for worker in self._workers if worker.where is not None}
        return {where.node: where.host for where in sorted(places, key=lambda where: (where.host, where.node))}

    def _node_status(self, node: str, host: str, seconds: float) -> NodeStatus:
        here = [worker for worker in self._workers if worker.where is not None and worker.where.node == node]
        views = self._committed[node] + sum(worker.views for worker in here)
        failed = self._failed[node] + sum(worker.failed for worker in here)
        return NodeStatus(host, sum(worker.ready for worker in here), views / seconds, failed)


def run_parts(
    actors: JobActors, stores: Mapping[int, Store], samples: pa.Table, on_status: Callable[[Status], None]
) -> float:
    """Keep every worker busy until each part is committed or given up.

    On SIGTERM, which spot instances receive, parts in progress are committed and no others begin.

    Args:
        stores: index of the teacher in the job to its store.
        samples: the index of all samples.
    Returns: views per second, over all stores, since the first worker had its teachers loaded.
    Raises: IncompleteError with the number of missing parts and the first reason; StorageError; TeacherError.
    """
    dispatch = Dispatch(actors, stores, samples)
    with _interruptible(stores.values()):
        on_status(Status("loading teacher", dispatch.before, dispatch.total))
        assert actors.handles  # starts Ray, which sets its own handler of SIGTERM; ours must come later
        with stop_signals(signal.SIGTERM) as stop_asked:
            dispatch.run(on_status, stop_asked)
            stopped = stop_asked()
    seconds = time.monotonic() - dispatch.began
    for store in stores.values():
        missing = store.missing_parts()
        if missing and stopped:
            raise _stopped(stores.values())
        if missing:
            reason = next(iter(dispatch.given_up), "no reason was recorded")
            raise IncompleteError(
                f"{len(missing)} of {store.spec.num_parts} parts are missing from {store.path} (first reason: "
                f"{reason}); the others are committed: run the same command again to continue"
            )
    return float(dispatch.total - dispatch.before) / seconds


@contextmanager
def _interruptible(stores: Iterable[Store]) -> Iterator[None]:
    """Turn Ctrl-C into an IncompleteError that reports what is committed."""
    try:
        yield
    except KeyboardInterrupt:
        raise _stopped(stores) from None


def _stopped(stores: Iterable[Store]) -> IncompleteError:
    done = [f"{len(store.committed_parts())} of {store.spec.num_parts} parts of {store.path}" for store in stores]
    return IncompleteError(f"stopped: {', '.join(done)} are committed; run the same command again to continue")
