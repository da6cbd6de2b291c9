"""Labels and captions of a folder's pictures from `metadata.{csv,jsonl,parquet}`, Hugging Face's image folder layout.

A metadata file describes the pictures in its own folder and in the folders below it, by their paths in the column
`file_name`. If several files name a picture, the nearest one counts; within a file, the first row that names it.
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

from eupe.common.storage import StoragePath
from eupe.corpus.choice import CAPTIONS, LABELS, Choice, label_word, writable
from eupe.corpus.columns import words_of
from eupe.corpus.folder import Row
from eupe.corpus.table_files import column_at, open_table
from eupe.corpus.tables import Words, place_key
from eupe.errors import CorpusError, StorageError

FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NAME_COLUMN = "file_name"
WHOLE = re.compile(r"(-?\d+)(\.0*)?")
NUMBER = re.compile(r"-?\d+(\.\d*)?([eE][-+]?\d+)?")
NAMED_COLUMNS = 12

Told = tuple[str | None, str | None, str | None]
"""Picture path, label and caption of one row."""


@dataclass(frozen=True)
class _File:
    """The contents of one metadata file, kept compact in Arrow."""

    name: str
    folder: str
    """The file's folder with a slash at its end; empty for the root."""
    words: pa.Table
    """Columns `key`, `label` and `caption`."""
    labelled: bool
    seen: NDArray[np.bool_]
    """True for each row whose picture was found so far."""


class Metadata:
    """All metadata files of a folder."""

    def __init__(self, root: StoragePath, names: Sequence[str], choice: Choice) -> None:
        """Read the metadata files.

        Args:
            names: paths of the files, below the root.
        Raises: CorpusError if a folder has several, one cannot be read, or the chosen column of labels is missing;
            StorageError if the storage fails.
        """
        self._root = root
        self._choice = choice
        self._notes: list[str] = []
        self._untold = 0
        folders = Counter(posixpath.dirname(name) for name in names)
        if twice := [folder for folder, count in folders.items() if count > 1]:
            raise CorpusError(f"{root / twice[0]} holds more than one of {', '.join(FILES)}; keep only one of them")
        read = (self._read(name) for name in names)
        # Deepest folders first, so that the nearest file comes first.
        self._files = sorted((file for file in read if file is not None), key=lambda file: -len(file.folder))
        if choice.label_column is not None and not self._files:
            raise CorpusError(
                f"--label-column {choice.label_column} has no effect: {root} has no usable metadata file, and its "
                "labels are the folder names; omit it"
            )

    def told(self, rows: Sequence[Row]) -> list[Row]:
        """Return rows of pictures with the labels and captions from the files."""
        found = [dict(row) for row in rows]
        left = list(range(len(found)))
        for file in self._files:
            below = [i for i in left if found[i]["key"].startswith(file.folder)]
            keys = pa.array([found[i]["key"] for i in below], pa.string())
            places = pc.index_in(keys, value_set=file.words["key"]).to_pylist()
            for i, place in zip(below, places, strict=True):
                if file.labelled:  # drop the label that came from the folder, even if the file omits the picture
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
        """Return the notes for the user; they are complete once all pictures went through `told`."""
        notes = list(self._notes)
        for file in self._files:
            missing = np.flatnonzero(~file.seen)
            if len(missing):
                first = file.words["key"][int(missing[0])].as_py()
                notes.append(f"{len(missing)} files listed in {file.name} are missing, the first is {first}")
        if self._untold:
            notes.append(f"{self._untold} pictures have no label, because no metadata file lists them")
        return tuple(notes)

    def _read(self, name: str) -> _File | None:
        """Read one file; return None and note it if it has no column of paths.

        Raises: CorpusError if the file cannot be read; StorageError if the storage fails.
        """
        try:
            rows = self._parquet(name) if name.endswith(".parquet") else self._text(name)
        except FileNotFoundError as error:
            raise CorpusError(str(error)) from error
        except (CorpusError, StorageError):
            raise
        except (OSError, ValueError, csv.Error, RecursionError, pa.ArrowException) as error:
            raise CorpusError(f"{self._root / name} cannot be read: {error}") from error
        if rows is None:
            self._notes.append(f"{name} has no column {NAME_COLUMN}, so no label or caption was taken from it")
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
            self._notes.append(f"{elsewhere} rows of {name} do not name a file in the corpus folder")
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
        """Read CSV or JSON lines: in one pass the columns, in another the label values, in a last one the rows."""
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
        """Return the column of labels, if there is one; note it if there are several.

        Raises: CorpusError if the chosen column does not exist.
        """
        wanted = self._choice.label_column
        if wanted is not None and wanted not in columns:
            raise CorpusError(
                f"{self._root / name} has no column {wanted}; --label-column may be "
                f"{', '.join(columns[:NAMED_COLUMNS])}"
            )
        there = [wanted] if wanted else [column for column in LABELS if column in columns]
        if len(there) > 1:
            self._notes.append(
                f"labels are taken from column {there[0]} of {name}; there is also {', '.join(there[1:])}: choose with "
                "--label-column"
            )
        return there[0] if there else None

    def _label_of(
        self, name: str, label: str | None, values: Callable[[], Iterator[Any]]
    ) -> Callable[[Any], str | None]:
        """Return the function that turns a value into a label.

        If all values are whole numbers, `1.0` is class 1. If all are numbers and some have fractions, they are not
        classes, and no value becomes a label.
        """
        if label is None:
            return lambda value: None
        words = {word for value in values() if (word := _word(value))}
        if all(WHOLE.fullmatch(word) for word in words):
            return lambda value: WHOLE.sub(r"\1", _word(value) or "") or None
        if all(NUMBER.fullmatch(word) for word in words):
            odd = next(word for word in sorted(words) if not WHOLE.fullmatch(word))
            self._notes.append(
                f"column {label} of {name} holds numbers such as {odd}, which are not classes, so no label was taken"
            )
            return lambda value: None
        return _word

    def _json_rows(self, root: StoragePath, name: str) -> Iterator[dict[str, Any]]:
        """Yield the lines that are JSON objects; count the others and note them once."""
        broken = 0
        for line in _lines(root, name):
            try:
                row = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError):
                row = None
            broken += not isinstance(row, dict)
            if isinstance(row, dict) and row:
                yield row
        note = f"{broken} lines of {name} are not JSON objects, and are left out"
        if broken and note not in self._notes:  # each file is read more than once
            self._notes.append(note)


def _name_column(columns: Sequence[str]) -> str | None:
    """Return the column of paths: `file_name`, or the only one that ends in `_file_name`."""
    if NAME_COLUMN in columns:
        return NAME_COLUMN
    ending = [column for column in columns if column.endswith(f"_{NAME_COLUMN}")]
    return ending[0] if len(ending) == 1 else None


def _text(value: Any) -> str | None:
    """Return text or a number as text; None for anything else, empty text, and text that was not UTF-8."""
    if not isinstance(value, str | int | float) or value == "":
        return None
    return None if _is_odd(value) else writable(str(value))


def _word(value: Any) -> str | None:
    """Return a value as a label; None if it cannot be one."""
    return None if label_word(value) is None else _text(value)


def _is_odd(value: Any) -> bool:
    """Return whether a value is text that was not UTF-8 in the file."""
    return isinstance(value, str) and any("\udc80" <= letter <= "\udcff" for letter in value)


def _lines(root: StoragePath, name: str) -> Iterator[str]:
    """Yield lines of text, with unpaired surrogates in place of bytes that are not UTF-8."""
    with root.open(name) as file:
        # newline="": csv needs the line ends as they are in the file.
        yield from io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _csv_rows(root: StoragePath, name: str) -> Iterator[dict[str, Any]]:
    for row in csv.DictReader(_lines(root, name)):
        # Fields beyond the header are under the key None.
        yield {column: value for column, value in row.items() if isinstance(column, str)}
