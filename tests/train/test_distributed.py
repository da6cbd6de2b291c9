"""Training in several processes: Ray Train, gloo, real kills."""

from dataclasses import replace
from pathlib import Path

import pytest
from making import TINY_STUDENT
from safetensors.torch import load_file

from eupe.store import Store
from eupe.train.config import TrainConfig
from eupe.train.log import TrainStatus
from eupe.train.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
WORKERS = 2


@pytest.fixture
def config(tiny_store: Store, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        targets=(tiny_store.path,),
        student=TINY_STUDENT,
        out=tmp_path / "run",
        steps=12,
        batch_size=8,
        head_width=32,
        holdout=0.3,
        dtype="fp32",
        checkpoint_every=4,
        log_every=1,
        num_workers=WORKERS,
    )


def losses_of(run: Path) -> list[float]:
    import json

    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def furthest(one: Path, other: Path) -> float:
    ours, theirs = (load_file(run / "student.safetensors") for run in (one, other))
    return max((ours[key] - theirs[key]).abs().max().item() for key in theirs)


def test_two_workers_go_the_way_of_one(config: TrainConfig) -> None:
    seen: list[TrainStatus] = []
    report = train(config, on_status=seen.append)
    alone = replace(config, num_workers=1, out=config.out.with_name("alone"))
    train(alone)
    assert losses_of(config.out) == pytest.approx(losses_of(alone.out), rel=1e-4)
    assert furthest(config.out, alone.out) < 1e-4
    assert [status.step for status in seen] == list(range(1, 13))
    assert report.steps == 12 and train(config).cached
    assert not (config.out / "ray").exists()


def test_a_spread_model_goes_the_way_of_a_whole_one_and_either_resumes_the_other(config: TrainConfig) -> None:
    spread = replace(config, shard=True, ema=0.9, clip=1.0, accumulate=2)
    train(spread)
    alone = replace(config, num_workers=1, ema=0.9, clip=1.0, out=config.out.with_name("alone"))
    train(alone)
    assert losses_of(config.out) == pytest.approx(losses_of(alone.out), rel=1e-4)
    assert furthest(config.out, alone.out) < 1e-4
    before = load_file(config.out / "student.safetensors")
    for name in ("report.json", "checkpoints/00000012.safetensors"):
        (config.out / name).unlink()
    train(replace(spread, num_workers=1, shard=False, accumulate=1, resume=True))
    after = load_file(config.out / "student.safetensors")
    assert max((after[key] - before[key]).abs().max().item() for key in before) < 1e-4
    for name in ("report.json", "checkpoints/00000012.safetensors"):
        (config.out / name).unlink()
    train(replace(spread, resume=True))
    after = load_file(config.out / "student.safetensors")
    assert max((after[key] - before[key]).abs().max().item() for key in before) < 1e-4
