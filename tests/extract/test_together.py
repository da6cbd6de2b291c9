"""Several teachers in one pass: each picture decoded once, each store the one that its teacher makes alone."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import TINY_SIZE, TWO_CROPS, make_store, random_weights

from eupe.corpus.index import index_folder
from eupe.extract import load
from eupe.extract.parts import plan_work_units, store_spec
from eupe.extract.worker import PartExtractor, Worker
from eupe.store import Store, open_store
from eupe.store.layout import StoreSpec
from eupe.store.writer import create_store, finish_store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import file_digest, load_teacher

Run = Callable[..., Any]
OTHER = "timm:test_efficientnet"
OTHER_SIZE = 96


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(OTHER.removeprefix("timm:"), tmp_path_factory.mktemp("other") / "w.safetensors")


def spec_of(segments: list[int], per_part: int) -> StoreSpec:
    teacher = {"summary_dim": 1, "dense_dim": 1}
    return StoreSpec(
        teacher=teacher,
        corpus={"segments": segments, "fingerprint": ""},
        views={"num_views": 1},
        sizes=(64,),
        grids=(1,),
        tokens=("summary",),
        samples_per_part=per_part,
        precision={"summary": "fp16"},
    )


@given(
    segments=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    exponents=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    data=st.data(),
)
def test_every_missing_part_is_in_one_work_unit_and_no_sample_in_two(
    segments: list[int], exponents: list[int], data: st.DataObject
) -> None:
    specs = [spec_of(segments, 1 << exponent) for exponent in exponents]
    done = [data.draw(st.sets(st.integers(0, spec.num_parts - 1))) for spec in specs]
    keys = [f"{i:03d}" for i in range(sum(segments))]
    samples = pa.table({"key": keys, "sha256": keys, "label": keys})
    units = list(plan_work_units(specs, samples, done))
    made = Counter((store, task.index) for unit in units for store, task in unit.tasks)
    wanted = {(i, part) for i, spec in enumerate(specs) for part in set(range(spec.num_parts)) - done[i]}
    assert set(made) == wanted and set(made.values()) <= {1}
    places = [place for unit in units for place, _ in unit.samples]
    assert places == sorted(set(places)), "in order, and no picture is decoded for two work units"
    for unit in units:
        for store, task in unit.tasks:
            rows = specs[store].part_samples(task.index)
            assert [sample.key for sample in task.samples] == keys[rows]
            assert (task.start, task.stop) == (rows.start, rows.stop)


def test_parts_of_different_sizes_share_one_decoding(
    tmp_path: Path,
    many_pictures: Path,
    tiny_weights: Path,
    other_weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = index_folder(many_pictures)
    decoded: Counter[str] = Counter()
    real = load.load_sample

    def counted(sample: Any, *args: Any, **named: Any) -> Any:
        decoded[sample.key] += 1
        return real(sample, *args, **named)

    monkeypatch.setattr(load, "load_sample", counted)
    extractors, places = [], []
    asked = (("timm:test_vit", tiny_weights, TINY_SIZE), (OTHER, other_weights, OTHER_SIZE))
    for i, (name, weights, size) in enumerate(asked):
        monkeypatch.setattr("eupe.extract.parts.samples_per_part", lambda *_, i=i: 8 << 2 * i)
        described = resolve_teacher(name)
        spec = store_spec(
            described,
            index,
            views=TWO_CROPS,
            sizes=(size,),
            tokens=("summary", "dense"),
            weights_sha256=file_digest(weights),
            dtype="fp32",
        )
        places.append(tmp_path / f"{i}.zarr")
        create_store(places[i], spec)
        options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "sizes": (size,)}
        teacher = load_teacher(described, weights=weights, **options)
        extractors.append(PartExtractor(teacher, spec, corpus_root=index.root, views=TWO_CROPS, batch_size=8))
    worker = Worker(extractors, places)
    units = list(plan_work_units([c.spec for c in extractors], index.samples, [(), ()]))
    assert [len(unit.tasks) for unit in units] == [5] * 4
    for unit in units:
        worker.run(unit)
    assert set(decoded.values()) == {1} and len(decoded) == len(index)
    for i, (name, weights, size) in enumerate(asked):
        monkeypatch.setattr("eupe.extract.parts.samples_per_part", lambda *_, i=i: 8 << 2 * i)
        alone = make_store(tmp_path / f"alone{i}.zarr", many_pictures, weights, teacher=name, sizes=(size,))
        assert_same_features(finish_store(places[i]), alone)


def assert_same_features(ours: Store, theirs: Store) -> None:
    assert ours.samples.equals(theirs.samples)
    paths = [*ours.spec.feature_paths, "boxes", "digests"]
    for path in paths:
        for part in range(ours.spec.num_parts):
            names = theirs.path.list(f"{path}/c/{part}/")
            assert names and [ours.path.read(n) == theirs.path.read(n) for n in names] == [True] * len(names), path


def words(corpus: Path, *more: object) -> list[object]:
    return ["extract", "--corpus", corpus, "--views", "rrc:2", "--dtype", "fp32", "--batch-size", 8, *more]


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_two_teachers_on_ray_leave_what_each_leaves_alone(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, other_weights: Path, run_eupe: Run
) -> None:
    asked = [("timm:test_vit", tiny_weights), (OTHER, other_weights)]
    both = [w for name, weights in asked for w in ("--teacher", name, "--weights", weights)]
    outs = [tmp_path / "a.zarr", tmp_path / "b.zarr"]
    outcome = run_eupe(*words(tiny_corpus, *both, "--size", 64, "--out", outs[0], "--out", outs[1], "--json"))
    assert outcome.code == 0, outcome.err
    reports = json.loads(outcome.out)["stores"]
    assert [(r["store"], r["cached"], r["num_views"]) for r in reports] == [(str(out), False, 48) for out in outs]
    for (name, weights), out in zip(asked, outs, strict=True):
        alone = make_store(tmp_path / f"alone-{out.name}", tiny_corpus, weights, teacher=name, sizes=(64,))
        assert_same_features(open_store(out), alone)
    third = tmp_path / "c.zarr"
    again = run_eupe(*words(tiny_corpus, *both, "--size", 64, "--out", outs[0], "--out", third, "--json"))
    assert [r["cached"] for r in json.loads(again.out)["stores"]] == [True, False], "only what is missing is made"
    assert_same_features(open_store(third), open_store(outs[1]))


def test_what_cannot_share_a_pass_is_refused(tmp_path: Path, tiny_corpus: Path, run_eupe: Run) -> None:
    both = ["--teacher", "timm:test_vit", "--teacher", OTHER]
    for more, said in (
        (["--out", tmp_path / "s.zarr"], "--out was given 1 times for 2 teachers"),
        (["--out", tmp_path / "s.zarr", "--out", tmp_path / "s.zarr"], "cannot hold the features of two teachers"),
        (["--weights", tmp_path / "w"], "--weights was given 1 times for 2 teachers"),
    ):
        outcome = run_eupe(*words(tiny_corpus, *both, *more))
        assert outcome.code == 2
        assert said in " ".join(outcome.err.split())
    assert not list(tmp_path.iterdir())


@given(
    segments=st.lists(st.integers(1, 60), min_size=2, max_size=3),
    exponents=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_stores_extended_at_different_times_share_short_work_units(
    segments: list[int], exponents: tuple[int, int]
) -> None:
    """Their parts overlap like shingles, which must not make one work unit of all."""
    specs = [spec_of(segments, 1 << exponents[0]), spec_of([sum(segments)], 1 << exponents[1])]
    keys = [f"{i:03d}" for i in range(sum(segments))]
    samples = pa.table({"key": keys, "sha256": keys, "label": keys})
    units = list(plan_work_units(specs, samples, [(), ()]))
    made = Counter((store, task.index) for unit in units for store, task in unit.tasks)
    assert set(made) == {(i, part) for i, spec in enumerate(specs) for part in range(spec.num_parts)}
    assert set(made.values()) == {1}
    for unit in units:
        places = [place for place, _ in unit.samples]
        assert places == list(range(places[0], places[-1] + 1))
        assert len(places) < 2 * max(1 << exponent for exponent in exponents)
