"""What the README tells people to type can be typed."""

import re
from pathlib import Path

import pytest
from typed import parsed

from eupe.teachers.registry import REGISTRY
from eupe.teachers.resolve import resolve_teacher

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for line in re.sub(r"\\\n\s*", "", README).splitlines()
    if line.startswith("eupe ") and "PATH" not in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse_and_name_known_teachers(command: str) -> None:
    given = parsed(command).get("teacher") or []
    for teacher in [given] if isinstance(given, str) else given:
        assert teacher.startswith("runs/") or resolve_teacher(teacher).name in REGISTRY


def test_the_tour_is_not_empty_and_counts_are_true() -> None:
    assert len(COMMANDS) >= 9
    assert f"{len(REGISTRY)} models" in README
