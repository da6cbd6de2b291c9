"""`eupe plan`: its arithmetic, its prediction against a store that was made, what it refuses, what it prints."""

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from making import TWO_CROPS, make_store, random_weights

from eupe.common import storage
from eupe.errors import ConfigError
from eupe.extract import load
from eupe.extract.plan import Rates
from eupe.extract.plan_on_paper import (
    NOMINAL_SHARES,
    Need,
    PaperConfig,
    estimate_on_paper,
    moments_bytes,
    need_of,
    require_room,
)
from eupe.extract.worker import Forward
from eupe.store import open_store
from eupe.teachers.teacher import Teacher

Run = Callable[..., Any]
OTHER = "timm:test_efficientnet"


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def words(corpus: Path, weights: Path, *more: object) -> list[object]:
    given = ["plan", "--teacher", "timm:test_vit", "--corpus", corpus, "--weights", weights, "--size", 64]
    return [*given, "--views", "rrc:2", "--dtype", "fp32", "--batch-size", 8, "--json", *more]


def planned(run_eupe: Run, *more: object) -> dict[str, Any]:
    outcome = run_eupe(*more)
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("\n") == 1
    report: dict[str, Any] = json.loads(outcome.out)
    return report


def refused(run_eupe: Run, *more: object) -> str:
    outcome = run_eupe(*more)
    assert (outcome.code, outcome.out) == (2, "")
    return " ".join(outcome.err.partition("error: ")[2].split())


def test_stages_on_the_same_processor_take_turns() -> None:
    rates = Rates(decode=100, forward=50, encode=100, read=200)
    assert rates.pipeline(on_gpu=False) == pytest.approx(25)
    assert rates.pipeline(on_gpu=True) == pytest.approx(50)
    assert Rates(decode=40, forward=50, encode=40, read=200).pipeline(on_gpu=True) == pytest.approx(20)


def test_the_cache_pays_off_once_it_saved_what_it_took() -> None:
    rates = Rates(decode=100, forward=50, encode=100, read=200)
    epochs = rates.break_even_epochs(on_gpu=False)
    assert epochs == pytest.approx(8 / 3)
    assert 1 / 25 + epochs / 200 == pytest.approx(epochs / 50)
    assert Rates(decode=100, forward=50, encode=100, read=50).break_even_epochs(on_gpu=False) is None


def test_moments_are_there_until_the_end() -> None:
    assert moments_bytes([2, 3]) == 8 * (1 + 2 + 3) + 8 * (1 + 3 + 6)
    assert need_of(1000.4, num_samples=9, per_part=4, dims=[2]) == Need(1000, 1000 + 3 * 48)


def test_room_is_asked_for_the_whole_time_and_only_on_a_disk() -> None:
    require_room(Need(5, 10), 10, "here")
    require_room(Need(5, 10), None, "s3://bucket/x")
    with pytest.raises(ConfigError, match="give another --out"):
        require_room(Need(5, 10), 9, "here")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_bytes_are_those_of_the_store(
    precision: str, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, run_eupe: Run
) -> None:
    store = make_store(tmp_path / "s.zarr", tiny_corpus, tiny_weights, views=TWO_CROPS, precision=precision)
    plan = planned(run_eupe, *words(tiny_corpus, tiny_weights, "--precision", precision))
    assert plan["num_views"] == 48 and plan["sampled_views"] == 48
    assert plan["need"]["stored"] == pytest.approx(store.stored_bytes, rel=0.05)
    assert plan["raw_bytes_per_view"] == 2 * (16 * 64 + 64)
    assert plan["bytes_per_view"] * 1000 == pytest.approx(plan["read_bytes_per_s"])


def test_every_rate_is_measured_and_the_precisions_lie_side_by_side(
    tiny_corpus: Path, tiny_weights: Path, run_eupe: Run
) -> None:
    plan = planned(run_eupe, *words(tiny_corpus, tiny_weights, "--workers", 4))
    rates = Rates(**plan["rates"])
    assert all(rate > 0 for rate in plan["rates"].values())
    assert plan["views_per_s"] == pytest.approx(rates.pipeline(on_gpu=plan["device"] == "cuda"))
    assert plan["hours"] == pytest.approx(48 / plan["views_per_s"] / 4 / 3600)
    dense = {c["precision"]: c for c in plan["choices"] if c["path"] == "64/dense"}
    assert set(dense) == set(NOMINAL_SHARES)
    assert dense["int8"]["total_bytes"] < dense["fp16"]["total_bytes"]
    assert dense["bitround:3"]["cosine_p5"] < dense["int8"]["cosine_p5"] < dense["fp16"]["cosine_p5"]


def test_every_option_changes_the_plan(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def plan(*more: object) -> dict[str, Any]:
        return planned(run_eupe, *words(tiny_corpus, tiny_weights, *more))

    plain = plan()
    assert plain["out"] == str(tmp_path / "store" / "timm-test_vit.zarr")
    assert plan("--out", tmp_path / "x.zarr")["out"] == str(tmp_path / "x.zarr")
    assert plan("--views", "rrc:3")["num_views"] == 72
    assert plan("--photometric", "eupe")["need"]["stored"] > plain["need"]["stored"]
    assert plan("--size", 32)["raw_bytes_per_view"] == plain["raw_bytes_per_view"] + 2 * (4 * 64 + 64)
    assert plan("--tokens", "dense")["raw_bytes_per_view"] == 2 * 16 * 64
    assert plan("--grid", 2)["raw_bytes_per_view"] == 2 * (4 * 64 + 64)
    assert plan("--dtype", "bf16")["dtype"] == "bf16"
    assert plan("--precision", "bitround:4")["need"]["stored"] < plain["need"]["stored"]
    assert plan("--fidelity", "0.9999")["precision"] != plain["precision"]
    with_pixels = plan("--pixels")
    assert with_pixels["bytes_per_view"] > plain["bytes_per_view"] + 1000
    assert with_pixels["raw_bytes_per_view"] == plain["raw_bytes_per_view"]
    assert plan("--limit", 5)["num_images"] == 5
    assert plan("--include", "class0/*")["num_images"] == 8
    assert plan("--include", "class0/*", "--include", "class1/*", "--exclude", "*/0000.png")["num_images"] == 15
    first = plan("--limit", 5)["choices"]
    assert plan("--limit", 5, "--shuffle")["choices"] != first
    for more in (["--seed", 1], ["--scale", "0.2,0.3"], ["--ratio", "1,1"]):
        assert plan(*more)["choices"] != plain["choices"]
    other = random_weights("test_vit", tmp_path / "other.safetensors", seed=1)
    assert planned(run_eupe, *words(tiny_corpus, other))["choices"] != plain["choices"]
    other.unlink()
    assert "do not exist" in refused(run_eupe, *words(tiny_corpus, tmp_path / "none"))
    assert not list(tmp_path.iterdir())


def test_the_teacher_is_timed_on_batches_of_the_size_asked_for(
    tiny_corpus: Path, tiny_weights: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: set[int] = set()
    begin = Forward.begin

    def noted(self: Forward, views: Any) -> Any:
        sizes.add(len(views))
        return begin(self, views)

    monkeypatch.setattr(Forward, "begin", noted)
    planned(run_eupe, *words(tiny_corpus, tiny_weights, "--batch-size", 12))
    assert sizes == {12}


def test_a_store_that_does_not_fit_is_refused(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 10**4))
    said = refused(run_eupe, *words(tiny_corpus, tiny_weights, "--out", tmp_path / "s.zarr"))
    assert "s.zarr has 1e-05 GB free" in said and "give another --out" in said
    paper = ["plan", "--teacher", "dinov2", "--num-images", 1000, "--json"]
    assert "give another --out" in refused(run_eupe, *paper, "--out", tmp_path)
    assert planned(run_eupe, *paper)["free_bytes"] is None


def test_what_a_store_holds_need_not_be_free(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.zarr"
    make_store(out, tiny_corpus, tiny_weights, views=TWO_CROPS)
    asked = words(tiny_corpus, tiny_weights, "--out", out)
    whole = planned(run_eupe, *asked)
    assert whole["held_bytes"] >= open_store(out).stored_bytes
    shutil.rmtree(out / "parts")
    shutil.rmtree(out / "64" / "dense" / "c")
    plan = planned(run_eupe, *asked)
    on_disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert 0 < plan["held_bytes"] == on_disk < whole["held_bytes"]

    missing = plan["need"]["peak"] - on_disk
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, missing + 2000))
    assert planned(run_eupe, *asked)["free_bytes"] == missing + 2000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, missing - 2000))
    assert "GB are already there" in refused(run_eupe, *asked)
    monkeypatch.undo()
    assert planned(run_eupe, *asked, "--seed", 1)["held_bytes"] == 0
    assert planned(run_eupe, *asked, "--limit", 20)["held_bytes"] == 0


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(OTHER.removeprefix("timm:"), tmp_path_factory.mktemp("other") / "w.safetensors")


def test_several_teachers_share_a_pass(
    tmp_path: Path,
    tiny_corpus: Path,
    tiny_weights: Path,
    other_weights: Path,
    run_eupe: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each figure of theirs is that of a plan of one; in all they add up, but for the pictures, decoded once."""
    real = load.load_sample

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.1)
        return real(*arguments, **named)

    monkeypatch.setattr(load, "load_sample", slow)
    shared = ["--views", "rrc:2", "--dtype", "fp32", "--batch-size", 8, "--limit", 6, "--workers", 2, "--json"]
    first = ["--teacher", "timm:test_vit", "--weights", tiny_weights, "--out", tmp_path / "a.zarr"]
    second = ["--teacher", OTHER, "--weights", other_weights, "--out", tmp_path / "b.zarr"]
    alone = [planned(run_eupe, "plan", "--corpus", tiny_corpus, *shared, *words) for words in (first, second)]
    both = planned(run_eupe, "plan", "--corpus", tiny_corpus, *shared, *first, *second)
    exact = ("teacher", "out", "num_images", "num_views", "sampled_views", "raw_bytes_per_view", "need", "precision")
    for ours, theirs in zip(both["teachers"], alone, strict=True):
        assert ours.keys() == theirs.keys() and "teachers" not in theirs
        assert [ours[name] for name in exact] == [theirs[name] for name in exact]
    each = both["teachers"]
    assert both["need"] == {kind: sum(plan["need"][kind] for plan in each) for kind in ("stored", "peak")}
    assert (both["num_images"], both["num_views"], both["workers"]) == (6, 12, 2)
    for total in ("bytes_per_view", "read_bytes_per_s", "epoch_hours_cached", "epoch_hours_online", "held_bytes"):
        assert both[total] == pytest.approx(sum(plan[total] for plan in each))
    for stage in ("forward", "encode", "read"):
        assert 1 / both["rates"][stage] == pytest.approx(sum(1 / plan["rates"][stage] for plan in each))
    assert both["rates"]["decode"] > 0.7 * min(plan["rates"]["decode"] for plan in each), "of one decoding"
    rates = Rates(**both["rates"])
    on_gpu = each[0]["device"] == "cuda"
    assert both["hours"] == pytest.approx(12 / rates.pipeline(on_gpu=on_gpu) / 2 / 3600)
    assert both["break_even_epochs"] == rates.break_even_epochs(on_gpu=on_gpu)

    told = run_eupe("plan", "--corpus", tiny_corpus, *shared[:-1], *first, *second)
    assert told.code == 0, told.err
    assert "in one pass, each picture decoded once" in told.out and "6 pictures, 12 views of each teacher" in told.out
    assert all(f"free at {tmp_path}/{name}.zarr" in told.out for name in "ab")
    assert all(told.out.count(f"mean and std of {name} are those of") == 1 for name in ("timm:test_vit", OTHER))


def test_stores_that_fit_one_by_one_but_not_together_are_refused(
    tmp_path: Path,
    tiny_corpus: Path,
    tiny_weights: Path,
    other_weights: Path,
    run_eupe: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = words(tiny_corpus, tiny_weights, "--teacher", OTHER, "--weights", other_weights, "--limit", 4)
    asked += ["--out", tmp_path / "a.zarr", "--out", tmp_path / "b.zarr"]
    plan = planned(run_eupe, *asked)
    most = max(each["need"]["peak"] for each in plan["teachers"])
    assert most < plan["need"]["peak"] - 5000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, most + 2000))
    said = refused(run_eupe, *asked)
    assert f"--out {tmp_path}/a.zarr and {tmp_path}/b.zarr (one disk) has" in said and "give another --out" in said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_device_too_small_for_one_view_is_one_sentence(
    error: Exception, tiny_corpus: Path, tiny_weights: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(self: Teacher, pixels: Any, layers: Any = ()) -> Any:
        raise error

    monkeypatch.setattr(Teacher, "__call__", no_memory)
    said = refused(run_eupe, *words(tiny_corpus, tiny_weights))
    assert "runs out of memory on cpu with a single view of 64 px" in said and "a smaller --size" in said


def test_another_error_of_the_teacher_is_not_taken_for_too_little_memory(
    tiny_corpus: Path, tiny_weights: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Teacher, pixels: Any, layers: Any = ()) -> Any:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Teacher, "__call__", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_eupe(*words(tiny_corpus, tiny_weights))


def test_a_full_temporary_disk_is_one_sentence(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    asked = words(tiny_corpus, tiny_weights)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for owner, name in ((storage, "write_file"), (os, "mkdir")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            outcome = run_eupe(*asked)
        said = " ".join(outcome.err.partition("error: ")[2].split())
        assert (outcome.code, outcome.out) == (1, "")
        assert "temporary folder ([Errno 28] No space left on device)" in said and "TMPDIR" in said
        assert "committed" not in said and not list(tmp_path.iterdir())


def test_on_paper_the_bytes_follow_from_the_specs() -> None:
    plan = estimate_on_paper(PaperConfig(teachers=("pe-core-g", "dinov3-h+"), num_images=1000, views=TWO_CROPS))
    first, second = plan.teachers
    assert first.raw_bytes_per_view == 2 * (32 * 32 + 1) * 1536
    assert second.raw_bytes_per_view == 2 * (16 * 16 + 1) * 1280
    assert first.raw_bytes == 2000 * first.raw_bytes_per_view
    assert first.choices["int8"] == round(0.43 * first.raw_bytes)
    assert first.need.stored == first.choices["fp16"]
    assert plan.need.stored == first.need.stored + second.need.stored
    assert second.need.peak - second.need.stored == 2 * 8 * (1 + 1280 + 1280 * 1281 // 2) * 32, (
        "1000 pictures are 32 parts of 32"
    )


@pytest.mark.parametrize(
    ("more", "factor"),
    [
        (["--views", "rrc:3"], 3),
        (["--num-images", 500], 0.5),
        (["--tokens", "summary"], 1 / 257),
        (["--grid", 4], 17 / 257),
        (["--size", 448], 1025 / 257),
        (["--precision", "int8"], 0.43 / 0.82),
        (["--teacher", "dinov2-s"], 2),
    ],
)
def test_every_option_changes_the_plan_on_paper(more: list[object], factor: float, run_eupe: Run) -> None:
    paper = ["plan", "--teacher", "dinov2-s", "--num-images", 1000, "--json"]
    plain, changed = planned(run_eupe, *paper), planned(run_eupe, *paper, *more)
    assert changed["on_paper"]
    assert changed["need"]["stored"] == pytest.approx(plain["need"]["stored"] * factor, rel=1e-4)


def test_what_is_on_paper_says_so(run_eupe: Run) -> None:
    outcome = run_eupe("plan", "--teacher", "pe-core", "--teacher", "dinov3", "--num-images", 1280000)
    assert outcome.code == 0
    assert outcome.out.count("on paper") == 2 and "nothing was measured" in outcome.out
    assert "pe-core-g" in outcome.out and "dinov3-h+" in outcome.out


def test_a_measured_plan_is_readable(tiny_corpus: Path, tiny_weights: Path, run_eupe: Run) -> None:
    outcome = run_eupe(*(word for word in words(tiny_corpus, tiny_weights) if word != "--json"))
    assert outcome.code == 0, outcome.err
    assert "measured: timm:test_vit on 48 views" in outcome.out and "on paper" not in outcome.out
    assert "the cache pays off after" in outcome.out and "64/summary" in outcome.out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "give --corpus"),
        (["--corpus", ".", "--num-images", 5], "give --corpus"),
        (["--corpus", ".", "--teacher", "dinov3", "--weights", "w"], "--weights was given 1 times for 2 teachers"),
        (["--corpus", ".", "--teacher", "dinov3", "--out", "o"], "--out was given 1 times for 2 teachers"),
        (["--corpus", ".", "--teacher", "dinov2"], "cannot hold the features of two teachers"),
        (["--corpus", ".", "--teacher", "dinov3", "--size", 256], "give --size 224 or --size 336"),
        (["--num-images", 5, "--out", "a", "--out", "b"], "give it once"),
        (["--num-images", 0], "--num-images must be at least 1"),
        (["--num-images", 5, "--weights", "w"], "--weights has no effect with --num-images"),
        (["--num-images", 5, "--photometric", "eupe"], "--photometric has no effect with --num-images"),
        (["--num-images", 5, "--dtype", "bf16"], "--dtype has no effect with --num-images"),
        (["--num-images", 5, "--batch-size", 4], "--batch-size has no effect with --num-images"),
        (["--num-images", 5, "--workers", 4], "--workers has no effect with --num-images"),
        (["--num-images", 5, "--views", "rrc:2", "--scale", "0.2,1"], "--scale has no effect with --num-images"),
        (["--num-images", 5, "--views", "rrc:2", "--ratio", "1,1"], "--ratio has no effect with --num-images"),
        (["--num-images", 5, "--fidelity", 0.999], "--fidelity has no effect with --num-images"),
        (["--num-images", 5, "--pixels"], "--pixels has no effect with --num-images"),
        (["--num-images", 5, "--limit", 4], "--limit has no effect with --num-images"),
        (["--num-images", 5, "--include", "*"], "--include has no effect with --num-images"),
        (["--num-images", 5, "--exclude", "*"], "--exclude has no effect with --num-images"),
        (["--num-images", 5, "--shuffle"], "--shuffle has no effect with --num-images"),
        (["--num-images", 5, "--seed", 0], "--seed has no effect with --num-images"),
        (["--num-images", 5, "--precision", "bitround:4"], "no nominal share"),
        (["--num-images", 5, "--tokens", "cls"], "--tokens takes"),
        (["--num-images", 5, "--size", 100], "--size 98"),
    ],
)
def test_what_has_no_meaning_is_refused(more: list[object], said: str, run_eupe: Run) -> None:
    assert said in refused(run_eupe, "plan", "--teacher", "dinov2", *more)
