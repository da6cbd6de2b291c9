"""An encoder from weights under heads from random ones: frozen at first, then trained at a rate of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from making import make_store, random_weights, tiny_config
from safetensors.torch import load_file
from torch import Tensor, nn

from eupe.errors import RunError
from eupe.store import Store
from eupe.train.checkpoint import FOLDER
from eupe.train.config import ENCODER_LR_MULT, FROZEN_SHARE, TrainConfig
from eupe.train.log import TrainStatus
from eupe.train.loop import train, train_together
from eupe.train.parallel import World
from eupe.train.run_spec import METHOD, PROTECTION, read_run_spec, resolve
from eupe.train.stream import open_corpora, stream, training_requests
from eupe.train.trainer import Trainer, learning_rate, rate_from

CPU = torch.device("cpu")
STEPS = 10
FROZEN = 2
CNN = "test_resnet"
PROTECTED = (FROZEN_SHARE, ENCODER_LR_MULT, "frozen")
"""The defaults of PROTECTION for an encoder from weights under fresh heads."""


@pytest.fixture(scope="module")
def cnn_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a student with batch norms."""
    return random_weights(CNN, tmp_path_factory.mktemp("weights") / "cnn.safetensors")


@pytest.fixture
def config(tiny_store: Store, tiny_weights: Path, tmp_path: Path) -> TrainConfig:
    return begun(tiny_store, tmp_path / "run", init=tiny_weights)


def begun(store: Store, out: Path, **options: object) -> TrainConfig:
    """A run of which every checkpoint stays; from a weights file, its first 2 of 10 steps are frozen by default."""
    usual = {"steps": STEPS, "head_width": 16, "weight_decay": 0.1, "checkpoint_every": 1, "keep": STEPS}
    return tiny_config(store.path, out, log_every=1, **{**usual, **options})


def elsewhere(config: TrainConfig, name: str, **options: object) -> TrainConfig:
    return replace(config, out=config.out.with_name(name), **options)  # type: ignore[arg-type]


def trainer_of(config: TrainConfig) -> Trainer:
    corpora = open_corpora(config)
    return Trainer(config, resolve(config, corpora), corpora[0], world=World(), device=CPU)


def after(config: TrainConfig, step: int, part: str) -> dict[str, Tensor]:
    """Return the tensors of a part in a checkpoint: `encoder.model`, `heads`, `ema.encoder.model`."""
    tensors = load_file(config.out / FOLDER / f"{step:08d}.safetensors")
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def begun_with(config: TrainConfig) -> dict[str, Tensor]:
    """The encoder before the first step: its table of positions is resampled to the run's size."""
    return trainer_of(config).distiller.encoder.model.state_dict()


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def protection(config: TrainConfig) -> tuple[float | str | None, ...]:
    spec = resolve(config, open_corpora(config)).config
    return tuple(spec[name] for name in PROTECTION)


def as_begun_before(config: TrainConfig) -> None:
    """The spec of a run as method 2 began it."""
    spec = resolve(config, open_corpora(config)).to_json()
    for name in PROTECTION:
        del spec["config"][name]
    config.out.mkdir()
    (config.out / "config.json").write_text(json.dumps({**spec, "config": {**spec["config"], METHOD: 2}}))


def test_an_encoder_from_weights_is_frozen_at_first_and_the_run_says_so(config: TrainConfig) -> None:
    notes: list[str] = []
    start = begun_with(config)
    train_together([config], on_note=notes.append)
    for step in range(1, FROZEN + 1):
        assert same(after(config, step, "encoder.model"), start), "neither updates nor weight decay"
        assert not same(after(config, step, "heads"), after(config, step + 1, "heads"))
    assert not same(after(config, FROZEN + 1, "encoder.model"), start)
    told = read_run_spec(config.out).config
    assert tuple(told[name] for name in PROTECTION) == PROTECTED
    (note,) = (note for note in notes if "frozen" in note)
    assert f"in the first {FROZEN} of {STEPS} steps, and then trained at {ENCODER_LR_MULT:g} of the" in note
    assert "with frozen batch norms" in note


def test_each_option_makes_another_student_and_their_defaults_the_same_run(
    config: TrainConfig, cnn_weights: Path
) -> None:
    config = replace(config, student=CNN, init=cnn_weights, steps=5)
    train(config)
    assert train(replace(config, **dict(zip(PROTECTION, PROTECTED, strict=True)))).cached  # type: ignore[arg-type]
    theirs = load_file(config.out / "student.safetensors")
    options: dict[str, object]
    for name, options in (
        ("thawed", {"freeze_encoder": 0.0}),
        ("fast", {"encoder_lr_mult": 1.0}),
        ("running", {"batch_norms": "running"}),
    ):
        with pytest.raises(RunError, match=f"holds another run \\({next(iter(options))}: was .*, now None\\)"):
            train(replace(config, **options))  # type: ignore[arg-type]
        other = elsewhere(config, name, **options)
        train(other)
        assert not same(load_file(other.out / "student.safetensors"), theirs)


def test_a_smaller_factor_moves_the_encoder_less_and_the_heads_as_far(config: TrainConfig) -> None:
    moved = {}
    for mult in (1.0, 0.1):
        one = elsewhere(config, f"times {mult}", freeze_encoder=0.0, encoder_lr_mult=mult, steps=1, warmup=0)
        train(one)
        start, end = begun_with(config), after(one, 1, "encoder.model")
        moved[mult] = max((end[name] - start[name]).abs().max().item() for name in start)
    # AdamW's first step is the learning rate in every weight, and a little weight decay
    assert moved[0.1] == pytest.approx(0.1 * moved[1.0], rel=0.01)
    heads = [after(elsewhere(config, f"times {mult}"), 1, "heads") for mult in (1.0, 0.1)]
    assert same(*heads)


def test_the_encoders_rate_starts_anew_with_a_warm_up_when_it_is_freed() -> None:
    rates = [rate_from(20, step, peak=2.0, warmup=0.1, total_steps=120) for step in range(120)]
    assert rates[:20] == [0.0] * 20
    assert rates[20] == pytest.approx(0.2) and max(rates) == rates[29] == rates[30] == pytest.approx(2.0)
    assert all(a < b for a, b in pairwise(rates[20:30])) and all(a >= b for a, b in pairwise(rates[30:]))
    assert 0 < rates[-1] < 0.001
    whole = [rate_from(0, step, peak=2.0, warmup=0.05, total_steps=110) for step in range(110)]
    assert whole == [learning_rate(step, peak=2.0, warmup_steps=6, total_steps=110) for step in range(110)]


def test_a_frozen_encoder_builds_no_graph_and_stays_in_evaluation_mode(config: TrainConfig, cnn_weights: Path) -> None:
    config = replace(config, student=CNN, init=cnn_weights)
    trainer, corpora = trainer_of(config), open_corpora(config)
    graphs: list[bool] = []
    trainer.distiller.encoder.register_forward_hook(
        lambda module, given, tokens: graphs.append(tokens.dense.requires_grad)
    )
    requests = training_requests(trainer.spec, corpora, World(), first_step=0, num_microbatches=1)
    for batch in stream(corpora, requests, CPU):
        step = batch.request.step
        trainer.forward_backward(batch, microbatch=0)
        gradients = [parameter.grad is not None for parameter in trainer.distiller.encoder.parameters()]
        assert set(gradients) == {step >= FROZEN}
        trained = trainer.distiller if step >= FROZEN else trainer.distiller.heads
        norm = nn.utils.get_total_norm(
            [parameter.grad for parameter in trained.parameters() if parameter.grad is not None]
        )
        assert trainer.optimizer_step(step).gradient_norm == norm, "what is clipped"
        trainer.distiller.eval().train()  # as a validation does
        assert trainer.distiller.encoder.training == (step >= FROZEN) and trainer.distiller.heads.training
    assert graphs == [step >= FROZEN for step in range(STEPS)]


def test_running_statistics_and_averages_of_a_frozen_encoder_are_those_of_its_weights(
    config: TrainConfig, cnn_weights: Path
) -> None:
    config = replace(config, student=CNN, init=cnn_weights, ema=0.9, validate_every=1, steps=4, freeze_encoder=0.5)
    train(config)
    start = load_file(cnn_weights)
    averaged = {name: value for name, value in start.items() if value.is_floating_point()}
    assert any(name.endswith("running_var") for name in averaged)
    for step in range(1, FROZEN + 1):
        assert same(after(config, step, "encoder.model"), start), "running statistics as well"
        assert same(after(config, step, "ema.encoder.model"), averaged)
    later = after(config, 4, "encoder.model")
    statistics = [name for name in start if "running_" in name or "num_batches" in name]
    assert all(torch.equal(later[name], start[name]) for name in statistics), "they stay when the weights are trained"
    assert not torch.equal(later["bn1.weight"], start["bn1.weight"])
    running = elsewhere(config, "running", batch_norms="running")
    train(running)
    later = after(running, FROZEN + 1, "encoder.model")
    assert not torch.equal(later["bn1.running_mean"], start["bn1.running_mean"])


def test_frozen_batch_norms_compute_in_training_what_they_compute_afterwards(
    config: TrainConfig, cnn_weights: Path
) -> None:
    trainer = trainer_of(replace(config, student=CNN, init=cnn_weights, freeze_encoder=0.0))
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    trained = trainer.distiller.predict(pixels)
    with torch.no_grad():
        for ours, theirs in zip(trained, trainer.distiller.eval().predict(pixels), strict=True):
            assert all(map(torch.equal, ours, theirs))


@pytest.fixture(scope="module")
def uninterrupted(tiny_store: Store, cnn_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run that is frozen in its first 3 steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    config = begun(tiny_store, out, student=CNN, init=cnn_weights, freeze_encoder=0.3, ema=0.9, clip=1.0)
    train(config)
    return config


@pytest.mark.parametrize("stopped_at", [2, 4, 5])
def test_a_run_stopped_before_at_or_after_the_end_of_the_freezing_resumes_bit_for_bit(
    uninterrupted: TrainConfig, tmp_path: Path, stopped_at: int
) -> None:
    config, whole = replace(uninterrupted, out=tmp_path / "run"), uninterrupted

    class Stop(Exception):
        pass

    def stop(status: TrainStatus) -> None:
        if status.step == stopped_at:  # its checkpoint is not written
            raise Stop

    with pytest.raises(Stop):
        train(config, on_status=stop)
    train(replace(config, resume=True))
    for name in ("student.safetensors", "heads.safetensors", f"{FOLDER}/{STEPS:08d}.safetensors"):
        assert same(load_file(config.out / name), load_file(whole.out / name))


def test_only_encoders_from_weights_under_fresh_heads_are_protected(
    config: TrainConfig, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path
) -> None:
    """The protection agrees with what was copied: see `InitReport.fresh`."""
    default, plain = PROTECTED, (None, None, None)
    assert protection(config) == default
    random = elsewhere(config, "random", init=None)
    assert protection(random) == plain
    train(replace(random, steps=1))
    others = random_weights("test_vit2", tmp_path / "other.safetensors")
    other = make_store(tmp_path / "other.zarr", tiny_corpus, others, teacher="timm:test_vit2")
    onward = elsewhere(config, "onward", init=random.out)
    cases = {
        "the same targets": (onward, plain),
        "another size": (replace(onward, size=(96,)), plain),
        "the same teacher twice": (replace(onward, targets=2 * config.targets), plain),
        "wider heads": (replace(onward, head_width=32), default),
        "another teacher": (replace(onward, targets=(other.path,)), default),
        "one teacher more": (replace(onward, targets=(*config.targets, other.path)), default),
        "weights alone": (replace(onward, init=random.out / "student.safetensors"), default),
    }
    for case, (each, expected) in cases.items():
        assert protection(each) == expected, case
        trainer = trainer_of(each)
        assert trainer.initialised is not None
        heads_are_fresh = any(name.startswith("heads.") for name in trainer.initialised.fresh)
        # a weights file has no heads to tell of
        assert (heads_are_fresh or not each.init.is_dir()) == (expected == default), case  # type: ignore[union-attr]
    asked = replace(onward, freeze_encoder=0.5, encoder_lr_mult=0.3, batch_norms="frozen")
    assert protection(asked) == (0.5, 0.3, "frozen")


def test_a_run_that_was_begun_without_protection_goes_on_without(config: TrainConfig) -> None:
    config = replace(config, steps=5)
    before = elsewhere(config, "before")
    now = elsewhere(config, "now", freeze_encoder=0.0, encoder_lr_mult=1.0, batch_norms="running")
    as_begun_before(before)
    assert protection(before) == (None, None, None)
    train(before)
    assert read_run_spec(before.out).config[METHOD] == 2
    train(now)
    assert same(load_file(before.out / "student.safetensors"), load_file(now.out / "student.safetensors"))
    assert train(before).cached
    (before.out / "report.json").unlink()
    (before.out / FOLDER / "00000005.safetensors").unlink()
    train(replace(before, resume=True))
    assert same(load_file(before.out / "student.safetensors"), load_file(now.out / "student.safetensors"))


def test_a_protected_student_and_one_from_random_weights_share_a_stream(config: TrainConfig) -> None:
    """The second was begun by the method before, whose runs hold out the same pictures."""
    config = replace(config, steps=5, checkpoint_every=5)
    older = elsewhere(config, "older", init=None)
    as_begun_before(older)
    train_together([config, older])
    for each in (config, older):
        alone = elsewhere(each, f"{each.out.name} alone")
        train(alone)
        for name in ("student.safetensors", "heads.safetensors"):
            assert same(load_file(each.out / name), load_file(alone.out / name))
