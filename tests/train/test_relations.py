"""Losses on relations against naive loops, and in a run: each is off by default, logged, and changes what is learnt."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import make_store, tiny_config
from torch import Tensor

from eupe.errors import ConfigError, RunError
from eupe.models.encoder import load_encoder
from eupe.store import Store
from eupe.train.config import TrainConfig
from eupe.train.loop import train
from eupe.train.relations import bank_loss, gram_loss, relational_loss, summary_bank
from eupe.train.run_spec import resolve
from eupe.train.stream import open_corpora


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_relational_is_the_naive_loop_over_pairs() -> None:
    student, teacher = random(5, 7, seed=0), random(5, 11, seed=1)
    for i, loss in enumerate(relational_loss(student, teacher).tolist()):
        rows = []
        for summaries in (student, teacher):
            products = [float(sum(a * b for a, b in zip(summaries[i], other, strict=True))) for other in summaries]
            length = math.sqrt(sum(product**2 for product in products))
            rows.append([product / length for product in products])
        assert loss == pytest.approx(sum((a - b) ** 2 for a, b in zip(*rows, strict=True)), rel=1e-5)
    torch.testing.assert_close(relational_loss(3 * teacher, teacher), torch.zeros(5), atol=1e-6, rtol=0)


def test_gram_is_the_naive_loop_over_cells() -> None:
    student, teacher = random(2, 2, 3, 7, seed=0), random(2, 2, 3, 5, seed=1)
    for i, loss in enumerate(gram_loss(student, teacher).tolist()):
        differences = []
        for a in range(6):
            for b in range(6):
                cosines = [
                    float(torch.cosine_similarity(cells[a], cells[b], dim=0))
                    for cells in (student[i].reshape(6, -1), teacher[i].reshape(6, -1))
                ]
                differences.append((cosines[0] - cosines[1]) ** 2)
        assert loss == pytest.approx(float(np.mean(differences)), rel=1e-5)


def test_bank_is_the_naive_divergence_of_similarities() -> None:
    student, teacher, bank = random(3, 6, seed=0), random(3, 6, seed=1), random(9, 6, seed=2)
    for i, loss in enumerate(bank_loss(student, teacher, bank, temperature=0.5).tolist()):
        shares = []
        for vector in (student[i], teacher[i]):
            powers = [math.exp(float(torch.cosine_similarity(vector, other, dim=0)) / 0.5) for other in bank]
            shares.append([power / sum(powers) for power in powers])
        ours, theirs = shares
        assert loss == pytest.approx(sum(q * math.log(q / p) for p, q in zip(ours, theirs, strict=True)), rel=1e-4)


@pytest.fixture
def config(tiny_store: Store, tmp_path: Path) -> TrainConfig:
    return tiny_config(tiny_store.path, tmp_path / "run", steps=3, log_every=1)


def logged(config: TrainConfig, step: int = 0) -> dict[str, float]:
    """The losses of a step by kind of token or relation."""
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    losses: dict[str, float] = [line["losses"] for line in lines if "losses" in line][step]
    return {name.rpartition("/")[2]: value for name, value in losses.items()}


def test_each_is_off_by_default_and_pulls_the_student_where_it_points(config: TrainConfig) -> None:
    train(config)
    assert logged(config).keys() == {"summary", "dense"}
    without = load_encoder(config.out).model.state_dict()
    for name in ("relational", "gram", "bank"):
        run = replace(config, out=config.out.with_name(name), **{name: 5.0})
        train(run)
        assert logged(run).keys() == {"summary", "dense", name} and logged(run)[name] > 0
        ours = load_encoder(run.out).model.state_dict()
        assert any(not torch.equal(ours[tensor], without[tensor]) for tensor in ours)


@pytest.mark.parametrize(("name", "most"), [("relational", 0.8), ("gram", 0.8), ("bank", 0.9)])
def test_each_becomes_smaller_by_training(name: str, most: float, config: TrainConfig) -> None:
    options: dict[str, Any] = {name: 5.0}
    run = replace(config, steps=30, lr=3e-3, warmup=0.1, **options)
    train(run)
    first, last = (np.mean([logged(run, step)[name] for step in steps]) for steps in (range(5), range(25, 30)))
    assert last < most * first


def test_a_bank_is_drawn_from_training_views_alone_and_by_the_seed(config: TrainConfig, tiny_store: Store) -> None:
    (targets,) = open_corpora(config)
    bank = summary_bank(targets, 0, 64, count=10, seed=3)
    torch.testing.assert_close(bank, summary_bank(targets, 0, 64, count=10, seed=3), rtol=0, atol=0)
    assert not torch.equal(bank, summary_bank(targets, 0, 64, count=10, seed=4))
    whole = summary_bank(targets, 0, 64, count=10_000, seed=0)
    assert len(whole) == len(targets.training) * 2
    keys = {targets.keys[i] for i in np.flatnonzero(targets.held_out)}
    rows = [i for i, key in enumerate(tiny_store.keys) if key in keys]
    held_out = torch.from_numpy(np.asarray(tiny_store.read(rows, [0] * len(rows)).summary, np.float32))
    assert len(rows) and not (whole[:, None] == held_out[None]).all(dim=-1).any()


def test_what_relates_the_views_of_a_worker_belongs_to_the_run(config: TrainConfig) -> None:
    train(replace(config, relational=1.0))
    with pytest.raises(RunError, match="relational_views: was 8, now 4"):
        train(replace(config, relational=1.0, accumulate=2, resume=True))


def test_what_cannot_be_compared_is_refused(
    config: TrainConfig, tiny_corpus: Path, tiny_weights: Path, tmp_path: Path, run_eupe: Callable[..., Any]
) -> None:
    store = make_store(tmp_path / "dense.zarr", tiny_corpus, tiny_weights, tokens=("dense",))
    dense = replace(config, targets=(store.path,), bank=1.0)
    with pytest.raises(ConfigError, match="--bank compares summary tokens, but no target has any; leave it out"):
        resolve(dense, open_corpora(dense))
    outcome = run_eupe("train", "--targets", store.path, "--student", "test_vit", "--out", "x", "--bank-size", 3)
    assert outcome.code == 2 and "--bank-size and --bank-temperature belong to --bank" in " ".join(outcome.err.split())
