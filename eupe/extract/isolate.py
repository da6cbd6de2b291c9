"""Search for pictures that kill the process that decodes them: child processes decode the pictures of a part.

One pass finds all of them. A child names each picture before it touches it, so if the child dies or hangs, the picture
named last is the suspect; another child continues after it.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import IO

from eupe.common.cores import num_cores
from eupe.common.storage import StoragePath
from eupe.corpus.pictures import Inside
from eupe.corpus.views import ViewSpec
from eupe.errors import StorageError
from eupe.extract import load
from eupe.extract.load import Sample

CHILD_BYTES = 8 * 2**30
"""Address space of a child: a picture that needs more would kill the worker, or other processes on the machine."""
START_SECONDS = 300.0
"""Time limit for a child's first message; on a busy machine the imports alone take a while."""
ENDLESS = "its decoder does not come to an end"


def find_crashing(
    samples: Sequence[Sample], root: StoragePath, views: ViewSpec, sizes: Sequence[int]
) -> dict[str, str]:
    """Find the pictures that no process survives; return key to reason.

    A picture is suspected when a child dies on it, and confirmed when a second child dies on it alone. A picture that
    makes a child hang needs no second child.

    Raises: RuntimeError if a child ends, or hangs, before it names a picture.
    """
    if not samples:
        return {}
    count = min(len(samples), num_cores(), load.MAX_DECODE_THREADS)
    slices = [samples[i * len(samples) // count : (i + 1) * len(samples) // count] for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        found = pool.map(lambda some: _crashing_in(list(some), root, views, sizes), slices)
        return {key: reason for crashing in found for key, reason in crashing.items()}


def _crashing_in(samples: list[Sample], root: StoragePath, views: ViewSpec, sizes: Sequence[int]) -> dict[str, str]:
    """Find the crashing samples among some with one child after another."""
    crashing: dict[str, str] = {}
    while samples:
        named, reason = _run_child(samples, root, views, sizes)
        if reason is None:
            break
        if named is None:
            raise RuntimeError(f"the process that searches for crashing pictures cannot start: {reason}")
        accused = samples[named]
        in_time = not reason.startswith(ENDLESS)
        if in_time:  # the child may have been killed for another reason: try this picture alone
            _, reason = _run_child([accused], root, views, sizes)
        if reason is not None:
            crashing[accused.key] = reason
        samples = samples[named + 1 :]
    return crashing


def _run_child(
    samples: list[Sample], root: StoragePath, views: ViewSpec, sizes: Sequence[int]
) -> tuple[int | None, str | None]:
    """Run a child; return the index of the picture that it named last, and why it failed (None if it did not)."""
    task = {
        "samples": [asdict(sample) for sample in samples],
        "root": str(root),
        "views": views.to_json(),
        "sizes": list(sizes),
    }
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "eupe.extract.isolate"],  # -P: import nothing from the working directory
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(task).encode())
            child.stdin.close()
        except BrokenPipeError:  # it is dead already; its exit code tells why
            pass
        named, in_time = _last_named(child.stdout)
        if not in_time:
            child.kill()
        code = child.wait()
    if not in_time:
        if named is None:
            return None, f"it named no picture within {START_SECONDS:g} s"
        return named, f"{ENDLESS} ({load.PICTURE_SECONDS:g} s)"
    if code == 0:
        return named, None
    return named, f"it kills the process that decodes it ({_how_it_died(code)})"


def _last_named(output: IO[bytes]) -> tuple[int | None, bool]:
    """Return the last number that a child wrote, and whether it kept writing in time until it ended."""
    tail = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        # until the first number the child is still starting, which must not count against a picture
        while selector.select(timeout=load.PICTURE_SECONDS if tail else START_SECONDS):
            block = os.read(output.fileno(), 65536)
            if not block:
                return _number(tail), True
            tail = (tail + block)[-64:]
    return _number(tail), False


def _number(tail: bytes) -> int | None:
    lines = tail.split()
    return int(lines[-1]) if lines else None


def _how_it_died(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def main() -> None:
    """Run as the child: decode the pictures that standard input lists, and write each one's index before it."""
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # children are expected to die: no core dumps
    task = json.loads(sys.stdin.buffer.read())
    views = ViewSpec.from_json(task["views"])
    for i, fields in enumerate(task["samples"]):
        inside = fields.pop("inside")
        sample = Sample(**fields, inside=None if inside is None else Inside(**inside))
        os.write(1, f"{i}\n".encode())  # unbuffered: a buffer would be lost if the picture kills this process
        with suppress(StorageError):  # not the picture's fault, and the worker will meet it, too
            load.load_sample(sample, StoragePath.of(task["root"]), views, tuple(task["sizes"]))


if __name__ == "__main__":
    main()
