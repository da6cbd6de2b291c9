"""A converted store is the one that extraction would have written; what the source does not hold is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from making import make_corpus, make_store
from mending import extend, files, flip, make_parts
from numpy.typing import NDArray
from object_store import S3Server

from eupe.common.storage import StoragePath
from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError, CorpusError, PartCorruptError, SpecMismatchError, StoreError
from eupe.extract import convert as convert_module
from eupe.extract.convert import convert
from eupe.extract.parts import converted_spec
from eupe.extract.worker import pool_cells, to_fp16
from eupe.store import Store, open_store
from eupe.store.precision import Calibration
from eupe.store.verify import verify
from eupe.store.writer import StoreWriter

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")

RECOLOURED = ViewSpec(policy="rrc", num_views=2, photometric="eupe")
GRID = 2
OPTIONS: dict[str, Any] = {"views": RECOLOURED, "sizes": (32, 64), "pixels": True}
"""Everything that a store can have; maps of 2 x 2 and of 4 x 4 cells."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 pictures and one that cannot be read: three parts."""
    folder = make_corpus(tmp_path_factory.mktemp("pictures") / "c", count=18)
    (folder / "class1" / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny_weights: Path) -> Store:
    """A store in fp16, not to be changed."""
    return make_parts(tmp_path_factory.mktemp("source") / "s.zarr", corpus, tiny_weights, **OPTIONS)


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory, source: Store) -> Path:
    """A folder of converted stores, by name. Not to be changed."""
    folder = tmp_path_factory.mktemp("lossy")
    convert(source.path, folder / "int8", precision="int8")
    convert(source.path, folder / "round", precision="bitround:7")
    convert(folder / "int8", folder / "pooled", precision="int8", grid=1)
    return folder


def every_view(store: Store, path: str) -> NDArray[np.float64]:
    """Decode the features of the samples that have any: [samples, views, ...]."""
    rows, k = store.rows(store.keys), store.spec.num_views
    places = [row for row in rows for _ in range(k)], list(range(k)) * len(rows)
    decoded = store.read_tokens(path, *places).decode()
    return decoded.reshape(len(rows), k, *decoded.shape[1:]).astype(np.float64)


def pooling_fp16() -> Any:
    """Make the teacher give what fp16 keeps of its maps."""
    return mock.patch("eupe.extract.worker.pool_cells", lambda dense, grid: pool_cells(to_fp16(dense)[0], grid))


def test_every_byte_is_as_extraction_writes_it(tmp_path: Path, source: Store, corpus: Path, tiny_weights: Path) -> None:
    precision = "dense=int8,summary=bitround:9"
    extracted = make_parts(tmp_path / "e.zarr", corpus, tiny_weights, precision=precision, **OPTIONS)
    report = convert(source.path, tmp_path / "c.zarr", precision=precision)
    assert files(tmp_path / "c.zarr") == files(tmp_path / "e.zarr")
    assert verify(tmp_path / "c.zarr").whole
    assert (report.num_samples, report.num_views, report.num_failed, report.cached) == (19, 38, 1, False)
    assert (report.source_bytes, report.stored_bytes) == (source.stored_bytes, extracted.stored_bytes)


@pytest.mark.parametrize(("precision", "parts"), [("fp16", make_store), ("int8", make_parts)])
def test_a_coarser_grid_has_extractions_bytes_where_the_map_was_fp16(
    tmp_path: Path,
    source: Store,
    corpus: Path,
    tiny_weights: Path,
    precision: str,
    parts: Callable[..., Store],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a part takes up all of the source's: fewer bytes a sample make larger parts."""
    with pooling_fp16():
        made = parts(tmp_path / "e.zarr", corpus, tiny_weights, precision=precision, grid=GRID, **OPTIONS)
    if parts is make_parts:
        monkeypatch.setattr(convert_module, "samples_per_part", lambda num_samples, num_bytes: 1)
    assert (made.spec.num_parts == 1) == (parts is make_store)
    convert(source.path, tmp_path / "c.zarr", precision=precision, grid=GRID)
    assert files(tmp_path / "c.zarr") == files(tmp_path / "e.zarr")


def test_a_coarser_grid_differs_from_extractions_in_the_rounding_of_pooled_maps_alone(
    tmp_path: Path, source: Store, corpus: Path, tiny_weights: Path
) -> None:
    extracted = make_store(tmp_path / "e.zarr", corpus, tiny_weights, grid=GRID, **OPTIONS)
    convert(source.path, tmp_path / "c.zarr", precision="fp16", grid=GRID)
    ours, theirs = files(tmp_path / "c.zarr"), files(tmp_path / "e.zarr")
    assert ours.keys() == theirs.keys()
    different = {name for name in ours if ours[name] != theirs[name]}
    assert "64/dense/c/0/0/0/0/0" in different
    commits = {name for name in different if name.startswith("parts/")}
    assert all(name.startswith(("64/dense/c/", "stats/64/dense/")) for name in different - commits)
    for name in commits:  # they record the checksums of the maps
        assert pq.read_table(tmp_path / "c.zarr" / name).equals(pq.read_table(tmp_path / "e.zarr" / name))

    got, exact = (every_view(store, "64/dense") for store in (open_store(tmp_path / "c.zarr"), extracted))
    np.testing.assert_allclose(got, exact, rtol=2**-10, atol=2**-10 * np.abs(exact).max())
    maps = every_view(source, "64/dense")
    naive = maps.reshape(18, 2, GRID, 2, GRID, 2, -1).mean(axis=(3, 5))
    np.testing.assert_allclose(got, naive, rtol=2**-10, atol=1e-6)


def test_values_beyond_fp16_stay_counted(tmp_path: Path, corpus: Path, tiny_weights: Path) -> None:
    with mock.patch("eupe.extract.worker.pool_cells", lambda dense, grid: 3e4 * dense):
        made = make_parts(tmp_path / "s.zarr", corpus, tiny_weights)
    convert(made.path, tmp_path / "c.zarr", precision="bitround:4")
    assert open_store(tmp_path / "c.zarr").clipped == made.clipped and made.clipped.count


def test_a_converted_store_is_extended_and_an_extended_store_is_converted_to_the_same_bytes(
    tmp_path: Path, corpus: Path, tiny_weights: Path
) -> None:
    pictures = shutil.copytree(corpus, tmp_path / "p")
    made = make_parts(tmp_path / "s.zarr", pictures, tiny_weights)
    convert(made.path, tmp_path / "before.zarr", precision="int8")
    for store in (made, open_store(tmp_path / "before.zarr")):
        extend(store, pictures, tiny_weights, count=3)
    convert(made.path, tmp_path / "after.zarr", precision="int8")
    before, after = files(tmp_path / "before.zarr"), files(tmp_path / "after.zarr")
    assert after.keys() == before.keys()
    times = {"corpus/00001.parquet"}  # the same pictures were drawn twice
    assert {name for name in after if after[name] != before[name]} <= times
    assert open_store(tmp_path / "after.zarr").spec.corpus["segments"] == [19, 3]


def test_fidelity_is_that_of_a_naive_computation_and_info_shows_it(
    tmp_path: Path, source: Store, run_eupe: Callable[..., Any]
) -> None:
    words = ["store", "convert", source.path, "--precision", "dense=int8", "--grid", GRID, "--out", tmp_path / "c.zarr"]
    told = run_eupe(*words)
    assert told.code == 0, told.err
    converted = open_store(tmp_path / "c.zarr")
    assert converted.spec.fidelity["num_views"] == 36
    for size in (32, 64):
        path = f"{size}/dense"
        maps = every_view(source, path)
        half = maps.shape[2] // GRID
        before = maps.reshape(18, 2, GRID, half, GRID, half, -1).mean(axis=(3, 5)).astype(np.float16).reshape(-1, 64)
        after = every_view(converted, path).reshape(-1, 64)
        exact = Calibration.of(before)
        a, b = ((tokens.astype(np.float64) - exact.mean) / exact.std for tokens in (before, after))
        cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        kept = converted.spec.fidelity["measured"][path]["int8"]
        assert abs(kept["mean"] - cosines.mean()) < 1e-6
        assert abs(kept["p5"] - np.percentile(cosines, 5)) < 1e-6
        assert f"{path} keeps a cosine of {kept['mean']:.6f}, at least {kept['p5']:.6f} for 95%" in told.out
    assert "done; 38 views; " in told.out and "before, " in told.out
    info = json.loads(run_eupe("store", "info", tmp_path / "c.zarr", "--json").out)
    assert info["fidelity"] == converted.spec.fidelity

    again = json.loads(run_eupe(*words, "--json").out)
    assert again["cached"] is True
    assert again["fidelity"]["64/dense"] == converted.spec.fidelity["measured"]["64/dense"]["int8"]
    assert (again["source_bytes"], again["stored_bytes"]) == (source.stored_bytes, converted.stored_bytes)


def test_what_a_source_has_lost_before_stays_recorded(tmp_path: Path, lossy: Path, source: Store) -> None:
    convert(lossy / "round", tmp_path / "r", precision="dense=bitround:3,summary=bitround:7")
    before, after = open_store(lossy / "round").spec, open_store(tmp_path / "r").spec
    for path in before.feature_paths:
        recorded = after.fidelity["measured"][path]
        assert recorded["bitround:7"] == before.fidelity["measured"][path]["bitround:7"]
        assert recorded.keys() == ({"bitround:7", "bitround:3"} if path.endswith("dense") else {"bitround:7"})
    assert verify(tmp_path / "r").whole


def test_of_int8_maps_are_pooled_and_arrays_that_stay_are_not_coded_again(source: Store, lossy: Path) -> None:
    before, after = open_store(lossy / "int8"), open_store(lossy / "pooled")
    assert after.spec.calibration["64/summary"] == before.spec.calibration["64/summary"]
    assert after.spec.fidelity["measured"]["64/summary"] == before.spec.fidelity["measured"]["64/summary"]
    stored = [store.read_tokens("64/summary", store.rows(store.keys), [1] * 18).stored for store in (before, after)]
    assert stored[0].dtype == np.int8 and np.array_equal(*stored)
    naive = every_view(source, "64/dense").mean(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(every_view(after, "64/dense"), naive, atol=0.03 * np.abs(naive).max())
    assert verify(lossy / "pooled").whole


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL; what was written stays."""


@pytest.mark.parametrize("changes", [1, 30, 70])
def test_a_killed_conversion_goes_on_to_the_same_bytes(
    tmp_path: Path, source: Store, lossy: Path, monkeypatch: pytest.MonkeyPatch, changes: int
) -> None:
    """Killed after a number of changes of the storage: among its first documents, its parts, its statistics."""
    left = changes

    def dying(change: Callable[..., object]) -> Callable[..., object]:
        def changed(*arguments: object) -> object:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            return change(*arguments)

        return changed

    with monkeypatch.context() as patch:
        for what in ("write_blocks", "create"):
            patch.setattr(StoragePath, what, dying(getattr(StoragePath, what)))
        with pytest.raises(Killed):
            convert(source.path, tmp_path / "c.zarr", precision="int8")

    committed = set(open_store(tmp_path / "c.zarr").committed_parts())
    made: list[int] = []
    commit = StoreWriter.commit
    monkeypatch.setattr(StoreWriter, "commit", lambda writer, part: (made.append(part.index), commit(writer, part)))
    assert not convert(source.path, tmp_path / "c.zarr", precision="int8").cached
    assert made == sorted({0, 1, 2} - committed)
    assert files(tmp_path / "c.zarr") == files(lossy / "int8")


def test_a_finished_conversion_is_a_hit_and_another_request_is_refused(
    tmp_path: Path, source: Store, lossy: Path
) -> None:
    out = shutil.copytree(lossy / "int8", tmp_path / "c.zarr")
    before = files(out)
    assert convert(source.path, out, precision="int8").cached
    for state in ("finished", "unfinished"):
        if state == "unfinished":
            (out / "parts/00002.parquet").unlink()
            before = files(out)
        with pytest.raises(SpecMismatchError, match=r"precision\.dense: stored int8, requested bitround:4"):
            convert(source.path, out, precision="bitround:4")
        with pytest.raises(SpecMismatchError, match="grids: stored"):
            convert(source.path, out, precision="int8", grid=1)
        assert files(out) == before


def of_other_parts(root: dict[str, Any]) -> None:
    root["samples_per_part"] *= 2


def calibrated_otherwise(root: dict[str, Any]) -> None:
    summary = root["calibration"]["64/summary"]
    summary["mean"] = summary["std"]


@pytest.mark.parametrize(
    ("begun", "change", "held", "grid"),
    [
        ("int8", of_other_parts, "fp16", None),
        ("int8", lambda root: None, "round", None),  # which has lost more than the source of what was begun
        ("pooled", calibrated_otherwise, "int8", 1),
    ],
)
def test_an_unfinished_store_that_was_begun_from_something_else_is_left_alone(
    tmp_path: Path,
    source: Store,
    lossy: Path,
    begun: str,
    change: Callable[[dict[str, Any]], None],
    held: str,
    grid: int | None,
) -> None:
    out = shutil.copytree(lossy / begun, tmp_path / "c.zarr")
    (out / "parts/00000.parquet").unlink()
    document = json.loads((out / "zarr.json").read_text())
    change(document["attributes"]["eupe"])
    (out / "zarr.json").write_text(json.dumps(document))
    before = files(out)
    with pytest.raises(SpecMismatchError, match=r"was begun from something else than .* or in other parts"):
        convert(source.path if held == "fp16" else lossy / held, out, precision="int8", grid=grid)
    assert files(out) == before


@pytest.mark.parametrize(
    ("held", "words", "said"),
    [
        ("int8", ["--precision", "fp16"], "has summary tokens in int8, and fp16 would claim more than is left of them"),
        ("int8", ["--precision", "bitround:2"], "and bitround:2 would claim more"),
        ("int8", ["--precision", "summary=int8"], "has dense tokens in int8, and fp16 would claim more"),
        ("round", ["--precision", "bitround:8"], "give --precision summary=bitround:B with B up to 7"),
        ("round", ["--precision", "fp16"], "has summary tokens in bitround:7, and fp16 would claim more"),
        ("fp16", ["--precision", "int4"], "precision 'int4' is unknown"),
        ("fp16", ["--precision", "fp16"], "has this precision and grid already"),
        ("fp16", ["--precision", "fp16", "--grid", "4"], "--grid 4 does not divide the 2x2 map of"),
        ("fp16", ["--precision", "int8", "--grid", "0"], "--grid 0 does not divide the 2x2 map of"),
    ],
)
def test_what_would_pretend_is_refused_in_one_sentence_and_nothing_is_written(
    tmp_path: Path,
    source: Store,
    lossy: Path,
    run_eupe: Callable[..., Any],
    held: str,
    words: list[str],
    said: str,
) -> None:
    path = source.path if held == "fp16" else lossy / held
    outcome = run_eupe("store", "convert", path, *words, "--out", tmp_path / "c.zarr")
    assert outcome.code == 2 and outcome.out == ""
    assert said in outcome.err and outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_grid_needs_maps(source: Store) -> None:
    summaries = replace(source.spec, tokens=("summary",), precision={"summary": "fp16"})
    with pytest.raises(ConfigError, match=r"--grid 2 pools dense maps, of which s\.zarr has none"):
        converted_spec(summaries, "int8", 2, where="s.zarr")


@pytest.mark.parametrize("out", ["s.zarr", "s.zarr/inside", ".", "link", "link/inside"])
def test_a_store_is_not_written_over_its_source(tmp_path: Path, source: Store, out: str) -> None:
    copy = shutil.copytree(source.path, tmp_path / "a" / "s.zarr")
    (tmp_path / "a" / "link").symlink_to(copy)
    before = files(copy)
    with pytest.raises(ConfigError, match=r"itself, lies in it or holds it"):
        convert(copy, tmp_path / "a" / out, precision="int8")
    assert files(copy) == before


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda store: (store / "parts/00001.parquet").unlink(), StoreError, "is not finished: 1 of 3 parts"),
        (lambda store: (store / "stats/zarr.json").unlink(), StoreError, "is not finished"),
        (lambda store: flip(store / "parts/00001.parquet", 0.9), PartCorruptError, "00001.parquet is damaged"),
        (lambda store: flip(store / "zarr.json", 0.0), StoreError, "zarr.json is damaged"),
        (lambda store: (store / "corpus/00000.parquet").unlink(), CorpusError, "is damaged or missing"),
        (lambda store: flip(store / "corpus/00000.parquet", 0.4), CorpusError, "eupe store repair"),
        (lambda store: flip(store / "64/dense/c/1/0/0/0/0", 0.4), PartCorruptError, "damaged or missing features"),
        (lambda store: (store / "32/summary/c/2/0/0").unlink(), PartCorruptError, "damaged or missing features"),
        (lambda store: shutil.rmtree(store), StoreError, "does not exist"),
    ],
)
def test_a_source_that_is_not_whole_is_refused_and_nothing_is_written(
    tmp_path: Path, source: Store, damage: Callable[[Path], object], error: type[StoreError], said: str
) -> None:
    copy = shutil.copytree(source.path, tmp_path / "s.zarr")
    damage(copy)
    with pytest.raises(error, match=said):
        convert(copy, tmp_path / "c.zarr", precision="int8")
    assert not (tmp_path / "c.zarr").exists()


def test_a_damaged_part_stops_the_conversion_which_goes_on_once_it_is_mended(
    tmp_path: Path, source: Store, lossy: Path, run_eupe: Callable[..., Any]
) -> None:
    """Pixels are not measured, so the damage is met on the way."""
    copy = shutil.copytree(source.path, tmp_path / "s.zarr")
    flip(copy / "64/pixels/c/2/0/0/0/0", 0.4)
    words = ["store", "convert", copy, "--precision", "int8", "--out", tmp_path / "c.zarr"]
    outcome = run_eupe(*words)
    assert outcome.code == 2 and "damaged or missing features" in outcome.err
    assert open_store(tmp_path / "c.zarr").missing_parts() == [2]
    flip(copy / "64/pixels/c/2/0/0/0/0", 0.4)
    assert run_eupe(*words).code == 0
    assert files(tmp_path / "c.zarr") == files(lossy / "int8")


def test_stores_in_a_bucket_are_converted_to_the_same_bytes(
    tmp_path: Path, source: Store, lossy: Path, s3: S3Server
) -> None:
    there = s3.bucket / "int8.zarr"
    convert(source.path, there, precision="int8")
    assert {name: there.read(name) for name in there.list()} == files(lossy / "int8")
    with pytest.raises(ConfigError, match="itself, lies in it or holds it"):
        convert(there, there / "inside", precision="int8", grid=1)
    convert(there, tmp_path / "pooled", precision="int8", grid=1)
    assert files(tmp_path / "pooled") == files(lossy / "pooled")
