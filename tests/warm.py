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
import importlib
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

from warm_ask import is_command, name_of, receive

LIBRARIES = (
    *("torch", "torch.utils.tensorboard", "torchvision", "timm", "timm.data", "open_clip", "transformers"),
    "transformers.models.dinov2.modeling_dinov2",
    *("pyarrow.dataset", "pyarrow.parquet", "zarr", "tensorstore", "numcodecs", "safetensors.torch", "yaml"),
    *("rich.console", "rich.table", "rich.progress", "typer", "PIL.Image", "PIL.ImageDraw", "onnx"),
    *("aiohttp", "click", "google.protobuf.json_format", "jsonschema", "prometheus_client", "requests"),
    *("colorful", "pydantic"),
)
"""The last lines are what Ray's processes import; not Ray, which reads its variables while it is imported."""
PROGRAMS = ("eupe", "python")
PROGRAM = """#!{python} -IS
import sys

sys.path.insert(0, {here!r})
from warm_ask import ask

ask({place!r}, sys.argv)
"""
SERVER = """
import sys

sys.path.insert(0, {here!r})
from warm import main

main({listening})
"""
"""Not a file: where a command spawns a process, that would run the file first."""


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
        server = SERVER.format(here=str(Path(__file__).parent), listening=listening.fileno())
        words = [sys.executable, "-c", server]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[listening.fileno()], env={**environment})
    try:
        yield folder
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


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
    asked = json.loads(receive(connection, *struct.unpack("Q", length)))
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
    if name_of(words) == "python" and not is_command(words):
        sys.argv = [word for word in words[1:] if word != "-u"]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        sys.argv = words[words.index("-m") + 1 :] if is_command(words) else words
        runpy.run_module(name_of(sys.argv), run_name="__main__")


def _customise(named: Sequence[str]) -> None:
    """Run a `sitecustomize.py` on PYTHONPATH, as Python does when it begins, if this process began without."""
    ran = getattr(sys.modules.get("sitecustomize"), "__file__", None)
    for file in (Path(path) / "sitecustomize.py" for path in named if path):
        if file.exists() and str(file) != ran:
            runpy.run_path(str(file))


def main(number: int) -> None:
    """Import the libraries, then serve at a listening socket of that number."""
    del sys.path[:2]  # this folder, and the one that the server was started in
    sys.path.insert(0, str(Path(sys.executable).parent))
    for library in LIBRARIES:
        importlib.import_module(library)
    sys.modules["PIL.Image"].init()
    gc.freeze()
    serve(socket.socket(fileno=number))
