"""Whose licences a student's weights come under: its teachers', and those of a proxy's teachers behind it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eupe.evaluate.run import is_run, read_card
from eupe.reading import read_json
from eupe.teachers.run_adapter import OWN_LICENCE
from eupe.train.card import RunCard
from eupe.train.loop import INIT_FILE

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Origin:
    """One teacher, or another source of a student's weights."""

    name: str
    licence: str
    through: tuple[str, ...] = ()
    """Names of the runs between it and the student, the nearest to the student first."""

    @property
    def way(self) -> str:
        """The runs between in words: `first of proxy`."""
        return " of ".join(reversed(self.through))


def origins(run: Path, card: RunCard) -> list[Origin]:
    """Of a run's student: its targets' teachers, those of runs among them, and what it began as; each once."""
    return list(dict.fromkeys(_origins(run, card, ())))


def origins_behind(place: str, learner: Path) -> list[Origin]:
    """The same of whatever learned from a run.

    Args:
        place: of that run, as it was noted when it taught.
        learner: what learned from it, beside which it may lie by now.
    """
    return list(dict.fromkeys(_behind(place, learner, ())))


def _origins(run: Path, card: RunCard, between: tuple[str, ...]) -> Iterator[Origin]:
    """
    Args:
        between: the places of the runs from this one to the student.
    """
    for target in [*card.targets, *(target for mixed in card.mix for target in mixed["targets"])]:
        if target["licence"] == OWN_LICENCE:
            yield from _behind(target["teacher"], run, between)
        else:
            yield Origin(target["teacher"], target["licence"], _names(between))
    if (start := _began_as(run)) is not None:
        yield from _behind(start, run, between)


def _behind(place: str, learner: Path, between: tuple[str, ...]) -> Iterator[Origin]:
    """What taught a run, which lies where it did, or still beside the one that learned from it."""
    if place in between:
        return
    for found in (Path(place), learner.parent / Path(place).name):
        if is_run(found):
            yield from _origins(found, read_card(found), (*between, place))
            return
    yield Origin(Path(place).name, f"{UNKNOWN}: no run is here that could tell which teachers it had", _names(between))


def _names(places: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(Path(place).name for place in places)


def _began_as(run: Path) -> str | None:
    """What `--init` named."""
    try:
        return str(read_json(run / INIT_FILE)["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
