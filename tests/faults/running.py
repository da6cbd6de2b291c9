"""Extractions and Ray clusters in processes of their own, to be watched and killed, and the stores that they leave."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ports import free_ports
from processes import descendants, descendants_called

PATIENCE_S = 240
FAREWELL_S = 10

RAY = Path(sys.executable).parent / "ray"


def begin(
    *words: object,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    program: str | None = None,
) -> subprocess.Popen[str]:
    """`eupe WORDS` in a process of its own, which leads a group.

    Args:
        environment: added to this process's.
        program: another Python than this process's.
    """
    return subprocess.Popen(
        [program or sys.executable, "-m", "eupe", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, output


def committed(out: Path) -> int:
    return len(list(out.glob("parts/[0-9]*.parquet")))


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def extract_workers(pid: int) -> list[int]:
    """Processes of the Ray actors below a process."""
    return descendants_called(b"ExtractActor", pid)


def wait_until_gone(pids: Iterable[int]) -> None:
    """Ray's processes follow their driver; should one not, it is killed."""
    pids = list(pids)
    deadline = time.monotonic() + FAREWELL_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > deadline:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        time.sleep(0.1)


def store_files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def assert_same_store(out: Path, expected: dict[str, bytes]) -> None:
    files = store_files(out)
    assert files.keys() == expected.keys()
    assert [name for name in files if files[name] != expected[name]] == []


def own_address() -> str:
    """Return the address by which Ray knows this machine."""
    return str(ray.util.get_node_ip_address())


@dataclass(frozen=True)
class RayHead:
    """A cluster of one node on this machine, made by `ray start --head`."""

    pid: int
    address: str
    """For `--ray-address`."""
    jobs_url: str
    """For `ray job submit --address`."""
    environment: Mapping[str, str]
    """Of its clients: the token that it asks for."""

    def ask(self, path: str) -> str:
        """Return what the cluster's server answers at `/api/PATH`."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        asked = urllib.request.Request(f"{self.jobs_url}/api/{path}", headers=token)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(asked, timeout=5) as answer:
            return str(answer.read().decode())


@contextmanager
def ray_head(num_cpus: int) -> Iterator[RayHead]:
    """Run a Ray on ports and in a folder of its own, and yield it; `ray stop` would end every other Ray here, too."""
    port, dashboard, agent, client = free_ports(4)
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a socket's path has 107 bytes at most
    words: list[object] = [RAY, "start", "--head", "--block", "--port", port]
    words += ["--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent, "--ray-client-server-port", client]
    words += ["--num-cpus", num_cpus, "--num-gpus", 0, "--object-store-memory", 150 * 2**20, "--temp-dir", folder]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "no_proxy": "127.0.0.1"}
    with (folder / "output").open("w+") as output:
        process = subprocess.Popen(
            list(map(str, words)),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, **token},
        )
        try:
            head = RayHead(process.pid, f"{own_address()}:{port}", f"http://127.0.0.1:{dashboard}", token)
            _wait_until_served(head, process, folder / "output")
            yield head
        finally:
            below = list(descendants(process.pid)) if process.poll() is None else []
            process.terminate()
            process.wait(timeout=PATIENCE_S)
            wait_until_gone(below)
            shutil.rmtree(folder)


def _wait_until_served(head: RayHead, process: subprocess.Popen[str], output: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert process.poll() is None, output.read_text()
        answer = ""
        try:
            # a server that answers may still wait for the node that is to do the work
            if "ALIVE" in (answer := head.ask("v0/nodes")):
                return
        except OSError as error:
            answer = str(error)
        assert time.monotonic() < deadline, f"{answer}: {output.read_text()}"
        time.sleep(0.2)
