"""The whole job through the command line, on Ray."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from awkward import save_broken
from making import make_corpus, make_store, random_weights
from ports import free_ports
from ray.cluster_utils import Cluster

from eupe.common.storage import StoragePath
from eupe.corpus.index import index_folder
from eupe.errors import CorpusError
from eupe.extract.actors import ExtractActor
from eupe.extract.config import ExtractConfig
from eupe.models.encoder import build_encoder, save_encoder
from eupe.store import Store, open_store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import file_digest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]

Run = Callable[..., Any]


def extract_words(corpus: Path, weights: Path, out: Path, *more: object) -> list[object]:
    words = ["extract", "--teacher", "timm:test_vit", "--weights", weights, "--corpus", corpus, "--out", out]
    return [*words, "--size", 64, "--views", "rrc:2", "--dtype", "fp32", *more]


def test_a_job_on_ray_makes_the_store_that_one_process_makes(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, tiny_store: Store, run_eupe: Run
) -> None:
    words = extract_words(tiny_corpus, tiny_weights, tmp_path / "s.zarr", "--batch-size", 8)
    first = run_eupe(*words, "--json")
    assert first.code == 0, first.err
    report = json.loads(first.out)
    assert (report["cached"], report["num_samples"], report["num_views"], report["num_failed"]) == (False, 24, 48, 0)
    ours, theirs = store_files(tmp_path / "s.zarr"), store_files(tiny_store.path.local)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []

    again = json.loads(run_eupe(*words, "--json").out)
    assert again["cached"]
    assert store_files(tmp_path / "s.zarr") == ours

    other = run_eupe(*words, "--seed", 1)
    assert other.code == 2
    assert "views.seed: stored 0, requested 1" in flat(other.err)
    assert store_files(tmp_path / "s.zarr") == ours

    reseeded = random_weights("test_vit", tmp_path / "other.safetensors", seed=5)
    other = run_eupe(*extract_words(tiny_corpus, reseeded, tmp_path / "s.zarr"))
    assert other.code == 2
    assert "teacher.weights_sha256" in flat(other.err)


def test_the_options_choose_pictures_and_views(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, run_eupe: Run
) -> None:
    words = extract_words(tiny_corpus, tiny_weights, tmp_path / "s.zarr", "--batch-size", 8)
    words += ["--scale", "0.2,0.3", "--ratio", "1,1", "--seed", 3]
    words += ["--include", "class0/*", "--include", "class1/*", "--exclude", "*/0000.png", "--shuffle", "--limit", 6]
    assert run_eupe(*words).code == 0
    store = open_store(tmp_path / "s.zarr")
    picked = index_folder(tiny_corpus).pick(include=["class[01]/*"], exclude=["*/0000.png"], shuffle=3, limit=6)
    assert store.samples["key"].to_pylist() == picked.samples["key"].to_pylist() != sorted(store.keys)
    boxes = store.read(list(range(6)) * 2, [0] * 6 + [1] * 6).boxes
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = store.samples["width"].to_numpy() * store.samples["height"].to_numpy()
    assert (sides[:, 0] == sides[:, 1]).all() and len(np.unique(boxes, axis=0)) > 6
    shares = sides.prod(axis=1) / np.tile(areas, 2)
    assert shares.min() > 0.18
    assert shares.max() < 0.32
    assert store.spec.views["scale"] == [0.2, 0.3] and store.spec.views["ratio"] == [1.0, 1.0]

    wrong = run_eupe(*words[:-1], 6, "--views", "squash")
    assert wrong.code == 2 and "--scale is for random crops only" in flat(wrong.err)


def flat(text: str) -> str:
    return " ".join(text.split())


def store_files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def test_unreadable_pictures_are_counted_not_fatal(tmp_path: Path, tiny_weights: Path, run_eupe: Run) -> None:
    corpus = make_corpus(tmp_path / "c", count=4)
    save_broken(corpus)
    outcome = run_eupe(*extract_words(corpus, tiny_weights, tmp_path / "s.zarr", "--json"))
    assert outcome.code == 0
    assert json.loads(outcome.out)["num_failed"] == 4
    info = json.loads(run_eupe("store", "info", tmp_path / "s.zarr", "--json").out)
    assert info["finished"]
    assert set(info["failed"]) == {"truncated.jpg", "empty.png", "text.jpg", "bomb.png"}


def test_weights_that_do_not_fit_are_never_partly_loaded(tmp_path: Path, tiny_corpus: Path, run_eupe: Run) -> None:
    wrong = random_weights("test_vit2", tmp_path / "wrong.safetensors")
    outcome = run_eupe(*extract_words(tiny_corpus, wrong, tmp_path / "s.zarr"))
    assert outcome.code == 2
    assert "do not fit" in flat(outcome.err)
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "s.zarr").exists()


def test_two_workers_make_the_store_that_one_makes(
    tmp_path: Path, many_pictures: Path, tiny_weights: Path, run_eupe: Run
) -> None:
    """Several parts, shared by the workers in whatever order."""
    stores = []
    for workers in (1, 2):
        out = tmp_path / f"{workers}.zarr"
        words = extract_words(many_pictures, tiny_weights, out, "--views", "rrc:16", "--workers", workers)
        outcome = run_eupe(*words, "--json")
        assert outcome.code == 0, outcome.err
        stores.append(open_store(out))
    assert stores[0].spec.num_parts == 4
    assert stores[0].samples.equals(stores[1].samples)
    rows = list(range(len(stores[0].samples)))
    a, b = (store.read(rows, [3] * len(rows)) for store in stores)
    assert (a.boxes == b.boxes).all()
    assert np.array_equal(*(store.read_digests(rows, [3] * len(rows)) for store in stores))
    assert a.dense is not None and b.dense is not None
    assert abs(a.dense.astype(float) - b.dense.astype(float)).max() < 0.01


def test_gpus_that_are_not_there_are_refused_not_waited_for(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, run_eupe: Run
) -> None:
    words = extract_words(tiny_corpus, tiny_weights, tmp_path / "s.zarr", "--workers", 2, "--gpus-per-worker", 99)
    outcome = run_eupe(*words)
    assert outcome.code == 2
    assert "2 workers with 99 GPUs each do not fit on the" in flat(outcome.err)
    outcome = run_eupe(*words[:-2], "--ray-address", f"127.0.0.1:{free_ports(1)[0]}")
    assert outcome.code == 2
    assert "no Ray cluster answers" in flat(outcome.err)


def test_a_cluster_does_the_work_and_limit_takes_the_first_pictures(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, tiny_store: Store, run_eupe: Run
) -> None:
    """Two nodes on this machine; the store of the first pictures is that of one process."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        words = extract_words(tiny_corpus, tiny_weights, tmp_path / "s.zarr", "--workers", 2, "--limit", 5)
        outcome = run_eupe(*words, "--ray-address", cluster.address, "--json")
        assert outcome.code == 0, outcome.err
    finally:
        ray.shutdown()
        cluster.shutdown()
    store = open_store(tmp_path / "s.zarr")
    assert store.samples["key"].to_pylist() == tiny_store.samples["key"].to_pylist()[:5]
    ours, theirs = (s.read([0, 4], [1, 0]).dense for s in (store, tiny_store))
    assert ours is not None and theirs is not None
    assert abs(ours.astype(float) - theirs.astype(float)).max() < 0.01


def test_a_worker_that_does_not_see_the_pictures_stops_the_job(
    tmp_path: Path, tiny_weights: Path, run_eupe: Run
) -> None:
    """An index may outlive its folder on some node; its pictures are not all recorded as unreadable."""
    corpus = make_corpus(tmp_path / "c", count=3)
    store = make_store(tmp_path / "s.zarr", corpus, tiny_weights)
    actor = ExtractActor(
        [ExtractConfig(teacher="timm:test_vit", corpus=corpus, out=tmp_path / "s.zarr", weights=tiny_weights)],
        [resolve_teacher("timm:test_vit")],
        StoragePath.of(tmp_path / "not-mounted"),
        1,
    )
    with pytest.raises(CorpusError, match=r"cannot see the corpus folder .*not-mounted"):
        actor.prepare([(0, store.path)])


def test_weights_given_beside_a_run_name_the_store(tmp_path: Path, tiny_corpus: Path, run_eupe: Run) -> None:
    for seed, name in enumerate(("run", "other")):
        torch.manual_seed(seed)
        save_encoder(build_encoder("test_vit", size=64), tmp_path / name)
    other = tmp_path / "other" / "student.safetensors"
    words = ["extract", "--teacher", tmp_path / "run", "--corpus", tiny_corpus, "--limit", 3]
    words += ["--out", tmp_path / "s.zarr"]
    assert run_eupe(*words, "--weights", other).code == 0
    assert open_store(tmp_path / "s.zarr").spec.teacher["weights_sha256"] == file_digest(other)
    outcome = run_eupe(*words)
    assert outcome.code == 2
    assert "teacher.weights_sha256" in flat(outcome.err)
