"""What a run does where nothing is said, and what it says of it: sizes of targets, the hold-out, views seen again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from making import TINY_STUDENT, make_corpus, make_store, tiny_config
from safetensors.torch import load_file
from torch import nn

from eupe.common.compute import normalise
from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError, RunError
from eupe.store import Store
from eupe.train.advice import MOST_PASSES, advice
from eupe.train.config import TrainConfig
from eupe.train.loop import train, train_together
from eupe.train.parallel import World
from eupe.train.run_spec import METHOD, NEWEST_METHOD, read_run_spec, resolve
from eupe.train.stream import open_corpora
from eupe.train.targets import Request, is_held_out, open_targets
from eupe.train.trainer import Trainer, synchronised


@pytest.fixture
def config(tiny_store: Store, tmp_path: Path) -> TrainConfig:
    return tiny_config(tiny_store.path, tmp_path / "run", steps=3, head_width=16)


@pytest.fixture(scope="module")
def sizes_store(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_weights: Path) -> Store:
    return make_store(tmp_path_factory.mktemp("s") / "s.zarr", tiny_corpus, tiny_weights, sizes=(48, 80, 112))


@pytest.mark.parametrize(
    ("size", "target"),
    [((), 48), ((48,), 48), ((80,), 80), ((64,), 80), ((96,), 112), ((32,), 48), ((128,), 112), ((48, 80), 48)],
)
def test_targets_are_those_of_the_size_that_fits_the_students(
    config: TrainConfig, sizes_store: Store, size: tuple[int, ...], target: int
) -> None:
    config = replace(config, targets=(sizes_store.path,), size=size)
    spec = resolve(config, open_corpora(config))
    assert spec.target_sizes == [(target,)]


def notes_of(config: TrainConfig) -> list[str]:
    notes: list[str] = []
    train_together([config], on_note=notes.append)
    return notes


def test_another_size_and_views_that_are_seen_over_and_over_are_said(config: TrainConfig, sizes_store: Store) -> None:
    config = replace(config, targets=(sizes_store.path,), size=(96,))
    size, seen = notes_of(config)
    assert size == f"{sizes_store.path} has no features at the student's 96 px; the student learns from those at 112 px"
    assert seen.endswith("will be seen about 1 times")
    views = 2 * int((~open_targets([sizes_store.path], corpus=None, holdout=0.3).held_out).sum())
    many = replace(config, size=(80,), steps=(MOST_PASSES + 2) * views // 8)
    corpora = open_corpora(many)
    (said,) = advice(many, resolve(many, corpora), corpora)
    assert f"more than {MOST_PASSES}" in said and "extract with more views" in said


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Store:
    """A store of pictures, each under two keys."""
    folder = tmp_path_factory.mktemp("twins")
    corpus = make_corpus(folder / "c", count=12)
    for file in sorted(corpus.rglob("*.png")):
        shutil.copy(file, file.with_name(f"copy-{file.name}"))
    return make_store(folder / "s.zarr", corpus, tiny_weights)


def test_copies_of_a_picture_are_held_out_together(twins: Store) -> None:
    targets = open_targets([twins.path], corpus=None, holdout=0.4)
    hashes = dict(zip(twins.samples["key"].to_pylist(), twins.samples["sha256"].to_pylist(), strict=True))
    held = {hashes[key] for key, held in zip(targets.keys, targets.held_out, strict=True) if held}
    trained = {hashes[key] for key, held in zip(targets.keys, targets.held_out, strict=True) if not held}
    assert held and trained and not held & trained
    assert held == {sha256 for sha256 in hashes.values() if is_held_out(sha256, 0.4)}
    by_key = open_targets([twins.path], corpus=None, holdout=0.4, holdout_by="key")
    assert by_key.held_out.tolist() == [is_held_out(key, 0.4) for key in by_key.keys]
    assert not np.array_equal(by_key.held_out, targets.held_out)


def as_begun_before(run: Path) -> None:
    """The spec as the first versions left it, after three of six steps."""
    document = json.loads((run / "config.json").read_text())
    del document["config"][METHOD]
    (run / "config.json").write_text(json.dumps(document))


def test_runs_that_were_begun_by_keys_and_a_fixed_decay_go_on_so(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, ema=0.9, steps=6, checkpoint_every=3, keep=2)
    train(config)
    assert read_run_spec(config.out).config[METHOD] == NEWEST_METHOD
    shutil.copytree(config.out, old := tmp_path / "old")
    as_begun_before(old)
    assert train(replace(config, out=old)).cached, "finished before it did so"

    halves = []
    for name in ("half", "whole"):
        (tmp_path / name).mkdir()
        shutil.copy(old / "config.json", tmp_path / name)
        halves.append(replace(config, out=tmp_path / name))
    whole = halves[1]
    train(whole)
    assert METHOD not in read_run_spec(whole.out).config
    shutil.copytree(whole.out, halves[0].out, dirs_exist_ok=True)
    for name in ("report.json", "checkpoints/00000006.safetensors"):
        (halves[0].out / name).unlink()
    train(replace(halves[0], resume=True))
    ours, theirs = (load_file(run.out / "student.safetensors") for run in halves)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    risen = load_file(config.out / "student.safetensors")
    assert any((risen[name] != theirs[name]).any() for name in theirs)


def test_a_beginning_with_another_hold_out_is_said(config: TrainConfig) -> None:
    train(config)
    after = replace(config, init=config.out, out=config.out.with_name("after"))
    assert len(notes_of(after)) == 1
    more = replace(config, init=config.out, out=config.out.with_name("more"), holdout=0.5)
    assert "held out other pictures" in notes_of(more)[0]
    as_begun_before(config.out)
    other = replace(config, init=config.out, out=config.out.with_name("other"))
    assert "held out other pictures" in notes_of(other)[0]


def test_the_dry_run_says_how_often_each_view_is_seen(
    tmp_path: Path, tiny_store: Store, run_eupe: Callable[..., Any]
) -> None:
    views = tiny_store.spec.num_samples * tiny_store.spec.num_views
    for steps, times in ((views // 8, 1), (views * (MOST_PASSES + 50) // 8, MOST_PASSES + 50)):
        training = f"{{targets: {tiny_store.path}, student: test_vit, batch-size: 8, steps: {steps}}}"
        (tmp_path / "r.yaml").write_text(f"out: {tmp_path / 'out'}\nsteps:\n  s: {{train: {training}}}\n")
        outcome = run_eupe("run", tmp_path / "r.yaml", "--dry-run")
        assert outcome.code == 0, outcome.err
        said = " ".join(outcome.out.split())
        assert f"each stored view seen about {times} times" in said
        note = f"s: each stored view will be seen about {times} times; more than {MOST_PASSES} times teaches little"
        assert (note in said) == (times > MOST_PASSES)


def test_runs_of_two_methods_do_not_share_a_stream_and_a_newer_one_is_refused(config: TrainConfig) -> None:
    two = [config, replace(config, out=config.out.with_name("other"))]
    train_together(two)
    as_begun_before(config.out)
    with pytest.raises(RunError, match="resume them one by one"):
        train_together([replace(one, resume=True) for one in two])
    (config.out / "report.json").unlink()
    again = replace(config, resume=True)
    document = json.loads((config.out / "config.json").read_text())
    document["config"][METHOD] = 99
    (config.out / "config.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match="method 99, but this eupe knows only 1 to 3"):
        train(again)


def test_each_view_of_a_picture_is_recoloured_apart_and_never_twice(
    config: TrainConfig, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path
) -> None:
    config = replace(config, photometric="eupe")
    (corpus,) = open_corpora(config)
    views = np.array([[0, 0], [0, 0], [0, 1]])
    with ThreadPoolExecutor(1) as pool:
        apart, alike = (
            corpus.load(Request(views=views, size=64, colours_seed=0, colours_by_view=how), pool=pool).pixels
            for how in (True, False)
        )
        plain = corpus.load(Request(views=views, size=64), pool=pool).pixels
    assert (apart[0] == apart[1]).all() and (apart[0] != plain[0]).any()
    assert (alike[2] != apart[2]).any(), "the second view has colours of its own"
    recoloured = ViewSpec(policy="rrc", num_views=2, photometric="eupe")
    store = make_store(tmp_path / "c.zarr", tiny_corpus, tiny_weights, views=recoloured)
    with pytest.raises(ConfigError, match="recoloured when they were extracted"):
        train(replace(config, targets=(store.path,)))
    assert not config.out.exists()


def test_rotary_coordinates_are_scaled_in_training_alone(config: TrainConfig) -> None:
    config = replace(config, student="vit_tiny_patch16_dinov3_qkvb", size=(64,))
    corpora = open_corpora(config)
    pixels = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)

    def said(factor: float | None, *, training: bool) -> Any:
        one = replace(config, rope_rescale=factor)
        trainer = Trainer(one, resolve(one, corpora), corpora[0], world=World(), device=torch.device("cpu"))
        torch.manual_seed(1)
        with torch.no_grad():
            return trainer.distiller.train(training).encoder(normalise(pixels, (0.5,) * 3, (0.5,) * 3)).dense

    plain = said(None, training=True)
    assert torch.equal(said(None, training=False), plain) and torch.equal(said(2.0, training=False), plain)
    assert not torch.allclose(said(2.0, training=True), plain)
    with pytest.raises(ConfigError, match="--rope-rescale must be at least 1"):
        replace(config, rope_rescale=0.5)


def test_a_student_without_rotary_positions_says_that_nothing_is_rescaled(config: TrainConfig) -> None:
    assert "test_vit has no rotary position embedding" in notes_of(replace(config, rope_rescale=2.0))[0]


def test_how_many_views_a_batch_norm_sees_makes_another_run(config: TrainConfig) -> None:
    config = replace(config, student="test_resnet", steps=2)
    train(config)
    assert read_run_spec(config.out).config["batch_norm_views"] == 8
    with pytest.raises(RunError, match="batch_norm_views: was 8, now 4"):
        train(replace(config, accumulate=2))
    tokens = replace(config, student=TINY_STUDENT, out=config.out.with_name("vit"))
    train(tokens)
    assert train(replace(tokens, accumulate=2)).cached
    corpora = open_corpora(config)
    wide = replace(config, out=config.out.with_name("wide"), num_workers=2)
    assert resolve(wide, corpora).config["batch_norm_views"] == 4
    assert resolve(replace(wide, sync_batch_norm=True), corpora).config["batch_norm_views"] == 8
    with pytest.raises(ConfigError, match="with --shard each worker would keep its own running statistics"):
        resolve(replace(wide, shard=True), corpora)


def test_batch_norms_are_synchronised_by_timm_and_on_gpus_alone() -> None:
    model = timm.create_model("test_efficientnet")
    with pytest.raises(ConfigError, match="--sync-batch-norm is only for GPUs"):
        synchronised(model, torch.device("cpu"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted = synchronised(model, torch.device("cuda"))
    norms = [part for part in converted.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert converted.state_dict().keys() == before.keys()
    assert all(torch.equal(converted.state_dict()[name], value) for name, value in before.items())


def test_a_scaled_rate_is_what_is_trained_with_and_noted(config: TrainConfig) -> None:
    rates = {}
    for scaling in (None, "sqrt"):
        config = replace(
            config, lr_scaling=scaling, out=config.out.with_name(f"scaled {scaling}"), log_every=1, warmup=0
        )
        train(config)
        line = json.loads((config.out / "metrics.jsonl").read_text().splitlines()[0])
        rates[scaling] = line["learning_rate"]
    assert rates["sqrt"] == pytest.approx(rates[None] * 4 * (8 / 1024) ** 0.5)
    assert read_run_spec(config.out).config["lr_scaling"] == "sqrt"
    with pytest.raises(ConfigError, match="--lr-scaling 'linear' is unknown; give sqrt, or leave it out"):
        replace(config, lr_scaling="linear")
