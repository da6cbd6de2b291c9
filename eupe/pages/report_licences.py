"""Licences of the weights that taught a model, as far as runs and stores record them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eupe.errors import EupeError
from eupe.evaluate.licences import UNKNOWN, Origin, origins, origins_behind
from eupe.evaluate.run import is_run, read_card
from eupe.pages.report import Model
from eupe.store import open_store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.run_adapter import OWN_LICENCE


@dataclass(frozen=True)
class Licence:
    """A teacher behind a model, with its licence."""

    model: str
    teacher: str
    through: str
    """Runs between the two, if any."""
    licence: str


def licences(models: Sequence[Model]) -> list[Licence]:
    """Return each teacher of every model once; models that are untrained or pixels have none."""
    found = [licence for model in models if not model.is_baseline for licence in _of_model(model)]
    return list(dict.fromkeys(found))


def _of_model(model: Model) -> list[Licence]:
    if model.kind == "run":
        return _of_run(model.name, Path(model.subject))
    try:
        if model.kind == "store":
            teacher = open_store(model.subject).spec.teacher
            if teacher["licence"] == OWN_LICENCE:
                return _said(model.name, origins_behind(str(teacher["name"]), Path(model.subject)))
            return [Licence(model.name, str(teacher["name"]), "", str(teacher["licence"]))]
        return [Licence(model.name, model.name, "", resolve_teacher(model.subject).licence)]
    except EupeError:
        return [Licence(model.name, model.name, "", f"{UNKNOWN}: it is not here")]


def _of_run(name: str, run: Path) -> list[Licence]:
    """Return the licences of a run's teachers, and of the teachers behind those that are runs themselves."""
    if not is_run(run):
        return [Licence(name, str(run), "", f"{UNKNOWN}: the run is not here")]
    return _said(name, origins(run, read_card(run)))


def _said(name: str, found: Sequence[Origin]) -> list[Licence]:
    return [Licence(name, origin.name, origin.way, origin.licence) for origin in found]
