"""A reader that shares no code with ours, zarrita on Node, sees the bits that were written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from eupe.store import layout, open_store
from eupe.store.layout import StoreSpec
from eupe.store.precision import Calibration
from eupe.store.writer import Part, Row, StoreWriter, create_store, finish_store

HERE = Path(__file__).parent
GOLDEN = sorted((HERE.parent / "golden").glob("format*/*.zarr"))

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")

SPEC = StoreSpec(
    teacher={"name": "toy", "dense_dim": 48, "summary_dim": 32, "weights_sha256": "ab" * 32, "dtype": "fp32"},
    corpus={"fingerprint": "cd" * 32, "segments": [5, 2], "root": "/pictures"},
    views={"policy": "rrc", "num_views": 2, "seed": 0},
    sizes=(64, 96),
    grids=(4, 6),
    tokens=("summary", "dense"),
    samples_per_part=4,
    precision={"summary": "fp16", "dense": "fp16"},
)
ROWS = [0, 1, 2, 3, 4, 8, 9]
"""The second segment begins a part; rows 5 to 7 stay empty."""
FAILED = 2
CALIBRATION = Calibration(np.linspace(-1, 1, 48, dtype=np.float32), np.linspace(1, 4, 48, dtype=np.float32))
CODED = replace(
    SPEC,
    precision={"summary": "bitround:4", "dense": "int8"},
    calibration={f"{size}/dense": CALIBRATION.to_json() for size in SPEC.sizes},
)


def smooth_halves(shape: tuple[int, ...]) -> NDArray[np.float16]:
    """Features that compress, as real ones do: blosc stores noise as it is, and would prove little."""
    axes = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    halves = (np.sin(sum((i + 1) * axis for i, axis in enumerate(axes)) / 64) * 8).astype(np.float16)
    special = np.array([0.0, -0.0, 65504, -65504, 2.0**-24], np.float16)
    halves.reshape(-1)[: len(special)] = special
    halves[FAILED] = np.nan
    return halves


@pytest.fixture(scope="session")
def written() -> dict[str, NDArray[Any]]:
    """Array path to what the store is to hold."""
    n, k = SPEC.num_samples, SPEC.num_views
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        "boxes": rng.integers(-1, 2**31 - 1, (n, k, 4), dtype=np.int32),
        "flips": np.array([[True, False], [False, True], [False, False], [True, True]] * 2)[:n],
        "digests": rng.integers(2**63, 2**64, (n, k), dtype=np.uint64),
    }
    for size, grid in zip(SPEC.sizes, SPEC.grids, strict=True):
        arrays[f"{size}/summary"] = smooth_halves((n, k, 32))
        arrays[f"{size}/dense"] = smooth_halves((n, k, grid, grid, 48))
    return arrays


def write(path: Path, spec: StoreSpec, written: dict[str, NDArray[Any]]) -> Path:
    create_store(path, spec)
    writer = StoreWriter(path)
    for index, part in enumerate([slice(0, 4), slice(4, 5), slice(5, 7)]):
        rows = [
            Row(f"{i}.png", None, None, error="broken" if i == FAILED else None)
            for i in range(*part.indices(spec.num_samples))
        ]
        features = {name: values[part] for name, values in written.items() if "/" in name}
        views = (written[name][part] for name in ("boxes", "flips", "digests"))
        writer.commit(Part(index, rows, *views, features))
    finish_store(path)
    return path


@pytest.fixture(scope="session")
def store(written: dict[str, NDArray[Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("interop") / "toy.zarr", SPEC, written)


@pytest.fixture(scope="session")
def coded_store(written: dict[str, NDArray[Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("interop") / "coded.zarr", CODED, written)


@pytest.fixture(scope="session")
def zarrita() -> None:
    """Installs into `node_modules` beside `package.json`, which git ignores."""
    npm = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"]
    installed = subprocess.run(npm, cwd=HERE, capture_output=True, text=True)
    assert installed.returncode == 0, f"npm install failed:\n{installed.stdout}{installed.stderr}"


def read(store: Path) -> dict[str, Any]:
    ran = subprocess.run(["node", "read_store.mjs", store], cwd=HERE, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    result: dict[str, Any] = json.loads(ran.stdout)
    return result


@pytest.fixture(scope="session")
def read_by_zarrita(zarrita: None, store: Path) -> dict[str, Any]:
    return read(store)


def assert_same_bits(read: dict[str, Any], values: NDArray[Any]) -> None:
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    assert read["dtype"] == values.dtype.name
    assert read["shape"] == list(values.shape)
    bits = np.array([int(word) for word in read["bits"]], dtype=unsigned)
    np.testing.assert_array_equal(bits.reshape(values.shape), np.ascontiguousarray(values).view(unsigned))


def test_the_attributes_are_found(read_by_zarrita: dict[str, Any]) -> None:
    assert read_by_zarrita["format"] == 1


@pytest.mark.parametrize("path", ["boxes", "flips", "digests", *(f"{s}/{k}" for s in (64, 96) for k in SPEC.tokens)])
def test_every_bit_is_read(read_by_zarrita: dict[str, Any], written: dict[str, NDArray[Any]], path: str) -> None:
    """Through sharding, transpose, blosc and crc32c, failed sample, partial parts and empty rows included."""
    fill = np.nan if "/" in path else 0
    values = np.full((10, *written[path].shape[1:]), fill, written[path].dtype)
    values[ROWS] = written[path]
    assert_same_bits(read_by_zarrita["arrays"][path], values)


def test_int8_is_read_and_decoded_as_the_page_says(zarrita: None, coded_store: Path) -> None:
    """Integers and the two bytes of the scale; what comes out is what our reader gives."""
    arrays = read(coded_store)["arrays"]
    for size in SPEC.sizes:
        found = arrays[f"{size}/dense"]
        assert (found["dtype"], found["shape"][-1]) == ("int8", 50)
        stored = np.array([int(word) for word in found["bits"]], np.uint8).view(np.int8).reshape(found["shape"])
        assert (stored[5:8] == 127).all()
        scale = stored[..., -2:].copy().view("<f2").astype(np.float32)
        tokens = stored[..., :-2] * scale * CALIBRATION.std + CALIBRATION.mean
        places = [(row, view) for row in ROWS for view in range(2)]
        features = open_store(coded_store).read([r for r, _ in places], [v for _, v in places], size=size)
        assert features.dense is not None and features.summary is not None
        np.testing.assert_array_equal(tokens[ROWS].reshape(features.dense.shape), features.dense)
        summary = np.array([int(word) for word in arrays[f"{size}/summary"]["bits"]], np.uint16).view(np.float16)
        summary = summary.reshape(arrays[f"{size}/summary"]["shape"])[ROWS]
        np.testing.assert_array_equal(summary.reshape(features.summary.shape), features.summary)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_golden_stores_are_read(zarrita: None, path: Path) -> None:
    """Bit by bit as zarr-python reads them, which `tests/golden` holds against what was written."""
    arrays, by_zarr = read(path)["arrays"], zarr.open_group(path, mode="r")
    names = ["boxes", "flips", "digests", *open_store(path).spec.feature_paths]
    assert len(names) == (9 if path.parent.name == "format2" else 7)
    for name in names:
        assert_same_bits(arrays[name], np.asarray(by_zarr[name]))


@pytest.mark.parametrize("path", [f"{s}/{k}" for s in (64, 96) for k in SPEC.tokens])
def test_one_view_alone_is_read(read_by_zarrita: dict[str, Any], written: dict[str, NDArray[Any]], path: str) -> None:
    """The fifth row is the first of part 1."""
    assert_same_bits(read_by_zarrita["arrays"][f"{path}[4,1]"], written[path][4, 1])


@pytest.mark.parametrize("path", [f"{s}/{k}" for s in (64, 96) for k in SPEC.tokens])
def test_the_statistics_are_read(read_by_zarrita: dict[str, Any], written: dict[str, NDArray[Any]], path: str) -> None:
    """Tolerance: float64 rounding, relative to the largest value."""
    vectors = np.delete(written[path], FAILED, axis=0).astype(np.float64).reshape(-1, written[path].shape[-1])
    read = {
        name: np.array([int(word) for word in read_by_zarrita["arrays"][f"stats/{path}/{name}"]["bits"]], np.uint64)
        for name in ("count", "mean", "std", "cov", "norms")
    }
    atol = 1e-12 * np.abs(vectors).max()
    assert read["count"].item() == len(vectors)
    np.testing.assert_allclose(read["mean"].view(np.float64), vectors.mean(axis=0), rtol=1e-12, atol=atol)
    np.testing.assert_allclose(read["std"].view(np.float64), vectors.std(axis=0), rtol=1e-12, atol=atol)
    covariance = np.cov(vectors.T, bias=True).ravel()
    np.testing.assert_allclose(read["cov"].view(np.float64), covariance, rtol=1e-12, atol=atol * np.abs(vectors).max())
    assert read["norms"].sum() == len(vectors)


def test_the_shards_of_this_store_are_compressed(store: Path, written: dict[str, NDArray[Any]]) -> None:
    """The oracle's guard: a shard stored as it is would not exercise blosc."""
    (shard,) = (file for file in (store / "96/dense/c/0").rglob("*") if file.is_file())
    assert shard.stat().st_size < 0.7 * written["96/dense"][:4].nbytes


def test_the_example_of_the_format_page_runs(
    read_by_zarrita: dict[str, Any], store: Path, written: dict[str, NDArray[Any]]
) -> None:
    """The fixture `read_by_zarrita` has zarrita installed before the example runs."""
    page = Path(layout.__file__).with_name("FORMAT.md").read_text("utf-8")
    (example,) = re.findall(r"```js\n(.*?)```", page, re.DOTALL)
    # the page reads the third sample of part 1, where this store's part 1 has one
    example = example.replace("eupe.samples_per_part + 2", "2 * eupe.samples_per_part + 1")
    script = example.replace('"dinov2.zarr"', json.dumps(str(store))) + "console.log(at(3, 1, 40), at(0, 2, 5));"
    command = ["node", "--input-type=module", "--eval", script]
    ran = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    dense = written["64/dense"][6, 0]
    assert [float(word) for word in ran.stdout.split()] == [float(dense[3, 1, 40]), float(dense[0, 2, 5])]
