"""`--retry-failed`: pictures that can be read by now get their features, and nothing else is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from making import make_corpus, picture

from eupe.store import open_store
from eupe.store.verify import verify

Run = Callable[..., Any]


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_pictures_that_came_back_are_made_and_the_others_stay(
    tmp_path: Path, tiny_weights: Path, run_eupe: Run
) -> None:
    corpus = make_corpus(tmp_path / "c", count=6)
    away = tmp_path / "away.png"
    (corpus / "class0" / "link.png").symlink_to(away)
    (corpus / "class1" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    out = tmp_path / "s.zarr"
    words = ["extract", "--teacher", "timm:test_vit", "--weights", tiny_weights, "--corpus", corpus, "--out", out]
    words += ["--views", "rrc:2", "--size", 64, "--dtype", "fp32", "--batch-size", 4]
    first = run_eupe(*words)
    assert first.code == 0 and "2 pictures have no features" in " ".join(first.err.split())
    assert "--retry-failed" in first.err
    before = open_store(out)
    good = before.read(before.rows(["class0/0000.png"]), [1])

    picture(9).save(away)
    hit = json.loads(run_eupe(*words, "--json").out)
    assert (hit["cached"], hit["num_failed"]) == (True, 2), "without being asked, nothing is tried again"
    again = run_eupe(*words, "--retry-failed", "--json")
    assert again.code == 0, again.err
    report = json.loads(again.out)
    assert (report["cached"], report["num_failed"], sum(report["failures"].values())) == (False, 1, 1)
    store = open_store(out)
    assert set(store.keys) == {*before.keys, "class0/link.png"}
    assert (store.read(store.rows(["class0/0000.png"]), [1]).dense == good.dense).all()
    assert verify(store.path).whole
    assert store.stats(64, "summary").count == 2 * 7

    whole = tmp_path / "whole"
    shutil.copytree(corpus, whole)
    alone = run_eupe(*words[:6], whole, "--out", tmp_path / "t.zarr", *words[9:], "--json")
    assert alone.code == 0, alone.err
    other = open_store(tmp_path / "t.zarr")
    for key in store.keys:
        ours, theirs = (s.read(s.rows([key]), [0]).dense for s in (store, other))
        assert (ours == theirs).all(), key
