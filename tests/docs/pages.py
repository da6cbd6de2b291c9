"""What the documents show: fenced blocks of Markdown, the commands and the programs in them.

A block of commands is marked `bash`; each of its lines is a command, of which none may be a placeholder. What is not
meant to be run (drawings, listings, what a command prints) is marked otherwise or not at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
PROGRAMS = ("eupe", "make", "python", "python3", "pip", "ray", "export", "pytest", "cp")
"""What a command begins with, to find blocks that are not marked."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    """As it is marked; empty where it is not."""
    body: str

    def commands(self) -> list[str]:
        """Its lines but for comments; a line that ends in a backslash goes on in the next."""
        lines = re.sub(r"\\\n\s*", "", self.body).splitlines()
        return [command for line in lines if (command := re.sub(r"(^|\s)#.*", "", line).strip())]


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in its order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page].read_text(), flags=re.MULTILINE | re.DOTALL)
    return [Block(language, body) for language, body in found]


def commands(page: str) -> list[str]:
    """All of a page, in its order."""
    return [command for block in blocks(page) if block.language == "bash" for command in block.commands()]


def listing(page: str, language: str) -> str:
    """A page's only block in a language, which the reader keeps as a file."""
    (body,) = (block.body for block in blocks(page) if block.language == language)
    return body


def program(page: str) -> str:
    """A page's Python blocks as one."""
    return "\n".join(block.body for block in blocks(page) if block.language == "python")


def has_anything_to_run(page: str) -> bool:
    return bool(commands(page) or program(page))


def unmarked_commands(page: str) -> list[str]:
    """Lines that look like commands in blocks that are not marked as such."""
    lines = [line for block in blocks(page) if not block.language for line in block.commands()]
    return [line for line in lines if line.split()[0] in PROGRAMS]
