"""Options of the command line that change what is judged, or how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from making import TINY_STUDENT, picture
from torch import Tensor

from eupe.evaluate import latency
from eupe.store import Store
from eupe.train.config import TrainConfig
from eupe.train.loop import train

Run = Callable[..., Any]


def test_latency_is_timed_as_the_options_say(run_eupe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []

    def noted(forward: Callable[[Tensor], Any], pixels: Tensor, repeats: int) -> list[float]:
        passes.append((len(pixels), torch.get_num_threads(), repeats))
        return [0.4]

    monkeypatch.setattr(latency, "time_passes", noted)
    words = ("eval", "latency", "timm:test_vit", "--size", 32, "--json")
    options = ([], ["--batch-size", 4], ["--threads", 1], ["--repeats", 2])
    scores = [json.loads(run_eupe(*words, *more).out)["results"][0]["scores"]["ms"] for more in options]
    plain, batches, threads, repeats = passes
    assert plain[0] == 1 and plain[2] == 30
    assert (batches, threads, repeats) == ((4, *plain[1:]), (1, 1, 30), (*plain[:2], 2))
    assert scores == pytest.approx([400, 100, 400, 400])


def test_agreement_looks_at_the_pictures_where_they_are_now(
    tiny_store: Store, tiny_corpus: Path, tmp_path: Path, run_eupe: Run
) -> None:
    run = tmp_path / "run"
    config = TrainConfig(targets=(tiny_store.path,), student=TINY_STUDENT, out=run, steps=1, batch_size=4, holdout=0.3)
    train(config)
    moved = tmp_path / "moved"
    shutil.copytree(tiny_corpus, moved)
    words = ("eval", "agreement", run, "--k", 2, "--json")
    whole = json.loads(run_eupe(*words).out)
    assert json.loads(run_eupe(*words, "--corpus", moved).out) == whole
    for number, path in enumerate(sorted(moved.rglob("*.png"))):
        picture(500 + number).save(path)
    refused = run_eupe(*words, "--corpus", moved)
    assert refused.code == 2 and "is not the one that the teacher" in refused.err
    shutil.rmtree(moved)
    gone = run_eupe(*words, "--corpus", moved)
    assert gone.code == 2 and str(moved) in gone.err
