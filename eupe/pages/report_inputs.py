"""Inputs of a report: results from runs, and from files of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from eupe.errors import ConfigError, RunError
from eupe.evaluate.result import EVALUATIONS_FILE, Result, newest, read_results
from eupe.evaluate.run import is_run
from eupe.kinds import CARD_FILE


def gather(places: Sequence[Path]) -> list[Result]:
    """Return the newest results of runs and of files of results, in the order given.

    A run is named by its path as given. A run's own file has all of its results, while a file from `--results` may have
    older ones, so the run's own file wins.

    Raises: ConfigError if no place is given, or one has no results; RunError if a run is unfinished, or a file damaged.
    """
    if not places:
        raise ConfigError("nothing to report: name at least one training run, or a file of results (.jsonl)")
    runs = {place.resolve(): place for place in places if place.is_dir()}
    read = {place: [_called_as_given(result, place, runs) for result in _read(place)] for place in places}
    order = list(dict.fromkeys(result.subject for results in read.values() for result in results))
    of_files, of_runs = ([p for p in read if p.is_dir() == is_folder] for is_folder in (False, True))
    # runs last, because `newest` keeps the last of equal results
    found = newest([result for place in (*of_files, *of_runs) for result in read[place]])
    return sorted(found, key=lambda result: order.index(result.subject))


def _read(place: Path) -> list[Result]:
    if not place.exists():
        raise ConfigError(f"{place} does not exist; give training runs, or files of results (.jsonl)")
    if place.is_dir():
        if not is_run(place):
            raise ConfigError(f"{place} is a folder but not a training run; give runs, or files of results (.jsonl)")
        if not (place / CARD_FILE).is_file():
            raise RunError(f"run {place} is not finished; finish it with `eupe train ... --resume`, then evaluate it")
    results = read_results(place)
    if not results:
        what = f"run {place} has not been evaluated" if place.is_dir() else f"{place} holds no results"
        raise ConfigError(
            f"{what}; for example, `eupe eval knn` writes some to a run's {EVALUATIONS_FILE} and to --results FILE"
        )
    return results


def _called_as_given(result: Result, place: Path, runs: Mapping[Path, Path]) -> Result:
    """Name a run's result by the run's path as given, because the run may have been moved since it was judged."""
    if place.is_dir():
        return replace(result, subject=str(place))
    if result.kind != "run":
        return result
    return replace(result, subject=str(runs.get(Path(result.subject).resolve(), result.subject)))
