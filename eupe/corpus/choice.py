"""What a user says where tars or tables hold more than one thing that could be taken, and what was taken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from eupe.corpus.folder import Row
from eupe.reading import parse_json

LABELS = (
    *("label", "class", "labels", "class_name", "class_label", "label_name", "category", "category_name"),
    *("class_id", "label_id", "category_id", "fine_label", "coarse_label", "target"),
)
"""Columns of tables, and entries of a `.json`, that hold labels; the first one that is there is taken."""
CAPTIONS = ("caption", "text")


@dataclass(frozen=True)
class Choice:
    """Which pictures and labels to take; None for what is found by itself."""

    image_key: str | None = None
    """Of WebDataset samples: the picture's name after the first dot, `input.jpg`; `*` for each by itself."""
    image_column: str | None = None
    """Of tables; of a struct's child the names with a dot between them."""
    label_column: str | None = None
    """Of tables and of a folder's metadata; of tars an entry of `.json`."""

    def given(self) -> dict[str, str]:
        """What was chosen, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def words(self) -> str:
        """As on the command line; empty where nothing was chosen."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.given().items())

    def told(self) -> str:
        """After `was made`."""
        return f"with {self.words()}" if self.words() else "without such an option"

    def to_bytes(self) -> bytes:
        """For the metadata of an index; empty where nothing was chosen."""
        return json.dumps(given).encode() if (given := self.given()) else b""

    @classmethod
    def from_bytes(cls, data: bytes) -> Choice:
        """The reverse of `to_bytes`.

        Raises: ValueError, TypeError if it is something else.
        """
        choice = cls(**parse_json(data)) if data else cls()
        if not all(isinstance(value, str) for value in choice.given().values()):
            raise TypeError("what was chosen is not in words")
        return choice


AS_FOUND = Choice()


@dataclass(frozen=True)
class Contents:
    """What one tar or table holds."""

    rows: list[Row]
    """Of the index, one for each picture, in the order of the tar or table."""
    left_out: Mapping[str, int]
    """Members and rows that are no picture of the index, by reason."""
    notes: tuple[str, ...] = field(default=())
    """Sentences on what was taken where there was a choice."""


def label_word(value: Any) -> str | None:
    """Return a value of JSON as a label; None for what is neither a word nor a number."""
    if not isinstance(value, str | int | float) or value != value:  # NaN is no label
        return None
    return writable(str(value))


def writable(text: str | None) -> str | None:
    """Return the text with `?` for halves of surrogate pairs, which no file can hold."""
    return None if text is None else text.encode(errors="replace").decode()
