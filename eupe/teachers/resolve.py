"""The way from a teacher's name, as typed by the user, to a TeacherSpec; no weights are loaded."""

from __future__ import annotations

import difflib
import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from eupe.common.kinds import RUN_FILES, STUDENT_FILE
from eupe.errors import TeacherError
from eupe.teachers.registry import ALIASES, REGISTRY, UNCARRIED
from eupe.teachers.spec import TeacherSpec

_DESCRIBERS = {
    "timm": "eupe.teachers.timm_adapter",
    "hf": "eupe.teachers.hf_adapter",
    "open_clip": "eupe.teachers.open_clip_adapter",
}


def resolve_teacher(name: str, weights: Path | None = None) -> TeacherSpec:
    """Return the spec of a registry name, `timm:ARCH[.tag]`, `hf:REPO[@REVISION]`, `hf:DIR`, `open_clip:...` or a run.

    Args:
        weights: local weights; the spec gets mean and std from their own files.
    Raises: TeacherError for any other name, with similar names, and for files beside the weights that cannot be used;
        RunError for a run whose spec is unreadable.
    """
    spec = _known(name)
    if weights is None:
        return spec
    given: TeacherSpec = import_module("eupe.teachers.preprocess").as_given(spec, weights)
    return given


def _known(name: str) -> TeacherSpec:
    if name in ALIASES or name in REGISTRY:
        return REGISTRY[ALIASES.get(name, name)]
    backend, colon, rest = name.partition(":")
    if colon and backend in _DESCRIBERS and rest:
        return _described(_DESCRIBERS[backend], name)
    if (Path(name) / STUDENT_FILE).is_file():
        return _described("eupe.teachers.run_adapter", name.rstrip("/"))
    raise TeacherError(_unknown(name))


def _described(adapter: str, name: str) -> TeacherSpec:
    spec: TeacherSpec = import_module(adapter).describe(name)
    return spec


def _unknown(name: str) -> str:
    path = Path(name)
    if "/" in name and not os.path.exists(name):  # noqa: PTH110 - a Path raises where a name is too long
        return f"{no_directory(path)}; for a model on the hub, write hf:{name}"
    if path.is_dir():
        if any((path / file).is_file() for file in RUN_FILES):
            return f"run {name} is not finished: it has no {STUDENT_FILE}; finish it with `eupe train ... --resume`"
        return (
            f"{name} is not a training run, because it has no {STUDENT_FILE}; "
            f"for a Hugging Face model directory, write hf:{name}"
        )
    if (why := UNCARRIED.get(name.lower().replace("_", "-"))) is not None:
        return f"there is no teacher {name!r}: {why}"
    near = difflib.get_close_matches(name, [*REGISTRY, *ALIASES], n=3)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return f"there is no teacher {name!r}; {hint}`eupe teachers` lists them all"


def no_directory(path: Path) -> str:
    """Return a message that there is no such directory, with similar names beside it."""
    beside: list[str] = []
    with suppress(OSError):
        beside = [each.name for each in path.parent.iterdir()]
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, beside, n=3)]
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    return f"there is no directory {path}{hint}"
