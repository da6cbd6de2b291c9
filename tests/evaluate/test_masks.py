"""Masks as people have them: read as what they are, or refused with what they hold and the option that tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from planted import masks

from eupe.errors import ConfigError, CorpusError
from eupe.evaluate.layouts import mask_split
from eupe.evaluate.masks import CLASS_NUMBERS, NOTHING, Classes, find_classes, read_code, read_mask

Run = Callable[..., Any]
VALUES = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
COLOURS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 64]], dtype=np.uint8)


def palette(values: NDArray[Any]) -> Image.Image:
    image = Image.fromarray(values)
    image.putpalette([7, 7, 7, *COLOURS[1:].ravel().tolist()])
    return image


WRITERS: dict[str, Callable[[Path], None]] = {
    "grey.png": lambda path: Image.fromarray(VALUES).save(path),
    "palette.png": lambda path: palette(VALUES).save(path),
    "four-bits.png": lambda path: palette(VALUES).save(path, bits=4),
    "sixteen.png": lambda path: Image.fromarray(VALUES.astype(np.uint16)).save(path),
    "grey-as-rgb.png": lambda path: Image.fromarray(np.repeat(VALUES[..., None], 3, axis=2)).save(path),
    "grey-as-rgba.png": lambda path: Image.fromarray(np.dstack([*[VALUES] * 3, VALUES * 0 + 255])).save(path),
    "grey-alpha.png": lambda path: Image.fromarray(np.dstack([VALUES, VALUES * 0 + 255]), mode="LA").save(path),
    "grey.bmp": lambda path: Image.fromarray(VALUES).save(path),
    "grey.TIF": lambda path: Image.fromarray(VALUES).save(path, format="TIFF"),
    "whole.tiff": lambda path: Image.fromarray(VALUES.astype(np.int32)).save(path),
    "floats.tiff": lambda path: Image.fromarray(VALUES.astype(np.float32)).save(path),
    "array.npy": lambda path: np.save(path, VALUES.astype(np.int64)),
}


@pytest.mark.filterwarnings("ignore:.*mode.*:DeprecationWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_class_numbers_are_read_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read_mask(tmp_path / name).tolist() == VALUES.tolist()


def test_one_bit_is_two_classes_and_none_is_a_number(tmp_path: Path) -> None:
    Image.fromarray(VALUES == 1).save(tmp_path / "bit.png")
    np.save(tmp_path / "bools.npy", VALUES == 1)
    Image.fromarray(VALUES.astype(np.int32) - 1).save(tmp_path / "none.tiff")
    assert (
        read_mask(tmp_path / "bit.png").tolist()
        == read_mask(tmp_path / "bools.npy").tolist()
        == [[0, 1, 0]] * 1 + [[0, 1, 0]]
    )
    assert read_mask(tmp_path / "none.tiff").min() == -1


@pytest.mark.parametrize("write", ["colours.png", "colours-palette.png", "colours-rgba.png"])
def test_colours_are_read_where_they_are_given(write: str, tmp_path: Path) -> None:
    path = tmp_path / write
    if write == "colours.png":
        Image.fromarray(COLOURS[VALUES]).save(path)
    elif write == "colours-rgba.png":
        Image.fromarray(np.dstack([COLOURS[VALUES], VALUES * 0 + 255])).save(path)
    else:
        image = Image.fromarray(VALUES[..., ::-1].copy())
        image.putpalette(COLOURS.ravel().tolist())
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    code = read_code("#008040,#800000", "#000000")
    classes = find_classes([path], code, nothing=255, names=None, data=tmp_path)
    expected = np.array([NOTHING, 1, 0])[VALUES]
    assert classes.read(path).tolist() == expected.tolist()
    assert code.protocol == {"mask_values": ["#008040", "#800000"], "mask_ignore": ["#000000"]}


def refused(path: Path, array: NDArray[Any], words: str, **options: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path)
    with pytest.raises((ConfigError, CorpusError), match=words):
        find_classes([path], **{"code": CLASS_NUMBERS, "nothing": 255, "names": None, "data": Path("d"), **options})


def test_values_that_may_mean_several_things_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    binary = np.where(VALUES == 1, 255, 0).astype(np.uint8)
    refused(path, binary, "hold 0, 255; of these, 0 is a class and 255 stands for none.*--mask-values 0,255")
    refused(path, binary, "hold 0, 255; of these, 255 is a class and 0 stands for none.*--mask-values 0,255", nothing=0)
    refused(path, binary, "of these, 0 is a class", names=2)
    wide = (VALUES == 1).astype(np.uint16) * 1000
    refused(path, wide, "hold 0, 1000, which would be 1,001 classes if they .*; .* --mask-values 0,1000")
    refused(
        path, np.where(VALUES == 2, 65535, VALUES.astype(np.uint16)), "hold 0, 1, 65535, which would be .* if they were"
    )
    ids = np.arange(300, dtype=np.uint16)[None]
    refused(path, ids, "; 255 may be a class or no class; give .* with --mask-ignore")
    refused(path, COLOURS[VALUES], "hold 3 colours .*--mask-values '#000000,#008040,#800000'")
    photo = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    refused(path, photo, "colours, too many to be classes")
    refused(path, VALUES * 0 + 255, "hold no class at all, only 255")
    refused(path, VALUES * 0 + 3, "of these, 3 is a class", names=4)
    refused(path, VALUES, "--mask-values gives 2 classes, but d names 3", code=read_code("0,1", None), names=3)
    refused(tmp_path / "m.tiff", VALUES.astype(np.int32) - 1, "hold -1, 0, 1, but class numbers start at 0")
    refused(tmp_path / "f.tiff", VALUES / np.float32(2), "values of type float32 that are not whole numbers")
    see_through = np.dstack([COLOURS[VALUES], VALUES * 100])
    refused(path, see_through, "is transparent in places")


def test_what_options_say_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.png"

    def read(array: NDArray[Any], values: str | None, ignored: str | None, nothing: int = 255) -> list[list[int]]:
        Image.fromarray(array).save(path)
        code = read_code(values, ignored)
        return find_classes([path], code, nothing=nothing, names=None, data=tmp_path).read(path).tolist()

    binary = np.array([[0, 255]], dtype=np.uint8)
    assert read(binary, "0,255", None) == read(binary, "0,255", None, nothing=0) == [[0, 1]]
    assert read(binary, "255,0", None) == [[1, 0]]
    none = np.array([[0, 1, 65535]], dtype=np.uint16)
    assert read(none, None, "65535") == read(none, "0,1", "65535") == [[0, 1, NOTHING]]
    assert read(np.arange(300, dtype=np.uint16)[None], None, "0") == [[NOTHING, *range(1, 300)]]
    assert read(np.array([[0, 15, 255]], dtype=np.uint8), "0,15", None) == [[0, 1, NOTHING]]
    with pytest.raises(CorpusError, match=r"m\.png holds class 7, but there are 2 classes \(0, 255\); --mask-values"):
        read(np.array([[0, 255, 7]], dtype=np.uint8), "0,255", None)


@pytest.mark.parametrize(
    ("values", "ignored", "said"),
    [
        ("0;255", None, "--mask-values takes whole numbers up to"),
        ("0,#ff0000", None, "--mask-values takes whole numbers up to"),
        ("#ff0000,#00ff00", "255", "--mask-ignore takes whole numbers up to"),
        ("0,1", "1", "--mask-values and --mask-ignore name a value twice"),
        ("0", None, "--mask-values 0 is one class"),
        ("0,99999999999", None, "--mask-values takes whole numbers up to"),
    ],
)
def test_options_that_say_nothing_are_refused(values: str, ignored: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_code(values, ignored)


def test_masks_that_lose_values_or_are_several_are_refused(tmp_path: Path) -> None:
    Image.fromarray(VALUES).save(tmp_path / "lossy.png", format="JPEG")
    pages = [Image.fromarray(VALUES)] * 2
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    deep = bytearray(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(9))
    deep[24:26] = bytes([16, 2])
    (tmp_path / "deep.png").write_bytes(bytes(deep))
    for name, said in (
        ("lossy.png", "is a JPEG, which changes values"),
        ("pages.tiff", "several pictures in one file"),
        ("deep.png", "has 16 bits in each of several channels"),
    ):
        with pytest.raises(CorpusError, match=said):
            read_mask(tmp_path / name)
    data = masks(tmp_path / "d")
    path = data / "masks" / "train" / "1.png"
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
    with pytest.raises(CorpusError, match=r"1\.jpg is a ground-truth map with lossy compression"):
        mask_split(data, "train")
    path.with_suffix(".jpg").rename(path.with_name("1_mask.png"))
    with pytest.raises(CorpusError, match=r"has no 1\.png .*which holds 0\.png, 1_mask\.png, 2\.png"):
        mask_split(data, "train")


def test_a_table_of_values_says_what_a_naive_loop_does() -> None:
    classes = Classes((7, -2, 300), (255, 0), CLASS_NUMBERS)
    low, table = classes._table
    for value in (-2, 0, 7, 255, 300):
        naive = {7: 0, -2: 1, 300: 2}.get(value, NOTHING)
        assert table[value - low] == naive


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("images/Train masks/Train", "images/Valid masks/Valid"),
        ("images/train2017 masks/train2017", "images/val2017 masks/val2017"),
        ("train/images train/masks", "test/images test/masks"),
        ("training/images training/masks", "valid/images valid/masks"),
    ],
)
def test_splits_of_masks_however_they_are_called(train: str, val: str, tmp_path: Path) -> None:
    made = masks(tmp_path / "made", train=2, val=1)
    for split, folders in (("train", train), ("val", val)):
        for kind, folder in zip(("images", "masks"), folders.split(), strict=True):
            (tmp_path / "d" / folder).parent.mkdir(parents=True, exist_ok=True)
            (made / kind / split).rename(tmp_path / "d" / folder)
    found = [mask_split(tmp_path / "d", split) for split in ("train", "val")]  # type: ignore[arg-type]
    assert [mapped.name for mapped in found] == [train.split()[0], val.split()[0]]
    assert [len(mapped.maps) for mapped in found] == [2, 1]
    assert found[1].protocol == ({"split": "test"} if "test" in val else {})
    (tmp_path / "d" / val.split()[0]).rename(tmp_path / "d" / "images_of_tomorrow")
    with pytest.raises(CorpusError, match="do not both have a folder val or test"):
        mask_split(tmp_path / "d", "val")


def test_the_verb_takes_values_and_says_what_it_judged(tmp_path: Path, run_eupe: Run) -> None:
    data = masks(tmp_path)
    for path in (data / "masks").rglob("*.png"):
        values = np.asarray(Image.open(path))
        Image.fromarray(np.where(values == 1, 255, np.where(values == 255, 100, 0)).astype(np.uint8)).save(path)
    words = ["eval", "segment", "pixels", "--data", data, "--size", 48, "--steps", 40, "--lr", 0.1]
    refusal = run_eupe(*words)
    assert refusal.code == 2 and "--mask-values 0,100,255" in refusal.err and refusal.err.count("\n") == 1
    note = "judged: 3 pictures of images/val, by 6 of images/train; 2 classes (values 0, 255, and 100 for none)"
    results = [
        json.loads(run_eupe(*words, "--mask-values", *more, "--json").out)["results"][0]
        for more in (["0,255", "--mask-ignore", "100"], ["0,255,100"])
    ]
    assert results[0]["scores"]["miou"] > 0.8 and results[0]["scores"] != results[1]["scores"]
    assert results[0]["protocol"]["mask_values"] == ["0", "255"] and results[0]["data"]["classes"] == 2
    assert results[0]["notes"] == [f"{note}, 2 of them judged"]
