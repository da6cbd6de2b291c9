"""What a run says of itself: words, rates, lines, TensorBoard, Weights & Biases."""

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from making import tiny_config
from PIL import Image

from eupe.errors import ConfigError
from eupe.store import Store
from eupe.train import stream as stream_module
from eupe.train.config import TrainConfig
from eupe.train.log import Rates, RunLog, TrainStatus
from eupe.train.loop import train
from eupe.train.run_spec import RunSpec
from eupe.train.stream import Meter
from eupe.train.targets import Batch, Request


@pytest.fixture
def config(tiny_store: Store, tmp_path: Path) -> TrainConfig:
    return tiny_config(
        tiny_store.path,
        tmp_path / "run",
        steps=4,
        batch_size=4,
        head_width=16,
        log_every=1,
        validate_every=2,
        checkpoint_every=2,
    )


def status(step: int = 3, losses: dict[str, float] | None = None) -> TrainStatus:
    return TrainStatus(
        images_per_s=1234.4,
        data_wait=0.0123,
        step=step,
        total_steps=9,
        loss=1.5,
        losses=losses or {"dinov2-s/dense": 0.25},
        learning_rate=1e-3,
        gradient_norm=0.5,
    )


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_words_of_one_target_are_the_loss_and_the_rates() -> None:
    words = status(losses={"dinov2-s/summary": 0.5, "dinov2-s/dense": 0.25}).words()
    assert words == "loss 1.500  1234 img/s  data-wait 1.2%"


def test_words_of_several_targets_have_each_ones_sum_also_with_a_slash_in_its_name() -> None:
    losses = {"dinov2-s/summary": 0.5, "dinov2-s/dense": 0.25, "a/b/dense": 0.125}
    assert status(losses=losses).words() == "loss 1.500  dinov2-s 0.750  a/b 0.125  1234 img/s  data-wait 1.2%"


class Clock:
    """A time that passes only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(stream_module, "time", types.SimpleNamespace(monotonic=lambda: self.now))

    def batches(self, waits: list[float], sizes: list[int]) -> Iterator[Batch]:
        for wait, size in zip(waits, sizes, strict=True):
            self.now += wait
            yield Batch(Request(views=torch.zeros(size, 2).numpy(), size=1), torch.zeros(0), (), ("key",) * size)


def test_a_meter_counts_the_pictures_of_all_workers_and_the_share_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = Meter(world_size=2)
    batches = meter.waiting(clock.batches(waits=[1.0, 0.5, 0.0], sizes=[4, 4, 2]))
    for _ in range(2):
        next(batches)
        clock.now += 2.25  # of computing
    assert meter.rates() == Rates(images_per_s=16 / 6, data_wait=1.5 / 6)
    next(batches)
    clock.now += 2.0
    assert meter.rates() == Rates(images_per_s=4 / 2, data_wait=0.0)
    seconds, rates = meter.totals()
    assert (seconds, rates) == (8.0, Rates(images_per_s=20 / 8, data_wait=1.5 / 8))
    assert next(batches, None) is None


def test_lines_of_steps_that_will_be_done_again_are_dropped(config: TrainConfig) -> None:
    config.out.mkdir()
    with RunLog(config, SPEC, 0) as log:
        for step in range(1, 6):
            log.step(status(step))
            log.validation(step, {})
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    with RunLog(config, SPEC, 3) as log:
        log.step(status(4))
    assert [line["step"] for line in lines(config.out)] == [1, 1, 2, 2, 3, 3, 4]


def test_the_gradients_norm_is_noted_before_it_is_clipped(config: TrainConfig) -> None:
    train(config)
    tight = replace(config, clip=1e-3, out=config.out.with_name("tight"))
    train(tight)
    plain, clipped = ([line for line in lines(run.out) if "loss" in line] for run in (config, tight))
    assert all(line["gradient_norm"] > 0 for line in plain)
    assert clipped[0]["gradient_norm"] == plain[0]["gradient_norm"] > 1e-3


SPEC = RunSpec(config={"lr": 0.5}, targets=(), pictures=(), total_steps=9)


class FakeWandb(types.ModuleType):
    """Notes what it is told."""

    Error = type("Error", (Exception,), {})
    Settings = staticmethod(dict)

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.told: list[tuple[int, dict[str, Any]]] = []
        self.ended: list[int] = []
        self.refusal = ""

    def init(self, **options: Any) -> Any:
        if self.refusal:
            raise self.Error(self.refusal)
        self.begun.append(options)
        return types.SimpleNamespace(
            log=lambda values, step: self.told.append((step, values)),
            finish=lambda exit_code: self.ended.append(exit_code),
        )

    def Image(self, picture: Image.Image) -> Image.Image:
        return picture


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_is_told_the_scalars_and_pictures_of_one_run_also_after_a_resume(
    config: TrainConfig, wandb: FakeWandb
) -> None:
    class Stop(Exception):
        pass

    def stop(status: TrainStatus) -> None:
        if status.step == 3:
            raise Stop

    config = replace(config, wandb="project")
    with pytest.raises(Stop):
        train(config, on_status=stop)
    train(replace(config, resume=True))
    assert wandb.ended == [1, 0]
    first, second = wandb.begun
    assert first == second and first["resume"] == "allow" and first["project"] == "project"
    assert first["config"]["total_steps"] == 4
    losses = [(step, told["loss"]) for step, told in wandb.told if "loss" in told]
    noted_losses = {line["step"]: line["loss"] for line in lines(config.out) if "loss" in line}
    assert losses == [(step, noted_losses[step]) for step in (1, 2, 3, 3, 4)]
    shown = [(step, told["pictures"]) for step, told in wandb.told if "pictures" in told]
    assert [step for step, _ in shown] == [2, 4]
    kept = Image.open(config.out / "pictures" / "00000004.png")
    assert shown[-1][1].tobytes() == kept.tobytes()
    validations = {step: told for step, told in wandb.told if any(name.startswith("validation/") for name in told)}
    noted = next(line for line in lines(config.out) if "validation" in line and line["step"] == 4)["validation"]
    assert validations[4] == {
        f"validation/{target}/{kind}": measures["normalised"]
        for target, kinds in noted.items()
        for kind, measures in kinds.items()
    }


def test_without_wandb_nothing_is_told(config: TrainConfig, wandb: FakeWandb) -> None:
    train(config)
    assert not wandb.begun and not (config.out / "wandb_id").exists()


@pytest.mark.parametrize("missing", ["package", "mere folder"])
def test_a_missing_package_is_said_before_anything_is_made(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None if missing == "package" else types.ModuleType("wandb"))
    with pytest.raises(ConfigError, match=r"--wandb needs .* pip install wandb"):
        train(replace(config, wandb="project"))
    assert not config.out.exists()


def test_a_refused_login_is_one_sentence(config: TrainConfig, wandb: FakeWandb) -> None:
    wandb.refusal = "no API key"
    with pytest.raises(ConfigError, match=r"--wandb project: no API key; .*WANDB_MODE=offline"):
        train(replace(config, wandb="project"))


def test_the_package_itself_keeps_two_students_apart_offline(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb.sdk", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    configs = [replace(config, out=config.out / name, wandb="project") for name in "ab"]
    for each in configs:
        each.out.mkdir(parents=True)
    with RunLog(configs[0], SPEC, 0) as one, RunLog(configs[1], SPEC, 0) as other:
        for log, loss in ((one, 0.123456), (other, 0.654321)):
            log.step(replace(status(), loss=loss))
            log.picture(3, Image.new("RGB", (8, 8)))
    for config, ours, theirs in ((configs[0], b"0.123456", b"0.654321"), (configs[1], b"0.654321", b"0.123456")):
        (kept,) = config.out.glob("wandb/offline-run-*/*.wandb")
        assert (config.out / "wandb_id").read_text() in kept.name
        assert ours in kept.read_bytes() and theirs not in kept.read_bytes()
        assert len(list(config.out.glob("wandb/offline-run-*/files/media/images/*.png"))) == 1
