"""Dense maps of earlier layers beside the last one: read alone, counted, checked, and refused where impossible."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray
from store_cases import CODED, Case, as_arrays, assert_same_bits, every_view, make_case, make_spec, write_store
from torch.utils.data import DataLoader

from eupe.errors import FormatVersionError, PartCorruptError, StoreError
from eupe.report.stats_page import render_stats_page
from eupe.store import StoreDataset, open_store
from eupe.store.catalogue import describe
from eupe.store.layout import StoreSpec, differences
from eupe.store.summary import summarise
from eupe.store.verify import verify

LAYERS = {"6": 7, "9": 4}
"""Channels of each, unlike the last map's 6; their maps are one cell wider than the last one, too."""
FAILED = 5


@pytest.fixture(scope="module")
def case() -> Case:
    case = make_case(make_spec(layers=LAYERS), failed={FAILED})
    # within the pictures, which `verify` checks
    corners = np.sort(np.random.default_rng(2).integers(0, 240, (11, 3, 2, 2)), axis=2) * 2 + np.array([[0], [1]])
    case.arrays["boxes"][case.ok] = corners.reshape(11, 3, 4)[case.ok]
    return case


@pytest.fixture(scope="module")
def whole(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`case` in fp16, finished. Not to be changed."""
    path = tmp_path_factory.mktemp("layers") / "whole.zarr"
    write_store(case, path)
    return path


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """The same with dense maps, and so layers, in int8. Not to be changed."""
    case = make_case(make_spec(layers=LAYERS, precision=CODED), failed={FAILED})
    path = tmp_path_factory.mktemp("layers") / "coded.zarr"
    write_store(case, path)
    return case, path


@pytest.mark.parametrize("layers", [("6", "9"), ("9",), ("9", "6"), ()])
def test_layers_are_read_as_they_were_written(case: Case, whole: Path, layers: tuple[str, ...]) -> None:
    store = open_store(whole)
    rows, views = [9, 0, 4, 4], [2, 0, 1, 1]
    for size in case.spec.sizes:
        read = as_arrays(store.read(rows, views, size=size, layers=layers))
        assert_same_bits(read, case.expected(rows, views, size, layers))
    valid = [i for i in range(11) if i != FAILED]
    items = dict(store.items(size=48, layers=layers))
    assert list(items) == [case.rows[i].key for i in valid]
    for i, features in zip(valid, items.values(), strict=True):
        assert_same_bits(as_arrays(features), case.expected([i] * 3, [0, 1, 2], 48, layers))


def test_int8_layers_are_coded_by_their_own_calibration(coded: tuple[Case, Path]) -> None:
    """Against a loop over tokens and channels, and within the half step that rounding may take."""
    case, path = coded
    rows, views = every_view(case.spec, range(11))
    layers = open_store(path).read(rows, views, layers=("6", "9")).layers
    expected = case.expected(rows, views, 32, ("6", "9"))
    assert_same_bits(dict(layers), {number: expected[f"dense-{number}"] for number in LAYERS})
    for number, maps in layers.items():
        calibration = case.spec.array_calibration(f"32/dense-{number}")
        assert calibration is not None and len(calibration.mean) == LAYERS[number]
        exact = case.arrays[f"32/dense-{number}"].reshape(maps.shape).astype(np.float64)
        z, kept = ((values - calibration.mean) / calibration.std for values in (exact, maps.astype(np.float64)))
        step = np.abs(z).max(axis=-1, keepdims=True) / 127
        assert np.nanmax(np.abs(kept - z) / step) < 0.57, "half a step, and an int8 of 127 steps of a rounded scale"


def test_zarr_reads_layers_too(case: Case, whole: Path, coded: tuple[Case, Path]) -> None:
    group, lossy = zarr.open_group(whole, mode="r"), zarr.open_group(coded[1], mode="r")
    spec: Any = lossy.attrs["eupe"]
    for path in (f"{size}/dense-{number}" for size in case.spec.sizes for number in LAYERS):
        by_zarr = np.asarray(group[path])
        assert by_zarr.tobytes() == case.arrays[path].tobytes()
        stored: NDArray[Any] = np.asarray(lossy[path])
        coding = spec["calibration"][path]
        mean, std = (np.frombuffer(base64.b64decode(coding[name]), "<f4") for name in ("mean", "std"))
        scale = np.ascontiguousarray(stored[..., -2:]).view("<f2").astype(np.float32)
        np.testing.assert_array_equal(stored[..., :-2] * scale * std + mean, coded[0].kept[path])


def test_statistics_of_a_layer_are_those_of_a_naive_computation(case: Case, whole: Path) -> None:
    """Tolerance: both sides sum in float64, in different orders."""
    store = open_store(whole)
    for path in (f"{size}/dense-{number}" for size in case.spec.sizes for number in LAYERS):
        size, kind = path.split("/")
        maps = case.arrays[path][case.ok].astype(np.float64)
        vectors = maps.reshape(-1, maps.shape[-1])
        stats = store.full_stats(int(size), kind)
        top = np.abs(vectors).max()
        assert stats.count == len(vectors)
        np.testing.assert_allclose(stats.mean, vectors.mean(axis=0), rtol=1e-12, atol=1e-12 * top)
        np.testing.assert_allclose(stats.std, vectors.std(axis=0), rtol=1e-12)
        np.testing.assert_allclose(stats.cov, np.cov(vectors.T, bias=True), rtol=1e-12, atol=1e-12 * top**2)
        views = np.linalg.norm(maps.astype(np.float32), axis=-1).reshape(-1, *maps.shape[2:4])
        assert stats.norms.sum() == views.size
        outliers = sum((view > 3 * np.median(view)).astype(int) for view in views)
        np.testing.assert_array_equal(stats.outliers, outliers)


def test_a_layer_is_read_without_a_byte_of_the_others(case: Case, copy: Path) -> None:
    for name in ("32/dense-9", "48/dense-6", "48/dense", "digests", "stats/32"):
        shutil.rmtree(copy / name)
    rows, views = [0, 10, 4], [1, 2, 0]
    store = open_store(copy)
    read = as_arrays(store.read(rows, views, size=32, layers=["6"]))
    assert_same_bits(read, case.expected(rows, views, 32, ["6"]))
    for missing, size in (("9", 32), ("6", 48)):
        with pytest.raises(PartCorruptError, match=f"{size}/dense"):
            store.read(rows, views, size=size, layers=[missing])
    for name in ("32/dense", "32/summary", "boxes", "flips"):
        shutil.rmtree(copy / name)
    tokens = open_store(copy).read_tokens("32/dense-6", rows, views).decode()
    assert tokens.tobytes() == case.expected(rows, views, 32, ["6"])["dense-6"].tobytes()


def test_a_lost_object_of_a_layer_is_damage_only_to_who_asks_for_it(case: Case, copy: Path) -> None:
    (copy / "32/dense-9/c/1/0/0/0/0").unlink()
    store = open_store(copy)
    assert_same_bits(as_arrays(store.read([4], [0], layers=["6"])), case.expected([4], [0], 32, ["6"]))
    assert_same_bits(as_arrays(store.read([0], [0], layers=["9"])), case.expected([0], [0], 32, ["9"]))
    with pytest.raises(PartCorruptError, match=r"32/dense-9"):
        store.read([4], [0], layers=["9"])


def test_a_layer_that_is_not_stored_is_named(whole: Path, tmp_path: Path) -> None:
    store = open_store(whole)
    for ask in (lambda: store.read([0], [0], layers=["6", "7"]), lambda: StoreDataset(store, layers=["7"])):
        with pytest.raises(StoreError, match=r"whole\.zarr lacks the dense maps of layers 7, and has those of 6, 9; "):
            ask()
    plain = write_store(make_case(make_spec()), tmp_path / "plain.zarr")
    with pytest.raises(StoreError, match="layers 6, and has only that of the last layer"):
        plain.read([0], [0], layers=["6"])


@pytest.mark.parametrize("name", ["32/dense-6/c/0/0/0/0/0", "48/dense-9/c/2/0/0/0/0"])
def test_verify_finds_a_flipped_byte(whole: Path, copy: Path, name: str) -> None:
    lacking = ["corpus/00000.parquet"]  # these stores have no index
    assert [damage.what for damage in verify(whole).damages] == lacking
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 3] ^= 4
    (copy / name).write_bytes(data)
    report = verify(copy)
    part = int(name.split("/")[3])
    assert [(damage.part, damage.what) for damage in report.damages if damage.what not in lacking] == [(part, name)]
    assert report.damaged_parts == [part] and not report.strays


def test_verify_misses_a_layer_s_documents_and_statistics(copy: Path) -> None:
    (copy / "32/dense-6/zarr.json").unlink()
    shutil.rmtree(copy / "stats/48/dense-9/cov")
    report = verify(copy)
    assert "32/dense-6/zarr.json" in {damage.what for damage in report.damages}
    assert any(damage.what.startswith("stats") for damage in report.damages)


# The specification


def test_a_spec_without_layers_has_format_1_and_does_not_mention_them() -> None:
    plain, layered = make_spec().to_json(), make_spec(layers=LAYERS).to_json()
    assert plain["format"] == 1 and "layers" not in plain
    assert layered["format"] == 2
    assert layered["layers"] == {
        "6": {"of": 12, "dim": 7, "grids": [3, 4]},
        "9": {"of": 12, "dim": 4, "grids": [3, 4]},
    }
    assert {k: v for k, v in layered.items() if k not in ("format", "layers")} == {
        k: v for k, v in plain.items() if k != "format"
    }


def test_layers_survive_json_and_are_compared() -> None:
    spec = make_spec(layers=LAYERS)
    again = StoreSpec.from_json(json.loads(json.dumps(spec.to_json())), where="here")
    assert again == spec and differences(again, spec) == []
    assert differences(again, make_spec(layers={"6": 7})) == [
        "layers.9.dim: stored 4, requested nothing",
        "layers.9.grids: stored [3, 4], requested nothing",
        "layers.9.of: stored 12, requested nothing",
    ]
    assert differences(make_spec(), make_spec(layers={"6": 7}))[0] == "layers.6.dim: stored nothing, requested 7"


Change = Callable[[dict[str, Any]], object]


def layer_6(**changes: Any) -> Change:
    return lambda plain: plain["layers"]["6"].update(changes)


def renamed(number: str) -> Change:
    return lambda plain: plain["layers"].update({number: plain["layers"].pop("6")})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (layer_6(of=6), "layers.6 of 6 is not a layer before the last one"),
        (layer_6(of=5), "layers.6 of 5 is not a layer before the last one"),
        (layer_6(of="12"), "layers.6 of '12' is not a layer before the last one"),
        (layer_6(of=True), "layers.6 of True is not a layer before the last one"),
        (renamed("0"), "layers.0 of 12 is not a layer before the last one"),
        (renamed("06"), "layers.06 of 12 is not a layer before the last one"),
        (renamed("6\n"), "is not a layer before the last one"),
        (renamed("../6"), "layers.../6 of 12 is not a layer before the last one"),
        (renamed("six"), "layers.six of 12 is not a layer before the last one"),
        (renamed("９"), "is not a layer before the last one"),
        (lambda plain: plain["layers"]["6"].pop("grids"), "layers.6.grids is None, not a positive integer for each"),
        (layer_6(grids=[3]), "layers.6.grids is [3], not a positive integer for each size"),
        (layer_6(grids=[3, 0]), "layers.6.grids is [3, 0], not a positive integer for each size"),
        (layer_6(grids=3), "layers.6.grids is 3, not a positive integer for each size"),
        (layer_6(dim=0), "layers.6.dim is 0, not a valid number of channels"),
        (layer_6(dim=10**9), "layers.6.dim is 1000000000, not a valid number of channels"),
        (layer_6(dim=None), "layers.6.dim is None, not a valid number of channels"),
        (layer_6(grids=[10**5, 4]), "a chunk of 32/dense-6 has shape [1, 1, 100000, 100000, 7], more than"),
        (lambda plain: plain["layers"].update({"6": 7}), "layers.6 of None is not a layer before the last one"),
        (lambda plain: plain.update(layers=["6"]), "layers is ('6',), not an object"),
        (lambda plain: plain.update(tokens=["summary"]), "layers are stored without the last dense map"),
        (lambda plain: plain.update(format=1), "format 1 with layers"),
        (lambda plain: plain.pop("layers"), "format 2 without layers"),
        (lambda plain: plain.update(layers={}), "format 2 without layers"),
    ],
)
def test_impossible_layers_are_refused_by_name(change: Change, said: str) -> None:
    plain = make_spec(layers=LAYERS).to_json()
    change(plain)
    with pytest.raises(StoreError) as refused:
        StoreSpec.from_json(json.loads(json.dumps(plain)), where="here.zarr")
    assert type(refused.value) is StoreError
    assert str(refused.value).startswith("here.zarr has a damaged specification: ")
    assert said in str(refused.value)


@pytest.mark.parametrize("number", [0, 3, "2", None, [2], 1.5])
def test_the_neighbours_of_the_formats_are_refused(number: Any) -> None:
    plain = {**make_spec(layers=LAYERS).to_json(), "format": number, "unheard": "of"}
    with pytest.raises(FormatVersionError, match=r"here is written in format .*reads formats 1 to 2; upgrade eupe"):
        StoreSpec.from_json(plain, where="here")


def test_an_int8_layer_needs_its_calibration(coded: tuple[Case, Path]) -> None:
    spec = coded[0].spec
    lacking = {path: each for path, each in spec.calibration.items() if path != "48/dense-9"}
    wrong = {**spec.calibration, "48/dense-9": spec.calibration["48/dense-6"]}
    for calibration, said in ((lacking, "contradict each other"), (wrong, "does not fit its channels")):
        with pytest.raises(StoreError, match=rf"of 48/dense-9 {said}"):
            StoreSpec.from_json(replace(spec, calibration=calibration).to_json(), where="here")


# The data set, and what is shown


def test_a_data_set_has_the_layers_that_are_asked_for(case: Case, whole: Path) -> None:
    store = open_store(whole)
    plain = {"key", "view", "label", "boxes", "flips", "summary", "dense"}
    assert StoreDataset(store)[0].keys() == plain
    assert StoreDataset(store, layers=["9"])[0].keys() == {*plain, "dense-9"}
    dataset = StoreDataset(store, size=48, layers=("6", "9"))
    seen = 0
    for batch in DataLoader(dataset, batch_size=7, shuffle=True):  # type: ignore[arg-type]
        for i, (key, view) in enumerate(zip(batch["key"], batch["view"].tolist(), strict=True)):
            row = next(r for r, sample in enumerate(case.rows) if sample.key == key)
            for kind in ("dense", "dense-6", "dense-9"):
                assert batch[kind][i].numpy().tobytes() == case.arrays[f"48/{kind}"][row, view].tobytes()
            seen += 1
    assert seen == len(dataset) == 30


def test_the_catalogue_and_the_summary_show_layers(whole: Path, run_eupe: Callable[..., Any]) -> None:
    store = open_store(whole)
    assert describe(store).layers == ("6", "9")
    summary = summarise(store)
    kinds = ["summary", "dense", "dense-6", "dense-9"]
    assert [(token.size, token.kind) for token in summary.tokens] == [(s, k) for s in (32, 48) for k in kinds]
    plain = summary.to_json()
    assert plain["layers"] == store.spec.layers
    assert plain["tokens"]["48/dense-9"]["channels"] == 4
    assert np.shape(plain["tokens"]["48/dense-6"]["outliers"]) == (4, 4)
    raw = sum(values[0].nbytes for values in make_case(store.spec).features.values())
    assert summary.stored_share == pytest.approx(store.stored_bytes / (10 * raw))
    page = render_stats_page(summary)
    assert page.count("48 px dense-6") >= 2 and "6 of 12 (3 × 3 cells, 4 × 4 cells), 9 of 12 (" in page

    told = run_eupe("store", "stats", whole)
    assert told.code == 0, told.err
    part = told.out.partition("32 px dense-9")[2]
    assert "cell with most outliers" in part.partition("48 px")[0] and "earlier layers" in told.out
    listed = run_eupe("store", "ls", whole.parent)
    assert listed.code == 0 and "layers" in listed.out and "6+9" in listed.out
    info = json.loads(run_eupe("store", "info", whole, "--json").out)
    assert info["format"] == 2 and info["layers"] == store.spec.layers
