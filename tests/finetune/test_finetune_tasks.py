"""The parts of fine-tuning against independent oracles."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import torch
from scipy.stats import t as student_t
from sklearn.linear_model import LogisticRegression
from tuning import run_of, shades

from eupe.common.compute import pick_device
from eupe.corpus.views import NEUTRAL, render_view
from eupe.evaluate.judged_pictures import centre
from eupe.evaluate.splits import few_pictures
from eupe.finetune.config import FinetuneConfig
from eupe.finetune.loop import Schedule, random_batches
from eupe.finetune.model import FineTuned
from eupe.finetune.results import T_975, Trial, gains, rows, spread
from eupe.finetune.tasks import PROBE_PENALTY, Task, open_task
from eupe.models.encoder import load_encoder


def task_of(data: Path, **options: Any) -> Task:
    return open_task(FinetuneConfig(subject="", data=str(data), out=Path(), **options))


def test_the_linear_probe_is_scikit_learns_on_standardised_summaries(tmp_path: Path) -> None:
    task = task_of(shades(tmp_path / "data"))
    encoder = load_encoder(run_of(tmp_path / "run")).eval()
    model = FineTuned(encoder, task.make_head(encoder.spec), task.name, pick_device())
    places = list(range(0, 24, 2))
    head = task.probe(model.encode, encoder.spec, places, steps=1, seed=0)
    seen = model.encode(task.learned.pick(places), centre).summary
    assert seen is not None
    features = seen.double().numpy()
    labels = [task.groups[i] for i in places]
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    theirs = LogisticRegression(C=1 / (PROBE_PENALTY * len(labels)), tol=1e-12, max_iter=10_000).fit(scaled, labels)
    with torch.inference_mode():
        ours = head(seen).softmax(dim=1).numpy()
    assert np.abs(ours - theirs.predict_proba(scaled)).max() < 1e-4


@pytest.mark.parametrize("task", ["segment", "depth"])
def test_the_truth_of_a_random_view_is_what_its_pixels_show(task: str, tmp_path: Path) -> None:
    """Every pixel's colour stands for its class, or depth, whatever was cropped and mirrored."""
    data = (planted.masks if task == "segment" else planted.depth_pairs)(tmp_path)
    opened, size = task_of(data, task=task, true_colours=True), 64
    boxes, flips = set(), set()
    for k in range(8):
        image = opened.learned.image(0)
        view = opened.draw(0, k, *image.size, seed=3)
        pixels = render_view(image, view, size).astype(int)
        truth = opened.truth(0, view, size)
        shown = np.abs(pixels[:, :, None] - planted.COLOURS.astype(int)).sum(axis=-1).argmin(axis=-1)
        wanted = shown if task == "segment" else planted.METRES[shown]
        known = truth >= 0 if task == "segment" else truth > 0
        assert known.any()
        assert np.isclose(truth[known], wanted[known]).mean() > 0.9  # colours mix at the edges of blocks
        boxes.add(view.box)
        flips.add(view.flip)
        assert view.photometric == NEUTRAL
    assert flips == {False, True}
    assert len(boxes) == (8 if task == "segment" else 1), "the depth of a square picture has one window"


def test_colours_vary_but_nothing_is_taken_away(tmp_path: Path) -> None:
    task = task_of(shades(tmp_path))
    drawn = [task.draw(0, k, 48, 48, seed=0).photometric for k in range(40)]
    assert len({each.brightness for each in drawn}) > 20
    assert {(each.grey, each.blur, each.solarise) for each in drawn} == {(0.0, 0.0, NEUTRAL.solarise)}


def test_every_picture_comes_before_any_comes_again_and_never_in_the_same_view(tmp_path: Path) -> None:
    task = task_of(shades(tmp_path))
    how = Schedule(steps=4, batch_size=3, lr=1, weight_decay=0, seed=5, freeze_batch_norms=False)
    places = [0, 3, 9, 10, 17, 20]
    batches = list(random_batches(task, places, how, size=32))
    views = torch.cat([views for views, _ in batches])
    codes = torch.cat([truth for _, truth in batches]).tolist()
    assert views.shape == (12, 32, 32, 3)
    code = {name: i for i, name in enumerate(task.classes)}
    once = sorted(code[task.groups[i]] for i in places)
    assert sorted(codes[:6]) == sorted(codes[6:]) == once
    assert len({view.numpy().tobytes() for view in views}) == 12


def test_a_share_of_each_class_is_learned_and_smaller_shares_are_part_of_larger_ones() -> None:
    labels = ["a"] * 50 + ["b"] * 20 + ["c"]
    keys = [f"k{i}" for i in range(len(labels))]
    chosen = [few_pictures(labels, keys, share, seed=1) for share in (0.01, 0.1, 0.5, 1)]
    counts = [[sum(kept[i] for i in range(71) if labels[i] == name) for name in "abc"] for kept in chosen]
    assert counts == [[1, 1, 1], [5, 2, 1], [25, 10, 1], [50, 20, 1]]
    for smaller, larger in pairwise(chosen):
        assert all(more or not less for less, more in zip(smaller, larger, strict=True))
    assert few_pictures(labels, keys, 0.1, seed=2) != chosen[1]


def trial(start: str, share: float, seed: int, score: float, probe: float | None = None) -> Trial:
    scores = {"accuracy": score}
    judged = None if probe is None else {"accuracy": probe}
    return Trial("", start, share, seed, 10, 5, 1.0, 1.0, scores, judged)


def test_intervals_are_students_over_pairs_of_the_same_seed() -> None:
    for freedom, value in enumerate(T_975, start=1):
        assert value == pytest.approx(student_t.ppf(0.975, freedom), abs=6e-4)
    scores = {"weights": [0.5, 0.7, 0.6], "scratch": [0.3, 0.6, 0.4]}
    trials = [trial(s, 0.1, i, x, 0.2 if s == "weights" else None) for s in scores for i, x in enumerate(scores[s])]
    found = rows(trials)
    assert [(row.start, row.fine_tuned.mean) for row in found] == [
        ("weights", pytest.approx(0.6)),
        ("scratch", pytest.approx(1.3 / 3)),
    ]
    assert found[0].probe == spread([0.2] * 3)
    assert found[1].probe is None
    (gain,) = gains(trials, better="weights", worse="scratch", lower_is_better=False)
    pairs = np.subtract(scores["weights"], scores["scratch"])
    low, high = student_t.interval(0.95, 2, pairs.mean(), pairs.std(ddof=1) / np.sqrt(3))
    assert gain.by.mean == pytest.approx(pairs.mean())
    assert gain.by.interval == pytest.approx((high - low) / 2, rel=1e-3)
    assert gain.is_beyond_the_spread == (low > 0)
    (worse,) = gains(trials, better="weights", worse="scratch", lower_is_better=True)
    assert worse.by.mean == pytest.approx(-pairs.mean())
    assert json.dumps(spread([1.0]).interval) == "null"
