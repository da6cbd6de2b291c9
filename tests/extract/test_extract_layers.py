"""Layers of a teacher from `--layers` to the store: as timm itself gives them, and through every verb of a store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from making import TINY_SIZE, make_corpus, make_store, random_weights
from mending import BATCH, Crews, extend, files, flip, make_parts
from numpy.typing import NDArray
from timm.models import load_checkpoint
from timm.models.vision_transformer import checkpoint_filter_fn

from eupe.errors import ConfigError, DriftError
from eupe.extract.audit import AuditConfig, audit, require_agreement
from eupe.extract.calibrate import Measured, settle
from eupe.extract.convert import convert
from eupe.extract.plan_on_paper import NOMINAL_SHARES
from eupe.extract.repair import RepairConfig, repair
from eupe.extract.worker import pool_cells, to_fp16
from eupe.store import Store, open_store
from eupe.store.precision import CANDIDATES, Calibration, Fidelity
from eupe.store.verify import verify

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")

Run = Callable[..., Any]
LAYERS = (2, 5)
"""Of the six of the tiny teacher, whose maps are 4 x 4 cells of 64 channels."""
OTHER, STAGE = "timm:test_efficientnet", 3
"""A teacher of five stages; at 64 px the third is a map of 8 x 8 cells of 32 channels, the last one of 2 x 2."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 pictures: three parts."""
    return make_corpus(tmp_path_factory.mktemp("pictures") / "c", count=18)


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(OTHER.removeprefix("timm:"), tmp_path_factory.mktemp("other") / "w.safetensors")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny_weights: Path) -> Store:
    """A store in fp16 with its pixels. Not to be changed."""
    path = tmp_path_factory.mktemp("store") / "s.zarr"
    return make_parts(path, corpus, tiny_weights, layers=LAYERS, pixels=True)


@pytest.fixture
def copy(store: Store, tmp_path: Path) -> Path:
    """A copy of `store` for a test to change."""
    return shutil.copytree(store.path.local, tmp_path / "copy.zarr")


def every_view(store: Store) -> tuple[list[int], list[int]]:
    return np.repeat(store.rows(store.keys), 2).tolist(), [0, 1] * len(store.keys)


def words(corpus: Path, weights: Path, *more: object) -> list[object]:
    given = ["extract", "--teacher", "timm:test_vit", "--weights", weights, "--corpus", corpus, "--size", TINY_SIZE]
    return [*given, "--views", "rrc:2", "--dtype", "fp32", "--batch-size", BATCH, "--json", *more]


def refused(outcome: Any) -> str:
    assert (outcome.code, outcome.out) == (2, "")
    assert "Traceback" not in outcome.err
    return " ".join(outcome.err.partition("error: ")[2].split())


def least_cosine(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min())


def test_stored_layers_are_those_of_timm(store: Store, tiny_weights: Path) -> None:
    """timm's own model, loader and method get the stored pixels; the difference is fp16's rounding."""
    assert store.spec.layers == {str(number): {"of": 6, "dim": 64, "grids": [4]} for number in LAYERS}
    model = timm.create_model("test_vit", num_classes=0, img_size=TINY_SIZE).eval()
    load_checkpoint(model, str(tiny_weights), filter_fn=checkpoint_filter_fn)
    pixels = torch.from_numpy(store.read_pixels(*every_view(store))).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        maps = model.get_intermediate_layers((pixels - mean) / std, n=[1, 4, 5], norm=True, reshape=True)
    read = store.read(*every_view(store), layers=[*map(str, LAYERS)])
    assert read.dense is not None
    for ours, theirs in zip([*read.layers.values(), read.dense], maps, strict=True):
        theirs = theirs.permute(0, 2, 3, 1).numpy()
        assert ours.shape == theirs.shape == (36, 4, 4, 64)
        assert least_cosine(ours, theirs) >= 0.9999
        np.testing.assert_allclose(ours, theirs, rtol=2**-10, atol=1e-3)
    assert least_cosine(read.layers["2"], read.layers["5"]) < 0.99, "else they could be mixed up unseen"


def test_a_layer_changes_nothing_else(tmp_path: Path, store: Store, corpus: Path, tiny_weights: Path) -> None:
    """Nor does the last layer, which is the last map itself: the store has the format and bytes of one without."""
    plain = make_parts(tmp_path / "p.zarr", corpus, tiny_weights, pixels=True, layers=(6,))
    bare = make_parts(tmp_path / "b.zarr", corpus, tiny_weights, pixels=True)
    assert files(plain.path) == files(bare.path)
    assert json.loads((tmp_path / "p.zarr/zarr.json").read_text())["attributes"]["eupe"]["format"] == 1
    own = {name: data for name, data in files(store.path).items() if "dense-" not in name}
    for name, data in files(bare.path).items():
        assert own.pop(name) == data or name.startswith("parts/") or name in ("zarr.json", "stats/zarr.json"), name
    assert not own


def test_a_store_with_layers_grows(tmp_path: Path, corpus: Path, tiny_weights: Path) -> None:
    pictures = shutil.copytree(corpus, tmp_path / "c")
    made = make_parts(tmp_path / "s.zarr", pictures, tiny_weights, layers=LAYERS)
    grown = extend(made, pictures, tiny_weights, count=3)
    assert verify(grown.path).whole and grown.spec.layers == made.spec.layers
    maps = grown.read(*every_view(grown), layers=["5"]).layers["5"].astype(np.float64)
    assert len(maps) == 42
    np.testing.assert_allclose(grown.stats(TINY_SIZE, "dense-5").mean, maps.mean(axis=(0, 1, 2)), atol=1e-12)


# The command line


def test_the_same_layers_are_a_cache_hit_and_others_are_named(
    copy: Path, corpus: Path, tiny_weights: Path, run_eupe: Run
) -> None:
    before = files(copy)
    for layers in ("2,5", "5,2,2", "2,5,6"):
        again = run_eupe(*words(corpus, tiny_weights, "--pixels", "--out", copy, "--layers", layers))
        assert again.code == 0, again.err
        assert json.loads(again.out)["cached"] is True
    for more, said in (
        (["--layers", "2"], "layers.5.dim: stored 64, requested nothing"),
        (["--layers", "2,4,5"], "layers.4.dim: stored nothing, requested 64"),
        (["--layers", "none"], "layers.2.dim: stored 64, requested nothing"),
        ([], "layers.2.grids: stored [4], requested nothing"),
    ):
        told = refused(run_eupe(*words(corpus, tiny_weights, "--pixels", "--out", copy, *more)))
        assert "holds features of another specification" in told and said in told and "format" not in told
    assert files(copy) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "0"], "--layers takes numbers of layers from 1, as 6,9, or none; got '0'"),
        (["--layers", "x"], "--layers takes numbers of layers from 1, as 6,9, or none; got 'x'"),
        (["--layers", "2,"], "--layers takes numbers of layers from 1, as 6,9, or none; got '2,'"),
        (["--layers=-1"], "--layers takes numbers of layers from 1, as 6,9, or none; got '-1'"),
        (["--layers", "none,2"], "--layers takes numbers of layers from 1, as 6,9, or none; got 'none,2'"),
        (["--layers", "2,7,9"], "teacher timm:test_vit has layers 1 to 6, not 7, 9; give others with --layers"),
        (["--layers", "2", "--tokens", "summary"], "--layers stores dense maps beside the last one; give --tokens"),
        (["--layers", "2", "--layers", "3"], "--layers was given 2 times for 1 teachers"),
        (["--layers", "2", "--grid", "3"], "--grid 3 does not divide the 4x4 map"),
    ],
)
@pytest.mark.parametrize("verb", ["extract", "plan"])
def test_impossible_layers_are_one_sentence(
    verb: str, more: list[str], said: str, tmp_path: Path, corpus: Path, tiny_weights: Path, run_eupe: Run
) -> None:
    asked = [verb, *words(corpus, tiny_weights, "--out", tmp_path / "s.zarr", *more)[1:]]
    assert refused(run_eupe(*asked)).startswith(said)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_teachers_of_one_pass_have_layers_of_their_own(
    tmp_path: Path, corpus: Path, tiny_weights: Path, other_weights: Path, run_eupe: Run
) -> None:
    """Ray's stores are those that one process makes alone."""
    outs = [tmp_path / "a.zarr", tmp_path / "b.zarr", tmp_path / "c.zarr"]
    asked = words(corpus, tiny_weights, "--teacher", OTHER, "--weights", other_weights, "--layers", "2,5")
    asked += ["--layers", STAGE, "--teacher", "timm:test_vit", "--weights", tiny_weights, "--layers", "none"]
    outcome = run_eupe(*asked, *(word for out in outs for word in ("--out", out)))
    assert outcome.code == 0, outcome.err
    alone = [
        ("timm:test_vit", tiny_weights, LAYERS),
        (OTHER, other_weights, (STAGE,)),
        ("timm:test_vit", tiny_weights, ()),
    ]
    for i, (out, (teacher, weights, layers)) in enumerate(zip(outs, alone, strict=True)):
        ours = open_store(out)
        theirs = make_store(tmp_path / f"alone{i}.zarr", corpus, weights, teacher=teacher, layers=layers)
        assert list(ours.spec.layers) == [str(number) for number in layers]
        assert verify(out).whole
        for path in theirs.spec.feature_paths:
            a, b = (store.read_tokens(path, *every_view(store)).stored for store in (ours, theirs))
            assert np.array_equal(a, b), path
    assert open_store(outs[1]).spec.shape(f"64/dense-{STAGE}") == (8, 8, 32)


# What is done with a store


@pytest.mark.parametrize("name", ["64/dense-2/c/1/0/0/0/0", "64/dense-5/c/2/0/0/0/0"])
def test_a_damaged_layer_is_repaired_byte_for_byte(copy: Path, store: Store, tiny_weights: Path, name: str) -> None:
    flip(copy / name, 0.4)
    crews, part = Crews(), int(name.split("/")[3])
    report = repair(RepairConfig(store=copy, weights=tiny_weights, batch_size=BATCH), open_crew=crews)
    assert (list(report.parts), crews.made) == ([part], [part])
    assert crews.opened[0].config.layers == LAYERS
    assert files(copy) == files(store.path)


@pytest.mark.parametrize(
    ("precision", "grid"),
    [("int8", None), ("dense=bitround:5,summary=fp16", None), ("fp16", 2), ("int8", 1)],
)
def test_a_converted_store_is_the_one_that_extraction_makes(
    tmp_path: Path, store: Store, corpus: Path, tiny_weights: Path, precision: str, grid: int | None
) -> None:
    """Bytes are the same if extraction pools what fp16 keeps of the maps, as a conversion does."""
    keeping = mock.patch("eupe.extract.worker.pool_cells", lambda dense, grid: pool_cells(to_fp16(dense)[0], grid))
    # in one part, as a conversion takes more samples to a part where each has fewer bytes
    make = make_parts if grid is None else make_store
    with keeping:
        options: dict[str, Any] = {"layers": LAYERS, "pixels": True, "precision": precision, "grid": grid}
        made = make(tmp_path / "e.zarr", corpus, tiny_weights, **options)
    report = convert(store.path, tmp_path / "c.zarr", precision=precision, grid=grid)
    assert files(tmp_path / "c.zarr") == files(made.path)
    converted = open_store(tmp_path / "c.zarr")
    side = grid or 4
    assert {path: converted.spec.shape(path) for path in converted.spec.feature_paths} == {
        "64/summary": (64,),
        **{f"64/{kind}": (side, side, 64) for kind in ("dense", "dense-2", "dense-5")},
    }
    measured = set(converted.spec.feature_paths) if precision != "fp16" else set()
    assert report.fidelity.keys() == measured and verify(converted.path).whole
    assert convert(store.path, tmp_path / "c.zarr", precision=precision, grid=grid).cached


def test_a_conversion_to_what_is_there_is_refused(tmp_path: Path, store: Store) -> None:
    for grid in (None, 4):
        with pytest.raises(ConfigError, match="has this precision and grid already"):
            convert(store.path, tmp_path / "c.zarr", precision="fp16", grid=grid)


def test_maps_of_stages_are_pooled_from_their_own_grids(tmp_path: Path, corpus: Path, other_weights: Path) -> None:
    """The last map has the grid already; the layer is pooled from 8 x 8, against a naive mean of its blocks."""
    made = make_parts(tmp_path / "s.zarr", corpus, other_weights, teacher=OTHER, layers=(STAGE,))
    assert made.spec.grids == (2,) and made.spec.layers[str(STAGE)]["grids"] == [8]
    convert(made.path, tmp_path / "c.zarr", precision="fp16", grid=2)
    before, after = (
        each.read(*every_view(each), layers=[str(STAGE)]) for each in (made, open_store(tmp_path / "c.zarr"))
    )
    assert before.dense is not None and after.dense is not None
    assert before.dense.tobytes() == after.dense.tobytes()
    naive = before.layers[str(STAGE)].astype(np.float64).reshape(36, 2, 4, 2, 4, 32).mean(axis=(2, 4))
    np.testing.assert_allclose(after.layers[str(STAGE)], naive, rtol=2**-10, atol=1e-4)


def test_fidelity_is_kept_by_layers_too(tmp_path: Path, corpus: Path, tiny_weights: Path) -> None:
    made = make_store(tmp_path / "s.zarr", corpus, tiny_weights, layers=LAYERS, fidelity=0.9995)
    dense = ("64/dense", "64/dense-2", "64/dense-5")
    assert made.spec.precision["dense"] != "fp16"
    assert all((kept := made.spec.measured_fidelity(path)) is not None and kept["p5"] >= 0.9995 for path in dense)


def test_a_layer_that_needs_more_bits_decides(store: Store) -> None:
    cheap = {p: Fidelity(mean=1.0, p5=1.0, share=1 / i) for i, p in enumerate(CANDIDATES, 1)}
    dear = {p: replace(each, p5=0.9) if p != CANDIDATES[2] else each for p, each in cheap.items()}
    calibrations = {path: Calibration.of(np.ones((2, 64))) for path in store.spec.feature_paths}
    for demanding, chosen in ((None, CANDIDATES[-1]), ("64/dense-2", CANDIDATES[2]), ("64/dense", CANDIDATES[2])):
        tried = {path: dear if path == demanding else cheap for path in store.spec.feature_paths}
        settled = settle(store.spec, Measured(calibrations, tried, 2), 0.99)
        assert settled.precision == {"summary": CANDIDATES[-1], "dense": chosen}


def test_an_audit_compares_layers(copy: Path, tiny_weights: Path) -> None:
    config = AuditConfig(store=copy, weights=tiny_weights, samples=6)
    report = audit(config)
    assert [(drift.path, drift.num_tokens) for drift in report.drifts] == [
        ("64/summary", 12),
        *((f"64/{kind}", 12 * 16) for kind in ("dense", "dense-2", "dense-5")),
    ]
    assert all(drift.standardised.p5 > 0.9999 for drift in report.drifts)
    require_agreement(report, 0.999)
    for part in range(3):  # whole objects, which no reader can tell from those that belong there
        for number in LAYERS:
            shutil.copy(copy / f"64/dense-{7 - number}/c/{part}/0/0/0/0", copy / f"taken-{number}-{part}")
        for number in LAYERS:
            shutil.move(copy / f"taken-{number}-{part}", copy / f"64/dense-{number}/c/{part}/0/0/0/0")
    report = audit(config)
    drifted = {drift.path for drift in report.drifts if drift.standardised.p5 < 0.999}
    assert drifted == {"64/dense-2", "64/dense-5"}
    with pytest.raises(DriftError, match="64/dense-"):
        require_agreement(report, 0.999)


def test_what_is_measured_of_layers_is_shown(tmp_path: Path, store: Store, run_eupe: Run) -> None:
    convert(store.path, tmp_path / "c.zarr", precision="dense=int8")
    stats = json.loads(run_eupe("store", "stats", tmp_path / "c.zarr", "--json").out)
    for kind in ("dense", "dense-2", "dense-5"):
        shown = stats["tokens"][f"64/{kind}"]
        assert (shown["precision"], shown["channels"], shown["count"]) == ("int8", 64, 36 * 16)
        assert 0.99 < shown["fidelity"]["p5"] < 1
    info = json.loads(run_eupe("store", "info", tmp_path / "c.zarr", "--json").out)
    assert info["layers"] == store.spec.layers and info["format"] == 2


# Plans


def test_a_measured_plan_counts_layers(tmp_path: Path, corpus: Path, tiny_weights: Path, run_eupe: Run) -> None:
    made = make_store(tmp_path / "s.zarr", corpus, tiny_weights, layers=LAYERS)
    asked = words(corpus, tiny_weights, "--layers", "2,5")[1:]
    outcome = run_eupe("plan", *asked)
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    assert plan["raw_bytes_per_view"] == 2 * (64 + 3 * 16 * 64)
    assert plan["need"]["stored"] == pytest.approx(made.stored_bytes, rel=0.05)
    assert {choice["path"] for choice in plan["choices"]} == {
        "64/summary",
        *(f"64/{kind}" for kind in ("dense", "dense-2", "dense-5")),
    }
    held = json.loads(run_eupe("plan", *asked, "--out", made.path).out)["held_bytes"]
    assert held == sum(file.stat().st_size for file in made.path.local.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("more", "raw"),
    [
        ([], 64 + 100 * 64),
        (["--layers", "2,5"], 64 + 3 * 100 * 64),
        (["--layers", "6"], 64 + 100 * 64),
        (["--layers", "2,5", "--grid", "5"], 64 + 3 * 25 * 64),
        (["--layers", "2", "--tokens", "dense"], 2 * 100 * 64),
    ],
)
def test_a_plan_on_paper_counts_layers(more: list[str], raw: int, run_eupe: Run) -> None:
    outcome = run_eupe("plan", "--teacher", "timm:test_vit", "--num-images", 1000, "--json", *more)
    assert outcome.code == 0, outcome.err
    (plan,) = json.loads(outcome.out)["teachers"]
    assert plan["raw_bytes_per_view"] == 2 * raw
    assert plan["need"]["stored"] == round(1000 * 2 * raw * NOMINAL_SHARES["fp16"])


def test_on_paper_each_teacher_has_layers_of_its_own(run_eupe: Run) -> None:
    paper = ["plan", "--teacher", OTHER, "--teacher", "timm:test_vit", "--size", 64, "--num-images", 10, "--json"]

    def raw(*more: object) -> list[int]:
        outcome = run_eupe(*paper, *more)
        assert outcome.code == 0, outcome.err
        return [plan["raw_bytes_per_view"] for plan in json.loads(outcome.out)["teachers"]]

    other, tiny = raw()
    assert raw("--layers", "3,4", "--layers", "none") == [other + 2 * (8 * 8 * 32 + 4 * 4 * 48), tiny]
    assert raw("--layers", "none", "--layers", "2") == [other, tiny + 2 * 4 * 4 * 64]
    assert raw("--layers", "1", "--layers", "1") == [other + 2 * 32 * 32 * 16, tiny + 2 * 4 * 4 * 64]
    assert "--layers was given 1 times for 2 teachers" in refused(run_eupe(*paper, "--layers", "2"))
