"""Validation of a recipe's steps: options are checked against the verb, names against the earlier steps."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models import is_model

from eupe.errors import EupeError
from eupe.evaluate.subject import PIXELS
from eupe.models.outside import is_outside
from eupe.pipeline.recipe import Problems, RawStep, Recipe
from eupe.pipeline.verbs import Option, Verb
from eupe.teachers.resolve import resolve_teacher

STORE, RUN, TUNED = "store", "run", "fine-tuned model"
MAKES = {"extract": STORE, "store convert": STORE, "train": RUN, "finetune": TUNED}
"""Kinds of output that later steps can take, by verb; outputs of other verbs cannot be taken."""
TAKES = {
    "teacher": (RUN,),
    "targets": (STORE,),
    "init": (RUN,),
    "run": (RUN, TUNED),
    "subject": (RUN,),
    "path": (STORE,),
    "subjects": (STORE, RUN),
    "stores": (STORE,),
    "judged": (RUN,),
    "items": (STORE, RUN),
}
"""Options and arguments that may name an earlier step, and the kinds of output that the step must make."""
GIVEN = {"out": ("extract", "store convert", "train", "finetune"), "json": (), "resume": ()}
"""Options that the pipeline sets itself, with the verbs; without verbs, for all."""


@dataclass(frozen=True)
class Ref:
    """A reference to the output of an earlier step."""

    step: str


Word = str | Ref


@dataclass(frozen=True)
class Step:
    """One command of a pipeline; some of its words are not known yet."""

    name: str
    verb: Verb
    options: Mapping[str, tuple[Word, ...]]
    """Values as typed on the command line; for a flag, the flag itself."""
    why: str = ""
    """What the step is for, in a line; it decides nothing."""

    @property
    def makes(self) -> str | None:
        return MAKES.get(self.verb.name)

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the earlier steps that this one needs, each once."""
        refs = (word.step for words in self.options.values() for word in words if isinstance(word, Ref))
        return tuple(dict.fromkeys(refs))

    def words(self, places: Mapping[str, str]) -> list[str]:
        """Return all options as words of the command line, arguments first.

        Args:
            places: the output path of each needed step.
        """
        options = sorted(self.options.items(), key=lambda item: self.verb.options[item[0]].word is not None)
        return [
            word
            for name, values in options
            for word in self.verb.options[name].words([places[v.step] if isinstance(v, Ref) else v for v in values])
        ]


def check_steps(recipe: Recipe, verbs: Mapping[str, Verb], problems: Problems) -> tuple[Step, ...]:
    """Return the steps with known verbs, in order, and add all mistakes to `problems`."""
    steps: dict[str, Step] = {}
    makes = {raw.name: MAKES.get(raw.verb) for raw in recipe.steps}
    cycles = _cycles(recipe.steps)
    for raw in recipe.steps:
        if raw.verb not in verbs:
            problems.add(raw.where(), f"is not a verb for a step{_near(raw.verb, verbs)}")
            continue
        names = _Names(raw, list(steps), makes, cycles)
        verb = verbs[raw.verb]
        options = {}
        for key, value in raw.options.items():
            if key not in verb.options:
                problems.add(raw.where(key), f"is not an option of eupe {verb.name}{_near(key, verb.options)}")
            elif key in GIVEN and raw.verb in (GIVEN[key] or (raw.verb,)):
                problems.add(raw.where(key), "is set by the pipeline; leave it out")
            elif (words := _words(verb, verb.options[key], value, names, problems)) is not None:
                options[key] = words
        for option in verb.options.values():
            given = option.name in GIVEN and raw.verb in (GIVEN[option.name] or (raw.verb,))
            if option.required and option.name not in raw.options and not given:
                problems.add(raw.where(option.name), f"is missing; eupe {verb.name} needs it")
        steps[raw.name] = Step(raw.name, verb, options, raw.why)
    return tuple(steps.values())


@dataclass(frozen=True)
class _Names:
    """The names that one step may use."""

    raw: RawStep
    earlier: Sequence[str]
    makes: Mapping[str, str | None]
    cycles: Mapping[str, str]

    def resolve(self, option: str, word: str) -> Word | EupeError:
        """Return the step of that name, the word itself if it exists outside the pipeline, or else the mistake."""
        takes = TAKES[option]
        if word in self.earlier and self.makes[word] in takes:
            return Ref(word)
        outside = _outside(option, word)
        if outside is None:
            return word
        kinds = " or a ".join(takes)
        if word == self.raw.name:
            return EupeError(f"{word!r} is this step itself")
        if word in self.cycles and self.raw.name in self.cycles:
            return EupeError(f"{word!r} itself needs this step: {self.cycles[self.raw.name]}")
        if word in self.earlier:
            return EupeError(f"step {word!r} makes a {self.makes[word] or 'report'}, but this option takes a {kinds}")
        if word in self.makes:
            return EupeError(f"{word!r} is a later step; put it above this one")
        near = _near(word, [name for name in self.earlier if self.makes[name] in takes])
        return EupeError(f"there is no earlier step {word!r}{near}; {outside}")


def _outside(option: str, word: str) -> str | None:
    """Return None if a word names something outside the pipeline; else a message about what was not found."""
    if "://" in word or (option, word) == ("subjects", PIXELS) or (option != "teacher" and Path(word).exists()):
        return None
    if (
        option == "init" and "/" in word
    ):  # weights that are not there yet, like those of teachers; a step has no such name
        return None
    if option == "subject" and (is_outside(word) or is_model(word)):
        return None
    if option not in ("teacher", "items", "subjects"):
        return f"there is no file or folder {word}, either"
    try:
        resolve_teacher(word)
    except EupeError as error:
        return str(error)
    return None


def _words(verb: Verb, option: Option, value: Any, names: _Names, problems: Problems) -> tuple[Word, ...] | None:
    """Return the words of an option; None if it is left out or wrong."""
    where = names.raw.where(option.name)
    if option.flag:
        if not isinstance(value, bool):
            problems.add(where, f"is a flag that takes true or false, got {value!r}")
        word = option.word if value is True else option.negative
        return None if word is None else (word,)
    values = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not option.multiple:
        problems.add(where, f"takes one value, got a list of {len(value)}")
    elif option.name == "teacher" and len(values) > 1:
        problems.add(where, "takes one teacher per step, so that each has its own key; write a step for each")
    elif not values or any(isinstance(item, bool | dict | list | None) for item in values):
        problems.add(where, f"takes text or a number, got {value!r}")
    elif (complaint := verb.complaint(option, [str(item) for item in values])) is not None:
        problems.add(where, complaint)
    else:
        return tuple(_resolved([str(item) for item in values], option, names, problems))
    return None


def _resolved(values: Iterable[str], option: Option, names: _Names, problems: Problems) -> Iterable[Word]:
    for value in values:
        word = names.resolve(option.name, value) if option.name in TAKES else value
        if isinstance(word, EupeError):
            problems.add(names.raw.where(option.name), str(word))
        else:
            yield word


def _cycles(raws: Sequence[RawStep]) -> dict[str, str]:
    """Return the steps that wait for themselves, each with the path of its cycle."""
    makes = {raw.name: MAKES.get(raw.verb) for raw in raws}
    ahead: dict[str, list[str]] = {raw.name: [] for raw in raws}
    for raw in raws:
        for option in TAKES.keys() & raw.options.keys():
            value = raw.options[option]
            words = [str(word) for word in (value if isinstance(value, list) else [value])]
            ahead[raw.name] += [word for word in words if makes.get(word) in TAKES[option]]
    found: dict[str, str] = {}
    for start in ahead:
        paths = [[start]]
        seen: set[str] = set()
        while paths:
            path = paths.pop()
            for step in ahead[path[-1]]:
                if step == start and len(path) > 1:
                    found.setdefault(start, " -> ".join([*path, start]))
                elif step not in seen:
                    seen.add(step)
                    paths.append([*path, step])
    return found


def _near(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""
