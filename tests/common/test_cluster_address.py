"""Ray's surroundings: where its files may lie, and clusters that do not answer."""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import grpc
import pytest

from eupe.common import cluster
from eupe.common.cluster import join_ray, scratch_folder, start_ray
from eupe.errors import ConfigError


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose path is short, in place of the system's own."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    folder = Path(f"/tmp/eupe{os.getpid()}")
    folder.mkdir()
    yield folder
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def test_ray_lies_where_its_sockets_can_be(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(short))
    assert scratch_folder() == short / "ray"
    file = short / "file"
    file.write_bytes(b"")
    for useless in (str(tmp_path / ("a" * 120)), "/nowhere/at/all", "/proc", str(file)):
        monkeypatch.setenv("TMPDIR", useless)
        Path(useless).mkdir() if "aaaa" in useless else None
        assert scratch_folder() in {Path("/tmp/ray"), Path(f"/tmp/ray-{os.getuid()}")}
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    (short / "ray").rmdir()
    (short / "ray").write_bytes(b"somebody else's")
    assert scratch_folder() == short / f"ray-{os.getuid()}"


def test_no_folder_at_all_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_can_be_used", lambda folder: False)
    with pytest.raises(ConfigError, match=r"finds no folder .*set RAY_TMPDIR to a folder of at most 37 characters"):
        scratch_folder()


def test_a_ray_that_does_not_start_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("the raylet died\nand more")

    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(
        ConfigError, match=r"Ray cannot start on this machine.*: the raylet died; set RAY_TMPDIR to another"
    ):
        start_ray(1)


@pytest.mark.parametrize("slow_starts", [2, 3])
def test_a_ray_that_is_slow_to_start_gets_another_chance(slow_starts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit of 30 seconds is too short for a busy machine, and nothing is wrong with the folder then."""
    starts = []

    def busy(**_: Any) -> None:
        starts.append(1)
        if len(starts) <= slow_starts:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr("ray.init", busy)
    expected = (
        nullcontext() if slow_starts < 3 else pytest.raises(ConfigError, match="may be too busy, so run the same")
    )
    with expected:
        start_ray(1)
    assert len(starts) == 3


@pytest.mark.parametrize(
    "form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}", "ray://127.0.0.1:{}/?x=1", "auto"]
)
def test_a_cluster_that_is_gone_is_a_sentence(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is tried before Ray is asked, which would wait for minutes; so is the one that `auto` stands for."""
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was asked"))
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(cluster, "_found_by_ray", lambda: f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at --ray-address .*omit the option"):
        join_ray(form.format(port))


def test_a_cluster_that_answers_is_joined_and_other_words_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever speaks Ray's protocol is: here an empty server of gRPC's own."""
    asked = []
    monkeypatch.setattr("ray.init", lambda **options: asked.append(options["address"]))
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    for form in ("127.0.0.1:{}", "ray://127.0.0.1:{}"):
        join_ray(form.format(port))
    server.stop(None)
    join_ray("local")
    assert len(asked) == 3
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        join_ray("localhost:abc")


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "auto"])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "has sent nothing for 0.2 s, so it is not Ray"),
        (b"", "closes the connection, so it is not Ray, or is still starting"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not Ray: it sends b'HTTP/1.1 '"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "is not Ray: it sends b'SSH-2.0-O'"),
        (b"SSH", "closes the connection"),
    ],
)
def test_what_listens_but_is_no_ray_is_a_sentence(
    form: str, answer: bytes | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was asked"))
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        port = server.getsockname()[1]
        monkeypatch.setattr(cluster, "_found_by_ray", lambda: f"127.0.0.1:{port}")
        if answer is not None:
            pool.submit(say, server, answer)
        with pytest.raises(ConfigError, match=f"no Ray cluster answers at --ray-address .*{said}.*omit the option"):
            join_ray(form.format(port), hello_seconds=0.2 if answer is None else 15)


def say(server: socket.socket, answer: bytes) -> None:
    """Serve one client."""
    connection, _ = server.accept()
    with connection:
        connection.recv(1024)
        connection.sendall(answer)


def test_ray_behind_tls_is_asked_by_ray_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("ray.init", lambda **options: asked.append(options["address"]))
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        join_ray(f"127.0.0.1:{server.getsockname()[1]}")
    assert len(asked) == 1


@pytest.mark.parametrize("home", ["/proc", "/nowhere/at/all", None])
def test_a_home_that_cannot_be_written_is_not_needed(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's processes are given a token that it else keeps there; a home that can be used stays in use."""
    tokens = []
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setattr("ray.init", lambda **_: tokens.append(os.environ.pop("RAY_AUTH_TOKEN", None)))
    monkeypatch.setenv("HOME", home or str(tmp_path))
    start_ray(1)
    assert [token is not None for token in tokens] == [home is not None]
