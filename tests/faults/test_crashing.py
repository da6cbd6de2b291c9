"""Pictures that kill whoever decodes them, through the command line: they cost their own rows and nothing else."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import make_corpus, make_store
from planting import planted_environment, poison
from running import assert_same_store, begin, finish, store_files
from shared_ray import running_ray

from eupe.corpus.views import ViewSpec
from eupe.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("forked")]

MANY_VIEWS = ViewSpec(policy="rrc", num_views=16)
"""32 pictures to a part."""
PATIENCE = 10.0
"""Seconds for one picture."""
DEADLY = {"class0/0003.png": "segfault", "class1/0007.png": "endless", "class2/0020.png": "greedy"}


@pytest.fixture(scope="module")
def planted(warm_python: str) -> Iterator[dict[str, str]]:
    """Variables of commands whose pictures are deadly, and that join a Ray whose workers have them, too."""
    variables = planted_environment(patience=PATIENCE)
    with running_ray(warm_python, {"RAY_AUTH_MODE": "disabled", **os.environ, **variables}) as address:
        yield {**variables, "RAY_ADDRESS": address}


def extract(
    corpus: Path, weights: Path, out: Path, *more: object, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    words = ["extract", "--teacher", "timm:test_vit", "--weights", weights, "--corpus", corpus, "--out", out]
    words += ["--size", 64, "--views", "rrc:16", "--dtype", "fp32", "--batch-size", 8, *more]
    return finish(begin(*words, environment=environment or {}))


def ledger(out: Path) -> dict[str, Any]:
    """Return what `eupe store info` reports of a store."""
    code, output = finish(begin("store", "info", out, "--json"))
    assert code == 0, output
    return dict(json.loads(output))


def test_crashing_samples_are_rows_with_reasons_and_others_are_unharmed(
    tmp_path: Path, tiny_weights: Path, planted: dict[str, str]
) -> None:
    corpus = make_corpus(tmp_path / "corpus", count=40)
    for key, how in DEADLY.items():
        poison(corpus / key, how)
    whole = make_store(tmp_path / "whole.zarr", corpus, tiny_weights, views=MANY_VIEWS)
    assert whole.spec.num_parts == 2 and not len(whole.failed)
    out = tmp_path / "s.zarr"

    code, output = extract(corpus, tiny_weights, out, environment=planted)
    assert code == 0, output
    assert "Traceback" not in output
    failures = {key: reason for reason, keys in ledger(out)["failures"].items() for key in keys}
    assert failures.keys() == DEADLY.keys()
    assert "signal SIGSEGV" in failures["class0/0003.png"]
    assert "does not come to an end" in failures["class1/0007.png"]
    assert "signal SIGKILL" in failures["class2/0020.png"]
    store = open_store(out)
    assert sorted(store.keys) == sorted(set(whole.keys) - DEADLY.keys())
    rows = store.valid["row"].to_pylist()
    ours, theirs = (s.read(rows * 2, [0] * len(rows) + [15] * len(rows)) for s in (store, whole))
    assert ours.dense is not None and theirs.dense is not None
    assert np.array_equal(ours.boxes, theirs.boxes)
    assert np.array_equal(ours.dense, theirs.dense)

    code, output = extract(corpus, tiny_weights, out, "--retry-failed")
    assert code == 0, output
    assert_same_store(out, store_files(whole.path.local))


def test_crashing_samples_among_the_pictures_that_a_teacher_is_tried_on(
    tmp_path: Path, tiny_weights: Path, planted: dict[str, str]
) -> None:
    """They cost neither the measured precision nor the arithmetic's; the sample holds the whole corpus."""
    corpus = make_corpus(tmp_path / "corpus", count=6)
    poison(corpus / "class0/0000.png", "segfault")
    poison(corpus / "class2/0005.png", "endless")
    out = tmp_path / "s.zarr"
    code, output = extract(corpus, tiny_weights, out, "--dtype", "bf16", "--precision", "int8", environment=planted)
    assert code == 0, output
    assert {key for keys in ledger(out)["failures"].values() for key in keys} == {"class0/0000.png", "class2/0005.png"}
    store = open_store(out)
    assert min(store.spec.forward["cosine_to_fp32"].values()) > 0.9
    assert len(store.valid) == 4


@pytest.mark.parametrize("hows", [("segfault", "greedy", "segfault", "endless", "greedy"), ("endless",)])
def test_a_corpus_of_nothing_but_crashing_samples_comes_to_an_end(
    hows: tuple[str, ...], tmp_path: Path, tiny_weights: Path, planted: dict[str, str]
) -> None:
    """The job fails, because a store without features cannot be finished; the reasons are on record."""
    corpus = make_corpus(tmp_path / "corpus", count=len(hows))
    for picture, how in zip(sorted(corpus.rglob("*.png")), hows, strict=True):
        poison(picture, how)
    code, output = extract(corpus, tiny_weights, tmp_path / "s.zarr", environment=planted)
    assert code == 2, output
    assert "no picture of the corpus could be read" in " ".join(output.split()) and "Traceback" not in output
    failed = open_store(tmp_path / "s.zarr").failed
    assert len(failed) == len(hows)
    assert failed["error"].null_count == 0
