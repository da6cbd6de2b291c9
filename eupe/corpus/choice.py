"""The user's choice of pictures and labels where tars or tables hold several candidates, and what was taken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from eupe.common.option import option
from eupe.common.reading import parse_json

if TYPE_CHECKING:
    from eupe.corpus.folder import Row

LABELS = (
    *("label", "class", "labels", "class_name", "class_label", "label_name", "category", "category_name"),
    *("class_id", "label_id", "category_id", "fine_label", "coarse_label", "target"),
)
"""Names of table columns and `.json` entries that hold labels; the first one that exists is used."""
CAPTIONS = ("caption", "text")


@dataclass(frozen=True)
class Choice:
    """The pictures and labels that the user chose; None means the automatic choice."""

    image_key: str | None = option(
        None,
        "For tars whose samples hold several pictures: the picture to take, by its name after the first dot, such as "
        "input.jpg; '*' takes each as its own sample.",
    )
    """It may be any shell pattern."""
    image_column: str | None = option(None, "For tables: the picture column; STRUCT.CHILD for a field of a struct.")
    label_column: str | None = option(
        None, "For tables and metadata files: the label column; for tars: the entry of the .json files."
    )
    """In tars, `cls` is the `.cls` file."""

    def given(self) -> dict[str, str]:
        """Return the options that were set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def words(self) -> str:
        """Return the choice as command-line options; empty if nothing was chosen."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.given().items())

    def told(self) -> str:
        """Return the choice as the end of the message `... was made`."""
        return f"with {self.words()}" if self.words() else "without such an option"

    def to_bytes(self) -> bytes:
        """Return the choice as JSON for the metadata of an index; empty if nothing was chosen."""
        return json.dumps(given).encode() if (given := self.given()) else b""

    @classmethod
    def from_bytes(cls, data: bytes) -> Choice:
        """Parse the result of `to_bytes`.

        Raises: ValueError or TypeError if the data is something else.
        """
        choice = cls(**parse_json(data)) if data else cls()
        if not all(isinstance(value, str) for value in choice.given().values()):
            raise TypeError("the recorded choice is not text")
        return choice


AS_FOUND = Choice()


@dataclass(frozen=True)
class Contents:
    """The contents of one tar or table."""

    rows: list[Row]
    """Rows of the index, one per picture, in the order of the tar or table."""
    left_out: Mapping[str, int]
    """Number of members or rows that are not in the index, by reason."""
    notes: tuple[str, ...] = field(default=())
    """Sentences for the user about automatic choices, and about labels or captions that were left out."""


def label_word(value: Any) -> str | None:
    """Return a JSON value as a label; None if it is neither text nor a number."""
    if not isinstance(value, str | int | float) or value != value:  # NaN is not a label
        return None
    return writable(str(value))


def writable(text: str | None) -> str | None:
    """Return the text with `?` in place of unpaired surrogates, which UTF-8 cannot encode."""
    return None if text is None else text.encode(errors="replace").decode()
