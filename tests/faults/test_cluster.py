"""Ray clusters on this machine: what is submitted, killed or shared among nodes ends in the store of one process."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from making import make_store
from ports import free_ports
from ray.cluster_utils import Cluster
from ray.util.state import list_tasks
from running import (
    PATIENCE_S,
    RAY,
    RayHead,
    assert_same_store,
    begin,
    committed,
    extract_workers,
    finish,
    ray_head,
    store_files,
    wait_until,
)
from threadpoolctl import threadpool_limits

from eupe.corpus.views import ViewSpec
from eupe.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("forked")]

MANY_VIEWS = ViewSpec(policy="rrc", num_views=16)
"""Four parts of 128 pictures."""


@pytest.fixture(scope="module")
def head(forked: None) -> Iterator[RayHead]:
    with ray_head(num_cpus=os.cpu_count() or 1) as running:
        yield running


@contextmanager
def on_one_core() -> Iterator[None]:
    """Sums are taken as by a worker that has one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def extract_words(corpus: Path, weights: Path, out: Path, *, views: int) -> list[object]:
    words = ["extract", "--teacher", "timm:test_vit", "--weights", weights, "--corpus", corpus, "--out", out]
    return [*words, "--size", 64, "--views", f"rrc:{views}", "--dtype", "fp32", "--batch-size", 8]


def job(head: RayHead, *words: object) -> tuple[int, str]:
    """`ray job WORDS` as a client of the cluster."""
    ended = subprocess.run(
        [RAY, "job", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **head.environment, "RAY_API_SERVER_ADDRESS": head.jobs_url},
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_a_submitted_job_succeeds_and_leaves_the_store_of_one_process(
    head: RayHead, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, tiny_store: Store
) -> None:
    """A job finds the cluster by the address that Ray sets in it; one with a mistake fails and says what it is."""
    eupe = [sys.executable, "-m", "eupe", *extract_words(tiny_corpus, tiny_weights, tmp_path / "s.zarr", views=2)]
    (folder := tmp_path / "cwd").mkdir()
    (folder / "note.txt").write_text("goes to the cluster\n")

    code, output = job(head, "submit", "--submission-id", "whole", "--working-dir", folder, "--", *eupe)
    assert code == 0, output
    assert "Job 'whole' succeeded" in job(head, "status", "whole")[1]
    assert "ExtractActor" in head.ask("v0/actors"), "the cluster did it, not a Ray of the job's own"
    assert_same_store(tmp_path / "s.zarr", store_files(tiny_store.path.local))

    code, output = job(head, "submit", "--submission-id", "refused", "--", *eupe, "--seed", 1)
    assert code == 1
    assert "Job 'refused' failed" in job(head, "status", "refused")[1]
    assert "views.seed: stored 0, requested 1" in " ".join(output.split()) and "exit code 2" in output
    assert_same_store(tmp_path / "s.zarr", store_files(tiny_store.path.local))


def test_a_driver_killed_is_started_again_elsewhere(
    head: RayHead, tmp_path: Path, many_pictures: Path, tiny_weights: Path
) -> None:
    """The second driver runs in another working directory, and does not make again what was committed."""
    out = tmp_path / "s.zarr"
    words = [*extract_words(many_pictures, tiny_weights, out, views=16), "--ray-address", head.address]
    (first := tmp_path / "first").mkdir()
    (second := tmp_path / "second").mkdir()

    process = begin(*words, cwd=first, environment=head.environment)
    wait_until(lambda: committed(out) >= 1, process)
    workers = extract_workers(head.pid)
    assert len(workers) == 1
    process.kill()
    process.wait()
    shutil.rmtree(first)
    whole = {file: file.stat().st_mtime_ns for file in out.glob("parts/[0-9]*.parquet")}
    assert 1 <= len(whole) < 4

    code, output = finish(begin(*words, cwd=second, environment=head.environment))
    assert code == 0, output
    assert {file: file.stat().st_mtime_ns for file in whole} == whole
    assert not Path(f"/proc/{workers[0]}").exists(), "it had the cores"
    alone = make_store(tmp_path / "e.zarr", many_pictures, tiny_weights, views=MANY_VIEWS)
    assert_same_store(out, store_files(alone.path.local))


def test_two_nodes_share_the_parts(tmp_path: Path, many_pictures: Path, tiny_weights: Path) -> None:
    """One core and one worker each; the store is that of one process on one core."""
    out = tmp_path / "s.zarr"
    dashboard = free_ports(1)[0]
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True, "dashboard_port": dashboard}
    )
    try:
        cluster.add_node(num_cpus=1)
        words = extract_words(many_pictures, tiny_weights, out, views=32)
        code, output = finish(begin(*words, "--workers", 2, "--ray-address", cluster.address, cwd=tmp_path))
        assert code == 0, output
        tasks = list_tasks(address=cluster.address, filters=[("name", "=", "ExtractActor.run")], detail=True)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert Counter(task.state for task in tasks) == {"FINISHED": 8}
    assert len({task.node_id for task in tasks}) == 2
    line = re.compile(rf"  {re.escape(socket.gethostname())}: 1 workers, \d+\.\d views/s, 0 failed")
    assert len(line.findall(output)) >= 2, output
    with on_one_core():
        alone = make_store(tmp_path / "e.zarr", many_pictures, tiny_weights, views=replace(MANY_VIEWS, num_views=32))
    assert_same_store(out, store_files(alone.path.local))


def test_a_node_that_is_taken_costs_only_what_was_under_way(
    tmp_path: Path, many_pictures: Path, tiny_weights: Path
) -> None:
    """Its worker begins again on a node that comes later, and finds nothing of its own to be done twice."""
    out = tmp_path / "s.zarr"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        taken = cluster.add_node(num_cpus=1)
        words = extract_words(many_pictures, tiny_weights, out, views=16)
        process = begin(*words, "--ray-address", cluster.address, cwd=tmp_path)
        wait_until(lambda: committed(out) >= 1, process)
        cluster.remove_node(taken, allow_graceful=False)
        whole = {file: file.stat().st_mtime_ns for file in out.glob("parts/[0-9]*.parquet")}
        assert 1 <= len(whole) < 4
        cluster.add_node(num_cpus=1)
        code, output = finish(process)
        assert code == 0, output
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert {file: file.stat().st_mtime_ns for file in whole} == whole
    with on_one_core():
        alone = make_store(tmp_path / "e.zarr", many_pictures, tiny_weights, views=MANY_VIEWS)
    assert_same_store(out, store_files(alone.path.local))
