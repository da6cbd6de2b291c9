"""Data sets whose files are not what they should be get one sentence that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import ade20k, depth_pairs, nyu, spair

from eupe.errors import CorpusError
from eupe.evaluate.layouts import caption_split, class_names, depth_split, point_pairs, question_set, read_depth

Run = Callable[..., Any]
DEEP = "[" * 200_000


def refused(outcome: Any, *said: str) -> None:
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1 and "Traceback" not in outcome.err
    for words in said:
        assert words in outcome.err


def empty(path: Path) -> None:
    path.write_bytes(b"")


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, np.ones((48, 48)))


def words(path: Path) -> None:
    np.save(path, np.array([["near", "far"]]))


def cut(path: Path) -> None:
    np.save(path, np.ones((48, 48)))
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (empty, "EOFError"),
        (archive, "is an archive of arrays (.npz)"),
        (words, "values of type <U4"),
        (cut, "cannot be"),
    ],
)
def test_arrays_of_depth_that_are_none(make: Callable[[Path], None], said: str, tmp_path: Path, run_eupe: Run) -> None:
    data = depth_pairs(tmp_path)
    (data / "depth" / "train" / "0.png").unlink()
    make(data / "depth" / "train" / "0.npy")
    refused(run_eupe("eval", "depth", "pixels", "--data", data, "--size", 48, "--steps", 1), "0.npy", said)


def test_whole_numbers_may_be_metres(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, 2], [0, 4]]))
    assert read_depth(tmp_path / "a.npy").tolist() == [[1, 2], [0, 4]]


def latin(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes("café\n".encode("latin-1"))


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


READERS: list[tuple[Callable[[Path], Path], str, Callable[[Path], Any]]] = [
    (ade20k, "classes.txt", class_names),
    (ade20k, "objectInfo150.txt", class_names),
    (nyu, "nyu_train.txt", lambda data: depth_split(data, "train")),
    (nyu, "nyu_test.txt", lambda data: depth_split(data, "val")),
    (spair, "Layout/large/test.txt", point_pairs),
]


@pytest.mark.parametrize("spoil", [latin, folder])
@pytest.mark.parametrize(("make", "name", "read"), READERS)
def test_lists_that_are_no_text(
    spoil: Callable[[Path], None],
    make: Callable[[Path], Path],
    name: str,
    read: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    data = make(tmp_path)
    spoil(data / name)
    with pytest.raises(CorpusError, match=f"{name} cannot be read as lines of text"):
        read(data)


def test_lists_of_classes_without_any(tmp_path: Path, run_eupe: Run) -> None:
    data = ade20k(tmp_path)
    (data / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n")
    said = ("eval", "segment", "pixels", "--data", data, "--size", 48, "--steps", 1)
    refused(run_eupe(*said), "objectInfo150.txt names no classes; write one name per line, or remove the file")
    (data / "classes.txt").write_text("\n \n")
    refused(run_eupe(*said), "classes.txt names no classes")


def test_a_list_of_nyus_without_any_depth(tmp_path: Path, run_eupe: Run) -> None:
    data = nyu(tmp_path)
    (data / "nyu_train.txt").write_text("/scene/rgb_0.png None 518\n")
    refused(run_eupe("eval", "depth", "pixels", "--data", data), "nyu_train.txt lists no picture with a depth map")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"src_kps": [[40, 24], [None, 24], [40, 40]]}, "points or a trg_bndbox that are not all finite"),
        ({"trg_kps": [[40, 24], [float("nan"), 24], [40, 40]]}, "points or a trg_bndbox that are not all finite"),
        ({"trg_bndbox": [0, 0, float("inf"), 64]}, "points or a trg_bndbox that are not all finite"),
        ({"trg_bndbox": [10, 0, 10, 64]}, "has a trg_bndbox of 10, 0, 10, 64, which is not a box"),
        ({"trg_bndbox": [0, 64, 64, 0]}, "has a trg_bndbox of 0, 64, 64, 0, which is not a box"),
        ({"trg_bndbox": [0, 0, 64, 10**400]}, "not an annotation of SPair-71k: OverflowError"),
        ({"category": 3}, "not an annotation of SPair-71k: TypeError: 3 is not a string"),
        ({"trg_imname": "b" * 300}, "names 1 files that are missing"),
    ],
)
def test_annotations_that_cannot_be_true(change: dict[str, Any], said: str, tmp_path: Path, run_eupe: Run) -> None:
    path = spair(tmp_path) / "PairAnnotation" / "test" / "000000-a-b:cat.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(run_eupe("eval", "correspond", "pixels", "--data", tmp_path, "--size", 64), said)


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    spair(tmp_path)
    for name in ("PairAnnotation/test/000000-a-b:cat.json", "captions_val2017.json", "questions.json"):
        (tmp_path / name).write_text(DEEP)
    for read in (point_pairs, caption_split, question_set):
        with pytest.raises(CorpusError, match=r"json .*it is nested too deeply"):
            read(tmp_path)
