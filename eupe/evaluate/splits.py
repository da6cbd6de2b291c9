"""Labelled pictures: which are judged, and which others they are judged by.

A data set names its splits by folders (`train/CLASS`, `valid/CLASS`) or by files (`data/test-00000-of-00001.parquet`).
If it names none, it is one corpus. A folder or file is a split if its name is one of `ROLES` in any case, alone or with
a number or a word like `set` beside it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa

from eupe.common.storage import AnyPath, StoragePath
from eupe.corpus.choice import AS_FOUND
from eupe.corpus.choice import Choice as Taken
from eupe.corpus.index import Corpus, open_corpus
from eupe.corpus.pictures import EXTENSIONS, insides
from eupe.errors import ConfigError, CorpusError
from eupe.evaluate.judged_pictures import Pictures

Role = Literal["train", "val", "test"]
ROLES: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation", "holdout"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
FILLERS = ("", "set", "split", "of", "data", "images", "image", "imgs", "img", "pictures", "photos")
"""Words beside a split's name that are ignored."""
CONTAINERS = (".tar", ".parquet", ".arrow")
MAPS = ("annotations", "masks", "depth")
"""Folders beside `images` whose truth is pictures, not labels."""
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
INTEGER = re.compile(r"[+-]?[0-9]{1,99}(\.0*)?")
INSIDE = re.compile(r"(.*?\.(?:tar|parquet|arrow))/(.*)", re.DOTALL)
OTHERS = "the other pictures"
"""Name for the pictures of one corpus that are not judged."""
NAMED = 5
"""Number of names that a message gives."""


@dataclass(frozen=True)
class Labelled:
    """Pictures with a label for each."""

    pictures: Pictures
    labels: tuple[str, ...]
    digests: tuple[str | None, ...] = ()
    """sha256 of each picture, if known."""
    name: str = ""
    """Name of the split, as the data set calls it."""
    unlabelled: int = 0
    """Number of pictures of the same split without a label."""

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, places: Sequence[int], name: str) -> Labelled:
        """Return the pictures at some places, under another name."""
        labels, digests = tuple(self.labels[i] for i in places), tuple(self.digests[i] for i in places)
        return Labelled(self.pictures.pick(places), labels, digests, name)


@dataclass(frozen=True)
class Splits:
    """The pictures to judge, and those to judge them by."""

    train: Labelled | None
    """None if each picture is judged by others of the same corpus."""
    val: Labelled
    role: Role | None = None
    """The split that is judged."""
    notes: tuple[str, ...] = ()
    """Sentences for people about the choice of splits."""

    @property
    def protocol(self) -> dict[str, str]:
        """Return what separates results on test from those on val, the default."""
        return {"split": self.role} if self.role == "test" else {}


class Sample(NamedTuple):
    """A picture, with what its split and class are derived from."""

    place: int
    """Its row in the index or store."""
    file: str | None
    """Tar or table that holds it."""
    folders: tuple[str, ...]
    """Folders on its path from the root, or inside its tar."""
    label: str | None


@dataclass(frozen=True)
class Choice:
    """The folders or files that are the splits."""

    train: tuple[str, ...]
    judged: tuple[str, ...]
    role: Role
    """The split that is judged."""
    left: tuple[str, ...] = ()
    """Folders or files in neither split."""
    are_folders: bool = True

    @property
    def both(self) -> tuple[str, ...]:
        """Return all folders or files that are learned from or judged."""
        return self.train + self.judged

    @property
    def may_be_classes(self) -> bool:
        """Return whether other folders beside them are not splits, so that these may be classes as well."""
        return any(split_role(name) is None for name in self.left)

    def name(self, role: Role) -> str:
        """Return a name for a split."""
        names = self.train if role == "train" else self.judged
        return f"{names[0]}/" if self.are_folders else _some(names, 1)


def order_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return each label once, sorted by number if all are integers, else by their characters."""
    different = set(labels)
    if all(INTEGER.fullmatch(label) for label in different):
        return tuple(sorted(different, key=lambda label: (int(label.partition(".")[0]), label)))
    return tuple(sorted(different))


def few_pictures(labels: Sequence[str], keys: Sequence[str], share: float, *, seed: int) -> list[bool]:
    """Return which rows are of a share of the pictures of each label, at least one of each.

    The pictures are drawn by a hash of seed and key, so those of a smaller share are among those of a larger one.

    Args:
        labels, keys: of each row; a picture may have several rows.
    """
    keys_of: dict[str, set[str]] = {}
    for label, key in zip(labels, keys, strict=True):
        keys_of.setdefault(label, set()).add(key)
    kept: set[str] = set()
    for pictures in keys_of.values():
        ranked = sorted(pictures, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
        kept.update(ranked[: max(1, round(share * len(pictures)))])
    return [key in kept for key in keys]


def labelled_splits(data: AnyPath, taken: Taken = AS_FOUND) -> Splits:
    """Find the splits of labelled pictures; the val split is judged, or test if there is no val.

    Raises: CorpusError; ConfigError if a split has no labels, or it is ambiguous which folders are splits.
    """
    place = StoragePath.of(data)
    if not place.is_local or not place.local.is_dir():
        return corpus_splits(open_corpus(data, choice=taken), str(data))
    root = place.local
    if (root / "images").is_dir() and (maps := [m for m in MAPS if (root / m).is_dir()]):
        raise ConfigError(
            f"{data} holds pictures with {maps[0]}, which are not labels; give pictures in one folder per class"
        )
    inner = _inside_wrappers(root)
    has_list = any((folder / name).is_file() for folder in (root, inner) for name in METADATA)
    # a list of labels names pictures by paths relative to its folder, so that folder is read as one corpus
    chosen = None if has_list else _choose_folders([f.name for f in _bearing(inner)], str(inner))
    if chosen is None or (chosen.may_be_classes and not any(map(_has_classes, map(inner.joinpath, chosen.both)))):
        return corpus_splits(open_corpus(data, choice=taken), str(data))
    # one index per split, so that folders in neither split are not read
    corpora = [open_corpus(inner / names[0], choice=taken) for names in (chosen.train, chosen.judged)]
    parts = [_samples(*_columns(corpus.samples)[:2]) for corpus in corpora]
    return _splits(corpora, _unwrapped_both(*parts), chosen, str(data))


def part_samples(
    keys: Sequence[str], labels: Sequence[str | None], where: str
) -> tuple[list[Sample] | None, list[Sample], Choice | None]:
    """Divide pictures into the splits that their keys name.

    Returns: the pictures to judge by, those to judge, and the choice of splits; without splits, the first and the last
        are None.
    Raises: ConfigError if it is ambiguous which folders are splits.
    """
    samples = _samples(keys, labels)
    if chosen := _choose_files(sorted({sample.file for sample in samples if sample.file is not None}), where):
        train, val = ([s for s in samples if s.file in names] for names in map(set, (chosen.train, chosen.judged)))
        return *_unwrapped_both(train, val), chosen
    samples = _unwrapped(samples)
    tops = sorted({sample.folders[0] for sample in samples if sample.folders})
    chosen = _choose_folders(tops, where)
    if chosen and chosen.may_be_classes and _by_folder(samples):
        # a class may be called `train`; a folder that holds folders is a split
        deep = {sample.folders[0] for sample in samples if len(sample.folders) > 1}
        chosen = chosen if deep & set(chosen.both) else None
    if chosen:
        train, val = (
            _below([s for s in samples if s.folders[:1] == names], derived=_by_folder(samples))
            for names in (chosen.train, chosen.judged)
        )
        return *_unwrapped_both(train, val), chosen
    _require_no_lone_split(samples, tops, where)
    # the other way round: CLASS/train and CLASS/val
    seconds = {sample.folders[1] if len(sample.folders) > 1 else "" for sample in samples if sample.folders}
    in_classes = _by_folder(samples) and all(split_role(name) for name in seconds)
    if in_classes and (chosen := _choose_folders(sorted(seconds), where)):
        train, val = ([s for s in samples if s.folders[1:2] == names] for names in (chosen.train, chosen.judged))
        return train, val, chosen
    return None, samples, None


def _samples(keys: Sequence[str], labels: Sequence[str | None]) -> list[Sample]:
    samples = []
    for place, (key, label) in enumerate(zip(keys, labels, strict=True)):
        inside = INSIDE.fullmatch(key)
        file, path = (inside[1], inside[2]) if inside else (None, key)
        samples.append(Sample(place, file, tuple(path.split("/")[:-1]), label))
    return samples


def _by_folder(samples: Sequence[Sample]) -> bool:
    """Return whether labels are the names of the first folders, and not from a list."""
    return all(sample.label == (sample.folders[0] if sample.folders else None) for sample in samples)


def _below(samples: Sequence[Sample], *, derived: bool) -> list[Sample]:
    """Remove the first folder of each sample; labels derived from folders become the next folder's name."""
    return [
        sample._replace(
            folders=sample.folders[1:],
            label=(sample.folders[1] if len(sample.folders) > 1 else None) if derived else sample.label,
        )
        for sample in samples
    ]


def _unwrapped(samples: list[Sample]) -> list[Sample]:
    """Remove folders that all other folders are in, since they distinguish nothing."""
    while inside := [sample for sample in samples if sample.folders]:
        if len({sample.folders[0] for sample in inside}) > 1 or any(len(s.folders) < 2 for s in inside):
            break
        samples = _below(samples, derived=_by_folder(samples))
    return samples


def _unwrapped_both(train: list[Sample], val: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Remove folders that wrap a split, as in `train/train/CLASS`, but not the class folder of a split of one class."""
    train = _unwrapped(train)
    # a judged split that shares labels with the training split has no wrapper: its one folder is a class
    known = {sample.label for sample in train} - {None}
    return train, val if known & {sample.label for sample in val} else _unwrapped(val)


def split_role(name: str) -> Role | None:
    """Return the split that a folder is named after; None if the name says anything else."""
    role, rest = _words(name)
    return None if rest else role


def _words(name: str) -> tuple[Role | None, tuple[str, ...]]:
    """Divide a name into the split that it names, if it names just one, and its other words except `FILLERS`."""
    words = [word.lower() for word in WORDS.findall(name)]
    words = [word.removesuffix("set") if word.removesuffix("set") in ROLES else word for word in words]
    roles = [ROLES[word] for word in words if word in ROLES]
    rest = tuple(word for word in words if word not in ROLES and word not in FILLERS)
    return (roles[0] if len(roles) == 1 else None), rest


def _choose_folders(names: Sequence[str], where: str) -> Choice | None:
    """Choose train, and val or test, among folders whose names are otherwise alike (`seg_train`, `seg_test`).

    Raises: ConfigError if there are several folders for one kind of split.
    """
    groups: dict[tuple[str, ...], dict[Role, list[str]]] = {}
    for name in names:
        role, rest = _words(name)
        if role is not None:
            groups.setdefault(rest, {}).setdefault(role, []).append(name)
    whole = [group for group in groups.values() if "train" in group and len(group) > 1]
    if not whole:
        return None
    for group in whole:
        several = whole[0]["train"] + whole[1]["train"] if len(whole) > 1 else _several(group)
        if several:
            raise ConfigError(
                f"{where} holds {_some([f'{name}/' for name in several])}, which are all the same kind of split; give "
                "a folder with one of each kind"
            )
    (group,) = whole
    chosen: Role = "val" if "val" in group else "test"
    train, judged = tuple(group["train"]), tuple(group[chosen])
    return Choice(train, judged, chosen, tuple(name for name in names if name not in (*train, *judged)))


def _several(group: dict[Role, list[str]]) -> list[str]:
    return next((names for names in group.values() if len(names) > 1), [])


def _choose_files(names: Sequence[str], where: str) -> Choice | None:
    """Choose among tars or tables by the split that the file's name gives, or else the nearest folder's."""
    roles: dict[Role | None, list[str]] = {}
    for name in names:
        words = [_words(word)[0] for word in reversed(name.rpartition(".")[0].split("/"))]
        roles.setdefault(next((role for role in words if role), None), []).append(name)
    role: Role = "val" if "val" in roles else "test"
    if "train" not in roles or role not in roles:
        return None
    left = tuple(name for other, names in roles.items() if other not in ("train", role) for name in names)
    return Choice(tuple(roles["train"]), tuple(roles[role]), role, left, are_folders=False)


def _require_no_lone_split(samples: Sequence[Sample], tops: Sequence[str], where: str) -> None:
    """Raise ConfigError if some folders are splits, but not the two that are needed.

    A folder named like a split that holds no folders is taken for a class.
    """
    if not _by_folder(samples):
        return
    holding = {sample.folders[0] for sample in samples if len(sample.folders) > 1}
    lone = [name for name in tops if split_role(name) and name in holding]
    if lone:
        one = Path(where, lone[0])
        alone = f", or give one as --data {one}" if one.is_dir() else ""
        raise ConfigError(
            f"{where} holds {_some([f'{name}/' for name in tops])}, which are not a training and an evaluation split; "
            f"name them train and val{alone}"
        )


def _inside_wrappers(root: Path) -> Path:
    """Descend from the root as long as it holds a single folder, and no pictures lie in either of the two."""
    while True:
        inside = _bearing(root)
        if len(inside) != 1 or any(map(_bears, _files(root))) or any(map(_bears, _files(inside[0]))):
            return root
        root = inside[0]


def _bearing(root: Path) -> list[Path]:
    """Return the folders that hold a picture, a tar or a table at any depth."""
    return [folder for folder in _folders(root) if _bears_any(folder)]


def _has_classes(folder: Path) -> bool:
    """Return whether a folder holds more than pictures side by side; if not, it may be a class itself."""
    return bool(_bearing(folder)) or any(path.name in METADATA or path.suffix in CONTAINERS for path in _files(folder))


def _bears_any(folder: Path) -> bool:
    return any(map(_bears, _files(folder))) or any(map(_bears_any, _folders(folder)))


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in _entries(root) if path.is_dir())


def _files(root: Path) -> Iterator[Path]:
    return (path for path in _entries(root) if path.is_file())


def _entries(root: Path) -> Iterator[Path]:
    try:
        yield from (path for path in root.iterdir() if not path.name.startswith((".", "__")))
    except OSError as error:
        raise CorpusError(f"corpus folder {root} cannot be read: {error.strerror}") from error


def _bears(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS or path.suffix in CONTAINERS


def _columns(samples: pa.Table) -> tuple[list[str], list[str | None], list[str | None]]:
    keys, labels, digests = (samples[name].to_pylist() for name in ("key", "label", "sha256"))
    return keys, labels, digests


def corpus_splits(corpus: Corpus, where: str) -> Splits:
    """Find the splits of an index, or of a store's samples, by the names in their keys.

    Raises: as `labelled_splits`.
    """
    keys, labels, _ = _columns(corpus.samples)
    train, val, chosen = part_samples(keys, labels, where)
    if train is None or chosen is None:
        return Splits(None, _labelled(corpus, val, "", where))
    return _splits([corpus, corpus], (train, val), chosen, where)


def _splits(corpora: Sequence[Corpus], parts: tuple[list[Sample], list[Sample]], chosen: Choice, where: str) -> Splits:
    train, val = (
        _labelled(corpus, samples, chosen.name(role), where)
        for corpus, samples, role in zip(corpora, parts, ("train", chosen.role), strict=True)
    )
    return Splits(train, val, chosen.role, left_out(chosen))


def left_out(chosen: Choice) -> tuple[str, ...]:
    """Return a sentence on what is neither learned from nor judged; empty if everything is used."""
    if not chosen.left:
        return ()
    names = _some([f"{name}/" if chosen.are_folders else name for name in chosen.left])
    return (f"left out: {names}; {chosen.name(chosen.role)} is judged by {chosen.name('train')}",)


def _labelled(corpus: Corpus, samples: Sequence[Sample], name: str, where: str) -> Labelled:
    """Return the labelled pictures among some samples of a corpus.

    Raises: ConfigError if none has a label.
    """
    kept = [sample for sample in samples if sample.label is not None]
    if not kept:
        beside = ", or give the other split alone" if name else ""
        what = f"{name} of {where}" if name else str(corpus.root)
        raise ConfigError(f"no picture of {what} has a label; put the pictures in one folder per class{beside}")
    rows = corpus.samples.take([sample.place for sample in kept])
    keys, _, digests = _columns(rows)
    labels = tuple(sample.label for sample in kept if sample.label is not None)
    pictures = Pictures(corpus.root, tuple(keys), tuple(insides(rows)))
    return Labelled(pictures, labels, tuple(digests), name, len(samples) - len(kept))


def require_several(part: Labelled, data: str) -> tuple[str, ...]:
    """Return the classes of labelled pictures.

    Raises: ConfigError if there is only one, so that every answer would be right.
    """
    classes = order_labels(part.labels)
    if len(classes) < 2:
        raise ConfigError(
            f"all {len(part)} labelled pictures of {_of(part, data)} are of one class, {classes[0]}, so there is "
            "nothing to tell apart; put the pictures of each class in their own folder"
        )
    return classes


def require_classes(judged: Labelled, bank: Labelled | None, data: str) -> None:
    """Raise ConfigError if every answer would be right, or none could be."""
    learnt = require_several(bank or judged, data)
    if not set(judged.labels) & set(learnt):
        raise ConfigError(
            f"no class of {_of(judged, data)} ({_some(order_labels(judged.labels))}) is among those it is judged by "
            f"({_some(learnt)}); the folders of both must have the same names"
        )
    if bank is None and max(Counter(judged.labels).values()) < 2:
        raise ConfigError(
            f"each of the {len(learnt)} classes of {_of(judged, data)} has only one picture, so no other picture has "
            "the same class; give more pictures of each"
        )


def _of(part: Labelled, data: str) -> str:
    return f"{part.name} of {data}" if part.name else data


def tell_protocol(judged: Labelled, bank: Labelled | None) -> tuple[str, ...]:
    """Return sentences on what is judged by what, and what is odd about it.

    Args:
        bank: pictures to judge by; None if each picture is judged by all others.
    """
    classes = order_labels({*judged.labels, *(bank.labels if bank else ())})
    by = "each by all the others (leave one out)" if bank is None else f"by {_counted(bank)}"
    return (
        f"judged: {_counted(judged)}, {by}; {_classes(classes)}",
        *_unlabelled(judged, bank),
        *_hopeless(judged, bank),
        *_seen_before(judged, bank),
    )


def tell_judged(judged: Labelled, num_names: int) -> tuple[str, ...]:
    """Return sentences on what is judged in a task where nothing is learned.

    Args:
        num_names: number of classes that each picture could be assigned to.
    """
    classes = _classes(order_labels(judged.labels))
    return (f"judged: {_counted(judged)} among {num_names:,} names; {classes}", *_unlabelled(judged))


def _classes(classes: Sequence[str]) -> str:
    return f"{len(classes):,} classes ({_some(classes)})"


def _counted(part: Labelled) -> str:
    count = len(set(part.pictures.keys))
    if part.name == OTHERS:
        return f"the other {count:,}"
    return _pictures(count) + (f" of {part.name}" if part.name else "")


def _pictures(count: int) -> str:
    return f"{count:,} picture{'s' * (count != 1)}"


def _unlabelled(*parts: Labelled | None) -> Iterator[str]:
    for part in parts:
        if part is not None and part.unlabelled:
            of = f" of {part.name}" if part.name else ""
            yield f"left out: {_pictures(part.unlabelled)}{of} without a label"


def _hopeless(judged: Labelled, bank: Labelled | None) -> Iterator[str]:
    """Yield a sentence on pictures whose class nothing can vote for; papers count them as wrong."""
    if bank is None:
        lone = {label for label, count in Counter(judged.labels).items() if count < 2}
        why = "without another of their class"
    else:
        lone = set(judged.labels) - set(bank.labels)
        why = f"of classes that {bank.name} lack{'' if bank.name == OTHERS else 's'}"
    if lone:
        count = sum(label in lone for label in judged.labels)
        yield f"counted as wrong: {_pictures(count)} {why} ({_some(order_labels(lone))})"


def _seen_before(judged: Labelled, bank: Labelled | None) -> Iterator[str]:
    """Yield a sentence on judged pictures of which there is another copy, byte for byte: they are easy to get right."""
    known = Counter(digest for digest in (bank or judged).digests if digest is not None)
    least = 1 if bank is not None else 2  # without a bank, each picture is counted once itself
    twice = [i for i, digest in enumerate(judged.digests) if digest is not None and known[digest] >= least]
    if twice:
        where = "among themselves" if bank is None else f"in {bank.name}"
        keys = [judged.pictures.keys[i] for i in twice]
        yield f"with an exact copy {where}: {_pictures(len(twice))} of those judged ({_some(keys, 1)})"


def _some(words: Iterable[str], most: int = NAMED) -> str:
    words = list(words)
    return ", ".join(words[:most]) + (f", and {len(words) - most:,} more" if len(words) > most else "")
