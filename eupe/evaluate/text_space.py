"""Ways from a subject's summaries to a teacher's text space: directly, or through the heads of runs.

A student's head predicts its target's summary after normalisation. Cosines with texts need the direction in the
teacher's own space, so the normalisation is undone (`eupe.train.predict`). A student of a proxy goes through its own
head to the proxy's summaries, then through the proxy's heads, over any number of runs.

Shapes: N views, Ds width of the subject's summary, D width of the space.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.common.kinds import WEIGHTS_FILE
from eupe.errors import ConfigError, EupeError, RunError
from eupe.evaluate.subject import EncoderSubject, PixelSubject, StoreSubject, Subject
from eupe.evaluate.text_tower import text_model, why_no_text
from eupe.store.layout import SUMMARY
from eupe.teachers.registry import ALIASES
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.weights import file_digest
from eupe.train.predict import KindPredictor, load_predictors
from eupe.train.run_spec import finished_run_spec, target_names


@dataclass(frozen=True)
class Way:
    """The way from a subject's summary to a teacher's image embedding."""

    teacher: TeacherSpec
    heads: tuple[tuple[Path, int], ...] = ()
    """Runs on the way, each with the number of the target whose head is used; empty if the summary is the embedding."""
    name: str = ""
    """Name that selects the way: its targets, separated by commas, or the teacher."""


def choose_way(subject: Subject, wanted: str | None) -> Way:
    """Return the requested way, or the only one.

    Args:
        wanted: a teacher with a text space, or the name of a way.
    Raises: ConfigError if there is no such way, or several; RunError if the subject is an unfinished run.
    """
    ways, dead_ends = ways_to_text(subject)
    known = ", ".join(way.name for way in ways)
    if not ways:
        raise ConfigError(f"{subject.name} leads to no text space: {'; '.join(dead_ends)}")
    if wanted is None:
        if len(ways) > 1:
            raise ConfigError(f"{subject.name} leads to several text spaces; choose with --space among {known}")
        return ways[0]
    teacher = ALIASES.get(wanted, wanted)
    fitting = [way for way in ways if way.name == wanted] or [way for way in ways if way.teacher.name == teacher]
    if not fitting:
        raise ConfigError(f"{subject.name} does not lead to the text space of {wanted}, only to {known}")
    if len(fitting) > 1:
        names = ", ".join(way.name for way in fitting)
        raise ConfigError(f"{subject.name} leads to the text space of {wanted} in several ways; give --space {names}")
    return fitting[0]


def ways_to_text(subject: Subject) -> tuple[list[Way], list[str]]:
    """Return all ways, and for each dead end the reason.

    Raises: RunError if the subject is an unfinished run.
    """
    if isinstance(subject, PixelSubject):
        return [], ["raw pixels do not come from a teacher"]
    spec = subject.spec if isinstance(subject, EncoderSubject) else TeacherSpec.from_json(subject.store.spec.teacher)
    return _ways(spec, (), ())


def _ways(
    spec: TeacherSpec, heads: tuple[tuple[Path, int], ...], names: tuple[str, ...]
) -> tuple[list[Way], list[str]]:
    if text_model(spec) is not None:
        return [Way(spec, heads, ",".join(names) or spec.name)], []
    if spec.backend != "run":
        return [], [why_no_text(spec)]
    run = Path(spec.model)
    if run in (earlier for earlier, _ in heads):
        return [], [f"run {run} is its own teacher"]
    learned = finished_run_spec(run)
    ways: list[Way] = []
    dead_ends: list[str] = []
    for i, (name, target) in enumerate(zip(target_names(learned.targets), learned.targets, strict=True)):
        if not target["summary_dim"]:
            dead_ends.append(f"run {run} has no head for the summary of {name}")
            continue
        try:
            further, ends = _ways(_target_spec(target["teacher"]), (*heads, (run, i)), (*names, name))
        except EupeError as error:  # one target that cannot be resolved must not hide ways through the others
            further, ends = [], [f"{name}, a target of run {run}: {error}"]
        ways += further
        dead_ends += ends
    return ways, dead_ends


def _target_spec(teacher: str) -> TeacherSpec:
    """Return the spec of a target's teacher.

    Raises: ConfigError if it is a run that is gone, or can only be resolved on the hub; TeacherError.
    """
    if teacher.startswith("hf:"):
        raise ConfigError(f"{teacher} has no text space")
    if Path(teacher).name != teacher and ":" not in teacher and not Path(teacher).is_dir():
        raise ConfigError(f"there is no run {teacher} any more (seen from {Path.cwd()})")
    return resolve_teacher(teacher)


def to_text_space(subject: Subject, way: Way, summaries_NDs: Tensor) -> Tensor:
    """Return image embeddings of unit length, float64 [N, D], on the CPU.

    An untrained student has a random head, too.

    Raises: RunError if the heads of a run cannot be used, or a run on the way was trained again after it was learned
        from.
    """
    said = summaries_NDs
    learner, taught = subject.name, subject.store.spec.teacher if isinstance(subject, StoreSubject) else None
    for number, (run, target) in enumerate(way.heads):
        if taught is not None:
            _require_unchanged(run, taught.get("weights_sha256"), of=learner)
        learner, taught = str(run), finished_run_spec(run).targets[target]
        predictor = load_predictors(run)[target].kinds[SUMMARY]
        assert isinstance(predictor, KindPredictor)
        if number == 0 and subject.untrained:  # only the student's own head; those of proxies stay trained
            predictor.draw_anew()
        with torch.inference_mode():
            said = predictor(said)
    return F.normalize(said.double(), dim=1)


def _require_unchanged(run: Path, weights_sha256: str | None, *, of: str) -> None:
    """Raise RunError if a run's weights are not those that `of` learned from.

    Runs finished by an older eupe do not record their teachers' weights (None here) and are not checked.
    """
    if weights_sha256 is not None and file_digest(run / WEIGHTS_FILE) != weights_sha256:
        raise RunError(
            f"run {run} was retrained after {of} learned from it, so its heads no longer fit; extract it and "
            "train again, or restore the earlier run"
        )
