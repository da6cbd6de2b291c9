"""Random faults, one after the other, until a job is done: its store is that of an undisturbed one, byte for byte.

All jobs share a cluster on this machine: two nodes of one core, so that a worker has one core however many there are.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import ray
from awkward import save_broken
from making import make_corpus
from planting import Outcomes, planted_environment
from ray.cluster_utils import Cluster
from running import PATIENCE_S, assert_same_store, committed, extract_workers, store_files
from warm import LIBRARIES

from eupe.cli import main
from eupe.common.files import UNFINISHED
from eupe.corpus.index import index_folder
from eupe.store import open_store
from eupe.store.reader import committed_parts, read_part_metadata

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SEEDS = range(2)
"""Each suffers every kind once, in another order and at other moments."""
KINDS = ("worker killed", "driver killed", "node killed", "SIGTERM", "outage", "disk full")
SAMPLES_PER_PART = 4
NUM_PICTURES = 96
WRITE_SECONDS = 0.02
"""Added to each write, so that many faults fall between the objects of a part."""

forking = multiprocessing.get_context("forkserver")
forking.set_forkserver_preload([*LIBRARIES, "eupe.cli", "eupe.extract.job"])


@dataclass(frozen=True)
class Fault:
    """A fault and when it happens."""

    kind: str
    after: int
    """Parts that this driver's workers have committed."""
    delay: float
    """Seconds after that."""
    nth: int
    """Write, counted from then on, that fails."""
    times: int

    @classmethod
    def drawn(cls, kind: str, rng: random.Random) -> Fault:
        return cls(kind, rng.randint(0, 4), rng.uniform(0, 0.3), rng.randint(1, 20), rng.randint(1, 3))


def drive(words: Sequence[str], log: Path) -> None:
    """`eupe WORDS` in a process of its own that prints into a file."""
    os.setsid()
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = ["eupe", *words]
    with mock.patch("eupe.extract.parts.samples_per_part", lambda num_samples, num_bytes: SAMPLES_PER_PART):
        main()


@dataclass(frozen=True)
class Ground:
    """The cluster on which the campaigns run, with their planned faults and the words of their command."""

    cluster: Cluster
    writes: Outcomes
    loads: Outcomes
    words: Sequence[str]

    def start(self, out: Path, *, workers: int) -> Job:
        log = out.with_name(f"{time.monotonic_ns()}.log")
        log.touch()
        words = [*self.words, "--out", out, "--workers", workers, "--ray-address", self.cluster.address]
        strangers = set(extract_workers(os.getpid()))
        process = forking.Process(target=drive, args=(list(map(str, words)), log), daemon=True)
        process.start()
        return Job(self, out, log, process, strangers, committed(out))

    def replace_node(self, rng: random.Random) -> None:
        taken = rng.choice(sorted(self.cluster.worker_nodes, key=lambda node: node.unique_id))
        self.cluster.remove_node(taken, allow_graceful=False)
        self.cluster.add_node(num_cpus=1)


@dataclass(frozen=True)
class Job:
    """A driver and its workers."""

    ground: Ground
    out: Path
    log: Path
    process: multiprocessing.process.BaseProcess
    strangers: set[int]
    """Workers of drivers before it."""
    before: int
    """Parts that were committed when it began."""

    @property
    def ended(self) -> bool:
        return self.process.exitcode is not None

    @property
    def workers(self) -> list[int]:
        return [pid for pid in extract_workers(os.getpid()) if pid not in self.strangers]

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """False if the driver ended before."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if self.ended:
                return False
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return True

    def finish(self) -> int:
        """Its exit code."""
        self.process.join(PATIENCE_S)
        assert self.process.exitcode is not None and "Traceback" not in self.log.read_text(), self.log.read_text()
        return self.process.exitcode

    def suffer(self, fault: Fault, rng: random.Random) -> bool:
        """False if the job was done before the fault could happen."""
        if not self.wait_for(lambda: self.has_come_to(fault)):
            return False
        time.sleep(fault.delay)
        if fault.kind == "worker killed":
            return self.lose_worker(rng)
        if fault.kind == "node killed":
            self.ground.replace_node(rng)
            return not self.ended
        if fault.kind in ("outage", "disk full"):
            return self.meet_storage_fault(fault)
        os.kill(self.process.pid or 0, signal.SIGKILL if fault.kind == "driver killed" else signal.SIGTERM)
        code = self.finish()
        if finished(self.out):
            return False
        assert code == (-signal.SIGKILL if fault.kind == "driver killed" else 1), self.log.read_text()
        return True

    def has_come_to(self, fault: Fault) -> bool:
        if fault.kind == "SIGTERM" and "extracting" not in self.log.read_text():
            return False  # before it hands out work a driver just leaves
        return committed(self.out) >= self.before + fault.after and bool(self.workers)

    def lose_worker(self, rng: random.Random) -> bool:
        if not (workers := self.workers):
            return False
        try:
            os.kill(rng.choice(workers), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return not self.ended

    def meet_storage_fault(self, fault: Fault) -> bool:
        full = fault.kind == "disk full"
        writes = self.ground.writes
        writes.plan(["ok"] * (fault.nth - 1) + (["ENOSPC"] * 1000 if full else ["EIO"] * fault.times))
        if not full:
            return self.wait_for(lambda: writes.spent)
        code = self.finish()
        writes.plan([])
        if finished(self.out):
            return False
        assert code == 1, self.log.read_text()
        assert "no space left while writing" in self.log.read_text()
        return True


def finished(out: Path) -> bool:
    return (out / "zarr.json").exists() and open_store(out).finished


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path, forked: None) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("campaign")
    corpus = make_corpus(folder / "corpus", count=NUM_PICTURES)
    save_broken(corpus)
    words = ["extract", "--teacher", "timm:test_vit", "--weights", tiny_weights, "--corpus", corpus]
    words += ["--size", 64, "--views", "rrc:16", "--dtype", "fp32", "--batch-size", 8]
    writes, loads = Outcomes(folder / "writes"), Outcomes(folder / "loads")
    planted = planted_environment(writes=writes, write_seconds=WRITE_SECONDS, loads=loads)
    with mock.patch.dict(os.environ, planted):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1)
            yield Ground(cluster, writes, loads, words)
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(autouse=True)
def no_driver_outlives_its_test() -> Iterator[None]:
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def undisturbed(ground: Ground, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    job = ground.start(folder / "s.zarr", workers=2)
    assert job.finish() == 0, job.log.read_text()
    return store_files(folder / "s.zarr")


def assert_committed_parts_are_whole(out: Path, expected: dict[str, bytes]) -> None:
    if not (out / "zarr.json").exists():
        return
    place = open_store(out).path
    for part in committed_parts(place):
        objects = read_part_metadata(place, part)["objects"]
        for name in [*objects, f"parts/{part:05d}.parquet"]:
            assert name.endswith(".moments") or (out / name).read_bytes() == expected[name], name


@pytest.mark.parametrize("seed", SEEDS)
def test_a_job_that_suffers_faults_ends_in_the_store_of_one_that_does_not(
    seed: int, ground: Ground, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """A job that is done before all of its faults have happened is begun again for those that are left."""
    rng = random.Random(seed)
    out = tmp_path / "s.zarr"
    faults = [Fault.drawn(kind, rng) for kind in rng.sample(KINDS, len(KINDS))]
    job = ground.start(out, workers=rng.randint(1, 2))
    while faults:
        happened = job.suffer(faults[0], rng)
        assert_committed_parts_are_whole(out, undisturbed)
        if happened:
            faults.pop(0)
        elif job.ended:
            assert_finished(job, undisturbed)
            shutil.rmtree(out)
        if job.ended:
            job = ground.start(out, workers=rng.randint(1, 2))
    assert_finished(job, undisturbed)


def assert_finished(job: Job, expected: dict[str, bytes]) -> None:
    """Each picture is there once, with features or a reason."""
    assert job.finish() == 0, job.log.read_text()
    store = open_store(job.out)
    assert store.samples["key"].to_pylist() == store_keys(job.ground)
    assert store.valid["error"].null_count == len(store.valid) == NUM_PICTURES
    assert store.failed["error"].null_count == 0
    assert_same_store(job.out, expected)


def store_keys(ground: Ground) -> list[str]:
    corpus = ground.words[ground.words.index("--corpus") + 1]
    return index_folder(corpus).samples["key"].to_pylist()


def test_a_worker_that_dies_while_it_tries_the_teacher_is_replaced(
    ground: Ground, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    ground.loads.plan(["SIGKILL"])
    job = ground.start(tmp_path / "s.zarr", workers=1)
    assert_finished(job, undisturbed)
    assert ground.loads.spent


def test_a_teacher_that_kills_every_worker_ends_the_job(
    ground: Ground, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """The job ends even if the teacher was tried before and a store exists, say on machines with less memory."""
    out = tmp_path / "s.zarr"
    unpack({name: data for name, data in undisturbed.items() if not name.startswith(("parts/", "stats/"))}, out)
    ground.loads.plan(["SIGKILL"] * 100)
    job = ground.start(out, workers=2)
    assert job.finish() == 2
    ground.loads.plan([])
    assert "a worker died while it loaded the teacher" in job.log.read_text()
    assert_finished(ground.start(out, workers=2), undisturbed)


@pytest.mark.parametrize("made", [("zarr.json",), ("zarr.json", "boxes/zarr.json")])
def test_a_driver_killed_while_it_made_the_store_is_no_obstacle(
    made: Sequence[str], ground: Ground, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    unpack({name: undisturbed[name] for name in made}, tmp_path / "s.zarr")
    assert_finished(ground.start(tmp_path / "s.zarr", workers=2), undisturbed)


def test_a_driver_killed_while_it_cleaned_up_leaves_that_to_the_next(
    ground: Ground, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "s.zarr"
    unpack({**undisturbed, "parts/00003.moments": b"merged", f"parts/x.{0:032x}{UNFINISHED}": b"half"}, out)
    assert_finished(ground.start(out, workers=2), undisturbed)


def unpack(files: Mapping[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
