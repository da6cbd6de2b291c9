"""Steps are forks of one process, and like commands that were typed."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from eupe.common.locks import lock_file
from eupe.pipeline.starter import NUMBER, Starter

pytestmark = pytest.mark.usefixtures("forked")

PATIENCE_S = 120


def test_a_step_prints_what_the_command_prints_and_ends_as_it_ends(tmp_path: Path) -> None:
    typed = [sys.executable, "-P", "-m", "eupe", "teachers"]
    with Starter() as starter, (tmp_path / "lock").open("w") as lock:
        for words, code in ((["teachers"], 0), (["teachers", "nobody"], 2)):
            with (tmp_path / "printed").open("wb") as stdout:
                assert starter.start(words, stdout=stdout.fileno(), lock=lock.fileno()).wait(PATIENCE_S) == code
            if code == 0:
                printed = (tmp_path / "printed").read_text()
                assert "dinov2" in printed
                assert printed == subprocess.run(typed, capture_output=True, check=True, text=True).stdout


def narrow_pipe() -> tuple[int, int]:
    """A pipe that holds less than the table of teachers: who prints it waits until somebody reads."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    return reading, writing


def test_a_step_can_be_stopped_and_keeps_the_lock_until_then(tmp_path: Path) -> None:
    lock = lock_file(tmp_path / "lock", verb="run", of=tmp_path)
    reading, writing = narrow_pipe()
    with Starter() as starter:
        step = starter.start(["teachers"], stdout=writing, lock=lock)
        os.close(writing)
        os.close(lock)
        os.read(reading, 1)
        assert step.wait(0.1) is None
        with pytest.raises(Exception, match="run"):
            lock_file(tmp_path / "lock", verb="run", of=tmp_path)
        step.terminate()
        assert step.wait(PATIENCE_S) == -signal.SIGTERM
        os.close(lock_file(tmp_path / "lock", verb="run", of=tmp_path))
    os.close(reading)


def test_a_step_whose_starter_was_killed_counts_as_killed(tmp_path: Path) -> None:
    with Starter() as starter, (tmp_path / "lock").open("w") as lock:
        reading, writing = narrow_pipe()
        step = starter.start(["teachers"], stdout=writing, lock=lock.fileno())
        os.close(writing)
        os.read(reading, 1)
        assert starter._process is not None
        starter._process.kill()
        assert step.wait(PATIENCE_S) == -signal.SIGKILL
        while os.read(reading, 1 << 16):
            pass  # its output ends, so it has ended, too
        os.close(reading)


def test_a_step_whose_pipeline_went_before_it_began_does_not_run(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    reading, writing = narrow_pipe()
    words = json.dumps(["teachers"]).encode()
    with ours, theirs, (tmp_path / "lock").open("w") as lock:
        socket.send_fds(ours, [NUMBER.pack(len(words))], [writing, lock.fileno()])
        ours.sendall(words)
        ours.close()
        os.close(writing)
        command = [sys.executable, "-P", "-m", "eupe.pipeline.starter"]
        assert subprocess.run(command, stdin=theirs.fileno(), timeout=PATIENCE_S).returncode == 0
    assert os.read(reading, 1) == b""
    os.close(reading)
