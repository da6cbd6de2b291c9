"""Consoles, and how results are printed."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from eupe.common.files import shown
from eupe.common.printing import print_table, report_lines


class _Console(Console):
    """A console that spells out control characters, so that text from outside cannot steer the terminal."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(shown(text), **how)


out = _Console(highlight=False, soft_wrap=True)
err = _Console(stderr=True, highlight=False, soft_wrap=True)


def escaped(text: str) -> str:
    """Return text from outside with its markup escaped."""
    return escape(text)


def finish(report: dict[str, Any], as_json: bool) -> None:
    """Print the verb's result: one JSON line, or readable lines."""
    if as_json:
        print(json.dumps(report))
        return
    for line in report_lines(report):
        out.print(escaped(line), soft_wrap=True)


def show(table: Table) -> None:
    """Print a table; see `print_table`."""
    print_table(out, table)
