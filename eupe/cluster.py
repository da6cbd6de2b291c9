"""Ray: one of this machine's own, in whatever environment, or a cluster that is joined if it answers."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, chdir, suppress
from pathlib import Path
from typing import Any

import ray

from eupe.errors import ConfigError

QUIET: Mapping[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
ANSWER_SECONDS = 5.0
"""How long a cluster that does not answer is asked again."""
HELLO_SECONDS = 15.0
"""How long what listens at an address may take for the first words of Ray's protocol."""
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client of HTTP/2, and so of gRPC, begins with: its preface, and a frame of no settings."""
FRAME_HEAD, SETTINGS = 9, 4
"""Bytes before a frame's content, of which the fourth is its kind; a server's first frame has its settings."""
LONGEST_SOCKET = 107
"""Bytes of the path of a socket on Linux."""
OF_A_SESSION = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
"""What Ray appends to its folder."""


def start_ray(num_cpus: int) -> None:
    """Start a Ray of this machine's own, with its files in a folder that it can use.

    Raises: ConfigError if it does not start.
    """
    folder = scratch_folder()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not _home_can_be_used():  # where Ray keeps the token that its processes know each other by
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        with _nothing_of_the_working_directory():
            ray.init(address="local", include_dashboard=False, num_cpus=num_cpus, _temp_dir=str(folder), **QUIET)
    except Exception as error:  # of many kinds; all say that Ray did not come up
        raise ConfigError(
            f"Ray cannot start on this machine, with its files in {folder}: {_first_line(error)}; name another short, "
            "writable folder in RAY_TMPDIR"
        ) from error


def _nothing_of_the_working_directory() -> AbstractContextManager[None]:
    """Keep Ray from putting this process's directory first where its workers look for modules.

    That directory may hold a `numpy.py` of somebody else's; only whoever may change `/` can put one there.
    """
    return chdir("/")


def scratch_folder() -> Path:
    """Return the folder for Ray's files: in that of RAY_TMPDIR or TMPDIR where these can be used.

    Ray puts sockets there, whose paths must be short.

    Raises: ConfigError if there is none.
    """
    bases = [Path(given).absolute() for name in ("RAY_TMPDIR", "TMPDIR") if (given := os.environ.get(name))]
    bases += [Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")]
    for folder in (folder for base in bases for folder in (base / "ray", base / f"ray-{os.getuid()}")):
        if len(os.fsencode(folder)) + OF_A_SESSION <= LONGEST_SOCKET and _can_be_used(folder):
            return folder
    longest = LONGEST_SOCKET - OF_A_SESSION - len("/ray")
    raise ConfigError(
        f"Ray finds no folder for its files: {', '.join(map(str, bases))} cannot be written, or are too long for the "
        f"path of a socket; name a folder of at most {longest} characters in RAY_TMPDIR"
    )


def _can_be_used(folder: Path) -> bool:
    """Tell whether a file can be made in a folder that is there, or that can be."""
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    return False


def _home_can_be_used() -> bool:
    with suppress(RuntimeError):  # of a user without a home
        return _can_be_used(Path.home() / ".ray")
    return False


def join_ray(address: str, *, hello_seconds: float = HELLO_SECONDS) -> None:
    """Join the cluster at an address as `--ray-address` takes it.

    Args:
        hello_seconds: how long something that listens there may keep silent.
    Raises: ConfigError if no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        for host, port in _endpoints(_found_by_ray() if address == "auto" else address):
            _require_answer(host, port, hello_seconds)
        with _nothing_of_the_working_directory():
            ray.init(address=address, **QUIET)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster answers at --ray-address {address} (or RAY_ADDRESS): {_first_line(error)}; start one, or "
            "leave the option out and unset RAY_ADDRESS to work on this machine alone"
        ) from error


def _found_by_ray() -> str:
    """Return what `auto` stands for, which may be the address of a cluster that has ended; `auto` if there is none."""
    from ray._private.services import canonicalize_bootstrap_address

    return canonicalize_bootstrap_address("auto") or "auto"


def _endpoints(address: str) -> Iterator[tuple[str, int]]:
    """Yield host and port of an address that names them.

    Raises: ValueError for a port that is none.
    """
    if address in ("auto", "local"):
        return
    host, colon, port = address.rpartition("://")[2].partition("/")[0].partition("?")[0].rpartition(":")
    if colon:
        yield host.strip("[]"), int(port)
    elif address.startswith("ray://"):
        yield port, 10001


def _require_answer(host: str, port: int, hello_seconds: float) -> None:
    """Raises: OSError if nothing listens there, though it is asked for `ANSWER_SECONDS`; see `_require_hello`, too."""
    until = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(1.0, until - time.monotonic())) as connection:
                return _require_hello(connection, hello_seconds)
        except socket.gaierror:
            raise
        except OSError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.5)


def _require_hello(connection: socket.socket, seconds: float) -> None:
    """Ask for what every gRPC server, and so every Ray, says first; Ray itself would wait for minutes.

    Raises: OSError if nothing is said in time; ValueError if something else is.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):  # only Ray has the keys
        return
    said = b""
    until = time.monotonic() + seconds
    connection.settimeout(seconds)
    try:
        connection.sendall(HELLO)
        while len(said) < FRAME_HEAD:
            connection.settimeout(max(0.01, until - time.monotonic()))
            if not (more := connection.recv(FRAME_HEAD - len(said))):
                raise ConnectionError("what listens there ends the connection, so it is no Ray, or not yet")
            said += more
    except TimeoutError:
        raise TimeoutError(f"what listens there has said nothing for {seconds:g} s, so it is no Ray") from None
    if said[3] != SETTINGS:
        raise ValueError(f"what listens there is no Ray: it says {said!r}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
