"""Whoever worked with an earlier commit goes on: what lies in `work1` is resumed, or is the cache hit that it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from make_work import EXACT, HALF_RUN, HALF_STORE, RUN, STORE, picture, set_times
from safetensors.numpy import load_file

from eupe.corpus.index import ROOT_KEY, read_index
from eupe.store import open_store
from eupe.store.verify import verify

WORK = Path(__file__).parent / "work1"

Run = Callable[[str], Any]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as its owner has it, somewhere else on the disk. Not to be changed."""
    folder = tmp_path_factory.mktemp("left") / "work"
    shutil.copytree(WORK, folder)
    set_times(folder)
    return folder


@pytest.fixture
def work(left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `left`, in which commands are run."""
    folder = shutil.copytree(left, tmp_path / "work")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(run_eupe: Callable[..., Any]) -> Run:
    return lambda words: run_eupe(*words.split())


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


def test_finished_work_is_a_cache_hit(work: Path, run: Run) -> None:
    before = files(work)
    for words in (f"{RUN} --corpus photos", f"extract {STORE} {EXACT} --out whole.zarr"):
        ended = run(f"{words} --json")
        assert ended.code == 0, ended.err
        assert json.loads(ended.out)["cached"] is True
    assert files(work) == before


def test_a_finished_pipeline_runs_nothing(work: Path, run: Run) -> None:
    before = files(work / "out")
    ended = run("run recipe.yaml --json")
    assert ended.code == 0, ended.err
    steps = json.loads(ended.out)["steps"]
    assert len(steps) == 7 and all(step["cached"] for step in steps), ended.err
    after = files(work / "out")
    for name in (".digests.json", ".lock"):  # in which the one who runs it notes who that is
        del before[name], after[name]
    assert after == before


def test_a_killed_run_goes_on_to_the_same_end(work: Path, run: Run) -> None:
    ended = run(f"{HALF_RUN} --corpus photos --out half-run --resume")
    assert ended.code == 0, ended.err
    theirs, ours = (load_file(work / name / "student.safetensors") for name in ("expected-run", "half-run"))
    assert ours.keys() == theirs.keys()
    apart = np.concatenate([np.abs(ours[name] - tensor).ravel() for name, tensor in theirs.items()])
    # Each step of AdamW moves a weight by some 1e-3, even if its gradient is next to nothing; the direction is then one
    # of rounding, which other processors and other numbers of threads do differently. So a few weights may be apart.
    assert np.quantile(apart, 0.999) < 1e-4 and apart.max() < 5e-4
    steps = [
        [json.loads(line).get("step") for line in (work / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("expected-run", "half-run")
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize(("name", "count"), [("folder", 12), ("tar", 4), ("table", 4)])
def test_an_index_is_read_and_made_again_the_same(work: Path, run: Run, name: str, count: int) -> None:
    path = work / f"index-of-{name}.parquet"
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, ROOT_KEY: str(_root(work, name))}), path)
    before = read_index(path)
    assert len(before) == count
    corpus = {"folder": "photos", "tar": "photos.tar", "table": "photos-table.parquet"}[name]
    ended = run(f"index --corpus {corpus} --out {path} --json")
    assert ended.code == 0, ended.err
    after = read_index(path)
    assert after.samples.equals(before.samples)
    assert after.fingerprint == before.fingerprint == json.loads(ended.out)["fingerprint"]


def _root(work: Path, name: str) -> Path:
    return work / "photos" if name == "folder" else work


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_a_killed_extraction_goes_on_and_its_store_grows_is_mended_and_trains(work: Path, run: Run) -> None:
    half, whole = work / "half.zarr", work / "whole.zarr"
    kept = {name: data for name, data in files(half).items() if name.startswith(("parts/0", "256/dense/c"))}
    ended = run(HALF_STORE)
    assert ended.code == 0, ended.err
    after = files(half)
    assert all(after[name] == data for name, data in kept.items() if not name.endswith(".moments"))
    assert not verify(half).damages
    ours, theirs = open_store(half), open_store(whole)
    assert ours.samples.equals(theirs.samples)
    rows = np.repeat(ours.samples["row"].to_numpy(), 32).tolist()
    views = list(range(32)) * 12
    a, b = (store.read(rows, views, size=256) for store in (ours, theirs))
    for kind in ("boxes", "flips"):
        assert np.array_equal(getattr(a, kind), getattr(b, kind))
    for kind in ("summary", "dense"):
        np.testing.assert_allclose(getattr(a, kind), getattr(b, kind), rtol=0.01, atol=0.01)

    (work / "photos" / "class1" / "more.jpg").write_bytes(picture(99))
    ended = run(HALF_STORE)
    assert ended.code == 0, ended.err
    grown = files(half)
    assert open_store(half).spec.corpus["segments"] == [12, 1]
    damaged = half / "256/dense/c/1/0/0/0/0"
    os.truncate(damaged, 1000)
    assert run("store verify half.zarr").code == 1
    ended = run("store repair half.zarr --corpus photos --weights weights.safetensors")
    assert ended.code == 0, ended.err
    assert not verify(half).damages
    assert {name: len(data) for name, data in files(half).items()} == {name: len(data) for name, data in grown.items()}
    ended = run(RUN.replace("whole.zarr", "half.zarr").replace("finished-run", "again --corpus photos"))
    assert ended.code == 0, ended.err
