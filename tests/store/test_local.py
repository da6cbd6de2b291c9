"""Views straight out of local shards, against tensorstore's and zarr-python's reading of the same bytes."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from numcodecs import blosc
from store_cases import CODED, Case, make_case, make_spec, write_store

from eupe.common.storage import StoragePath
from eupe.errors import PartCorruptError
from eupe.store import backends, open_store
from eupe.store.backends import Array, LocalViews
from eupe.store.layout import arrays
from eupe.store.shard import crc32c, object_key, shard_blocks

DENSE = "32/dense"


@pytest.fixture(scope="module", params=[None, CODED], ids=["fp16", "int8"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case = make_case(make_spec(num_samples=90, samples_per_part=1, precision=request.param))
    path = tmp_path_factory.mktemp("stores") / "s.zarr"
    write_store(case, path)
    return case, path


def views_of(path: Path, name: str = DENSE) -> LocalViews:
    layout = next(layout for layout in arrays(open_store(path).spec) if layout.path == name)
    return LocalViews(path, layout)


def open_files(store: Path) -> int:
    """Return the number of a store's files that this process has open."""
    gc.collect()
    return sum(os.path.realpath(link).startswith(str(store)) for link in Path("/proc/self/fd").iterdir())


def test_every_view_as_others_read_it(stored: tuple[Case, Path]) -> None:
    _, path = stored
    rows, views = (np.indices((90, 3)).reshape(2, -1)).tolist()
    order = np.random.default_rng(0).permutation(270)
    rows, views = np.array(rows)[order].tolist(), np.array(views)[order].tolist()
    store = open_store(path)
    got = views_of(path).begin(rows, views).result()
    layout = next(layout for layout in arrays(store.spec) if layout.path == DENSE)
    assert np.array_equal(got, Array.open(store.path, layout).begin(rows, views).result(), equal_nan=True)
    by_zarr = np.asarray(zarr.open_array(path / DENSE, mode="r"))[rows, views]
    assert np.array_equal(np.moveaxis(got, 1, -1), by_zarr, equal_nan=True)
    assert got.dtype == by_zarr.dtype and got.flags.c_contiguous


def test_few_files_stay_open_and_all_are_closed(stored: tuple[Case, Path]) -> None:
    _, path = stored
    views = views_of(path)
    for _ in range(2):
        views.begin(list(range(90)), [0] * 90).result()
    assert 0 < open_files(path) <= backends.OPEN_SHARDS < 90
    del views
    assert open_files(path) == 0


def test_a_file_is_not_closed_while_it_is_read(stored: tuple[Case, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One open shard at a time, many threads: each evicts what the others read."""
    _, path = stored
    monkeypatch.setattr(backends, "OPEN_SHARDS", 1)
    views = views_of(path)
    expected = np.asarray(zarr.open_array(path / DENSE, mode="r"))[:, 1]

    def read(seed: int) -> None:
        rows = np.random.default_rng(seed).permutation(90).tolist()
        got = views.begin(rows, [1] * 90).result()
        assert np.array_equal(np.moveaxis(got, 1, -1), expected[rows], equal_nan=True)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(20)))


def checked(data: bytes) -> bytes:
    return data + crc32c(data).to_bytes(4, "little")


@pytest.mark.parametrize("what", ["another size", "flipped", "swapped index", "cut", "missing", "never written"])
def test_what_is_not_whole_is_not_read(tmp_path: Path, what: str) -> None:
    """The first samples are whole and stay readable."""
    case = make_case(make_spec())
    path = tmp_path / "s.zarr"
    write_store(case, path)
    views = views_of(path)
    file = path / object_key(views._layout, 1)
    data = bytearray(file.read_bytes())
    if what == "another size":
        larger = checked(blosc.compress(np.zeros(4096, np.float16), b"lz4", 1, 0))
        smaller = checked(blosc.compress(np.zeros(4, np.float16), b"lz4", 1, 0))
        data = bytearray(b"".join(shard_blocks([larger, smaller] * 6, views._layout)))
    elif what == "flipped":
        for offset in range(0, len(data) // 2, 40):
            data[offset] ^= 16
    elif what == "swapped index":
        data[-36:-20], data[-20:-4] = data[-20:-4], data[-36:-20]
    elif what == "cut":
        del data[5:]
    elif what == "never written":
        data = bytearray(b"".join(shard_blocks([], views._layout)))
    file.write_bytes(data)
    if what == "missing":
        file.unlink()
    store = open_store(path)
    for view in (0, 1):
        with pytest.raises(PartCorruptError, match=rf"damaged or missing features: .*`eupe store repair {path}`"):
            store.read([1, 5], [0, view])
    assert np.array_equal(store.read([0, 3], [0, 1]).dense, case.expected([0, 3], [0, 1], 32)["dense"])


def test_what_was_mended_is_read_by_a_store_opened_anew(stored: tuple[Case, Path], tmp_path: Path) -> None:
    case = make_case(make_spec())
    store = write_store(case, tmp_path / "s.zarr")
    file = tmp_path / "s.zarr" / object_key(views_of(tmp_path / "s.zarr")._layout, 1)
    whole = file.read_bytes()
    StoragePath.of(file.parent).write(file.name, whole[:-9])
    with pytest.raises(PartCorruptError):
        store.read([5], [0])
    StoragePath.of(file.parent).write(file.name, whole)
    assert open_store(store.path).read([5], [0]).dense is not None
