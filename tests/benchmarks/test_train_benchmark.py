"""benchmarks/train.py: what it compares is what it says; its rates are not tested."""

from __future__ import annotations

import re
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from making import BATCH, TINY_SIZE, TINY_STUDENT, TINY_TEACHER

from benchmarks import train
from benchmarks.online import OnlineTeacher
from eupe.store import Store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import Teacher, load_teacher
from eupe.train.config import TrainConfig

TINY = ("--student", TINY_STUDENT, "--head-width", "16", "--batch-size", "4", "--steps", "2", "--pictures", "12")


@pytest.fixture
def run(tiny_store: Store, tmp_path: Path) -> train.Run:
    config = TrainConfig(
        targets=(tiny_store.path,),
        student=TINY_STUDENT,
        out=tmp_path / "run",
        steps=train.ENDLESS,
        batch_size=BATCH,
        head_width=16,
        holdout=0.3,
    )
    return train.Run(config)


@pytest.fixture
def teacher(tiny_weights: Path) -> Teacher:
    spec = resolve_teacher(TINY_TEACHER)
    device = torch.device("cpu")
    return load_teacher(spec, weights=tiny_weights, device=device, dtype=torch.float32, sizes=(TINY_SIZE,))


def test_online_batches_are_the_cached_ones_but_for_float16(run: train.Run, teacher: Teacher) -> None:
    online = run.online(OnlineTeacher(teacher, TINY_SIZE, batch_size=3), 3)
    for cached, taught in islice(zip(run.cached(3), online, strict=True), 3):
        assert cached.keys == taught.keys
        assert torch.equal(cached.pixels, taught.pixels)
        for kind in ("summary", "dense"):
            stored, fresh = (getattr(batch.targets[0], kind).decode() for batch in (cached, taught))
            assert torch.allclose(stored, fresh, rtol=2e-3, atol=1e-4)
            assert not torch.equal(stored, fresh)


def test_online_targets_can_be_learnt_from(run: train.Run, teacher: Teacher) -> None:
    before = [weight.clone() for weight in run.trainer.distiller.parameters()]
    for batch in islice(run.online(OnlineTeacher(teacher, TINY_SIZE, batch_size=3)), 2):
        run.step(batch)
    after = run.trainer.distiller.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_timed_steps_are_those_after_the_warm_up(run: train.Run) -> None:
    used = []
    took = train.timed(run.cached(), lambda batch: used.append(batch.request.step), 5)
    assert used == list(range(train.WARM_UP + 5))
    assert took.views == 5 * BATCH
    assert 0 <= took.data_wait <= 1


def test_no_step_is_timed_twice(run: train.Run) -> None:
    asked = []

    def batches(first: int):  # type: ignore[no-untyped-def]
        asked.append(first)
        return run.cached(first)

    for _ in range(2):
        run.timed(batches, 1)
    assert asked == [0, train.WARM_UP + 1]


def test_ablations_share_one_extraction_and_online_ones_share_nothing() -> None:
    ours, theirs = train.ablations([100.0], [10.0], [60.0], epochs=2)
    assert ours == [100 + 10 * 10]
    assert theirs == [10 * 60]


def test_flatness_sees_a_leak_and_forgives_the_warm_up() -> None:
    warming = np.minimum(np.arange(100) * 50, 1000.0)
    assert train.flatness([*warming]) == pytest.approx(1.0)
    assert train.flatness([*(1000 + 10.0 * np.arange(100))]) > train.FLAT


def printed(measure: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a whole benchmark prints when it does the least possible; check that it leaves no files."""
    words = ["train", measure, "--folder", str(folder), *TINY, "--size", "112", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", [*words, *(("--teachers", "dinov2-s") if measure == "online" else ())])
    train.main()
    assert not any(folder.joinpath("train").glob("*"))
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("assets")
@pytest.mark.parametrize(
    ("measure", "ratios"),
    [
        ("wait", ["rate of cached / in memory", "data-wait, share of the time"]),
        ("loader", ["the stream / reading, then decoding", "the student / reading, then decoding, then its step"]),
        (
            "online",
            [
                "an epoch: online / cached",
                "5 ablations, epochs of each: 1: online / store",
                "5 ablations, epochs of each: 10: online / store",
            ],
        ),
        ("layout", ["channels first / as it is trained"]),
        ("memory", ["last / first after the warm-up"]),
    ],
)
def test_every_measure_ends_with_its_ratios(
    measure: str,
    ratios: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = printed(measure, tmp_path, monkeypatch, capsys)
    rows = dict(re.findall(r"^\| (.+) \| ([\d.]+) \([\d.]+–[\d.]+\) \|", found, re.MULTILINE))
    assert list(rows) == ratios
    assert all(0 <= float(value) < 1000 for value in rows.values())


@pytest.mark.slow
@pytest.mark.usefixtures("assets")
def test_students_of_two_steps_agree_whether_cached_or_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = printed("quality", tmp_path, monkeypatch, capsys)
    apart = [float(x) for x in re.findall(r"cached against online, seed \d: at most ([\d.]+) apart", found)]
    between_seeds = float(re.findall(r"cached, seed 1 against 0: at most ([\d.]+) apart", found)[0])
    assert len(apart) == 2
    assert max(apart) <= train.AGREE < between_seeds
