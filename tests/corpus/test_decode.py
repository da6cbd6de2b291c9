from pathlib import Path

import numpy as np
import pytest
from awkward import save_awkward, save_broken
from PIL import Image, ImageOps

from eupe.corpus.pictures import decode_image
from eupe.errors import CorpusError


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_awkward(tmp_path_factory.mktemp("awkward"))


def decoded(path: Path) -> Image.Image:
    return decode_image(path.read_bytes())


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == "RGB" and np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", ["wide.png", "grey.png", "cmyk.jpg"])
def test_plain_modes_equal_pillows_conversion(awkward: dict[str, Path], name: str) -> None:
    assert same(decoded(awkward[name]), Image.open(awkward[name]).convert("RGB"))


def test_exif_orientation_is_applied(awkward: dict[str, Path]) -> None:
    upright = decoded(awkward["turned.jpg"])
    assert upright.size == (80, 120)
    assert same(upright, Image.open(awkward["turned.jpg"]).transpose(Image.Transpose.ROTATE_270))
    assert same(upright, ImageOps.exif_transpose(Image.open(awkward["turned.jpg"])))


def test_transparency_is_composited_on_white(awkward: dict[str, Path]) -> None:
    pixels = np.asarray(decoded(awkward["palette-alpha.png"]))
    assert (pixels[:20, :20] == 255).all()
    grey = Image.open(awkward["grey-alpha.png"])
    level, alpha = (np.asarray(band).astype(float) for band in grey.split())
    expected = level * alpha / 255 + 255 * (1 - alpha / 255)
    assert np.abs(np.asarray(decoded(awkward["grey-alpha.png"]))[..., 0] - expected).max() <= 1


def test_sixteen_bit_samples_keep_their_high_byte(awkward: dict[str, Path]) -> None:
    wide = np.asarray(Image.open(awkward["sixteen-bit.png"])).astype(int)
    pixels = np.asarray(decoded(awkward["sixteen-bit.png"]))
    assert np.array_equal(pixels, np.repeat((wide // 256)[..., None], 3, axis=2))
    assert len(np.unique(pixels)) == 256


def test_first_frame_of_a_moving_picture(awkward: dict[str, Path]) -> None:
    assert same(decoded(awkward["moving.gif"]), Image.open(awkward["moving.gif"]).convert("RGB"))


@pytest.mark.parametrize("name", ["truncated.jpg", "empty.png", "text.jpg", "bomb.png"])
def test_what_is_no_whole_picture_is_refused_with_a_reason(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorpusError) as refusal:
        decoded(save_broken(tmp_path)[name])
    assert len(str(refusal.value)) > 10
    assert "\n" not in str(refusal.value)
    assert " at 0x" not in str(refusal.value), "the same file must give the same row"


def test_a_format_that_needs_an_interpreter_is_not_opened(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    with pytest.raises(CorpusError):
        decoded(tmp_path / "x.eps")
