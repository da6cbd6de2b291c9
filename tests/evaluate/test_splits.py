"""Which labelled pictures are judged, and by which: splits, classes in order, and what a person is told of both."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import make_tar
from making import make_store
from PIL import Image

from eupe.corpus.index import open_corpus, write_index
from eupe.errors import ConfigError
from eupe.evaluate.prompts import Classes, class_numbers, folder_classes
from eupe.evaluate.splits import labelled_splits, order_labels, part_samples, require_classes, tell_protocol

Run = Callable[..., Any]


def png(seed: int, hue: int) -> bytes:
    """A noisy picture of 16 pixels, of a colour."""
    noise = np.random.default_rng(seed).integers(0, 40, (16, 16, 3))
    noise[..., hue % 3] += 200 - 60 * (hue // 3)
    file = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, split: str, classes: Iterable[str] = ("cat", "dog", "owl"), *, each: int = 2) -> Path:
    """Pictures in class folders below `split`, whose classes have colours."""
    for hue, name in enumerate(classes):
        for i in range(each):
            path = folder / split / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(hash_of(split) + 10 * hue + i, hue))
    return folder


def hash_of(word: str) -> int:
    return sum(map(ord, word))


def found(data: Path) -> Any:
    splits = labelled_splits(data)
    train = None if splits.train is None else (splits.train.name, len(splits.train))
    return train, splits.val.name, order_labels(splits.val.labels)


@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("train", "val"),
        ("train", "valid"),
        ("Train", "Val"),
        ("TRAIN", "TEST"),
        ("training", "validation"),
        ("train", "test"),
        ("train", "dev"),
        ("training_set", "test_set"),
        ("trainset", "testset"),
        ("train_images", "val_images"),
        ("train2017", "val2017"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("data/train", "data/test"),
        ("a/b/train", "a/b/val"),
    ],
)
def test_folders_are_splits_however_they_are_called(train: str, other: str, tmp_path: Path) -> None:
    put(put(tmp_path, train), other, each=1)
    (tmp_path / "docs").mkdir()
    names = [word.removeprefix("data/").removeprefix("a/b/").split("/")[0] + "/" for word in (train, other)]
    assert found(tmp_path) == ((names[0], 6), names[1], ("cat", "dog", "owl"))
    write_index(open_corpus(tmp_path), tmp_path / "index.parquet")
    assert found(tmp_path / "index.parquet") == found(tmp_path), "an index says the same"


def test_keys_of_splits_are_below_them(tmp_path: Path) -> None:
    """They decide by which pictures a penalty is chosen, and must stay what they were."""
    splits = labelled_splits(put(put(tmp_path, "train"), "val"))
    assert splits.train is not None and splits.train.pictures.keys[:2] == ("cat/0.png", "cat/1.png")
    assert splits.val.pictures.read(0) == (tmp_path / "val" / "cat" / "0.png").read_bytes()
    assert splits.protocol == {} and splits.notes == ()
    assert labelled_splits(put(put(tmp_path / "b", "train"), "test")).protocol == {"split": "test"}


def test_val_is_judged_where_there_is_a_test_split_too(tmp_path: Path) -> None:
    splits = labelled_splits(put(put(put(tmp_path, "train"), "validation"), "test"))
    assert splits.val.name == "validation/"
    assert splits.notes == ("left out: test/; validation/ is judged by train/",)


@pytest.mark.parametrize("folders", ["train training val", "train val valid", "trainA trainB testA testB"])
def test_several_splits_of_a_kind_are_refused(folders: str, tmp_path: Path) -> None:
    for name in folders.split():
        put(tmp_path, name, each=1)
    with pytest.raises(ConfigError, match="all the same kind of split"):
        labelled_splits(tmp_path)


@pytest.mark.parametrize("folders", [("train", "unseen"), ("val", "test"), ("test", "other")])
def test_half_of_a_pair_of_splits_is_refused(folders: tuple[str, ...], tmp_path: Path) -> None:
    for name in folders:
        put(tmp_path, name, each=1)
    listed = ", ".join(f"{name}/" for name in sorted(folders))
    with pytest.raises(ConfigError, match=f"holds {listed}, which are not a training and an evaluation split"):
        labelled_splits(tmp_path)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert found(put(tmp_path / "a", ".", ("train", "bus", "test"))) == (None, "", ("bus", "test", "train"))
    write_index(open_corpus(tmp_path / "a"), tmp_path / "index.parquet")
    assert found(tmp_path / "index.parquet") == found(tmp_path / "a")
    put(tmp_path / "b", ".", ("train", "val", "test"))
    with pytest.raises(ConfigError, match=r"no picture of train/ of .*b has a label; put the pictures in one"):
        labelled_splits(tmp_path / "b")


def test_splits_inside_classes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        put(put(tmp_path, name, ["train"]), name, ["test"], each=1)
    assert found(tmp_path) == (("train/", 4), "test/", ("cat", "dog"))


@pytest.mark.parametrize("wrapper", ["animals", "images", "data/images", "train"])
def test_a_folder_that_wraps_all_others_is_no_class(wrapper: str, tmp_path: Path) -> None:
    assert found(put(tmp_path, wrapper)) == (None, "", ("cat", "dog", "owl"))


def test_labels_of_a_list_are_not_taken_for_folders(tmp_path: Path) -> None:
    put(put(tmp_path, "train", ["a"], each=4), "test", ["a"])
    corpus = open_corpus(tmp_path)
    labels = pa.array([f"label{i % 2}" for i in range(len(corpus))])
    samples = corpus.samples.set_column(corpus.samples.schema.get_field_index("label"), "label", labels)
    write_index(type(corpus)(corpus.root, samples), tmp_path / "index.parquet")
    assert found(tmp_path / "index.parquet") == (("train/", 4), "test/", ("label0", "label1"))


def test_folders_inside_a_tar_are_splits_too() -> None:
    """Folders in a tar are splits whether the labels are their first folders or those below the splits."""
    for labels in (["data"] * 4, ["cat", "dog", "dog", "cat"]):
        keys = [f"x.tar/data/{path}.png" for path in ("train/cat/1", "train/dog/2", "val/dog/3", "val/cat/4")]
        train, val, chosen = part_samples(keys, labels, "d")
        assert train is not None and chosen is not None and chosen.name("val") == "val/"
        assert [[s.label for s in part] for part in (train, val)] == [["cat", "dog"], ["dog", "cat"]]


def table(path: Path, count: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"image": {"bytes": png(seed + i, i % 2), "path": None}, "label": str(i % 2)} for i in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize(
    ("train", "other"),
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
        ("train.parquet", "Valid.parquet"),
        ("train/0.parquet", "val/0.parquet"),
        ("default/train/0.parquet", "default/test/0.parquet"),
        ("digits_train.parquet", "digits_test.parquet"),
    ],
)
def test_tables_of_splits(train: str, other: str, tmp_path: Path) -> None:
    table(tmp_path / train, 6, 0)
    table(tmp_path / other, 4, 100)
    splits = labelled_splits(tmp_path)
    assert splits.train is not None and (len(splits.train), len(splits.val)) == (6, 4)
    assert splits.val.pictures.read(1) == png(101, 1)


def test_tars_of_splits(tmp_path: Path, run_eupe: Run) -> None:
    counts = {"train-000": 4, "train-001": 4, "val-000": 3, "test-000": 2}
    for seed, (name, count) in enumerate(counts.items()):
        members: dict[str, bytes] = {}
        for i in range(count):
            members |= {f"{i}.png": png(10 * seed + i, i % 2), f"{i}.cls": str(i % 2).encode()}
        make_tar(tmp_path / f"pets-{name}.tar", members)
    splits = labelled_splits(tmp_path)
    assert splits.train is not None and (len(splits.train), len(splits.val)) == (8, 3)
    said = run_eupe("eval", "knn", "pixels", "--data", tmp_path, "--size", 16, "--k", 1).out
    train = "pets-train-000.tar, and 1 more"
    assert f"judged: 3 pictures of pets-val-000.tar, by 8 pictures of {train}; 2 classes (0, 1)" in said
    assert f"left out: pets-test-000.tar; pets-val-000.tar is judged by {train}" in said


def test_a_store_of_splits_is_judged_by_them(tmp_path: Path, tiny_weights: Path, run_eupe: Run) -> None:
    store = make_store(tmp_path / "s.zarr", put(put(tmp_path / "d", "train"), "test", each=1), tiny_weights)
    (result,) = json.loads(run_eupe("eval", "knn", store.path, "--k", 1, "--json").out)["results"]
    assert (result["data"]["train"], result["data"]["val"], result["data"]["labels"]) == (12, 6, 3)
    assert (result["protocol"]["judged_by"], result["protocol"]["split"]) == ("the training split", "test")
    assert result["notes"][0] == "judged: 3 pictures of test/, by 6 pictures of train/; 3 classes (cat, dog, owl)"


@pytest.mark.parametrize(
    ("labels", "ordered"),
    [
        ([str(i) for i in range(12)], [str(i) for i in range(12)]),
        (["10", "9", "-1", "0", "9"], ["-1", "0", "9", "10"]),
        (["000", "002", "010", "001"], ["000", "001", "002", "010"]),
        (["01", "1", "10", "2"], ["01", "1", "2", "10"]),
        (["0.0", "10.0", "2.0"], ["0.0", "2.0", "10.0"]),
        (["n10", "n9", "n01440764"], ["n01440764", "n10", "n9"]),
        (["10", "9", "cat"], ["10", "9", "cat"]),
    ],
)
def test_integers_are_in_numeric_order(labels: list[str], ordered: list[str]) -> None:
    assert list(order_labels(labels)) == ordered
    assert folder_classes(labels).folders == tuple(ordered)


def test_name_i_is_class_i() -> None:
    numbers = [str(i) for i in range(12)]
    names = tuple(f"name{i}" for i in range(12))
    assert class_numbers(Classes(names), reversed(numbers), data="d") == {n: int(n) for n in numbers}
    assert class_numbers(Classes(tuple(reversed(numbers))), numbers, data="d") == {n: 11 - int(n) for n in numbers}
    assert class_numbers(Classes(("Dog", "CAT")), ["cat", "dog"], data="d") == {"cat": 1, "dog": 0}
    assert class_numbers(Classes(("sea-lion", "ox")), ["ox", "sea_lion"], data="d") == {"sea_lion": 0, "ox": 1}


@pytest.mark.parametrize(
    ("names", "labels", "said"),
    [
        (["a", "b", "c"], ["0", "1"], "3 class names and 2 folders in d, and no name matches a folder"),
        (["a", "b", "c"], ["x1", "x2", "x10"], "order is not clear: number 2 is x10 if sorted as text and x2 if"),
        (["n1 tench, fish", "n0 crane"], ["n0", "n1"], "lines of class names begin with folders"),
        (["1: one", "0: zero"], ["0", "1"], "put a tab after the folder:"),
    ],
)
def test_names_whose_order_is_not_clear_are_refused(names: list[str], labels: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        class_numbers(Classes(tuple(names)), labels, data="d")


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_one_class_is_refused_by_every_task(task: str, tmp_path: Path, run_eupe: Run) -> None:
    put(tmp_path / "one", "images", ["."], each=6)
    put(put(tmp_path / "half", "train", ["a"]), "val", ["a", "b"])
    for folder in ("one", "half"):
        refused = run_eupe("eval", task, "pixels", "--data", tmp_path / folder, "--size", 16)
        assert refused.code == 2 and refused.err.count("\n") == 1
        assert "of one class" in refused.err and "put the pictures of each class in their own folder" in refused.err


def test_classes_that_have_nothing_in_common_are_refused(tmp_path: Path) -> None:
    splits = labelled_splits(put(put(tmp_path / "a", "train", ["a", "b"]), "val", ["c"]))
    with pytest.raises(ConfigError, match=r"no class of val/ of d \(c\) is among those it is judged by \(a, b\)"):
        require_classes(splits.val, splits.train, "d")
    lone = labelled_splits(put(tmp_path / "b", ".", each=1))
    with pytest.raises(ConfigError, match="each of the 3 classes of d has only one picture"):
        require_classes(lone.val, lone.train, "d")


def test_what_is_odd_about_the_data_is_told(tmp_path: Path, run_eupe: Run) -> None:
    put(put(tmp_path / "unseen", "train", ["a", "b"]), "val")
    shutil.copy(tmp_path / "unseen/train/a/0.png", tmp_path / "unseen/val/cat/copy.png")
    (tmp_path / "unseen/val/loose.png").write_bytes(png(7, 0))
    (tmp_path / "unseen/val/a").mkdir()
    (tmp_path / "unseen/val/a/x.png").write_bytes(png(8, 0))
    out = run_eupe("eval", "knn", "pixels", "--data", tmp_path / "unseen", "--size", 16, "--k", 1).out
    for said in (
        "judged: 8 pictures of val/, by 4 pictures of train/; 5 classes (a, b, cat, dog, owl)",
        "left out: 1 picture of val/ without a label",
        "counted as wrong: 7 pictures of classes that train/ lacks (cat, dog, owl)",
        "with an exact copy in train/: 1 picture of those judged (cat/copy.png)",
    ):
        assert said in out
    put(put(tmp_path / "lone", ".", ["a", "b"]), ".", ["c"], each=1)
    shutil.copy(tmp_path / "lone/a/0.png", tmp_path / "lone/b/copy.png")
    splits = labelled_splits(tmp_path / "lone")
    assert tell_protocol(splits.val, splits.train) == (
        "judged: 6 pictures, each by all the others (leave one out); 3 classes (a, b, c)",
        "counted as wrong: 1 picture without another of their class (c)",
        "with an exact copy among themselves: 3 pictures of those judged (a/0.png, and 2 more)",
    )


def test_linear_tells_which_share_it_judges(tmp_path: Path, run_eupe: Run) -> None:
    words = ("eval", "linear", "pixels", "--data", put(tmp_path, ".", each=12), "--size", 16, "--penalty", 1)
    (result,) = json.loads(run_eupe(*words, "--json").out)["results"]
    (note,) = result["notes"]
    val, train = result["data"]["val"], result["data"]["train"]
    assert note == f"judged: {val} pictures, by the other {train}; 3 classes (cat, dog, owl)"
    assert note in run_eupe(*words).out
