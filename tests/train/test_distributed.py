"""Training in several processes: Ray Train, gloo, real kills."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from making import make_corpus, make_store, tiny_config
from ports import free_ports
from processes import descendants_called
from safetensors.torch import load_file

from eupe.errors import ConfigError, CorpusError, IncompleteError
from eupe.store import Store
from eupe.train.checkpoint import steps_kept
from eupe.train.config import TrainConfig
from eupe.train.log import TrainStatus
from eupe.train.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("joined")]
WORKERS = 2


@pytest.fixture
def config(tiny_store: Store, tmp_path: Path) -> TrainConfig:
    """Return options for two workers on the Ray that the tests share."""
    options = {"steps": 12, "checkpoint_every": 4, "log_every": 1, "num_workers": WORKERS}
    return tiny_config(tiny_store.path, tmp_path / "run", ray_address=os.environ["RAY_ADDRESS"], **options)


def losses_of(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def furthest(one: Path, other: Path) -> float:
    ours, theirs = (load_file(run / "student.safetensors") for run in (one, other))
    return max((ours[key] - theirs[key]).abs().max().item() for key in theirs)


def test_a_spread_model_goes_the_way_of_a_whole_one_and_either_resumes_the_other(config: TrainConfig) -> None:
    config = replace(config, ema=0.9, clip=1.0, validate_every=3)
    spread = replace(config, shard=True, accumulate=2)
    train(spread)
    alone = replace(config, num_workers=1, out=config.out.with_name("alone"))
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


@pytest.mark.parametrize("shard", [False, True])
def test_a_frozen_encoder_is_averaged_over_workers_before_and_after_it_is_freed(
    config: TrainConfig, tiny_weights: Path, shard: bool
) -> None:
    config = replace(config, init=tiny_weights, freeze_encoder=0.4, ema=0.9, clip=1.0, validate_every=3, keep=3)
    shared = replace(config, shard=shard, accumulate=2)
    train(shared)
    alone = replace(config, num_workers=1, out=config.out.with_name("alone"))
    train(alone)
    assert losses_of(config.out) == pytest.approx(losses_of(alone.out), rel=1e-4)
    assert furthest(config.out, alone.out) < 1e-4
    frozen, freed, of_one = (
        load_file(run / "checkpoints" / f"{step:08d}.safetensors")
        for run, step in ((config.out, 4), (config.out, 12), (alone.out, 4))
    )
    encoder = [name for name in frozen if name.startswith("encoder.model.")]
    assert encoder and all(torch.equal(frozen[name], of_one[name]) for name in encoder)
    assert not any(torch.equal(frozen[name], freed[name]) for name in encoder)


def worker_processes() -> list[int]:
    """Return Ray Train's worker processes below this one; a test that runs beside this one may have its own."""
    return descendants_called(b"ray::RayTrainWorker", os.getpid())


def test_a_worker_that_is_killed_costs_the_steps_since_the_checkpoint(config: TrainConfig) -> None:
    killed: list[int] = []

    def kill(status: TrainStatus) -> None:
        if status.step >= 6 and not killed:
            killed.append(worker_processes()[1])
            os.kill(killed[0], signal.SIGKILL)

    report = train(replace(config, steps=80), on_status=kill)
    assert killed and report.steps == 80
    whole = replace(config, steps=80, out=config.out.with_name("whole"), num_workers=1)
    train(whole)
    assert losses_of(config.out) == pytest.approx(losses_of(whole.out), rel=1e-3)


def test_a_signal_stops_all_workers_with_a_checkpoint(config: TrainConfig) -> None:
    def stop(status: TrainStatus) -> None:
        if status.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    long = replace(config, steps=3000)
    with pytest.raises(IncompleteError, match=r"stopped after step \d+ of 3000; resume with --resume"):
        train(long, on_status=stop)
    assert len(losses_of(config.out)) == steps_kept(config.out)[-1] < 3000


def test_a_mistake_that_workers_find_is_the_users(config: TrainConfig, tmp_path: Path, tiny_weights: Path) -> None:
    corpus = make_corpus(tmp_path / "pictures")
    store = make_store(tmp_path / "s.zarr", corpus, tiny_weights)
    lost = []

    def lose_a_picture(status: TrainStatus) -> None:
        if not lost:
            lost.extend(corpus.rglob("*.png"))
            for path in lost:
                path.unlink()

    with pytest.raises(CorpusError, match="has stored features, but cannot be read now"):
        train(replace(config, targets=(store.path,), steps=3000), on_status=lose_a_picture)


def test_a_cluster_that_is_not_there_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="no Ray cluster answers at --ray-address"):
        train(replace(config, ray_address=f"127.0.0.1:{free_ports(1)[0]}"))


def test_two_workers_go_the_way_of_one(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where --out is relative, since workers are in another directory; on a Ray of their own.

    It is the last: a process that has started a Ray itself would ask the shared one for a token.
    """
    monkeypatch.chdir(tmp_path)
    config = replace(config, out=Path("run"), ray_address=None)
    seen: list[TrainStatus] = []
    report = train(config, on_status=seen.append)
    alone = replace(config, num_workers=1, out=config.out.with_name("alone"))
    train(alone)
    assert losses_of(config.out) == pytest.approx(losses_of(alone.out), rel=1e-4)
    assert furthest(config.out, alone.out) < 1e-4
    assert [status.step for status in seen] == list(range(1, 13))
    assert report.steps == 12 and train(config).cached
    assert not (config.out / "ray").exists()
