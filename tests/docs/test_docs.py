"""What the documents tell people to type can be typed; that it works is `test_commands_are_run.py`."""

from __future__ import annotations

import re

import pytest
from pages import PAGES, commands
from typed import SCENES, parsed

TYPED = [(page, command) for page in PAGES for command in commands(page) if command.startswith(("eupe ", SCENES))]


@pytest.mark.parametrize(("page", "command"), TYPED)
def test_every_command_of_the_documents_parses(page: str, command: str) -> None:
    parsed(command)


def test_there_are_commands_to_parse() -> None:
    assert len(TYPED) > 70
    assert {page for page, _ in TYPED} >= {"README.md", "docs/quickstart.md", "docs/training.md", "docs/scaling.md"}
    assert {page for page, command in TYPED if command.startswith(SCENES)} == {
        "README.md",
        "docs/quickstart.md",
        "docs/scenes.md",
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page].read_text())
    missing = [t for t in targets if "://" not in t and not (PAGES[page].parent / t).exists()]
    assert not missing
