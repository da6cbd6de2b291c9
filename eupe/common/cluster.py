"""Ray: start a local instance, whatever the environment, or join a cluster if it answers."""

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
"""Time for which a connection that is refused is retried."""
HELLO_SECONDS = 15.0
"""Time that a listener may take to send the first bytes of Ray's protocol."""
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""First bytes of an HTTP/2 client, and so of a gRPC client: the preface, and an empty settings frame."""
FRAME_HEAD, SETTINGS = 9, 4
"""Size of a frame's header, whose fourth byte is the frame's type; type of a server's first frame."""
LONGEST_SOCKET = 107
"""Upper bound on the bytes of a socket's path on Linux."""
START_ATTEMPTS = 3
SLOW_START = "timed out during startup"
"""Part of Ray's message if its processes are not up in time."""
OF_A_SESSION = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
"""Length of what Ray appends to its folder."""


def start_ray(num_cpus: int) -> None:
    """Start a local Ray, with its files in a folder that it can use.

    Raises: ConfigError if it does not start.
    """
    folder = scratch_folder()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not _home_can_be_used():  # Ray keeps the token there that its processes authenticate with
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    for _ in range(START_ATTEMPTS):
        try:
            with _nothing_of_the_working_directory():
                ray.init(address="local", include_dashboard=False, num_cpus=num_cpus, _temp_dir=str(folder), **QUIET)
            return
        except Exception as error:  # of many types; all mean that Ray did not start
            ray.shutdown()
            if SLOW_START in str(error):  # after 30 s, which Ray does not let us change: a busy machine needs longer
                continue
            raise ConfigError(
                f"Ray cannot start on this machine, with its files in {folder}: {_first_line(error)}; set RAY_TMPDIR "
                "to another short, writable folder"
            ) from error
    raise ConfigError(
        f"Ray did not start within its time limit, {START_ATTEMPTS} times in a row; this machine may be too busy, so "
        "run the same command again later"
    )


def _nothing_of_the_working_directory() -> AbstractContextManager[None]:
    """Return a context in which Ray does not put this process's working directory first on its workers' module path.

    The working directory may hold a foreign `numpy.py`; only a user who may write to `/` can put one there.
    """
    return chdir("/")


def scratch_folder() -> Path:
    """Return a folder for Ray's files: below RAY_TMPDIR or TMPDIR if these can be used, else below a system folder.

    Ray puts sockets there, whose paths must be short.

    Raises: ConfigError if there is no such folder.
    """
    bases = [Path(given).absolute() for name in ("RAY_TMPDIR", "TMPDIR") if (given := os.environ.get(name))]
    bases += [Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")]
    for folder in (folder for base in bases for folder in (base / "ray", base / f"ray-{os.getuid()}")):
        if len(os.fsencode(folder)) + OF_A_SESSION <= LONGEST_SOCKET and _can_be_used(folder):
            return folder
    longest = LONGEST_SOCKET - OF_A_SESSION - len("/ray")
    raise ConfigError(
        f"Ray finds no folder for its files: {', '.join(map(str, bases))} cannot be written, or are too long for a "
        f"socket path; set RAY_TMPDIR to a folder of at most {longest} characters"
    )


def _can_be_used(folder: Path) -> bool:
    """Return whether a file can be made in a folder; the folder is made if it is missing."""
    with suppress(OSError):
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    return False


def _home_can_be_used() -> bool:
    with suppress(RuntimeError):  # the user has no home
        return _can_be_used(Path.home() / ".ray")
    return False


def join_ray(address: str, *, hello_seconds: float = HELLO_SECONDS) -> None:
    """Join the cluster at an address, in the form that `--ray-address` takes.

    Args:
        hello_seconds: time that a listener there may stay silent.
    Raises: ConfigError if no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        # checked first: `ray.init` would wait for minutes for a cluster that is gone
        for host, port in _endpoints(_found_by_ray() if address == "auto" else address):
            _require_answer(host, port, hello_seconds)
        with _nothing_of_the_working_directory():
            ray.init(address=address, **QUIET)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster answers at --ray-address {address} (or RAY_ADDRESS): {_first_line(error)}; start one, or "
            "omit the option and unset RAY_ADDRESS to use this machine alone"
        ) from error


def _found_by_ray() -> str:
    """Return the address that `auto` stands for, perhaps of a cluster that has ended; `auto` if there is none."""
    from ray._private.services import canonicalize_bootstrap_address

    return canonicalize_bootstrap_address("auto") or "auto"


def _endpoints(address: str) -> Iterator[tuple[str, int]]:
    """Yield host and port of an address that names them.

    Raises: ValueError if the port is not a number.
    """
    if address in ("auto", "local"):
        return
    host, colon, port = address.rpartition("://")[2].partition("/")[0].partition("?")[0].rpartition(":")
    if colon:
        yield host.strip("[]"), int(port)
    elif address.startswith("ray://"):
        yield port, 10001


def _require_answer(host: str, port: int, hello_seconds: float) -> None:
    """Check that a gRPC server listens at an address; retry for `ANSWER_SECONDS`.

    Raises: OSError if nothing listens there, or it does not answer; ValueError if it is not a gRPC server.
    """
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
    """Check for the frame that every gRPC server, and so every Ray, sends first.

    Raises: OSError if nothing arrives in time; ValueError if something else arrives.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):  # only Ray has the keys, so only Ray can check
        return
    said = b""
    until = time.monotonic() + seconds
    connection.settimeout(seconds)
    try:
        connection.sendall(HELLO)
        while len(said) < FRAME_HEAD:
            connection.settimeout(max(0.01, until - time.monotonic()))
            if not (more := connection.recv(FRAME_HEAD - len(said))):
                raise ConnectionError("the server there closes the connection, so it is not Ray, or is still starting")
            said += more
    except TimeoutError:
        raise TimeoutError(f"the server there has sent nothing for {seconds:g} s, so it is not Ray") from None
    if said[3] != SETTINGS:
        raise ValueError(f"the server there is not Ray: it sends {said!r}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
