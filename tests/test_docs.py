"""What the documents tell people to type can be typed; the quick start is walked from its first command to its last."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typed import parsed

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b|\.\.\.|\|")
"""A word that stands for one of the reader's own."""


def blocks(page: Path, language: str | None = None) -> list[str]:
    """Fenced blocks, continued lines joined; of all languages where none is named."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [body for tongue, body in found if language is None or tongue == language]


def commands(page: Path) -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks(page) for line in block.splitlines()]
    return [line for line in lines if line.startswith("eupe ") and not PLACEHOLDER.search(line)]


TYPED = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), TYPED)
def test_every_command_of_the_documents_parses(page: str, command: str) -> None:
    parsed(command)


def test_there_are_commands_to_parse() -> None:
    assert len(TYPED) > 40
    assert {page for page, _ in TYPED} >= {"quickstart.md", "training.md", "teachers.md", "scaling.md"}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_quick_start_can_be_pasted(assets: Path, tmp_path: Path) -> None:
    """In order, in one folder, as a newcomer would; the assets are there already."""
    (tmp_path / "assets").symlink_to(assets)
    place = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": place, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    told = ""
    for block in blocks(ROOT / "docs" / "quickstart.md", "bash"):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        told += done.stdout
    assert "miou" in told and "pck" in told and "accuracy" in told
    for made in ("store/dinov2.zarr", "runs/tiny/report.json", "report.html", "page.html", "exported/README.md"):
        assert (tmp_path / made).exists()
    assert told.rstrip().endswith("192"), "the width of the exported student"
