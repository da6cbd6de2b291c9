"""The store as a library: by key, as a data set, and every example of docs/store.md."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from store_cases import Case, as_arrays, assert_same_bits
from torch.utils.data import DataLoader

import eupe
from eupe.errors import StoreError
from eupe.store import Store, StoreDataset, open_store

DOCS = Path(__file__).parents[2] / "docs" / "store.md"


def test_items_are_every_valid_sample_with_its_views(case: Case, whole: Path) -> None:
    store = open_store(whole)
    items = dict(store.items(size=48))
    valid = [i for i in range(11) if i != 5]
    assert list(items) == store.keys == [case.rows[i].key for i in valid]
    for i, features in zip(valid, items.values(), strict=True):
        assert_same_bits(as_arrays(features), case.expected([i] * 3, [0, 1, 2], 48))


def test_rows_are_found_by_key_in_any_order(case: Case, whole: Path) -> None:
    store = open_store(whole)
    assert store.rows([case.rows[9].key, case.rows[2].key]) == [9, 2]
    with pytest.raises(StoreError, match=r"whole\.zarr has no features of 'folder ü/5\.jpg'"):
        store.rows([case.rows[5].key])


def test_a_data_loader_gives_every_view_once(case: Case, whole: Path) -> None:
    dataset = StoreDataset(open_store(whole), size=32)
    assert len(dataset) == 30
    seen = []
    for batch in DataLoader(dataset, batch_size=7, shuffle=True):  # type: ignore[arg-type]
        for i, (key, view) in enumerate(zip(batch["key"], batch["view"].tolist(), strict=True)):
            row = next(r for r, sample in enumerate(case.rows) if sample.key == key)
            assert batch["dense"][i].numpy().tobytes() == case.arrays["32/dense"][row, view].tobytes()
            assert batch["summary"][i].numpy().tobytes() == case.arrays["32/summary"][row, view].tobytes()
            assert batch["label"][i] == case.rows[row].label
            seen.append((row, view))
    assert sorted(seen) == [(row, view) for row in range(11) if row != 5 for view in range(3)]
    with pytest.raises(IndexError, match="30 views; got 30"):
        dataset[30]
    assert dataset[-1]["view"] == 2


def test_a_forked_worker_is_refused_and_a_spawned_one_reads(whole: Path) -> None:
    """A forked process lacks the threads that read; it would wait for ever."""
    dataset = StoreDataset(open_store(whole))
    with pytest.raises(StoreError, match="cannot be read in a forked process"):
        next(iter(DataLoader(dataset, num_workers=1, multiprocessing_context="fork")))  # type: ignore[arg-type]
    spawned = DataLoader(dataset, batch_size=30, num_workers=1, multiprocessing_context="spawn")  # type: ignore[arg-type]
    assert next(iter(spawned))["dense"].shape == (30, 2, 2, 6)


def test_a_store_travels_by_pickle(case: Case, whole: Path) -> None:
    store = open_store(whole)
    store.read([0], [0])
    again = pickle.loads(pickle.dumps(store))
    assert_same_bits(as_arrays(again.read([3], [1])), case.expected([3], [1], 32))


def test_the_package_gives_the_store_and_nothing_unknown() -> None:
    assert eupe.open_store is open_store
    with pytest.raises(AttributeError, match="no attribute 'open_stores'"):
        eupe.open_stores  # type: ignore[attr-defined]  # noqa: B018


def test_every_example_of_the_docs_runs(tiny_store: Store, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "dinov2-s.zarr").symlink_to(tiny_store.path.local)
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL))
    assert code.count("print") > 8
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "(2, 4, 4, 64)" in done.stdout
