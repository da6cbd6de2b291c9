"""Commands of eupe without their imports: one process imports the libraries once, and forks for each command.

A command that needs a model imports PyTorch and its friends for eight seconds before it works for one, and so does each
worker that it has Ray start. A walk through the pages types a hundred such commands, and what it proves is what they
do, not how they start: `warm_programs` makes a folder for PATH with a program named `eupe` that hands its words,
folder, variables and open files to a process that has imported the libraries, and nothing of eupe. That process forks,
and the child is the command. To such a command Python is a program of that folder, too, so that Ray's workers and the
steps of a pipeline are forked likewise.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

LIBRARIES = (
    *("torch", "torch.utils.tensorboard", "torchvision", "timm", "timm.data", "open_clip", "transformers"),
    "transformers.models.dinov2.modeling_dinov2",
    *("pyarrow.dataset", "pyarrow.parquet", "zarr", "tensorstore", "numcodecs", "safetensors.torch", "yaml"),
    *("rich.console", "rich.table", "rich.progress", "typer", "PIL.Image", "PIL.ImageDraw", "onnx"),
    *("aiohttp", "click", "google.protobuf.json_format", "jsonschema", "prometheus_client", "requests"),
)
"""The last line is what Ray's processes import; not Ray, which reads how to authenticate while it is imported."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PROGRAMS = ("eupe", "python")
COMMANDS = ("eupe", "scenes", "eupe.pipeline.starter")
"""What Python runs as `python -m`, and is forked."""
PROGRAM = """#!{python} -IS
import sys

sys.path.insert(0, {here!r})
from warm import ask

ask({place!r}, sys.argv)
"""


AGENT = """
import os, runpy, sys
sys.executable, sys.argv = sys.argv[1], [word for word in sys.argv[2:] if word != "-u"]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Ray's agents, which need pipes and are not forked, have Python started by the name that they take for their own."""


@contextmanager
def warm_programs(environment: Mapping[str, str]) -> Iterator[Path]:
    """A folder for PATH with the programs, which are asked of a process that has imported the libraries.

    Args:
        environment: all variables that libraries read while they are imported; what else a command finds are its own.
    """
    folder = Path(tempfile.mkdtemp(prefix="warm", dir="/tmp"))  # a socket's path has 107 bytes at most
    place = folder / "socket"
    for name in PROGRAMS:
        text = PROGRAM.format(python=sys.executable, here=str(Path(__file__).parent), place=str(place))
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        listening.listen()
        words = [sys.executable, __file__, str(listening.fileno())]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[listening.fileno()], env={**environment})
    try:
        yield folder
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def ask(place: str, words: list[str]) -> None:
    """Have a command run by the process at a place, and end as it ends; what else Python is given, it runs itself."""
    if _name(words) == "python" and not _is_forked(words):
        called_so = ["-c", AGENT, words[0]] if any("agent" in word for word in words[1:3]) else []
        os.execv(sys.executable, [sys.executable, *called_so, *words[1:]])
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(place)
        told = json.dumps({"words": words, "folder": str(Path.cwd()), "environment": dict(os.environ)}).encode()
        socket.send_fds(asking, [struct.pack("Q", len(told))], [0, 1, 2])
        asking.sendall(told)
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: asking.sendall(bytes([number])))
        ended = _receive(asking, 8)
    (status,) = struct.unpack("Q", ended) if len(ended) == 8 else (signal.SIGKILL,)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) in PASSED_ON:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _name(words: Sequence[str]) -> str:
    return Path(words[0]).name


def _is_forked(words: Sequence[str]) -> bool:
    """Return whether Python's words run in a fork: a command, or a script like Ray's workers; its agents need pipes."""
    script = next(word for word in [*words[1:], "-"] if word != "-u")
    return _is_command(words) or (script.endswith(".py") and "agent" not in script)


def _is_command(words: Sequence[str]) -> bool:
    return [word for word in words[1:4] if word != "-P"][:2] in [["-m", name] for name in COMMANDS]


def _receive(connection: socket.socket, length: int) -> bytes:
    """That many bytes, or fewer where the other side has gone."""
    got = b""
    while len(got) < length and (more := connection.recv(length - len(got))):
        got += more
    return got


def serve(listening: socket.socket) -> None:
    """Fork for each command that is asked for, and once more to wait for its end, until standard input ends.

    Which it does with the process that began this one, however that dies.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while sys.stdin not in select.select([listening, sys.stdin], [], [])[0]:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _attend(connection)
        connection.close()


def _attend(connection: socket.socket) -> None:
    """Run one command in a child and tell how it ended; signals of the one who asks, and its death, are passed on."""
    length, files, _, _ = socket.recv_fds(connection, 8, 3)
    asked = json.loads(_receive(connection, *struct.unpack("Q", length)))
    child = os.fork()
    if child == 0:
        connection.close()
        code = 1
        try:
            _become(asked, files)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    for file in files:
        os.close(file)
    ended = os.pidfd_open(child)
    while ended not in (ready := select.select([connection, ended], [], [])[0]):
        number = connection.recv(1) if connection in ready else b""
        os.kill(child, number[0] if number else signal.SIGKILL)
        if not number:
            break
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        connection.sendall(struct.pack("Q", status))
    os._exit(0)


def _become(asked: dict[str, object], files: list[int]) -> None:
    """Be the command in its folder, with its variables and its open files."""
    os.setpgid(0, 0)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    # Those of the process that forked know whether its own files could be sought.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(str(asked["folder"]))
    os.environ.clear()
    os.environ.update(asked["environment"])  # type: ignore[arg-type]
    words: list[str] = asked["words"]  # type: ignore[assignment]
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [path for path in named if path and path not in sys.path]
    _customise(named)
    sys.executable = str(Path(words[0]).with_name("python"))
    if _name(words) == "python" and not _is_command(words):
        sys.argv = [word for word in words[1:] if word != "-u"]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        sys.argv = words[words.index("-m") + 1 :] if _is_command(words) else words
        runpy.run_module(_name(sys.argv), run_name="__main__")


def _customise(named: Sequence[str]) -> None:
    """Run a `sitecustomize.py` on PYTHONPATH, as Python does when it begins, if this process began without."""
    ran = getattr(sys.modules.get("sitecustomize"), "__file__", None)
    for file in (Path(path) / "sitecustomize.py" for path in named if path):
        if file.exists() and str(file) != ran:
            runpy.run_path(str(file))


if __name__ == "__main__":
    import importlib

    listening = socket.socket(fileno=int(sys.argv[1]))
    sys.path[0] = str(Path(sys.executable).parent)
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()
    serve(listening)
