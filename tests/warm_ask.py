"""Ask a process that has imported the libraries to run a command (`warm.py`).

This is read for each command, so it imports little.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Sequence

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
COMMANDS = ("eupe", "scenes", "eupe.pipeline.starter")
"""What Python runs as `python -m`, and is forked."""
AGENT = """
import os, runpy, sys
sys.executable, sys.argv = sys.argv[1], [word for word in sys.argv[2:] if word != "-u"]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Ray's agents, which need pipes and are not forked, have Python started by the name that they take for their own."""
CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language=PYTHON"


def ask(place: str, words: list[str]) -> None:
    """Have a command run by the process at a place, and end as it ends; what else Python is given, it runs itself."""
    if name_of(words) == "python" and not _is_forked(words):
        called_so = ["-c", AGENT, words[0]] if any("agent" in word for word in words[1:3]) else []
        os.execv(sys.executable, [sys.executable, *called_so, *words[1:]])
    words = _without_setup(words)
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(place)
        folder = os.getcwd()  # noqa: PTH109
        told = json.dumps({"words": words, "folder": folder, "environment": dict(os.environ)}).encode()
        socket.send_fds(asking, [struct.pack("Q", len(told))], [0, 1, 2])
        asking.sendall(told)
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: asking.sendall(bytes([number])))
        ended = receive(asking, 8)
    (status,) = struct.unpack("Q", ended) if len(ended) == 8 else (signal.SIGKILL,)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) in PASSED_ON:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def name_of(words: Sequence[str]) -> str:
    return words[0].rpartition("/")[2]


def is_command(words: Sequence[str]) -> bool:
    return [word for word in words[1:4] if word != "-P"][:2] in [["-m", name] for name in COMMANDS]


def _is_forked(words: Sequence[str]) -> bool:
    """Return whether Python's words run in a fork: a command, or a script like Ray's workers; its agents need pipes."""
    script = next(word for word in [*words[1:], "-"] if word != "-u")
    return is_command(words) or (script.endswith(".py") and "agent" not in script)


def _without_setup(words: list[str]) -> list[str]:
    """Return the words of a worker of Ray for those of the script that sets its variables and starts it; sets them.

    That script imports Ray, and has this program started again. Where it does more, it is left to do so.
    """
    context = [json.loads(word.removeprefix(CONTEXT)) for word in words if word.startswith(CONTEXT)]
    if not words[1:2] or not words[1].endswith("/setup_worker.py") or LANGUAGE not in words or len(context) != 1:
        return words
    variables = context[0].pop("env_vars") or {}
    if context[0].pop("py_executable") != words[0] or any(context[0].values()) or "$" in "".join(variables.values()):
        return words
    os.environ.update(variables)
    return [words[0], *(word for word in words[2:] if word != LANGUAGE and not word.startswith(CONTEXT))]


def receive(connection: socket.socket, length: int) -> bytes:
    """That many bytes, or fewer where the other side has gone."""
    got = b""
    while len(got) < length and (more := connection.recv(length - len(got))):
        got += more
    return got
