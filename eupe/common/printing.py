"""Results for people: tables without anything cut off, and reports as lines of words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eupe.common.progress import amount

NARROW, TURNED = 8, 16
"""Characters to which words may be folded in a table, and in a transposed table; numbers are never folded."""
LINE = 100
"""Number of characters above which a dict gets a line for each of its members."""
_PADDING = 2
_NUMBER = re.compile(r"[-+−–~]?\d[\d.,:+–×-]*[%*a-zA-Z]{0,3}")


def print_table(console: Console, table: Table) -> None:
    """Print a table without a box: names are folded, numbers are not; a table with too many columns is transposed.

    It takes the width that it needs if there is no terminal, or if the terminal is too narrow even then.
    """
    for piece in _pieces(table, console.width if console.is_terminal else None):
        console.print(piece, crop=False, soft_wrap=False)


def _pieces(table: Table, width: int | None) -> list[Table]:
    """Return tables whose columns have their widths set; `width` is None for no limit."""
    columns, rows = _texts(table), table.row_count
    if _fit(table, width, NARROW) or not rows or len(columns) <= 2:
        return [table]
    for count in range(rows, 0, -1):
        pieces = [_turned(table, columns, range(i, min(i + count, rows))) for i in range(0, rows, count)]
        fits = [_fit(piece, width, TURNED) for piece in pieces]
        if all(fits):
            break
    return pieces


def _turned(table: Table, columns: Sequence[Sequence[Text]], rows: range) -> Table:
    """Transpose some rows of a table: they become columns, and every column but the first becomes a row."""
    names, *measures = columns
    turned = Table(title=table.title, box=None)
    turned.add_column(names[0])
    for row in rows:
        turned.add_column(names[1 + row], justify="right")
    for measure in measures:
        turned.add_row(measure[0], *(measure[1 + row] for row in rows))
    return turned


def _fit(table: Table, width: int | None, narrow: int) -> bool:
    """Set each column's width, folding the widest until all fit; return whether they do."""
    columns = _texts(table)
    wide = [max(cell_len(line) for text in texts for line in text.plain.split("\n")) for texts in columns]
    least = [max(_least(text.plain, narrow) for text in texts) for texts in columns]
    room = math.inf if width is None else width - _PADDING * len(columns)
    while sum(wide) > room and (foldable := [i for i, chars in enumerate(wide) if chars > least[i]]):
        wide[max(foldable, key=lambda i: wide[i])] -= 1
    for column, chars in zip(table.columns, wide, strict=True):
        column.width, column.overflow = chars, "fold"
    table.width = sum(wide) + _PADDING * len(columns)
    return sum(wide) <= room


def _texts(table: Table) -> list[list[Text]]:
    """Return header and cells of each column."""
    return [[_text(column.header), *map(_text, column.cells)] for column in table.columns]


def _text(cell: Any) -> Text:
    return cell if isinstance(cell, Text) else Text.from_markup(str(cell))


def _least(text: str, narrow: int) -> int:
    """Return the number of characters that must stay on one line."""
    words = text.split()
    return max((len(word) if _NUMBER.fullmatch(word) else min(cell_len(word), narrow) for word in words), default=0)


def report_lines(report: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield a line for each field that holds anything, with those of nested fields indented below it."""
    for field, value in report.items():
        name = _name(field)
        if value is None or (isinstance(value, str | Mapping | list | tuple) and not value):
            continue
        if isinstance(value, Mapping):
            yield from _nested(name, value, indent)
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            yield f"{indent}{name}:"
            yield from (f"{indent}  {_words(item)}" for item in value)
        else:
            yield f"{indent}{name}: {_words(value, field)}"


def _nested(name: str, value: Mapping[str, Any], indent: str) -> Iterator[str]:
    words = _words(value)
    if not any(isinstance(v, Mapping) for v in value.values()) and len(words) <= LINE:
        if words:
            yield f"{indent}{name}: {words}"
        return
    if lines := list(report_lines(value, indent + "  ")):
        yield f"{indent}{name}:"
        yield from lines


def _words(value: Any, field: str = "") -> str:
    """Return a value as words on one line."""
    if isinstance(value, Mapping):
        said = ((_name(key), _words(item, key)) for key, item in value.items())
        return ", ".join(f"{name} {words}" for name, words in said if words)
    if isinstance(value, list | tuple):
        return ", ".join(" ".join(_each(item)) if isinstance(item, list | tuple) else _words(item) for item in value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and field.endswith("_bytes"):
        return amount(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def _each(items: Iterable[Any]) -> Iterator[str]:
    return (_words(item) for item in items)


def _name(field: str) -> str:
    """Return a field's name in words; keys that are data, such as paths, stay as they are."""
    return field.removeprefix("num_").replace("_", " ") if field.isidentifier() else field
