"""How many cores a worker computes on: those that it was given, in whatever thread and after whatever trial."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from making import TINY_SIZE, TINY_TEACHER, TWO_CROPS
from torch import Tensor

from eupe.common.compute import Tokens
from eupe.common.cores import num_cores
from eupe.common.storage import StoragePath
from eupe.corpus.index import Corpus, index_folder
from eupe.extract import actors, audit, calibrate, load, worker
from eupe.extract.actors import ExtractActor, Node, place_workers
from eupe.extract.calibrate import sample_task
from eupe.extract.config import ExtractConfig
from eupe.extract.parts import plan_work_units, store_spec
from eupe.store import Store
from eupe.store.layout import StoreSpec
from eupe.store.writer import create_store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import Teacher, file_digest

Run = Callable[..., Any]


class Observed:
    """A record of threads that compute, torch's threads in each, threads that decode, and the most batches at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: set[int] = set()
        self.torch_threads: set[int] = set()
        self.at_once = self._now = 0
        self._lock = threading.Lock()
        forward = Teacher.__call__

        def observed(teacher: Teacher, pixels: Tensor, layers: Sequence[int] = ()) -> Tokens:
            with self._lock:
                self.threads.add(threading.get_ident())
                self.torch_threads.add(torch.get_num_threads())
                self._now += 1
                self.at_once = max(self.at_once, self._now)
            time.sleep(0.1)  # so that batches that may overlap do
            tokens = forward(teacher, pixels, layers)
            with self._lock:
                self._now -= 1
            return tokens

        self.decoders: set[int] = set()
        load_sample = load.load_sample

        def loaded(*arguments: Any, **named: Any) -> Any:
            self.decoders.add(threading.get_ident())
            return load_sample(*arguments, **named)

        monkeypatch.setattr(Teacher, "__call__", observed)
        monkeypatch.setattr(load, "load_sample", loaded)

    def forget(self) -> None:
        self.threads, self.torch_threads, self.at_once = set(), set(), 0


def in_another_thread(work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run a call in another thread, as Ray runs an actor's methods, and return its result."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *arguments, **named).result()


@pytest.fixture
def two_parts(tiny_weights: Path, tiny_corpus: Path) -> tuple[StoreSpec, Corpus]:
    index = index_folder(tiny_corpus)
    plan = store_spec(
        resolve_teacher(TINY_TEACHER),
        index,
        views=TWO_CROPS,
        sizes=(TINY_SIZE,),
        tokens=("summary", "dense"),
        weights_sha256=file_digest(tiny_weights),
        dtype="fp32",
    )
    return plan, index


@pytest.mark.parametrize("num_cpus", [1, 3])
@pytest.mark.parametrize("asked", [None, 2])
def test_a_worker_computes_on_the_cpus_that_it_was_given(
    num_cpus: int,
    asked: int | None,
    two_parts: tuple[StoreSpec, Corpus],
    tmp_path: Path,
    tiny_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The batch size is found by a trial, or given; each call runs in a thread of its own."""
    monkeypatch.setattr(actors, "this_process", lambda: ("node", os.getpid()))
    monkeypatch.setattr(actors, "fastest_batch", lambda *a, real=actors.fastest_batch: min(2, real(*a)))
    before = torch.get_num_threads()
    plan, index = two_parts
    config = ExtractConfig(
        teacher=TINY_TEACHER, corpus="", weights=tiny_weights, sizes=plan.sizes, views=TWO_CROPS, batch_size=asked
    )
    actor = in_another_thread(ExtractActor, [config], [resolve_teacher(TINY_TEACHER)], index.root, num_cpus)
    task = sample_task(plan, index)
    forward = in_another_thread(actor.try_forward, 0, plan, task, isolate=False)
    create_store(tmp_path / "s.zarr", plan := replace(plan, forward=forward))
    seen = Observed(monkeypatch)
    in_another_thread(actor.prepare, [(0, StoragePath.of(tmp_path / "s.zarr"))])
    for unit in plan_work_units([plan], index.samples, [()]):
        assert in_another_thread(actor.run, unit, {}, False) == 0
    assert (len(seen.threads), seen.at_once, seen.torch_threads) == (num_cpus, num_cpus, {1})
    assert 1 <= len(seen.decoders) <= num_cpus
    torch.set_num_threads(before)


def test_a_plan_and_an_audit_compute_on_all_cores(
    tiny_corpus: Path, tiny_weights: Path, tiny_store: Store, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan also where its sample of the corpus is less than a batch for each core."""
    for module in (worker, audit):
        monkeypatch.setattr(module, "num_cores", lambda: 3)
    seen = Observed(monkeypatch)
    words = ["plan", "--teacher", TINY_TEACHER, "--corpus", tiny_corpus, "--weights", tiny_weights, "--size", TINY_SIZE]
    monkeypatch.setattr(calibrate, "SAMPLE_VIEWS", 4)
    assert run_eupe(*words, "--views", "rrc:2", "--batch-size", 4).code == 0
    assert (len(seen.threads), seen.at_once, seen.torch_threads) == (3, 3, {1})
    seen.forget()
    report = audit.audit(audit.AuditConfig(store=tiny_store.path, weights=tiny_weights, samples=8))
    assert report.num_views == 16
    assert (len(seen.threads), seen.at_once, seen.torch_threads) == (3, 3, {1})


def test_workers_on_one_machine_share_its_cores() -> None:
    for num_workers in (1, 2, 3, 4, 8):
        count, cpus, _ = place_workers([Node(8, 0)], num_workers, None)
        assert (count, cpus) == (num_workers, 8 // num_workers)


@pytest.mark.parametrize(
    ("quota", "around", "expected"),
    [
        ("max 100000", "max 100000", 4),
        ("250000 100000", "max 100000", 3),
        ("300000 100000", "50000 100000", 1),
        ("", "", 4),
    ],
)
def test_cores_are_those_of_the_process_and_its_control_groups(
    quota: str, around: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5, 7})
    assert num_cores(tmp_path) == 4
    group = tmp_path / "sys/fs/cgroup/pod/job"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:name=old:/x\n0::/pod/job\n")
    (group / "cpu.max").write_text(quota)
    (group.parent / "cpu.max").write_text(around)
    assert num_cores(tmp_path) == expected
