"""The options of the command line's verbs, read from the command line itself, so that recipes need no schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer

STEPS = ("extract", "train", "finetune", "eval", "export", "viz", "store convert", "store stats", "store verify")
"""Verbs, and groups of verbs, that a step may use."""


@dataclass(frozen=True)
class Option:
    """An option of a verb, or one of its arguments; recipes name both in the same way."""

    name: str
    """Name as typed, without dashes."""
    parameter: str
    """Parameter of the Python function."""
    word: str | None
    """Word before the value; None for an argument."""
    negative: str | None
    """Word that turns a flag off, if there is one."""
    flag: bool
    multiple: bool
    required: bool

    def words(self, values: Sequence[str]) -> list[str]:
        """Return the words on the command line; the value of a flag is the word that turns it on or off."""
        if self.word is None or self.flag:
            return list(values)
        return [word for value in values for word in (self.word, value)]


@dataclass(frozen=True)
class Verb:
    """A command of the command line."""

    name: str
    """Full name: `train`, `eval knn`, ..."""
    options: Mapping[str, Option]
    command: Any

    def complaint(self, option: Option, values: Sequence[str]) -> str | None:
        """Return the command line's error about these values of one option, if any."""
        try:
            self.command.make_context(self.name, option.words(values))
        except typer.BadParameter as error:
            # only this option is given, so errors about others, and missing ones, do not count
            if getattr(error.param, "name", None) == option.parameter and type(error).__name__ != "MissingParameter":
                return str(error.message)
        return None

    def parsed(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the function's parameters for a whole command, with defaults filled in."""
        params: dict[str, Any] = self.command.make_context(self.name, list(words)).params
        return params


def read_verbs(root: Any) -> dict[str, Verb]:
    """Return the verbs below a click command (`typer.main.get_command`) that a step may use, by name."""
    verbs = {}
    for name, command in _leaves(root, ""):
        if any(name == step or name.startswith(f"{step} ") for step in STEPS):
            options = (_option(param) for param in command.params)
            verbs[name] = Verb(name, {option.name: option for option in options}, command)
    return verbs


def _leaves(command: Any, name: str) -> list[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        return [(name, command)]
    return [
        leaf for word, below in command.commands.items() for leaf in _leaves(below, f"{name} {word}" if name else word)
    ]


def _option(param: Any) -> Option:
    argument = param.param_type_name == "argument"
    return Option(
        name=param.name if argument else param.opts[0].lstrip("-"),
        parameter=param.name,
        word=None if argument else param.opts[0],
        negative=None if argument or not param.secondary_opts else param.secondary_opts[0],
        flag=not argument and bool(param.is_flag),
        multiple=param.nargs == -1 or bool(getattr(param, "multiple", False)),
        required=bool(param.required),
    )
