"""Which pictures kill the process that decodes them: found by decoding a part's pictures in processes of their own.

One pass finds all of them, however many there are: a child names each picture before it touches it, so that when it
dies, or does not come to an end, the last named is the one; another child goes on behind it.
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

from eupe.cores import num_cores
from eupe.corpus.pictures import Inside
from eupe.corpus.views import ViewSpec
from eupe.errors import StorageError
from eupe.extract import load
from eupe.extract.plan import Sample
from eupe.place import Place

CHILD_BYTES = 8 * 2**30
"""Address space of a child: a picture that takes more would kill the worker, or its neighbours."""
START_SECONDS = 300.0
"""How long a child may take until it names its first picture: on a busy machine the imports alone take a while."""
ENDLESS = "its decoder does not come to an end"


def find_killers(samples: Sequence[Sample], root: Place, views: ViewSpec, sizes: Sequence[int]) -> dict[str, str]:
    """Key to reason, of the pictures that no process survives; all others are only decoded.

    A picture is accused when a child dies of it, and found guilty when another dies of it alone.

    Raises: RuntimeError if children die before they begin.
    """
    if not samples:
        return {}
    count = min(len(samples), num_cores(), load.MAX_DECODE_THREADS)
    slices = [samples[i * len(samples) // count : (i + 1) * len(samples) // count] for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        found = pool.map(lambda some: _killers_of(list(some), root, views, sizes), slices)
        return {key: reason for killers in found for key, reason in killers.items()}


def _killers_of(samples: list[Sample], root: Place, views: ViewSpec, sizes: Sequence[int]) -> dict[str, str]:
    killers: dict[str, str] = {}
    while samples:
        named, reason = _run_child(samples, root, views, sizes)
        if reason is None:
            break
        if named is None:
            raise RuntimeError(f"the process that looks for pictures that kill cannot start: {reason}")
        accused = samples[named]
        in_time = not reason.startswith(ENDLESS)
        if in_time:
            _, reason = _run_child([accused], root, views, sizes)
        if reason is not None:
            killers[accused.key] = reason
        samples = samples[named + 1 :]
    return killers


def _run_child(
    samples: list[Sample], root: Place, views: ViewSpec, sizes: Sequence[int]
) -> tuple[int | None, str | None]:
    """The place of the last picture that the child named, and why it did not come to its end; None if it did."""
    task = {
        "samples": [asdict(sample) for sample in samples],
        "root": str(root),
        "views": views.to_json(),
        "sizes": list(sizes),
    }
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "eupe.extract.isolate"],  # -P: nothing comes from the working directory
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(task).encode())
            child.stdin.close()
        except BrokenPipeError:
            pass
        named, in_time = _last_named(child.stdout)
        if not in_time:
            child.kill()
        code = child.wait()
    if not in_time:
        if named is None:
            return None, f"it names no picture in {START_SECONDS:g} s"
        return named, f"{ENDLESS} ({load.PICTURE_SECONDS:g} s)"
    if code == 0:
        return named, None
    return named, f"it kills the process that decodes it ({_how_it_died(code)})"


def _last_named(output: IO[bytes]) -> tuple[int | None, bool]:
    """The last number that a child wrote, and whether it went on writing until its end."""
    tail = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
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
    """The child: decode what standard input names, saying which before each."""
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    task = json.loads(sys.stdin.buffer.read())
    views = ViewSpec.from_json(task["views"])
    for i, fields in enumerate(task["samples"]):
        inside = fields.pop("inside")
        sample = Sample(**fields, inside=None if inside is None else Inside(**inside))
        os.write(1, f"{i}\n".encode())
        with suppress(StorageError):  # which the worker meets, too, and which is no fault of the picture
            load.load_sample(sample, Place.of(task["root"]), views, tuple(task["sizes"]))


if __name__ == "__main__":
    main()
