"""`eupe` as a process of its own."""

from __future__ import annotations

import atexit
import io
import os
import sys

from eupe.cli import main


def run() -> None:
    """The command line, and then an end at once.

    While Python takes itself apart, thread pools of native libraries (Arrow's, tensorstore's) now and then abort the
    process: a command that has done its work would end with code 134.
    """
    code: object = 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may have characters that a terminal's words lack
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except SystemExit as end:
        code = end.code
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    run()
