"""Entry point of the `eupe` command as a process."""

from __future__ import annotations

import atexit
import io
import os
import sys

import typer

from eupe.cli import app, main


def run(command: typer.Typer = app) -> None:
    """Run a command line, then end the process at once.

    While Python shuts down, thread pools of native libraries (Arrow's, tensorstore's) sometimes abort the process: a
    command that has done its work would end with code 134.
    """
    code: object = 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may have characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        main(command)
    except SystemExit as end:
        code = end.code
    # `os._exit` neither runs exit functions nor flushes
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    run()
