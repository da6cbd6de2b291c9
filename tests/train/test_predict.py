"""The heads of a run without its stores, against what `eupe eval agreement` compares with the stores open."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import TINY_SIZE, TINY_STUDENT, make_store
from safetensors.torch import load_file, save_file
from torch import Tensor

from eupe.common.compute import normalise
from eupe.errors import RunError
from eupe.evaluate.open_run import Run, open_run
from eupe.models.encoder import load_encoder
from eupe.store import Store
from eupe.train.config import TrainConfig
from eupe.train.loop import judged, train, training_sample
from eupe.train.predict import load_predictors
from eupe.train.sampling import Views
from eupe.train.stream import stream
from eupe.train.targets import Batch
from eupe.train.validate import fit_gains, held_out_cosines, pairs


@pytest.fixture(scope="module")
def dense_store(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_weights: Path) -> Store:
    """Return a store of the tiny corpus with dense tokens only, at two sizes."""
    folder = tmp_path_factory.mktemp("dense")
    return make_store(folder / "dense.zarr", tiny_corpus, tiny_weights, tokens=("dense",), sizes=(TINY_SIZE, 96))


def small(out: Path, *stores: Store, **options: Any) -> TrainConfig:
    targets = tuple(store.path for store in stores)
    config = TrainConfig(targets=targets, student=TINY_STUDENT, out=out, steps=6, batch_size=8, head_width=16)
    return replace(config, holdout=0.3, dtype="fp32", lr=3e-3, **options)


def batches(run: Run, views: Views) -> Iterator[Batch]:
    return stream([run.targets], judged(run.spec, views), run.device)


def without_stores(run: Path, folder: Path) -> Path:
    """The run elsewhere, on a machine that has none of its targets."""
    copy = shutil.copytree(run, folder / "elsewhere")
    spec = json.loads((copy / "config.json").read_text())
    spec["targets"] = [{**target, "path": "/nowhere.zarr"} for target in spec["targets"]]
    (copy / "config.json").write_text(json.dumps(spec))
    return copy


@pytest.mark.parametrize("options", [{}, {"normalise": "phi-s", "ema": 0.6}, {"normalise": "none"}], ids=str)
def test_predictions_without_stores_are_those_that_agreement_is_measured_on(
    options: dict[str, Any], tmp_path: Path, tiny_store: Store, dense_store: Store
) -> None:
    config = small(tmp_path / "run", tiny_store, dense_store, **options)
    train(config)
    run = open_run(config.out)
    gains = fit_gains(run.distiller, batches(run, training_sample(run.targets)), run.device)
    held_out = run.targets.views_of(run.targets.held_out)
    wanted: dict[tuple[int, str], list[Tensor]] = {}
    for i, kind, predicted, _, norm in pairs(run.distiller, batches(run, held_out), run.device):
        wanted.setdefault((i, kind), []).append(norm.inverse(gains[i][kind] * predicted))
    summaries: list[Tensor] = []
    held_out_cosines(
        run.distiller,
        batches(run, held_out),
        run.device,
        gains,
        on_tokens=lambda i, kind, said, stored: summaries.append(said) if kind == "summary" else None,
    )

    elsewhere = without_stores(config.out, tmp_path)
    encoder, predictors = load_encoder(elsewhere).eval(), load_predictors(elsewhere)
    assert [predictor.name for predictor in predictors] == ["timm:test_vit-0", "timm:test_vit-1"]
    assert [predictor.widths for predictor in predictors] == [{"summary": 64, "dense": 64}, {"dense": 64}]
    got: dict[tuple[int, str], list[Tensor]] = {}
    with torch.inference_mode():
        for batch in batches(run, held_out):
            tokens = encoder(normalise(batch.pixels, encoder.spec.mean, encoder.spec.std))
            for i, predictor in enumerate(predictors):
                for kind, said in zip(("summary", "dense"), predictor(tokens), strict=True):
                    if said is not None:
                        got.setdefault((i, kind), []).append(said)
    assert got.keys() == wanted.keys() == {(0, "summary"), (0, "dense"), (1, "dense")}
    for key, parts in wanted.items():
        torch.testing.assert_close(torch.cat(got[key]), torch.cat(parts), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(got[0, "summary"]), torch.cat(summaries), rtol=1e-4, atol=1e-4)


def test_norms_are_those_of_each_target_s_first_size(tmp_path: Path, dense_store: Store) -> None:
    config = small(tmp_path / "run", dense_store, target_size=(96, TINY_SIZE), size=(TINY_SIZE, 96))
    train(config)
    kept = load_file(config.out / "norms.safetensors")
    assert kept.keys() == {f"0.dense.{name}" for name in ("mean", "centre", "scale", "gain")}
    first, second = (dense_store.stats(size, "dense") for size in (96, TINY_SIZE))
    assert np.allclose(kept["0.dense.mean"].numpy(), first.mean, atol=1e-6)
    assert np.allclose(kept["0.dense.scale"].numpy(), first.std, atol=1e-6)
    assert not np.allclose(first.mean, second.mean, atol=1e-4)


def test_runs_whose_heads_cannot_be_used_are_refused(tmp_path: Path, tiny_store: Store) -> None:
    config = small(tmp_path / "run", tiny_store)
    train(config)
    before = load_predictors(config.out)[0].state_dict()
    norms = config.out / "norms.safetensors"
    kept = load_file(norms)

    save_file({name: value for name, value in kept.items() if not name.endswith("gain")}, norms)
    with pytest.raises(RunError, match=r"heads of run .* cannot be used: .*2 missing \(dense.gain, summary.gain\)"):
        load_predictors(config.out)
    norms.write_bytes(b"no tensors")
    with pytest.raises(RunError, match=r"norms\.safetensors cannot be read as a safetensors file"):
        load_predictors(config.out)

    norms.unlink()
    with pytest.raises(RunError, match=r"has no norms.safetensors.* remove .*report.json and finish it again"):
        load_predictors(config.out)
    (config.out / "report.json").unlink()
    with pytest.raises(RunError, match=r"is not finished: it has no report.json"):
        load_predictors(config.out)
    train(replace(config, resume=True))
    after = load_predictors(config.out)[0].state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())

    with pytest.raises(RunError, match="is not a training run"):
        load_predictors(tmp_path)
