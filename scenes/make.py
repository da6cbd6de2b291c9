"""A folder of rendered pictures with exact ground truth, made on all cores, as a whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eupe.common.files import publish
from eupe.common.locks import unfinished
from eupe.common.prefetch import map_ahead
from eupe.common.reading import read_json
from eupe.common.signals import stop_signals
from eupe.errors import ConfigError, IncompleteError, StorageError
from scenes.catalogue import CATEGORIES, CLASSES
from scenes.layouts import LAYOUTS, Request

VERSION = 1
"""Version of the pictures, to be raised when the same request gives other bytes; older folders then do not match."""
CARD = "scenes.json"
SIZES_PX = (32, 1024)
FEWEST = 2 * len(CATEGORIES)
"""Least number of pictures: for each category one to train on and one to be judged on."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    """The flags of `python -m scenes`."""

    out: Path
    pictures: int
    """Number of pictures of each layout."""
    size: int
    """Side of the pictures in pixels."""
    seed: int
    only: Sequence[str] = ()
    """Folders to make, such as `classification`; all by default."""


@dataclass(frozen=True)
class ScenesReport:
    """The contents of the folder."""

    out: str
    counts: Mapping[str, Mapping[str, int]]
    cached: bool
    """True if the folder was already there."""


def make_scenes(
    config: ScenesConfig, *, processes: int | None = None, progress: Progress | None = None
) -> ScenesReport:
    """Render all layouts, or those asked for; the same request again finds them done.

    Args:
        processes: number of processes, by default one per core; the pictures do not depend on it.
        progress: callback with (pictures done, total).
    Raises: ConfigError for an invalid option, or a folder that holds something else; StorageError if the folder cannot
        be written; IncompleteError if a signal stopped the work or a process died.
    """
    request, layouts = _checked(config), _chosen_layouts(config.only)
    try:
        if (counts := _finished(config.out, request, layouts)) is not None:
            return ScenesReport(str(config.out), counts, cached=True)
        with unfinished(config.out, verb="python -m scenes") as folder:
            # another process may have finished it meanwhile
            if (counts := _finished(config.out, request, layouts)) is not None:
                return ScenesReport(str(config.out), counts, cached=True)
            cores = len(os.sched_getaffinity(0))
            counts = _fill(folder, request, layouts, processes or cores, progress or (lambda *_: None))
            publish(folder, config.out)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{config.out} cannot be written ({error}); nothing was left there") from error
    return ScenesReport(str(config.out), counts, cached=False)


def _checked(config: ScenesConfig) -> Request:
    low, high = SIZES_PX
    if config.pictures < FEWEST:
        raise ConfigError(
            f"--pictures {config.pictures} is too few: give {FEWEST} or more, so that each of the {len(CATEGORIES)} "
            "categories has a picture to train on and one to evaluate on"
        )
    if not low <= config.size <= high:
        raise ConfigError(f"--size {config.size} is not a valid picture size; give {low} to {high} pixels")
    if config.seed < 0:
        raise ConfigError(f"--seed {config.seed} is negative; give 0 or more")
    return Request(pictures=config.pictures, size=config.size, seed=config.seed)


def _chosen_layouts(only: Sequence[str]) -> list[str]:
    """Return the layouts that make these folders, in the order of LAYOUTS; all if none is given."""
    made_by = {folder: layout for layout in LAYOUTS for folder in layout.split(" and ")}
    if unknown := [folder for folder in only if folder not in made_by]:
        raise ConfigError(f"--only {unknown[0]} is not a folder of scenes; give one of {', '.join(made_by)}")
    chosen = {made_by[folder] for folder in only}
    return [layout for layout in LAYOUTS if layout in chosen or not only]


def _finished(out: Path, request: Request, layouts: Sequence[str]) -> Mapping[str, Mapping[str, int]] | None:
    """Return the counts if this very request was done before; None if there is nothing.

    Raises: ConfigError if something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        card = read_json(out / CARD)
        stored = card["request"]
        counts: Mapping[str, Mapping[str, int]] = card["counts"]
        asked = _identity(request)
        different = [f"{k} {stored.get(k)} there, {v} requested" for k, v in asked.items() if stored.get(k) != v]
        if list(counts) != layouts:
            different.append(f"{', '.join(counts)} there, {', '.join(layouts)} requested")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{out} exists and is not a folder of scenes; give another --out") from error
    if different:
        raise ConfigError(
            f"{out} holds other scenes ({'; '.join(different)}); give another --out, or delete this folder"
        )
    return counts


def _identity(request: Request) -> dict[str, int]:
    return {"version": VERSION, **asdict(request)}


def _fill(
    folder: Path, request: Request, layouts: Sequence[str], processes: int, progress: Progress
) -> Mapping[str, Mapping[str, int]]:
    jobs = [(layout, number) for layout in layouts for number in range(request.pictures)]
    drawn: dict[str, list[Any]] = {layout: [] for layout in layouts}
    signals = (signal.SIGINT, signal.SIGTERM)
    with stop_signals(*signals) as stop_asked, closing(_drawn(folder, request, jobs, processes)) as results:
        for done, ((layout, _), result) in enumerate(zip(jobs, results, strict=True)):
            drawn[layout].append(result)
            progress(done + 1, len(jobs))
            if stop_asked():
                raise IncompleteError(
                    "stopped before all scenes were made, and nothing was kept; run the same command again"
                )
    counts = {layout: LAYOUTS[layout].finish(folder, request, drawn[layout]) for layout in layouts}
    card = {"request": _identity(request), "categories": CATEGORIES, "classes": CLASSES, "counts": counts}
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")
    return counts


def _drawn(
    folder: Path, request: Request, jobs: Sequence[tuple[str, int]], processes: int
) -> Generator[Any, None, None]:
    """Yield what the layouts return for each picture, in order."""
    work = partial(_draw, folder, request)
    if processes == 1:
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_worker) as pool:
        try:
            yield from map_ahead(pool, work, jobs, ahead=4 * processes)
        except BrokenProcessPool as error:
            raise IncompleteError(
                "a process that rendered scenes died, perhaps because memory ran out, and nothing was kept; run the "
                "same command again"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _draw(folder: Path, request: Request, job: tuple[str, int]) -> Any:
    layout, number = job
    return LAYOUTS[layout].draw(folder, request, number)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and exit with it: a worker whose parent was killed would wait forever for work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with(parent: multiprocessing.process.BaseProcess) -> None:
        parent.join()
        os._exit(1)  # sys.exit would end only this thread

    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
