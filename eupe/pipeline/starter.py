"""Processes for the steps of a pipeline, forked from one that has imported the libraries.

Most steps import PyTorch, timm and their like for several seconds, often for longer than they work. Here one process
imports them once, and a step is a fork of it that runs the command line as if it had been typed. The process that forks
imports nothing of this package, starts no threads and uses no GPU: a fork could use none of these.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

LIBRARIES = (
    "torch",
    "timm",
    "transformers",
    "zarr",
    "tensorstore",
    "pyarrow.parquet",
    "safetensors.torch",
    "rich.progress",
)
NUMBER = struct.Struct("q")
"""Length of a message, process of a step, or its wait status."""


class Starter:
    """Starts steps, one at a time; a context manager. The process that forks begins with the first step."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._control is not None and self._process is not None:
            self._control.close()
            self._process.wait()

    def start(self, words: Sequence[str], *, stdout: int, lock: int) -> RunningStep:
        """Run `eupe` with these words in a process and session of its own, without input.

        Args:
            stdout: descriptor of its standard output.
            lock: descriptor that it keeps open while it lives.
        """
        if self._control is None:
            self._control, theirs = socket.socketpair()
            # -P: import nothing from the working directory; a session: a terminal's Ctrl-C reaches only this process
            command = [sys.executable, "-P", "-m", "eupe.pipeline.starter"]
            with theirs:
                self._process = subprocess.Popen(command, stdin=theirs.fileno(), start_new_session=True)
        told = json.dumps(list(words)).encode()
        socket.send_fds(self._control, [NUMBER.pack(len(told))], [stdout, lock])
        self._control.sendall(told)
        return RunningStep(self._control)


class RunningStep:
    """A step that was started."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._process = _receive_number(control)

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, negative for a signal's; None if the step runs on after these seconds.

        If the process that forks was killed, the step is killed, too, because nobody can tell how it ends.
        """
        if self._process is None:
            return -signal.SIGKILL
        if not select.select([self._control], [], [], seconds)[0]:
            return None
        if (status := _receive_number(self._control)) is not None:
            return os.waitstatus_to_exitcode(status)
        self._send(signal.SIGKILL)
        return -signal.SIGKILL

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process, number)


def _receive_number(control: socket.socket) -> int | None:
    """Return the next number; None if the other side has gone."""
    got = control.recv(NUMBER.size, socket.MSG_WAITALL)
    return NUMBER.unpack(got)[0] if len(got) == NUMBER.size else None


def _serve(control: socket.socket) -> list[str] | None:
    """Fork for each request, and return the words of its command in the child; None when the requests end."""
    while True:
        got, files, _, _ = socket.recv_fds(control, NUMBER.size, 2)
        if len(got) < NUMBER.size:
            return None
        words: list[str] = json.loads(control.recv(NUMBER.unpack(got)[0], socket.MSG_WAITALL))
        child = os.fork()
        if child == 0:
            control.close()
            os.setsid()
            stdout, lock = files
            os.dup2(stdout, sys.stdout.fileno())
            os.close(stdout)
            os.set_inheritable(lock, False)
            os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
            # the old one knows whether the file before could be sought
            sys.stdout = open(sys.stdout.fileno(), "w", encoding=sys.stdout.encoding, closefd=False)  # noqa: SIM115
            return words
        for file in files:
            os.close(file)
        try:
            control.sendall(NUMBER.pack(child))
        except OSError:  # the pipeline went while the libraries were imported, and never saw this step begin
            os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(OSError):  # the pipeline may be gone
            control.sendall(NUMBER.pack(status))


def main() -> None:
    """Import the libraries, then start a step for each request on standard input, which is a socket."""
    for library in LIBRARIES:
        with contextlib.suppress(Exception):  # a step that needs it says what is wrong
            importlib.import_module(library)
    gc.freeze()
    words = _serve(socket.socket(fileno=os.dup(sys.stdin.fileno())))
    if words is not None:
        sys.argv = ["eupe", *words]
        runpy.run_module("eupe", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
