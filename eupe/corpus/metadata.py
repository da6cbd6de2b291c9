"""Labels and captions of a folder's pictures from `metadata.{csv,jsonl,parquet}` beside them, as Hugging Face has it.

Such a file tells of the pictures of its own folder and of those below it, by their paths in the column `file_name`. Of
several that tell of a picture, the nearest counts, and in one file the first row of it.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eupe.corpus.choice import CAPTIONS, LABELS, Choice, label_word, writable
from eupe.corpus.columns import words_of
from eupe.corpus.folder import Row
from eupe.corpus.table_files import column_at, open_table
from eupe.corpus.tables import Words, place_key
from eupe.errors import CorpusError, StorageError
from eupe.place import Place

FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NAME_COLUMN = "file_name"
WHOLE = re.compile(r"(-?\d+)(\.0*)?")
NUMBER = re.compile(r"-?\d+(\.\d*)?([eE][-+]?\d+)?")
NAMED_COLUMNS = 12

Told = tuple[str | None, str | None, str | None]
"""Of a row: the picture's path, its label and its caption."""


@dataclass(frozen=True)
class _File:
    """What one file tells, as compactly as Arrow can."""

    name: str
    folder: str
    """Ends with a slash, unless it is the root."""
    words: pa.Table
    """Columns key, label and caption."""
    labelled: bool
    seen: NDArray[np.bool_]
    """Which of its rows have been asked for."""


class Metadata:
    """All such files of a folder."""

    def __init__(self, root: Place, names: Sequence[str], choice: Choice) -> None:
        """Read them.

        Args:
            names: of the files, below the root.
        Raises: CorpusError if one cannot be read, or lacks the labels that were chosen; StorageError.
        """
        self._root = root
        self._choice = choice
        self._notes: list[str] = []
        self._untold = 0
        folders = Counter(posixpath.dirname(name) for name in names)
        if twice := [folder for folder, count in folders.items() if count > 1]:
            raise CorpusError(f"{root / twice[0]} holds more than one of {', '.join(FILES)}; leave one of them there")
        read = (self._read(name) for name in names)
        self._files = sorted((file for file in read if file is not None), key=lambda file: -len(file.folder))
        if choice.label_column is not None and not self._files:
            raise CorpusError(
                f"--label-column {choice.label_column} has no meaning here: no metadata file tells of the pictures of "
                f"{root}, whose labels are their folders; leave it out"
            )

    def told(self, rows: Sequence[Row]) -> list[Row]:
        """Return rows of pictures with what the files tell of them."""
        found = [dict(row) for row in rows]
        left = list(range(len(found)))
        for file in self._files:
            below = [i for i in left if found[i]["key"].startswith(file.folder)]
            keys = pa.array([found[i]["key"] for i in below], pa.string())
            places = pc.index_in(keys, value_set=file.words["key"]).to_pylist()
            for i, place in zip(below, places, strict=True):
                if file.labelled:
                    found[i]["label"] = None
                if place is not None:
                    file.seen[place] = True
                    said = file.words.slice(place, 1).to_pylist()[0]
                    found[i] |= {name: said[name] for name in (("label", "caption") if file.labelled else ("caption",))}
            told = {i for i, place in zip(below, places, strict=True) if place is not None}
            left = [i for i in left if i not in told]
        labelled = tuple(file.folder for file in self._files if file.labelled)
        self._untold += sum(found[i]["key"].startswith(labelled) for i in left) if labelled else 0
        return found

    def notes(self) -> tuple[str, ...]:
        """What is to be said once all pictures have been asked for."""
        notes = list(self._notes)
        for file in self._files:
            missing = np.flatnonzero(~file.seen)
            if len(missing):
                first = file.words["key"][int(missing[0])].as_py()
                notes.append(f"{len(missing)} files that {file.name} names are not there, the first is {first}")
        if self._untold:
            notes.append(f"{self._untold} pictures have no label, for no metadata file names them")
        return tuple(notes)

    def _read(self, name: str) -> _File | None:
        """None of a file without a column of paths, which is said."""
        try:
            rows = self._parquet(name) if name.endswith(".parquet") else self._text(name)
        except FileNotFoundError as error:
            raise CorpusError(str(error)) from error
        except (CorpusError, StorageError):
            raise
        except (OSError, ValueError, csv.Error, RecursionError, pa.ArrowException) as error:
            raise CorpusError(f"{self._root / name} cannot be read: {error}") from error
        if rows is None:
            self._notes.append(f"{name} has no column {NAME_COLUMN}, so that no label or caption was taken from it")
            return None
        labelled, told = rows
        words: dict[str, tuple[str | None, str | None]] = {}
        elsewhere = 0
        for path, label, caption in told:
            key = place_key(self._root, name, path) if path else None
            elsewhere += key is None
            if key is not None:
                words.setdefault(key, (label, caption))
        if elsewhere:
            self._notes.append(f"{elsewhere} rows of {name} name no file of the corpus's folder")
        columns = [list(words), [label for label, _ in words.values()], [caption for _, caption in words.values()]]
        arrays = [pa.array(column, pa.string()) for column in columns]
        folder = posixpath.join(posixpath.dirname(name), "")
        table = pa.table(arrays, ["key", "label", "caption"])
        return _File(name, folder, table, labelled, np.zeros(len(table), bool))

    def _parquet(self, name: str) -> tuple[bool, Iterator[Told]] | None:
        table = open_table(self._root, name)
        paths = _name_column(table.schema.names)
        if paths is None:
            return None
        columns = words_of(table.schema, self._root / name, self._choice)
        words = Words(table, columns)
        self._notes += columns.notes

        def told() -> Iterator[Told]:
            for group in range(len(table.ends)):
                for batch in table.batches(group, [(paths,), *words.paths]):
                    for i, path in enumerate(column_at(batch, (paths,)).to_pylist()):
                        said = words.of(batch, i)
                        yield path, said["label"], said["caption"]
            self._notes.extend(words.notes(self._root / name))

        return columns.label is not None, told()

    def _text(self, name: str) -> tuple[bool, Iterator[Told]] | None:
        """Of CSV or JSON lines, which are read twice: for the columns, and for what is in them."""
        rows_of = _csv_rows if name.endswith(".csv") else self._json_rows
        columns: dict[str, None] = {}
        for row in rows_of(self._root, name):
            for column in row:
                columns.setdefault(column)
        paths = _name_column(list(columns))
        if paths is None:
            return None
        label = self._label_column(name, list(columns))
        caption = next((column for column in CAPTIONS if column in columns), None)
        word = self._label_of(name, label, lambda: (row.get(label or "") for row in rows_of(self._root, name)))

        def told() -> Iterator[Told]:
            odd = 0
            for row in rows_of(self._root, name):
                said, text = row.get(label or ""), row.get(caption or "")
                odd += _is_odd(said) + _is_odd(text)
                yield _text(row.get(paths)), word(said), _text(text)
            if odd:
                self._notes.append(f"{odd} labels and captions of {name} are not UTF-8 text, and are left out")

        return label is not None, told()

    def _label_column(self, name: str, columns: Sequence[str]) -> str | None:
        """Raises: CorpusError if there is none of the name that was chosen."""
        wanted = self._choice.label_column
        if wanted is not None and wanted not in columns:
            raise CorpusError(
                f"{self._root / name} has no column {wanted}; --label-column may be "
                f"{', '.join(columns[:NAMED_COLUMNS])}"
            )
        there = [wanted] if wanted else [column for column in LABELS if column in columns]
        if len(there) > 1:
            self._notes.append(
                f"labels are those of column {there[0]} of {name}; there is also {', '.join(there[1:])}: "
                "--label-column chooses"
            )
        return there[0] if there else None

    def _label_of(
        self, name: str, label: str | None, values: Callable[[], Iterator[Any]]
    ) -> Callable[[Any], str | None]:
        """How a value becomes a label: `1.0` is class 1 where all are whole; numbers with fractions are no classes."""
        if label is None:
            return lambda value: None
        words = {word for value in values() if (word := _word(value))}
        if all(WHOLE.fullmatch(word) for word in words):
            return lambda value: WHOLE.sub(r"\1", _word(value) or "") or None
        if all(NUMBER.fullmatch(word) for word in words):
            odd = next(word for word in sorted(words) if not WHOLE.fullmatch(word))
            self._notes.append(
                f"column {label} of {name} holds numbers such as {odd}, which are no classes, so no label was taken"
            )
            return lambda value: None
        return _word

    def _json_rows(self, root: Place, name: str) -> Iterator[dict[str, Any]]:
        """Lines that are objects; the others are counted and said once."""
        broken = 0
        for line in _lines(root, name):
            try:
                row = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError):
                row = None
            broken += not isinstance(row, dict)
            if isinstance(row, dict) and row:
                yield row
        note = f"{broken} lines of {name} are no JSON objects, and are left out"
        if broken and note not in self._notes:
            self._notes.append(note)


def _name_column(columns: Sequence[str]) -> str | None:
    """The column of paths: `file_name`, or the one that ends so."""
    if NAME_COLUMN in columns:
        return NAME_COLUMN
    ending = [column for column in columns if column.endswith(f"_{NAME_COLUMN}")]
    return ending[0] if len(ending) == 1 else None


def _text(value: Any) -> str | None:
    """A word; None for an empty one, or one that was not UTF-8."""
    if not isinstance(value, str | int | float) or value == "":
        return None
    return None if _is_odd(value) else writable(str(value))


def _word(value: Any) -> str | None:
    """Of a label."""
    return None if label_word(value) is None else _text(value)


def _is_odd(value: Any) -> bool:
    """Whether text was not UTF-8."""
    return isinstance(value, str) and any("\udc80" <= letter <= "\udcff" for letter in value)


def _lines(root: Place, name: str) -> Iterator[str]:
    """Lines of text; bytes that are not UTF-8 are half surrogates in them."""
    with root.open(name) as file:
        yield from io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _csv_rows(root: Place, name: str) -> Iterator[dict[str, Any]]:
    for row in csv.DictReader(_lines(root, name)):
        yield {column: value for column, value in row.items() if isinstance(column, str)}
