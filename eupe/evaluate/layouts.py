"""Folder layouts of standard data sets: pictures and their ground truth. `splits` reads labels.

| task | layout |
|---|---|
| masks | `images/{training,validation}/X.jpg`, `annotations/.../X.png`, 0 is no class (ADE20K); or
  `images/{train,val}`, `masks/{train,val}`, 255 is no class |
| depth | `nyu_train.txt`, `nyu_test.txt`: lines of picture, depth map, focal length (NYUv2); or `images/{train,val}`,
  `depth/{train,val}`; 16-bit PNGs in the unit of `depth-unit.txt`, or `.npy`, in metres by default; 0 is unknown |
| pairs | `JPEGImages`, `PairAnnotation/test`, `Layout/large/test.txt` (SPair-71k) |
| captions | `captions_val2017.json`, here or in `annotations/`, and `val2017/` (COCO) |
| questions | `questions.json`, a list of `image` (a path below its folder), `split` (train or val), `kind`, `question`
  and `answer` |
"""

from __future__ import annotations

import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eupe.common.reading import read_json
from eupe.common.storage import StoragePath
from eupe.corpus.pictures import EXTENSIONS
from eupe.errors import ConfigError, CorpusError
from eupe.evaluate.judged_pictures import Pictures
from eupe.evaluate.masks import LOSSY, NAMED, SUFFIXES
from eupe.evaluate.splits import split_role

Split = Literal["train", "val"]
ADE_NOTHING, MASK_NOTHING = 0, 255
MILLIMETRE = 1e-3
METRES = {"m": 1.0, "cm": 1e-2, "mm": MILLIMETRE}
NYU_LISTS: dict[str, str] = {"train": "nyu_train.txt", "val": "nyu_test.txt"}
NYU_SIDES = (640, 480)
UNIT_FILE = "depth-unit.txt"
"""File in a data set's folder that holds the value of `--depth-unit` for its depth maps."""
SCENES_FILE = "scenes.json"
"""File above a data set's folder that marks rendered scenes (docs/scenes.md), whose depth is in millimetres."""
COCO_CAPTIONS, COCO_PICTURES = "captions_val2017.json", "val2017"
QUESTIONS = "questions.json"
EIGEN_CROP = (41, 45, 601, 471)
"""Region of a 640x480 picture in which NYUv2 is judged: x0, y0, x1, y1; source: Eigen et al., arXiv 1406.2283."""


@dataclass(frozen=True)
class Mapped:
    """Pictures with a ground-truth map for each: masks or depth."""

    pictures: Pictures
    maps: tuple[Path, ...]
    nothing: int = 0
    """Value that means no ground truth."""
    crop: tuple[int, int, int, int] | None = None
    """Region of a 640x480 picture that is judged, scaled for pictures of another size; None for the whole picture."""
    name: str = ""
    """Name of the split in the data set."""
    role: str = "val"

    @property
    def protocol(self) -> dict[str, str]:
        """Return the protocol entry that tells results on test from the usual ones on val."""
        return {"split": self.role} if self.role == "test" else {}

    def limited(self, limit: int | None) -> Mapped:
        """Return the first `limit` pictures and maps; all if None."""
        count = len(self.maps) if limit is None else limit
        places = range(len(self.maps))[:count]
        return replace(self, pictures=self.pictures.pick(places), maps=self.maps[:count])


@dataclass(frozen=True)
class PointPair:
    """Two pictures of objects of one category, with corresponding points."""

    source: int
    target: int
    """`source` and `target` are indices of pictures."""
    category: str
    source_points: NDArray[np.float64]
    target_points: NDArray[np.float64]
    """Points of either picture, [P, 2] as x and y in pixels; row i of both corresponds."""
    target_box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Captioned:
    """Pictures with one or more captions each."""

    pictures: Pictures
    captions: tuple[str, ...]
    picture_of: NDArray[np.int64]
    """Index of the picture that each caption describes."""


@dataclass(frozen=True)
class Question:
    """A question about a picture, and its answer."""

    picture: int
    """Index of the picture."""
    split: Split
    kind: str
    question: str
    answer: str


def mask_split(data: Path, split: Split) -> Mapped:
    """Return the pictures and masks of a split.

    Raises: CorpusError if a folder, or a picture's mask, is missing.
    """
    kind = _only(data, ("annotations", "masks"), "masks: annotations/{training,validation} or masks/{train,val}")
    nothing = ADE_NOTHING if kind == "annotations" else MASK_NOTHING
    return _paired(data, kind, split, SUFFIXES, nothing)


def class_names(data: Path) -> tuple[str, ...] | None:
    """Return the names of the masks' values from 0 on (from 1 on in ADE20K's layout), or None if the data has none.

    They are read from `classes.txt`, one name per line, or from ADE20K's `objectInfo150.txt`.

    Raises: CorpusError if such a file holds no names.
    """
    own, ade = data / "classes.txt", data / "objectInfo150.txt"
    listed = next((path for path in (own, ade) if path.exists()), None)
    if listed is None:
        return None
    lines = _lines(listed) if listed == own else [line.split("\t")[-1] for line in _lines(listed)[1:]]
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise CorpusError(f"{listed} names no classes; write one name per line, or remove the file")
    return names


def depth_split(data: Path, split: Split) -> Mapped:
    """Return the pictures and depth maps of a split.

    Raises: CorpusError if a list, a folder, or a picture's map is missing.
    """
    if not (data / NYU_LISTS["train"]).exists():
        _only(data, ("depth",), "depth maps: nyu_train.txt and nyu_test.txt, or depth/{train,val}")
        return _paired(data, "depth", split, (".png", ".npy", ".tif", ".tiff"), 0)
    listed = data / NYU_LISTS[split]
    if not listed.exists():
        raise CorpusError(f"{listed} is missing next to {NYU_LISTS['train']}; NYUv2 needs both lists")
    keys, maps = [], []
    for number, line in enumerate(_lines(listed), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 3:
            raise CorpusError(f"line {number} of {listed} should be `PICTURE DEPTH FOCAL`, got {line!r}")
        if words[1] == "None":  # the test list has pictures without a depth map
            continue
        keys.append(words[0].lstrip("/"))
        maps.append(data / words[1].lstrip("/"))
    if not keys:
        raise CorpusError(f"{listed} lists no picture with a depth map")
    _require_files([*(data / key for key in keys), *maps], listed)
    return Mapped(Pictures(StoragePath.of(data), tuple(keys)), tuple(maps), 0, EIGEN_CROP, NYU_LISTS[split])


def point_pairs(data: Path, *, limit: int | None = None) -> tuple[Pictures, list[PointPair]]:
    """Return the pictures and the test pairs of SPair-71k.

    Args:
        limit: only the first pairs.
    Raises: CorpusError that names the file that is missing or not in SPair's format.
    """
    listed = data / "Layout" / "large" / "test.txt"
    if not listed.exists():
        raise CorpusError(f"{data} holds no correspondences in SPair-71k's layout: {listed} is missing")
    names = [line.strip() for line in _lines(listed) if line.strip()][:limit]
    if not names:
        raise CorpusError(f"{listed} lists no pairs")
    places: dict[str, int] = {}
    pairs = [_point_pair(data, name, places) for name in names]
    pictures = Pictures(StoragePath.of(data), tuple(places))
    _require_files([data / key for key in places], listed)
    return pictures, pairs


def _point_pair(data: Path, name: str, places: dict[str, int]) -> PointPair:
    path = data / "PairAnnotation" / "test" / f"{name}.json"
    try:
        plain: dict[str, Any] = read_json(path)
        category = _word(plain["category"])
        keys = [f"JPEGImages/{category}/{_word(plain[side])}" for side in ("src_imname", "trg_imname")]
        source, target = (np.array(plain[side], dtype=np.float64).reshape(-1, 2) for side in ("src_kps", "trg_kps"))
        x0, y0, x1, y1 = map(float, plain["trg_bndbox"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CorpusError(f"{path} is not an annotation of SPair-71k: {type(error).__name__}: {error}") from error
    if len(source) != len(target) or not len(source):
        raise CorpusError(
            f"{path} has {len(source)} source and {len(target)} target points; it needs the same "
            "number of both, at least one"
        )
    if not np.isfinite([*source.flat, *target.flat, x0, y0, x1, y1]).all():
        raise CorpusError(f"{path} has points or a trg_bndbox that are not all finite numbers; correct it")
    if x1 <= x0 or y1 <= y0:
        raise CorpusError(f"{path} has a trg_bndbox of {x0:g}, {y0:g}, {x1:g}, {y1:g}, which is not a box; correct it")
    # A picture of several pairs gets one index, so that it is encoded once.
    first, second = (places.setdefault(key, len(places)) for key in keys)
    return PointPair(first, second, category, source, target, (x0, y0, x1, y1))


def caption_split(data: Path, *, limit: int | None = None) -> Captioned:
    """Return COCO's val2017, with pictures in the order of the list and captions grouped by picture.

    Args:
        limit: only the first pictures.
    Raises: CorpusError if the list or a picture is missing, an id is repeated, or a picture has no caption.
    """
    places = (data / COCO_CAPTIONS, data / "annotations" / COCO_CAPTIONS)
    listed = next((place for place in places if place.is_file()), None)
    if listed is None:
        raise CorpusError(f"{data} holds no captions in COCO's layout: {places[0]} and {places[1]} are missing")
    try:
        plain = read_json(listed)
        images = [(each["id"], _word(each["file_name"])) for each in plain["images"]]
        said = [(each["id"], each["image_id"], _word(each["caption"])) for each in plain["annotations"]]
        repeated = [("picture", i) for i, n in Counter(i for i, _ in images).items() if n > 1]
        repeated += [("caption", i) for i, n in Counter(i for i, _, _ in said).items() if n > 1]
        captions: dict[Any, list[str]] = {i: [] for i, _ in images}
        homeless = [(i, image) for i, image, _ in said if image not in captions]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{listed} is not a list of COCO captions: {type(error).__name__}: {error}") from error
    if repeated:
        raise CorpusError(f"{listed} has {repeated[0][0]} {repeated[0][1]} more than once")
    if homeless:
        raise CorpusError(
            f"caption {homeless[0][0]} of {listed} belongs to picture {homeless[0][1]}, which is not listed"
        )
    for _, image, caption in said:
        captions[image].append(caption)
    kept = images[:limit]
    if not kept:
        raise CorpusError(f"{listed} lists no pictures")
    if silent := [name for i, name in kept if not captions[i]]:
        raise CorpusError(f"{listed} has no caption for {silent[0]} ({len(silent)} of {len(kept)} pictures have none)")
    keys = tuple(f"{COCO_PICTURES}/{name}" for _, name in kept)
    _require_files([data / key for key in keys], listed)
    own = [(place, caption) for place, (i, _) in enumerate(kept) for caption in captions[i]]
    picture_of = np.array([place for place, _ in own], dtype=np.int64)
    return Captioned(Pictures(StoragePath.of(data), keys), tuple(caption for _, caption in own), picture_of)


def _word(value: Any) -> str:
    """Return a string without surrounding whitespace.

    Raises: TypeError if it is not a string; ValueError if it is empty.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    if not value.strip():
        raise ValueError("an empty string")
    return value.strip()


def question_set(data: Path) -> tuple[Pictures, list[Question]]:
    """Return the pictures, in the order of their first question, and the questions.

    Raises: CorpusError if the list or a picture is missing, a question is incomplete, a picture is in both splits, or
        a kind of question is missing from one split.
    """
    listed = data / QUESTIONS
    try:
        plain = read_json(listed)
    except (OSError, ValueError) as error:
        raise CorpusError(f"{listed} cannot be read: {error}") from error
    if not isinstance(plain, list) or not plain:
        raise CorpusError(f"{listed} is not a list of questions, or is empty")
    places: dict[str, int] = {}
    questions = [_question(each, number, listed, places) for number, each in enumerate(plain)]
    keys = tuple(places)
    splits: dict[int, Split] = {}
    for each in questions:
        if splits.setdefault(each.picture, each.split) != each.split:
            raise CorpusError(f"{listed} asks about {keys[each.picture]} in both splits; keep each picture in one")
    for kind in sorted({each.kind for each in questions}):
        asked = {each.split for each in questions if each.kind == kind}
        if lacking := {"train", "val"} - asked:
            raise CorpusError(f"{listed} has no {kind} questions in the {lacking.pop()} split")
    _require_files([data / key for key in keys], listed)
    return Pictures(StoragePath.of(data), keys), questions


def _question(plain: Any, number: int, listed: Path, places: dict[str, int]) -> Question:
    try:
        image, split, kind, question = (_word(plain[name]) for name in ("image", "split", "kind", "question"))
        answer = plain["answer"]
        answer = str(answer) if isinstance(answer, int) and not isinstance(answer, bool) else _word(answer)
        if split not in ("train", "val"):
            raise ValueError(f"split {split!r} is neither train nor val")
        if not question_words(question):
            raise ValueError(f"{question!r} has no words")
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"question {number} of {listed} cannot be used: {type(error).__name__}: {error}") from error
    return Question(places.setdefault(image, len(places)), cast(Split, split), kind, question, answer)


def question_words(question: str) -> list[str]:
    """Return the words of a question in lower case, without punctuation."""
    return re.findall(r"\w+", question.lower())


@dataclass(frozen=True)
class DepthUnit:
    """Depth that one step of a depth map stands for."""

    word: str
    """The unit as it was given."""
    metres: float
    inverse: bool = False
    """True if maps hold disparities: a depth is then `metres` divided by the value."""


def depth_unit(word: str) -> DepthUnit:
    """Parse `--depth-unit`: m, cm, mm, metres per step as a number or a fraction, or `NUMBER/disparity`.

    Raises: ConfigError if it is none of these.
    """
    if word in METRES:
        return DepthUnit(word, METRES[word])
    above, slash, below = word.partition("/")
    inverse = below.strip() == "disparity"
    try:
        metres = float(above) / (float(below) if slash and not inverse else 1)
        if not 0 < metres < math.inf:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"--depth-unit takes m, cm, mm, the metres of one step (0.001, or 1/256), or NUMBER/disparity, got {word}"
        ) from None
    return DepthUnit(word, metres, inverse)


def read_depth(path: Path, unit: DepthUnit | None = None) -> NDArray[np.float32]:
    """Read a depth map in metres, [H, W]; 0 where the depth is unknown.

    Args:
        unit: unit of the values; by default integers of an image are millimetres, and everything else is metres.
    Raises: CorpusError unless the file holds an array of two axes or an image of one channel, or if an 8-bit image
        comes without a unit.
    """
    is_array, values = _is_array(path), _read_values(path)
    unit_m = METRES[_usual_unit(values, is_array=is_array)]
    if values.ndim != 2:
        raise CorpusError(f"depth map {path} has shape {values.shape}, not height x width")
    if unit is None and not is_array and values.dtype.itemsize == 1:
        raise CorpusError(
            f"depth map {path} has 8 bits, which are not millimetres; give --depth-unit, the metres of one step "
            "(10/255 if 255 is 10 m); relative depth has no unit"
        )
    known = values.astype(np.float32)
    if unit is None:
        metres = known * unit_m
    elif unit.inverse:
        metres = np.divide(unit.metres, known, out=np.zeros_like(known), where=known > 0)
    else:
        metres = known * unit.metres
    depth: NDArray[np.float32] = np.nan_to_num(metres.astype(np.float32), posinf=0, neginf=0)
    return depth


def stated_unit(data: Path, given: DepthUnit | None, maps: Sequence[Path]) -> DepthUnit | None:
    """Return the unit of a data set's depth maps: the given one, or that in `depth-unit.txt`; None means the default.

    Raises: ConfigError if the file holds no valid unit; CorpusError if the maps hold integers whose unit is not stated.
    """
    if given is not None:
        return given
    if (data / UNIT_FILE).exists():
        stated = depth_unit((data / UNIT_FILE).read_text(errors="replace").strip())
        return None if stated.word == told_unit(maps[0], None) else stated
    path = maps[0]
    values = _read_values(path)
    # Scenes rendered before they got a `depth-unit.txt` are recognised by their file.
    usual = (data / NYU_LISTS["train"]).exists() or (data.parent / SCENES_FILE).exists()
    if values.dtype.kind in "iu" and values.dtype.itemsize > 1 and not usual:
        raise CorpusError(
            f"depth map {path} holds whole numbers up to {values.max():,}, and nothing states the depth of one step; "
            "give --depth-unit (mm, cm, 1/256 as in KITTI, or the metres of one step), or write it to "
            f"{data / UNIT_FILE}"
        )
    return None


def told_unit(path: Path, unit: DepthUnit | None) -> str:
    """Return the name of the unit in which a depth map is read."""
    if unit is not None:
        return unit.word
    return _usual_unit(_read_values(path), is_array=_is_array(path))


def _usual_unit(values: NDArray[Any], *, is_array: bool) -> str:
    return "m" if is_array or values.dtype.kind == "f" else "mm"


def _is_array(path: Path) -> bool:
    return path.suffix.lower() == ".npy"


def _read_values(path: Path) -> NDArray[Any]:
    return _read_array(path) if _is_array(path) else _read_image(path)


def _read_image(path: Path) -> NDArray[Any]:
    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG", "TIFF", "BMP")) as image:
            return np.asarray(image)
    except Exception as error:  # a hostile file can raise anything from a decoder
        raise CorpusError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _read_array(path: Path) -> NDArray[Any]:
    try:
        values = np.load(path, allow_pickle=False)
    except Exception as error:  # a hostile file can raise anything here, too
        raise CorpusError(f"depth map {path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(values, np.ndarray):
        raise CorpusError(f"depth map {path} is an archive of arrays (.npz), not one array (.npy)")
    if values.dtype.kind not in "fiu":
        raise CorpusError(f"depth map {path} holds values of type {values.dtype}; metres are real numbers")
    return values


def _paired(data: Path, kind: str, split: Split, suffixes: Sequence[str], nothing: int) -> Mapped:
    role, images, maps = _split_folders(data, kind, split)
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not files:
        raise CorpusError(f"{images} holds no pictures")
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(maps.rglob("*")):
        by_stem.setdefault(path.relative_to(maps).with_suffix("").as_posix(), []).append(path)
    truths = [
        _beside(path, by_stem.get(path.relative_to(images).with_suffix("").as_posix(), []), maps, suffixes)
        for path in files
    ]
    keys = tuple(path.relative_to(data).as_posix() for path in files)
    name = images.relative_to(data).as_posix()
    return Mapped(Pictures(StoragePath.of(data), keys), tuple(truths), nothing, name=name, role=role)


def _beside(picture: Path, there: Sequence[Path], maps: Path, suffixes: Sequence[str]) -> Path:
    for suffix in suffixes:
        if found := next((path for path in there if path.suffix.lower() == suffix), None):
            return found
    if lossy := next((path for path in there if path.suffix.lower() in LOSSY), None):
        raise CorpusError(f"{lossy} is a ground-truth map with lossy compression, which changes values; save it as PNG")
    held = sorted(path.name for path in maps.iterdir())
    first, *others = suffixes
    raise CorpusError(
        f"picture {picture} has no {picture.stem}{first} (or {', '.join(others)}) in {maps}, which holds "
        f"{', '.join(held[:3]) or 'nothing'}; name each map after its picture"
    )


def _split_folders(data: Path, kind: str, split: Split) -> tuple[str, Path, Path]:
    """Find a split's folders of pictures and of maps: `images/train` and `masks/train`, or `train/images` and so on.

    Returns: the split's role (test stands in for val if there is no val), and both folders.
    Raises: CorpusError if there are none, or several.
    """
    wanted = ("train",) if split == "train" else ("val", "test")
    for role in wanted:
        inside = [_of_role(data / word, role) for word in ("images", kind)]
        outside = [
            folder for folder in _of_role(data, role) if (folder / "images").is_dir() and (folder / kind).is_dir()
        ]
        pairs = [folders for folders in inside if folders]
        if len(pairs) == 2:
            several = next((folders for folders in pairs if len(folders) > 1), None)
            if several is None:
                return role, pairs[0][0], pairs[1][0]
            outside = several
        if len(outside) > 1:
            raise CorpusError(f"{outside[0]} and {outside[1]} are the same kind of split; keep one of them")
        if outside:
            return role, outside[0] / "images", outside[0] / kind
    there = [f"{word}/{path.name}" for word in ("images", kind) for path in _subfolders(data / word)]
    raise CorpusError(
        f"{data / kind} and {data / 'images'} do not both have a folder {' or '.join(wanted)}; the {split} split "
        f"belongs there (found {', '.join(there[:NAMED]) or 'no folder'})"
    )


def _of_role(parent: Path, role: str) -> list[Path]:
    return [folder for folder in _subfolders(parent) if split_role(folder.name) == role]


def _subfolders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _only(data: Path, kinds: Sequence[str], wanted: str) -> str:
    if not data.is_dir():
        raise CorpusError(f"{data} is not a folder; --data takes a data set in its standard layout")
    splits = [folder for folder in _subfolders(data) if split_role(folder.name)]
    for kind in kinds:
        if any((folder / kind).is_dir() for folder in (data, *splits)):
            return kind
    held = ", ".join(sorted(path.name for path in data.iterdir())[:NAMED])
    raise CorpusError(f"{data} holds no {wanted} (found {held or 'nothing'})")


def _require_files(paths: Iterable[Path], listed: Path) -> None:
    missing = [path for path in paths if not os.path.isfile(path)]  # noqa: PTH113 - is_file raises for a long name
    if missing:
        raise CorpusError(f"{listed} names {len(missing)} files that are missing; the first is {missing[0]}")


def _lines(path: Path) -> list[str]:
    """Read the lines of a text file; raise CorpusError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read as lines of text: {error}") from error
