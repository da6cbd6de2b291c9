"""Commands that documents and manifests tell people to type, read by eupe's own command line."""

from __future__ import annotations

import shlex
from typing import Any

import typer

from eupe.cli import app


def parsed(command: str) -> dict[str, Any]:
    """The parameters of `eupe VERB ...`; fails where the command line would refuse them."""
    words = shlex.split(command)[1:]
    verb: Any = typer.main.get_command(app)
    while hasattr(verb, "commands") and words:
        named = verb.name == "teachers" and words[0] not in verb.commands
        verb = verb.commands["show" if named else words.pop(0)]
    params: dict[str, Any] = verb.make_context("eupe", words).params
    return params
