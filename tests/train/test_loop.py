"""Whole training runs on tiny stores."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from making import TINY_STUDENT, make_store, tiny_config
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError, IncompleteError, RunError, TrainingError
from eupe.models.encoder import load_encoder
from eupe.store import Store
from eupe.train.checkpoint import FOLDER, steps_kept
from eupe.train.config import TrainConfig
from eupe.train.log import TrainStatus
from eupe.train.loop import train


@pytest.fixture
def config(tiny_store: Store, tmp_path: Path) -> TrainConfig:
    return tiny_config(tiny_store.path, tmp_path / "run", steps=12, checkpoint_every=5, validate_every=6, log_every=1)


def lines(run: Path, key: str) -> list[dict[str, object]]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in line]


def checkpoint(run: Path) -> Path:
    return run / FOLDER / f"{steps_kept(run)[-1]:08d}.safetensors"


def test_a_run_leaves_a_student_heads_metrics_and_a_report(config: TrainConfig) -> None:
    seen: list[TrainStatus] = []
    report = train(config, on_status=seen.append)
    assert not report.cached
    assert [status.step for status in seen] == list(range(1, 13))
    assert all(0 <= status.data_wait <= 1 and status.images_per_s > 0 for status in seen)
    assert [line["step"] for line in lines(config.out, "loss")] == list(range(1, 13))
    assert [line["step"] for line in lines(config.out, "validation")] == [6, 12]
    assert load_encoder(config.out).spec.arch == TINY_STUDENT
    heads = load_file(config.out / "heads.safetensors")
    assert {name.split(".")[1] for name in heads} == {"summary", "dense"}
    board = EventAccumulator(str(config.out / "tensorboard"))
    board.Reload()
    assert len(board.Scalars("loss")) == 12
    assert steps_kept(config.out) == [10, 12]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_obeyed_after_the_step_with_a_checkpoint(config: TrainConfig, number: signal.Signals) -> None:
    def interrupt(status: TrainStatus) -> None:
        if status.step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(IncompleteError, match="after step 3 of 12; resume with --resume"):
        train(config, on_status=interrupt)
    assert steps_kept(config.out) == [3]
    train(replace(config, resume=True))
    whole = replace(config, out=config.out.with_name("whole"))
    train(whole)
    ours, theirs = (load_file(run / "student.safetensors") for run in (config.out, whole.out))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("stopped_at", [3, 7, 11])
def test_a_stopped_run_resumed_equals_the_uninterrupted_one_bit_for_bit(config: TrainConfig, stopped_at: int) -> None:
    whole = replace(config, out=config.out.with_name("whole"))
    train(whole)

    class Stop(Exception):
        pass

    def stop(status: TrainStatus) -> None:
        if status.step == stopped_at:
            raise Stop

    with pytest.raises(Stop):
        train(config, on_status=stop)
    with pytest.raises(RunError, match="--resume"):
        train(config)
    train(replace(config, resume=True))
    for name in ("student.safetensors", "heads.safetensors", "checkpoints/00000012.safetensors"):
        ours, theirs = load_file(config.out / name), load_file(whole.out / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    losses = [[line["loss"] for line in lines(run, "loss")] for run in (config.out, whole.out)]
    assert losses[0] == losses[1]


def test_a_finished_run_is_a_cache_hit_and_another_one_is_refused(config: TrainConfig) -> None:
    first = train(config)
    files = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    again = train(config)
    assert again == replace(first, cached=True)
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == files
    with pytest.raises(RunError, match=r"lr: was 0.001, now 0.01"):
        train(replace(config, lr=0.01))
    with pytest.raises(RunError, match=r"steps: was 12, now 13"):
        train(replace(config, steps=13, resume=True))


def test_targets_made_anew_are_not_the_same_run(
    config: TrainConfig, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path
) -> None:
    train(config)
    other = make_store(tmp_path / "o.zarr", tiny_corpus, tiny_weights, dtype="bf16")
    with pytest.raises(RunError, match="targets: was"):
        train(replace(config, targets=(other.path,)))


def test_a_line_cut_short_by_a_full_disk_does_not_stop_a_resume(config: TrainConfig) -> None:
    train(config)
    (config.out / "report.json").unlink()
    metrics = config.out / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + whole.splitlines()[0][:25])
    train(replace(config, resume=True))
    assert [line["step"] for line in lines(config.out, "loss")] == list(range(1, 13))


def test_a_damaged_checkpoint_is_named(config: TrainConfig) -> None:
    train(config)
    (config.out / "report.json").unlink()
    last = checkpoint(config.out)
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(RunError, match=last.name):
        train(replace(config, resume=True))


def test_a_loss_that_is_not_finite_stops_before_the_update(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eupe.train import model

    calls = []

    def poisoned(*args: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return args[0].sum(dim=1) * (math.nan if len(calls) > 7 else 0.0)

    monkeypatch.setattr(model, "summary_loss", poisoned)
    with pytest.raises(TrainingError, match=r"loss of step 7 of .* is nan.*class\d/"):
        train(config)
    saved = load_file(checkpoint(config.out))
    assert steps_kept(config.out)[-1] == 5
    assert all(value.isfinite().all() for value in saved.values() if value.is_floating_point())


def test_gradients_reach_every_parameter_of_student_and_heads(config: TrainConfig) -> None:
    """AdamW keeps a second moment for every parameter that ever had a gradient; all of them changed something."""
    train(config)
    saved = load_file(checkpoint(config.out))
    moments = [value for name, value in saved.items() if name.endswith("exp_avg_sq")]
    trained = [n for n in saved if n.startswith(("encoder.", "heads."))]
    assert len(moments) == len(trained)
    assert all(value.abs().sum() > 0 for value in moments)


def test_any_number_of_targets_has_its_own_heads(
    config: TrainConfig, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path
) -> None:
    """Two sizes of one teacher as two targets: two grids, one of them coarser than the student's."""
    views = ViewSpec(policy="rrc", num_views=2)
    coarse = make_store(tmp_path / "coarse.zarr", tiny_corpus, tiny_weights, views=views, sizes=(32,))
    fine = make_store(tmp_path / "fine.zarr", tiny_corpus, tiny_weights, views=views, sizes=(96,))
    report = train(replace(config, targets=(fine.path, coarse.path), size=(64,)))
    assert len(report.validation) == 2
    heads = load_file(config.out / "heads.safetensors")
    assert {name.split(".")[0] for name in heads} == {"0", "1"}


def test_what_cannot_work_is_said_together(tiny_store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        TrainConfig(
            targets=(), student="x", out=tmp_path, epochs=1, steps=2, lr=0, batch_size=0, holdout=1, dtype="fp16"
        )
    for word in ("--targets", "not both", "--lr", "--batch-size", "--holdout", "fp16"):
        assert word in str(refusal.value)
    fine = TrainConfig(targets=(tiny_store.path,), student=TINY_STUDENT, out=tmp_path / "r", holdout=0.3)
    with pytest.raises(ConfigError, match="--batch-size 128 exceeds the"):
        train(fine)
    with pytest.raises(ConfigError, match="holds out none"):
        train(replace(fine, holdout=1e-9))
    with pytest.raises(ConfigError, match="did you mean"):
        train(replace(fine, student="test_vitt", batch_size=4, steps=1))
    with pytest.raises(ConfigError, match="must divide"):
        train(replace(fine, size=(50,), batch_size=4, steps=1))


FRESH = """
import socket, sys
def refuse(*args):
    raise OSError("the network is off")
socket.socket.connect = socket.socket.connect_ex = refuse
import eupe.train.loop
from eupe.cli import main
sys.argv = ["eupe", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = {name.split(".")[0] for name in sys.modules} & {"transformers", "open_clip", "ray"}
loaded |= {name for name in sys.modules if name.startswith(("eupe.teachers", "eupe.extract"))}
# the command line has the flags of every verb from its config, which imports no teacher
loaded -= {"eupe.extract", "eupe.extract.config"}
assert not loaded, loaded
"""


TAGGED = f"{TINY_STUDENT}.r160_in1k"


def test_with_weights_from_a_file_a_tag_tells_their_normalisation(config: TrainConfig, tiny_weights: Path) -> None:
    train(replace(config, student=TAGGED, init=tiny_weights, steps=1, lr=1e-9))
    encoder = load_encoder(config.out)
    assert encoder.spec.mean == (0.5, 0.5, 0.5)
    name = "blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(encoder.model.state_dict()[name], load_file(tiny_weights)[name], rtol=0, atol=1e-6)


def test_a_run_that_was_begun_when_tags_were_taken_goes_on(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, student=TAGGED, steps=2)
    with monkeypatch.context() as before:
        before.setattr("eupe.train.run_spec.is_pretrained", lambda config: False)
        first = train(config)
    assert train(config) == replace(first, cached=True)
    (config.out / "report.json").unlink()
    assert train(replace(config, resume=True)).validation == first.validation
    with pytest.raises(ConfigError, match=f"pretrained weights of {TAGGED} cannot be had"):
        train(replace(config, out=config.out.with_name("another")))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("test_vit.nonsense", "timm has no weights 'test_vit.nonsense'"),
        ("vit.tinny", "timm has no architecture 'vit.tinny'"),
        ("hf-hub:timm/test_vit.r160_in1k", "timm has no architecture 'hf-hub:"),
    ],
)
def test_a_dot_is_a_tag_behind_an_architecture_alone(name: str, words: str, config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=words):
        train(replace(config, student=name))


def test_training_loads_no_teacher_and_needs_no_network(tiny_store: Store, tmp_path: Path) -> None:
    words = ["train", "--targets", tiny_store.path, "--student", TINY_STUDENT, "--out", tmp_path / "run"]
    words += ["--steps", 2, "--batch-size", 4, "--head-width", 16, "--holdout", 0.3, "--json"]
    done = subprocess.run([sys.executable, "-c", FRESH, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2


def test_a_student_of_real_features_beats_the_mean_feature_on_held_out_pictures(assets: Path, tmp_path: Path) -> None:
    store = make_store(
        tmp_path / "dinov2.zarr",
        assets / "photos",
        assets / "weights" / "dinov2-small",
        teacher="dinov2",
        views=ViewSpec(policy="rrc", num_views=2),
        sizes=(56,),
    )
    config = TrainConfig(
        targets=(store.path,),
        student=TINY_STUDENT,
        out=tmp_path / "run",
        size=(64,),
        steps=60,
        batch_size=16,
        head_width=256,
        holdout=0.15,
        lr=5e-3,
    )
    report = train(config)
    logged = [line["loss"] for line in lines(config.out, "loss")]
    assert np.mean(logged[-3:]) < 0.9 * logged[0]
    summary, dense = (report.validation["dinov2-s"][kind] for kind in ("summary", "dense"))
    assert summary["normalised"] > 0.1 and dense["normalised"] > 0.15, "the mean feature has 0"
    assert dense["raw"] > dense["mean_raw"] + 0.005
