"""Pictures in tars: WebDataset samples, or class folders packed by `tar`.

Nothing is unpacked: a picture is a byte range of its tar. In a WebDataset, members with the same path up to the first
dot of the file name are one sample, and the text after that dot is their key. Labels come from `.cls` or a label entry
of a `.json`, captions from `.txt` or the `caption` or `text` of a `.json`. If no picture has such a file beside it, the
tar holds folders: each picture is a sample of its own, whatever dots its name has, and its folder is its label.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from eupe.common.files import key_of
from eupe.common.reading import parse_json
from eupe.common.storage import BLOCK_BYTES, StoragePath
from eupe.corpus.choice import AS_FOUND, CAPTIONS, LABELS, Choice, Contents, label_word, writable
from eupe.corpus.folder import Known, Row, modified_ns
from eupe.corpus.left_out import added, hidden, not_read
from eupe.corpus.pictures import EXTENSIONS
from eupe.errors import CorpusError

MEMBER = re.compile(r"(?P<sample>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]+)")
SIDECARS = ("cls", "json", "txt")
GZIP = b"\x1f\x8b"
EVERY_KEY = "*"
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}

WORDS = "label and caption files"
LONELY_WORDS = "label and caption files without a picture"
UNREADABLE_WORDS = "label and caption files that cannot be read"
OTHER_KEYS = "pictures of other keys of their samples"
ODD_MEMBERS = "members that are neither files nor links"
LOST_LINKS = "links to what is not in their tar"
FOLDER_LINKS = "links to folders"
REPLACED = "members that a later one of the same name replaces"

WORDS_BYTES = 16 * 2**20
"""Limit of a label or caption file; larger ones are not read, so that one member cannot fill the memory."""
MAX_LINKS = 40
"""Number of links followed one after another, the same as in Linux."""
NAMED_ENTRIES = 20
NAMED_KEYS = 8


@dataclass(slots=True)
class _Picture:
    """A picture in a tar; its path omits the tar's name, which all members share."""

    path: str
    start: int
    length: int
    sha256: str | None = None


@dataclass(slots=True)
class _Words:
    """Labels and captions beside a picture, by the kind of file that states them."""

    cls: str | None = None
    label: str | None = None
    txt: str | None = None
    caption: str | None = None
    kinds: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


@dataclass
class _Tar:
    """The state of a tar while it is read, some hundred bytes for each member."""

    where: StoragePath
    name: str
    """Path below the root; keys begin with it."""
    choice: Choice
    samples: dict[str, dict[str, _Picture]] = field(default_factory=dict)
    """Pictures by their path up to the first dot of the file name, and by the text after it."""
    words: dict[str, _Words] = field(default_factory=dict)
    """Labels and captions by their file's path without the last suffix."""
    links: dict[str, str] = field(default_factory=dict)
    """Targets of hard and symbolic links, by path."""
    left_out: Counter[str] = field(default_factory=Counter)
    entries: dict[str, None] = field(default_factory=dict)
    """Names of the entries in `.json` files, for the error message if a chosen one is missing."""

    def num_samples(self) -> int:
        return len(self.samples.keys() | self.words.keys())


def tar_rows(root: StoragePath, name: str, known: Known, choice: Choice = AS_FOUND) -> Contents:
    """Read a tar's contents for the index.

    Args:
        name: path of the tar, below the root.
        known: rows of this tar in an earlier index; a picture is not hashed again if its position and the tar's
            modification time are the same.
    Raises: CorpusError if the tar is damaged, gzipped or sparse, its samples are ambiguous, or nothing matches the
        choice; StorageError if an object store cannot be read.
    """
    modified = modified_ns(root, name)
    tar = _Tar(root / name, name, choice)

    def hash_of(file: BinaryIO, picture: _Picture) -> str:
        before = known.get(f"{name}/{picture.path}")
        place = {"file": name, "start": picture.start, "length": picture.length, "mtime_ns": modified}
        if before is not None and before["sha256"] and all(before[column] == place[column] for column in place):
            return str(before["sha256"])
        digest = hashlib.sha256()
        file.seek(picture.start)
        for block in _blocks(file, picture.length):
            digest.update(block)
        return digest.hexdigest()

    try:
        with root.open(name) as file:
            _scan(file, tar, lambda member: _note(file, member, tar, hash_of))
            if tar.links:
                _follow_links(file, tar)
            chosen = sorted(_chosen(tar), key=lambda found: (found[0].start, found[0].path))
            last = _Picture("", -1, 0)
            for picture, _ in chosen:  # sorted by position, so a link is next to its target and shares its hash
                if picture.sha256 is None:
                    same = (picture.start, picture.length) == (last.start, last.length)
                    picture.sha256 = last.sha256 if same else hash_of(file, picture)
                last = picture
    except FileNotFoundError as error:
        raise CorpusError(str(error)) from error
    _require_label_entry(tar)
    stems = {stem for _, stem in chosen}
    sidecars = not stems.isdisjoint(tar.words)
    folders = {} if sidecars else _folder_labels({posixpath.dirname(picture.path) for picture, _ in chosen})
    rows = [
        {"key": f"{name}/{picture.path}", "num_bytes": picture.length, "mtime_ns": modified}
        | {"file": name, "start": picture.start, "length": picture.length, "sha256": picture.sha256}
        | _label_and_caption(tar.words.get(stem), folders.get(posixpath.dirname(picture.path)))
        for picture, stem in chosen
    ]
    return Contents(rows, _left_out(tar, stems), _notes(tar))


def _label_and_caption(words: _Words | None, folder: str | None) -> Row:
    if words is None:
        return {"label": folder, "caption": None}
    label = words.cls if words.cls is not None else words.label
    return {
        "label": folder if label is None else label,
        "caption": words.txt if words.txt is not None else words.caption,
    }


def _broken(tar: _Tar, whole: int, reason: object) -> CorpusError:
    return CorpusError(
        f"{tar.where} is truncated or damaged ({reason}), after {whole} complete samples; make or fetch it again"
    )


def _scan(file: BinaryIO, tar: _Tar, take: Callable[[tarfile.TarInfo], None]) -> None:
    """Pass the members of a tar to `take`, except folders.

    Raises: CorpusError if it is gzipped, has a sparse member, or breaks off; then with the number of whole samples.
    """
    if file.read(len(GZIP)) == GZIP:
        raise CorpusError(f"{tar.where} is gzipped, so pictures in it cannot be read by their offset; gunzip it first")
    broken: BaseException | None = None
    last: str | None = None
    end = 0
    try:
        for member, after in _members(file):
            end = after
            if member is None:
                break
            last = _sample_name(member)
            if member.issparse():
                raise CorpusError(f"{tar.where}: member {member.name} is a sparse file; make the tar without --sparse")
            if not member.isdir():
                take(member)
    except (tarfile.TarError, EOFError) as error:
        broken = error
    # tarfile ends without an error at a cut or damaged header, so look for the end mark itself.
    if broken is None:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
            return
    # The sample of the member that is cut short is not whole.
    whole = tar.num_samples() - (broken is not None and (last in tar.samples or last in tar.words))
    raise _broken(tar, whole, broken or "its end mark is missing") from broken


def _members(file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo | None, int]]:
    """Yield each member with the offset of the next header; at the end None with the offset of the end mark."""
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as opened:
        for member in opened:
            yield member, opened.offset
            opened.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
        yield None, opened.offset


def _plain(name: str) -> str:
    """Return a member's path as text that can be written, without the `./` that `tar -C folder .` puts before it."""
    return key_of(name.removeprefix("./"))


def _sample_name(member: tarfile.TarInfo) -> str | None:
    match = MEMBER.fullmatch(_plain(member.name))
    return match["sample"] if match and member.isreg() else None


def _blocks(file: BinaryIO, length: int) -> Iterator[bytes]:
    while length:
        block = file.read(min(length, BLOCK_BYTES))
        if not block:
            raise EOFError("it ends inside a member")
        length -= len(block)
        yield block


HashOf = Callable[[BinaryIO, _Picture], str]


def _note(file: BinaryIO, member: tarfile.TarInfo, tar: _Tar, hash_of: HashOf) -> None:
    """Record a member.

    Raises: CorpusError for a name that occurs twice; EOFError if the tar ends inside the member.
    """
    path = _plain(member.name)
    if reason := hidden(path):
        tar.left_out[reason] += 1
    elif member.islnk() or member.issym():
        # A hard link's target is relative to the tar's root, a symbolic link's to the link's folder.
        folder = "" if member.islnk() else posixpath.dirname(path)
        tar.links[path] = posixpath.normpath(posixpath.join(folder, _plain(member.linkname)))
    elif member.isreg():
        _note_file(file, path, member.offset_data, member.size, tar, hash_of)
    else:
        tar.left_out[ODD_MEMBERS] += 1


def _note_file(file: BinaryIO, path: str, start: int, length: int, tar: _Tar, hash_of: HashOf | None) -> None:
    """Record a regular file, or the file that a link leads to.

    Args:
        hash_of: hashes pictures whose key has no dot at once: nearly all of them are taken, and so a bucket is read
            only once. None to hash nothing yet.
    Raises: CorpusError for a name that occurs twice; EOFError if the tar ends inside the file.
    """
    suffix = PurePosixPath(path).suffix.lower()
    match = MEMBER.fullmatch(path)
    if match is None or (suffix.removeprefix(".") not in SIDECARS and suffix not in EXTENSIONS):
        tar.left_out[not_read(path)] += 1
        return
    if suffix not in EXTENSIONS:
        _note_words(file, path, start, length, tar)
        return
    picture = _Picture(path, start, length)
    pictures = tar.samples.setdefault(match["sample"], {})
    if match["extension"] in pictures:
        if "." not in match["extension"]:
            raise CorpusError(f"{tar.name}/{path} is in its tar twice; names in a tar must be unique")
        tar.left_out[REPLACED] += 1
    pictures[match["extension"]] = picture
    if hash_of is not None and "." not in match["extension"]:
        picture.sha256 = hash_of(file, picture)


def _note_words(file: BinaryIO, path: str, start: int, length: int, tar: _Tar) -> None:
    """Record the label and the caption in a label or caption file.

    Raises: CorpusError for a name that occurs twice; EOFError if the tar ends inside the file.
    """
    stem, _, kind = path.rpartition(".")
    kind = kind.lower()
    words = tar.words.setdefault(stem, _Words())
    if kind in (*words.kinds, *words.unreadable):
        raise CorpusError(f"{tar.name}/{path} is in its tar twice; names in a tar must be unique")
    if length > WORDS_BYTES:
        words.unreadable += (kind,)
        return
    file.seek(start)
    try:
        _read_words(b"".join(_blocks(file, length)).decode("utf-8-sig"), kind, words, tar)
    except (ValueError, RecursionError):
        words.unreadable += (kind,)
    else:
        words.kinds += (kind,)


def _read_words(text: str, kind: str, words: _Words, tar: _Tar) -> None:
    """Parse a label or caption file.

    Raises: ValueError or RecursionError if a `.json` is not valid.
    """
    column = tar.choice.label_column
    if kind == "txt":
        words.txt = text.strip()
        return
    if kind == "cls":
        tar.entries.setdefault("cls")
        words.cls = text.strip() if column in (None, "cls") else None
        return
    notes: Any = parse_json(text)
    if not isinstance(notes, dict):
        return
    for name in notes:  # bounded, because each file may have other entries
        if len(tar.entries) < NAMED_ENTRIES or name in LABELS or name == column:
            tar.entries.setdefault(name)
    found = (label_word(notes.get(name)) for name in (LABELS if column is None else (column,)))
    words.label = next((word for word in found if word is not None), None)
    said = (notes[name] for name in CAPTIONS if isinstance(notes.get(name), str | int | float))
    words.caption = next((writable(str(value)) for value in said), None)


def _follow_links(file: BinaryIO, tar: _Tar) -> None:
    """Record the files that links lead to.

    Raises: CorpusError for a name that occurs twice.
    """
    targets = {path: _target(path, tar.links) for path in tar.links}
    wanted = set(targets.values())
    places: dict[str, tuple[int, int]] = {}
    # A second pass, because all targets are known only now.
    for member, _ in _members(file):
        if member is not None and member.isreg() and (path := posixpath.normpath(_plain(member.name))) in wanted:
            places[path] = (member.offset_data, member.size)
    for path, target in targets.items():
        if target in places:
            _note_file(file, path, *places[target], tar, None)
        else:
            suffix = PurePosixPath(path).suffix.lower()
            wanted_file = suffix in EXTENSIONS or suffix.removeprefix(".") in SIDECARS
            tar.left_out[LOST_LINKS if wanted_file else not_read(path) if suffix else FOLDER_LINKS] += 1


def _target(path: str, links: Mapping[str, str]) -> str | None:
    """Return where a link leads, through other links and links to folders; None if they form a circle."""
    for _ in range(MAX_LINKS):
        words = path.split("/")
        heads = ("/".join(words[:count]) for count in range(1, len(words) + 1))
        head = next((head for head in heads if head in links), None)
        if head is None:
            return path
        path = posixpath.normpath(posixpath.join(links[head], path[len(head) + 1 :]))
    return None


def _chosen(tar: _Tar) -> list[tuple[_Picture, str]]:
    """Return the pictures to take, each with the path, without suffix, of its label and caption files.

    Raises: CorpusError if a sample has several pictures and none was chosen, or no picture matches the choice.
    """
    single, kinds = _told_apart(tar)
    taken = [(picture, picture.path.rpartition(".")[0]) for picture in single]
    if (wanted := tar.choice.image_key) is not None:
        taken = [found for found in taken if _is_called(PurePosixPath(found[0].path).suffix[1:], wanted)]
        for sample, pictures in kinds.items():
            taken += [(picture, sample) for key, picture in pictures.items() if _is_called(key, wanted)]
        _count_others(tar, taken, single, kinds)
        if not taken and (single or kinds):
            raise CorpusError(f"{tar.where} has no picture called {wanted}; --image-key may be {_keys(kinds, single)}")
        return taken
    beside: set[str] = set()
    """Keys in samples with exactly one picture whose key has no dot, such as `seg.png` beside `jpg`."""
    alone: list[tuple[str, str, _Picture]] = []
    for sample, pictures in kinds.items():
        plain = [key for key in pictures if "." not in key]
        if len(pictures) == 1:
            alone += [(sample, key, picture) for key, picture in pictures.items()]
        elif len(plain) == 1:
            taken.append((pictures[plain[0]], sample))
            beside |= {key.lower() for key in pictures if key != plain[0]}
        else:
            first, second = list(pictures.values())[:2]
            raise CorpusError(
                f"one sample has two pictures, {tar.name}/{first.path} and {tar.name}/{second.path}; choose one with "
                f"--image-key {_keys(kinds, single)}, or take each as its own sample with --image-key '{EVERY_KEY}'"
            )
    taken += [(picture, sample) for sample, key, picture in alone if key.lower() not in beside]
    _count_others(tar, taken, single, kinds)
    return taken


def _told_apart(tar: _Tar) -> tuple[list[_Picture], dict[str, dict[str, _Picture]]]:
    """Return the pictures that are samples of their own, and the pictures of other samples by sample and key.

    The text after the first dot is a key, not a part of the name (`img_1.5.jpg`), if at least half of the samples have
    it, or if the tar has labels or captions under the name before that dot. If the text begins with a digit, its own
    sample must have such a label or caption.
    """
    shares = Counter(key.lower() for pictures in tar.samples.values() for key in pictures)
    labelled = not tar.words.keys().isdisjoint(tar.samples)
    crowded = sum(sum("." not in key for key in pictures) > 1 for pictures in tar.samples.values())
    folder_of_twins = not labelled and 2 * crowded < len(tar.samples)
    single: list[_Picture] = []
    kinds: dict[str, dict[str, _Picture]] = {}
    for sample, pictures in tar.samples.items():
        plain = sum("." not in key for key in pictures)
        for key, picture in pictures.items():
            common = 2 * shares[key.lower()] >= len(tar.samples)
            if "." not in key:
                is_key = plain == 1 or not folder_of_twins  # x.jpg and x.png in a folder are two pictures
            elif key[0].isdigit():
                is_key = sample in tar.words and (common or not plain)
            else:
                is_key = common or (labelled and picture.path.rpartition(".")[0] not in tar.words)
            if is_key:
                kinds.setdefault(sample, {})[key] = picture
            else:
                single.append(picture)
    return single, kinds


def _is_called(key: str, wanted: str) -> bool:
    return fnmatchcase(key.lower(), wanted.lower())


def _count_others(
    tar: _Tar,
    taken: Sequence[tuple[_Picture, str]],
    single: Sequence[_Picture],
    kinds: Mapping[str, Mapping[str, _Picture]],
) -> None:
    """Count the pictures that are not taken, by key."""
    paths = {picture.path for picture, _ in taken}
    for pictures in kinds.values():
        for key, picture in pictures.items():
            if picture.path not in paths:
                tar.left_out[f"{OTHER_KEYS}: {key.lower()}"] += 1
    for picture in single:
        if picture.path not in paths:
            tar.left_out[f"{OTHER_KEYS}: {PurePosixPath(picture.path).suffix[1:].lower()}"] += 1


def _keys(kinds: Mapping[str, Mapping[str, _Picture]], single: Sequence[_Picture]) -> str:
    """Return the keys that exist as text, the most common first."""
    counts = Counter(key.lower() for pictures in kinds.values() for key in pictures)
    counts.update(PurePosixPath(picture.path).suffix[1:].lower() for picture in single)
    named = [f"{key} ({count} pictures)" for key, count in counts.most_common(NAMED_KEYS)]
    return ", ".join(named) + (", ..." if len(counts) > NAMED_KEYS else "")


def _folder_labels(folders: Set[str]) -> dict[str, str]:
    """Return each folder's label: the first folder below the ones that all share, and below `train`, `val` and `test`.

    Pictures outside all folders have no label.
    """
    parts = {folder: folder.strip("/").split("/") for folder in folders}
    while parts and min(map(len, parts.values())) > 1:
        heads = {words[0] for words in parts.values()}
        if len(heads) > 1 and not {head.lower() for head in heads} <= SPLITS:
            break
        parts = {folder: words[1:] for folder, words in parts.items()}
    labels = {folder: words[0] for folder, words in parts.items() if words[0]}
    return {} if {label.lower() for label in labels.values()} <= SPLITS else labels


def _require_label_entry(tar: _Tar) -> None:
    """Raise CorpusError if none of the tar's files has the chosen labels."""
    wanted = tar.choice.label_column
    if wanted is None or wanted in tar.entries:
        return
    there = f"they have {', '.join(tar.entries)}" if tar.entries else "none could be read"
    raise CorpusError(f"--label-column {wanted} is not in any .json of {tar.where}; {there}")


def _left_out(tar: _Tar, taken: Set[str]) -> dict[str, int]:
    for stem, words in tar.words.items():
        reason = WORDS if stem in taken else LONELY_WORDS
        tar.left_out.update(f"{reason}: .{kind}" for kind in words.kinds)
        tar.left_out.update(f"{UNREADABLE_WORDS}: .{kind}" for kind in words.unreadable)
    return added(tar.left_out)


def _notes(tar: _Tar) -> tuple[str, ...]:
    there = [name for name in LABELS if name in tar.entries]
    if len(there) < 2 or tar.choice.label_column is not None:
        return ()
    return (
        f"labels are taken from `{there[0]}` of each .json, or else {', '.join(there[1:])}; choose with --label-column",
    )
