"""Licences that apply to a student's weights: those of its teachers, and of the teachers behind a proxy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eupe.common.reading import read_json
from eupe.evaluate.open_run import is_run, read_run_spec
from eupe.teachers.run_adapter import OWN_LICENCE
from eupe.train.loop import INIT_FILE
from eupe.train.run_spec import RunSpec

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Origin:
    """A teacher, or another source of a student's weights."""

    name: str
    licence: str
    through: tuple[str, ...] = ()
    """Names of the runs between it and the student, nearest to the student first."""

    @property
    def way(self) -> str:
        """Return the runs in between in words, such as `first of proxy`."""
        return " of ".join(reversed(self.through))


def origins(run: Path, spec: RunSpec) -> list[Origin]:
    """Return the origins of a run's student, each once.

    They are the teachers of its targets, the origins of targets that are runs, those of the run that it was initialised
    from, or the library's weights that it started from.
    """
    return list(dict.fromkeys(_origins(run, spec, ())))


def origins_behind(place: str, learner: Path) -> list[Origin]:
    """Return the origins behind a run that something else learned from, each once.

    Args:
        place: path of that run, as noted when it was the teacher.
        learner: path of what learned from it; the run may lie beside it by now.
    """
    return list(dict.fromkeys(_behind(place, learner, ())))


def _origins(run: Path, spec: RunSpec, between: tuple[str, ...]) -> Iterator[Origin]:
    """Yield the origins of a run's student; one may come more than once.

    Args:
        between: paths of the runs from the nearest to the student up to this one; empty for the student's own run.
    """
    for target in [*spec.targets, *(target for mixed in spec.mix for target in mixed["targets"])]:
        if target["licence"] == OWN_LICENCE:
            yield from _behind(target["teacher"], run, between)
        else:
            yield Origin(target["teacher"], target["licence"], _names(between))
    start, licence = _began_as(run)
    if start is not None and licence is not None:
        yield Origin(start, licence, _names(between))
    elif start is not None:
        yield from _behind(start, run, between)


def _behind(place: str, learner: Path, between: tuple[str, ...]) -> Iterator[Origin]:
    """Yield the origins of a run that taught, found at its noted path or beside the run that learned from it."""
    if place in between:  # runs that name each other must not recurse without end
        return
    for found in (Path(place), learner.parent / Path(place).name):
        if is_run(found):
            yield from _origins(found, read_run_spec(found), (*between, place))
            return
    yield Origin(Path(place).name, f"{UNKNOWN}: no run is here that could tell which teachers it had", _names(between))


def _names(places: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(Path(place).name for place in places)


def _began_as(run: Path) -> tuple[str | None, str | None]:
    """Return what a run started from, and its licence if it is a library's weights; None for random weights."""
    try:
        began = read_json(run / INIT_FILE)
        return str(began["source"]), began.get("licence")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None
