"""Commands that documents and manifests tell people to type, read by their own command lines."""

from __future__ import annotations

import shlex
from typing import Any

import typer

from eupe.cli import app
from scenes.__main__ import app as scenes_app

SCENES = "python -m scenes "


def parsed(command: str) -> dict[str, Any]:
    """The parameters of `eupe VERB ...` or `python -m scenes ...`; fails where the command line would refuse them."""
    begin, line = (SCENES, scenes_app) if command.startswith(SCENES) else ("eupe ", app)
    words = shlex.split(command.removeprefix(begin))
    verb: Any = typer.main.get_command(line)
    while hasattr(verb, "commands") and words and not words[0].startswith("-"):
        named = verb.name == "teachers" and words[0] not in verb.commands
        verb = verb.commands["show" if named else words.pop(0)]
    params: dict[str, Any] = verb.make_context("eupe", words).params
    return params
