"""Columns of a table that hold pictures, labels and captions: found by type and name, or chosen by the user."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from eupe.common.storage import StoragePath
from eupe.corpus.choice import AS_FOUND, CAPTIONS, LABELS, Choice
from eupe.errors import CorpusError

BINARY_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
OTHER_BINARY_COLUMNS = (
    *("image_bytes", "img_bytes", "image_data", "img_data", "picture_bytes", "jpeg_bytes", "jpg_bytes", "png_bytes"),
    *("bytes", "content", "data"),
)
"""Names used if no struct and none of `BINARY_COLUMNS` holds pictures: Spark's `content`, and other common names."""
PATH_COLUMNS = ("path", "file_name", "image_path")
OTHER_PATH_COLUMNS = (
    *("image", "img", "picture", "filename", "file_path", "filepath", "file", "image_file", "image_name"),
    *("img_path", "image_filename", "image_uri", "uri"),
)
SPARK = {"path", "modificationTime", "length", "content"}
"""Columns that Spark's `binaryFile` writes; its `path` is where a picture came from, not where it is now."""
NAMED_COLUMNS = 12

Path = tuple[str, ...]
"""Path of a column: its name, or in a struct the names from the top-level column down to the child."""


@dataclass(frozen=True)
class PictureColumn:
    """A column that may hold pictures."""

    path: Path
    kind: Literal["struct", "binary", "text"]
    """`struct`: `bytes`, `path` or both, as Hugging Face writes them. `binary`: bytes. `text`: paths of files."""
    has_bytes: bool = True
    has_path: bool = False
    many: bool = False
    """True if each row holds a list of pictures."""

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def leaves(self) -> list[Path]:
        """Return the columns to read, bytes before paths."""
        if self.kind != "struct" or self.many:
            return [self.path]
        return [
            *([(*self.path, "bytes")] if self.has_bytes else []),
            *([(*self.path, "path")] if self.has_path else []),
        ]


@dataclass(frozen=True)
class LabelColumn:
    """A column of labels."""

    path: Path
    kind: pa.DataType
    names: tuple[str, ...] | None
    """Class names that integer labels index; None if the table has none."""

    @property
    def name(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True)
class Columns:
    """The columns taken from a table."""

    stored: PictureColumn | None
    """Column of the pictures' bytes."""
    files: PictureColumn | None
    """Column of the paths of picture files; if `stored` is set as well, files that exist take precedence."""
    chosen: bool
    """True if the user chose `stored` and it is not the column that would be found automatically."""
    label: LabelColumn | None
    caption: Path | None
    notes: tuple[str, ...]


class NoPicturesError(CorpusError):
    """The error for a table without any column that could hold pictures."""


def columns_of(schema: pa.Schema, where: StoragePath, choice: Choice = AS_FOUND) -> Columns:
    """Return the columns to take from a table.

    Raises: CorpusError if no column holds pictures, several could, or a chosen column is missing or of the wrong type.
    """
    candidates = list(_candidates(schema))
    if choice.image_column is None:
        stored, files = _found(candidates, schema, where)
        chosen = False
    else:
        column = _named(candidates, choice.image_column, schema, where)
        stored, files = (None, column) if not column.has_bytes else (column, None)
        chosen = stored is not None and stored != found_stored(schema, where)
    taken = stored or files
    assert taken is not None
    label, notes = _label(schema, taken.path[:-1], where, choice)
    if choice.image_column is None:
        others = [c.name for c in candidates if c.path != taken.path and _is_telling(c)]
        notes = (*_note("pictures", taken.name, others, "--image-column"), *notes)
    return Columns(stored, files, chosen, label, _caption(schema, taken.path[:-1]), notes)


def words_of(schema: pa.Schema, where: StoragePath, choice: Choice) -> Columns:
    """Return the columns of labels and captions, without pictures.

    Raises: CorpusError if the chosen column of labels is missing, or cannot hold labels.
    """
    label, notes = _label(schema, (), where, choice)
    return Columns(None, None, False, label, _caption(schema, ()), notes)


def _caption(schema: pa.Schema, above: Path) -> Path | None:
    return next((path for path in _paths(CAPTIONS, above) if _is_text(_type_at(schema, path))), None)


def picture_kind(schema: pa.Schema) -> Literal["bytes", "paths"] | None:
    """Return whether a table holds pictures as bytes or as paths, in whichever column; None if it holds none."""
    candidates = list(_candidates(schema))
    try:
        stored, _ = _found(candidates, schema, StoragePath("/"))
    except NoPicturesError:
        return None
    except CorpusError:  # several columns qualify: `columns_of` will ask the user to choose
        return "bytes" if any(candidate.has_bytes for candidate in candidates) else "paths"
    return "paths" if stored is None else "bytes"


def found_stored(schema: pa.Schema, where: StoragePath) -> PictureColumn | None:
    """Return the column of bytes that is taken automatically; None if there is none, or several qualify."""
    try:
        return _found(list(_candidates(schema)), schema, where)[0]
    except CorpusError:
        return None


def named_stored(schema: pa.Schema, where: StoragePath, name: str) -> PictureColumn | None:
    """Return the column of bytes with this name; None if there is none."""
    return next((c for c in _candidates(schema) if c.name == name and c.has_bytes), None)


def _candidates(fields: pa.Schema | pa.StructType, above: Path = ()) -> Iterator[PictureColumn]:
    """Yield all columns that may hold pictures, including the children of structs that do not qualify themselves."""
    for field in fields:
        path = (*above, field.name)
        kind, many = field.type, False
        if _is_list(kind):
            kind, many = kind.value_type, True
        if pa.types.is_struct(kind):
            inner = {child.name: child.type for child in kind}
            has_bytes, has_path = _is_binary(inner.get("bytes")), _is_text(inner.get("path"))
            if has_bytes or (has_path and inner.keys() <= {"bytes", "path"}):
                yield PictureColumn(path, "struct", has_bytes, has_path, many)
            elif not many:
                yield from _candidates(kind, path)
        elif _is_binary(kind):
            yield PictureColumn(path, "binary", many=many)
        elif _is_text(kind) and not many:
            yield PictureColumn(path, "text", has_bytes=False, has_path=True)


def _is_telling(column: PictureColumn) -> bool:
    """Return whether a column's name or layout shows that it holds pictures; a binary type is not enough."""
    names = (*BINARY_COLUMNS, *OTHER_BINARY_COLUMNS)
    return column.has_bytes and (column.kind == "struct" or column.path[-1] in names)


def _found(
    candidates: Sequence[PictureColumn], schema: pa.Schema, where: StoragePath
) -> tuple[PictureColumn | None, PictureColumn | None]:
    """Return the column of the pictures' bytes and the column of their paths; one of them may be None.

    Raises: CorpusError if there is neither, or several columns qualify equally.
    """
    top = [c for c in candidates if len(c.path) == 1]
    whole = {c.name: c for c in top if c.has_bytes and not c.many}
    structs = [c for c in whole.values() if c.kind == "struct"]
    binaries = [whole[name] for name in BINARY_COLUMNS if name in whole]
    if structs or binaries:
        return _only(structs or binaries, where), None
    others = [whole[name] for name in OTHER_BINARY_COLUMNS if name in whole]
    texts = {c.name: c for c in top if c.kind == "text"}
    paths = [texts[name] for name in PATH_COLUMNS if name in texts]
    if paths:
        spark = set(schema.names) >= SPARK and "content" in whole
        return (whole["content"], None) if spark else (others[0] if others else None, _only(paths, where))
    nested = [c for c in candidates if len(c.path) > 1 and not c.many and _is_telling(c)]
    many = [c for c in candidates if c.many and _is_telling(c)]
    lists = [c for c in candidates if c.many]
    # `others` is in order of preference, so several of them are not ambiguous.
    for stored in (others[:1], list(whole.values()), many, nested, lists):
        if stored:
            return _only(stored, where), None
    named = [c for c in top if c.kind == "struct"] or [texts[name] for name in OTHER_PATH_COLUMNS if name in texts]
    if named:
        return None, named[0]
    raise NoPicturesError(
        f"table {where} has no picture column among {_some(schema.names)}; expected a struct with bytes "
        f"(Hugging Face's Image), a binary column ({', '.join(BINARY_COLUMNS)}), a column of paths "
        f"({', '.join(PATH_COLUMNS)}), or the column named by --image-column"
    )


def _only(found: Sequence[PictureColumn], where: StoragePath) -> PictureColumn:
    """Return the only column, or of several the one called `image`.

    Raises: CorpusError if there are several and none is called `image`.
    """
    images = [column for column in found if column.name == "image"]
    if len(found) > 1 and not images:
        names = ", ".join(column.name for column in found)
        raise CorpusError(f"table {where} has several picture columns, {names}; choose one with --image-column")
    return (images or found)[0]


def _named(candidates: Sequence[PictureColumn], name: str, schema: pa.Schema, where: StoragePath) -> PictureColumn:
    """Return the column with this name.

    Raises: CorpusError if it does not exist, or cannot hold pictures.
    """
    for column in candidates:
        if column.name == name:
            return column
    telling = [c.name for c in candidates if c.has_bytes] or schema.names
    if (kind := _type_at(schema, _split(name, schema))) is not None:
        raise CorpusError(
            f"column {name} of table {where} holds {kind}, not pictures; --image-column may be {_some(telling)}"
        )
    raise CorpusError(f"table {where} has no column {name}; --image-column may be {_some(telling)}")


def _label(
    schema: pa.Schema, above: Path, where: StoragePath, choice: Choice
) -> tuple[LabelColumn | None, tuple[str, ...]]:
    """Return the column of labels, and notes for the user about it.

    Args:
        above: path of the struct that holds the pictures; its labels take precedence over the table's.
    Raises: CorpusError if the chosen column does not exist, or cannot hold labels.
    """
    if (name := choice.label_column) is not None:
        path = _split(name, schema)
        kind = _type_at(schema, path)
        if kind is None:
            raise CorpusError(f"table {where} has no column {name}; --label-column may be {_some(_labels_in(schema))}")
        if not _is_label(kind):
            raise CorpusError(
                f"column {name} of table {where} holds {kind}, not labels; --label-column may be "
                f"{_some(_labels_in(schema))}"
            )
        return LabelColumn(path, kind, _class_names(schema, path)), ()
    there = [(path, kind) for path in _paths(LABELS, above) if (kind := _type_at(schema, path)) is not None]
    usable = [(path, kind) for path, kind in there if _is_label(kind)]
    if not usable:
        return None, tuple(
            f"column {'.'.join(path)} holds {kind}, not labels, so none were taken; choose another with --label-column"
            for path, kind in there[:1]
            if not pa.types.is_null(kind)
        )
    path, kind = usable[0]
    label = LabelColumn(path, kind, _class_names(schema, path))
    return label, _note("labels", label.name, [".".join(path) for path, _ in usable[1:]], "--label-column")


def _note(what: str, taken: str, others: Sequence[str], option: str) -> tuple[str, ...]:
    if not others:
        return ()
    return (f"{what} are taken from column {taken}; there is also {_some(others)}: choose with {option}",)


def _paths(names: Sequence[str], above: Path) -> list[Path]:
    return [*((*above, name) for name in names if above), *((name,) for name in names)]


def _split(name: str, schema: pa.Schema) -> Path:
    """Return the path of the column that a user named; a top-level column whose name has dots takes precedence."""
    return (name,) if name in schema.names else tuple(name.split("."))


def _type_at(schema: pa.Schema, path: Path) -> pa.DataType | None:
    kinds: dict[str, pa.DataType] = {field.name: field.type for field in schema}
    kind: pa.DataType | None = None
    for name in path:
        kind = kinds.get(name)
        kinds = {child.name: child.type for child in kind} if kind is not None and pa.types.is_struct(kind) else {}
    return kind


def _labels_in(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if _is_label(field.type)] or list(schema.names)


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMED_COLUMNS
    return ", ".join(names[:NAMED_COLUMNS]) + (f", and {more} more" if more > 0 else "")


def _is_list(kind: pa.DataType) -> bool:
    tests = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(pa.types, test)(kind) for test in tests)


def _is_binary(kind: pa.DataType | None) -> bool:
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = ("is_binary", "is_large_binary", "is_binary_view", "is_fixed_size_binary")
    return kind is not None and any(getattr(pa.types, test)(kind) for test in tests)


def _is_text(kind: pa.DataType | None) -> bool:
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = ("is_string", "is_large_string", "is_string_view")
    return kind is not None and any(getattr(pa.types, test)(kind) for test in tests)


def _is_label(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = ("is_integer", "is_boolean", "is_floating")
    return _is_text(value) or any(getattr(pa.types, test)(value) for test in tests)


def _class_names(schema: pa.Schema, path: Path) -> tuple[str, ...] | None:
    """Return the class names of a Hugging Face ClassLabel; None if the column is not one."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        for name in path:
            feature = feature[name]
        return tuple(str(name) for name in feature["names"])
    except (KeyError, TypeError, ValueError):
        return None
