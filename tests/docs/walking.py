"""Walks pages: runs their commands one after the other in one folder, as a reader would who pastes them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from pages import ROOT, blocks, commands, program

PATIENCE_S = 600
"""For one command."""

_INSTALLS = "installs from the package index what the tests are run with"
_EDGE = tuple(f"--format {form} " for form in ("executorch", "litert", "coreml"))
NOT_RUN: dict[tuple[str, str], str] = {
    ("README.md", "make demo"): "ten minutes; its steps are those of docs/quickstart.md and tests/pipeline/",
    ("README.md", "make test"): "runs the tests",
    ("README.md", "eupe teachers verify"): "minutes; tests/teachers/ does it row by row, docs/teachers.md with a name",
    **{
        ("docs/edge.md", command): "`make test-edge` does it"
        for command in commands("docs/edge.md")
        if any(form in command for form in _EDGE)
    },
    ("docs/pipelines.md", "eupe run desk"): "is `make demo`",
    ("docs/quickstart.md", "python3 -m venv .venv && . .venv/bin/activate"): _INSTALLS,
    ("docs/quickstart.md", "pip install torch torchvision && pip install -e '.[demo,export]'"): _INSTALLS,
}
"""The commands that no walk runs, by page, and why not."""


@dataclass
class Walk:
    """A folder in which a page's commands are run, and what they said."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    """Beside this process's."""
    programs: Path | None = None
    """A folder for PATH ahead of all others: `eupe` without its imports (`tests/warm.py`)."""
    said: dict[str, str] = field(default_factory=dict)
    """By command, as it stands in the page: what it printed."""

    def page(self, name: str, *, file: str = "", smaller: Mapping[str, str] | None = None, ahead: str = "") -> None:
        """Run all commands of a page, then its Python as one program.

        Args:
            file: what the page calls the file that its YAML block is.
            smaller: what is put in place of words of the commands and of that file: sizes, and places that are the
                reader's own. Each must occur.
            ahead: of the Python: what the page leaves to the reader.
        """
        smaller = dict(smaller or {})
        here = [command for command in commands(name) if (name, command) not in NOT_RUN]
        recipe = "".join(block.body for block in blocks(name) if block.language == "yaml")
        unused = [words for words in smaller if not any(words in text for text in [*here, recipe])]
        assert not unused, f"{name} has nothing of {unused}"
        if file:
            (self.folder / file).write_text(replaced(recipe, smaller))
        for command in here:
            self.said[command] = self.run(replaced(command, smaller))
        if source := program(name):
            (self.folder / "page.py").write_text(f"{ahead}\n{source}")
            self.run("python page.py")

    def run(self, command: str) -> str:
        """Run a command and return what it prints; it must succeed, and leave what it was told to make."""
        if command.startswith("export "):
            self.environment |= dict(word.split("=", 1) for word in shlex.split(command)[1:])
            return ""
        done = subprocess.run(
            ["timeout", str(PATIENCE_S), "bash", "-euo", "pipefail", "-c", command],  # ends all that bash started
            cwd=self.folder,
            env=self.all_environment(),
            capture_output=True,
            text=True,
        )
        told = f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, f"exit code {done.returncode}: {told}"
        missing = [out for out in _outputs(command) if "://" not in out and not (self.folder / out).exists()]
        assert not missing, f"{missing} is not there: {told}"
        return done.stdout

    def all_environment(self) -> dict[str, str]:
        first = [] if self.programs is None else [str(self.programs)]
        programs = os.pathsep.join([*first, str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {"PATH": programs, "PYTHONPATH": str(ROOT), "HOME": str(self.folder), "HF_HUB_OFFLINE": "1"}
        added = {**own, **self.environment}
        if "PYTHONPATH" in self.environment:
            added["PYTHONPATH"] = os.pathsep.join([self.environment["PYTHONPATH"], str(ROOT)])
        return {**os.environ, **added}


def replaced(command: str, smaller: Mapping[str, str]) -> str:
    for words, others in smaller.items():
        command = command.replace(words, others)
    return command


def _outputs(command: str) -> list[str]:
    words = shlex.split(command)
    return [word for option, word in pairwise(words) if option == "--out"]
