"""docs/extract-at-scale.md, with a Ray cluster of two nodes on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ports import free_ports
from presupposed import reader_environment, take
from test_commands_are_run import AT_SCALE
from walking import PATIENCE_S, Walk

from eupe.store import open_store

HOST = "127.0.0.1"
JOB = "ray job status --address http://{} dinov2-b"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_page_on_clusters_is_run(
    presupposed: Path, readers_programs: Path, tmp_path: Path
) -> None:
    """`/data` and `/shared` are folders here; each node has ports of its own."""
    take(presupposed, tmp_path, ["photos=data/photos", "photos=shared/photos"])
    walk = Walk(tmp_path, {**reader_environment(presupposed), "no_proxy": HOST}, programs=readers_programs)
    port, dashboard, client, *agents = free_ports(5)
    head = f"--port {port} --dashboard-port {dashboard} --ray-client-server-port {client} --num-cpus 1 --num-gpus 0"
    with ray_folder() as folder:
        walk.page(
            AT_SCALE,
            smaller={
                "/data/": f"{tmp_path}/data/",
                "/shared/": f"{tmp_path}/shared/",
                "rrc:4": "rrc:1",
                "ray start --head": f"ray start --head {head} --temp-dir {folder} "
                f"--node-ip-address {HOST} --dashboard-agent-listen-port {agents[0]}",
                "ray start --address": f"ray start --num-cpus 1 --num-gpus 0 --node-ip-address {HOST} "
                f"--dashboard-agent-listen-port {agents[1]} --address",
                "HEAD:6379": f"{HOST}:{port}",
                "HEAD:8265": f"{HOST}:{dashboard}",
                "--ray-address auto": f"--ray-address {HOST}:{port}",
            },
        )
        wait_for_the_job(walk, f"{HOST}:{dashboard}")
        assert "nothing to do" in walk.run(f"ray job logs --address http://{HOST}:{dashboard} dinov2-b")
    for store in ("data/store/dinov2-b.zarr", "data/store/siglip2.zarr", "shared/store/dinov2-b.zarr"):
        assert open_store(tmp_path / store).spec.num_samples == 24


def wait_for_the_job(walk: Walk, address: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while "succeeded" not in (told := walk.run(JOB.format(address))):
        assert "failed" not in told and time.monotonic() < deadline, told
        time.sleep(1)


@contextmanager
def ray_folder() -> Iterator[Path]:
    """Yield a folder for `ray start --temp-dir`, then kill processes that name it; `ray stop` would kill every Ray."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a socket's path has 107 bytes at most
    try:
        yield folder
    finally:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if str(folder).encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue
        shutil.rmtree(folder, ignore_errors=True)
