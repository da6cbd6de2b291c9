"""Stores of every released format stay readable, bit for bit: by us, and by zarr-python from the specification."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from safetensors.numpy import load_file

from eupe.store import open_store
from eupe.store.verify import verify

FIXTURES = sorted(Path(__file__).parent.glob("format*/*.zarr"))


def test_every_precision_has_its_fixture() -> None:
    assert {f"{path.parent.name}/{path.stem}" for path in FIXTURES} >= {
        "format1/fp16",
        "format1/bitround5",
        "format1/int8",
        "format2/layers",
    }


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_fixture_reads_as_it_was_written(path: Path) -> None:
    expected = load_file(path.with_suffix(".safetensors"))
    places = expected["rows"].tolist()
    store, group = open_store(path), zarr.open_group(path, mode="r")
    assert store.finished and store.samples["row"].to_pylist() == places
    assert [row for row, word in zip(places, store.samples["status"].to_pylist(), strict=True) if word != "ok"] == [1]
    rows, views = np.repeat(places, 2).tolist(), [0, 1] * len(places)
    for size in store.spec.sizes:
        features = store.read(rows, views, size=size, layers=tuple(store.spec.layers))
        assert features.layers.keys() == ({"6"} if path.parent.name == "format2" else set())
        for name, got in (("boxes", features.boxes), ("flips", features.flips)):
            assert np.array_equal(got.reshape(expected[name].shape), expected[name])
        layers = [(f"dense-{number}", maps) for number, maps in features.layers.items()]
        for kind, ours in (("summary", features.summary), ("dense", features.dense), *layers):
            wanted = expected[f"{size}/{kind}"]
            assert ours is not None and ours.dtype == wanted.dtype
            assert np.array_equal(ours.reshape(wanted.shape), wanted, equal_nan=True)
            theirs = by_the_specification(group, f"{size}/{kind}")[places]
            assert np.array_equal(theirs, wanted, equal_nan=True)
        if store.spec.pixels:
            wanted = expected[f"{size}/pixels"]
            assert np.array_equal(store.read_pixels(rows, views, size=size).reshape(wanted.shape), wanted)
            assert np.array_equal(np.asarray(group[f"{size}/pixels"])[places], wanted)
    assert np.array_equal(store.read_digests(rows, views).reshape(-1, 2), expected["digests"])


def by_the_specification(group: zarr.Group, path: str) -> NDArray[Any]:
    """A feature array, decoded as FORMAT.md tells it."""
    stored: NDArray[Any] = np.asarray(group[path])
    spec: Any = group.attrs["eupe"]
    token, _, _ = path.split("/")[1].partition("-")
    if spec["precision"][token] != "int8":
        return stored
    mean, std = (np.frombuffer(base64.b64decode(spec["calibration"][path][name]), "<f4") for name in ("mean", "std"))
    scale = np.ascontiguousarray(stored[..., -2:]).view("<f2").astype(np.float32)
    return stored[..., :-2] * scale * std + mean


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_fixture_is_whole(path: Path) -> None:
    report = verify(path)
    assert not report.damages and report.num_objects > 20
