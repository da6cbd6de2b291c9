"""Pictures of what a student predicts, and that drawing them changes nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from making import TINY_STUDENT, TWO_CROPS, make_store, tiny_config
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eupe.models.pca import fit_pca
from eupe.store import Store
from eupe.train.config import TrainConfig
from eupe.train.dense_maps import CELL_PX, GAP_PX, TITLE_PX, DenseMaps, dense_maps, draw_maps
from eupe.train.loop import judged, train
from eupe.train.losses import match_grids
from eupe.train.model import build_distiller
from eupe.train.run_spec import resolve
from eupe.train.stream import open_corpora, stream

CPU = torch.device("cpu")
STEP_PX = CELL_PX + GAP_PX


@pytest.fixture
def config(tiny_store: Store, tmp_path: Path) -> TrainConfig:
    return tiny_config(tiny_store.path, tmp_path / "run", steps=4, batch_size=3)


def cell(grid: Image.Image, row: int, column: int, side: int = CELL_PX) -> NDArray[np.uint8]:
    left, top = STEP_PX * column, TITLE_PX + STEP_PX * row
    shown = grid.crop((left, top, left + CELL_PX, top + CELL_PX))
    return np.asarray(shown.resize((side, side), Image.Resampling.NEAREST))


@pytest.mark.parametrize(("student", "ema"), [(TINY_STUDENT, 0.9), ("test_resnet", None)])
def test_a_run_that_is_validated_and_drawn_at_every_step_becomes_the_same_to_the_bit(
    config: TrainConfig, student: str, ema: float | None
) -> None:
    often = replace(config, student=student, ema=ema, validate_every=1)
    once = replace(often, out=config.out.with_name("once"), validate_every=1000)
    train(often)
    train(once)
    assert sorted(path.name for path in (often.out / "pictures").iterdir()) == [f"{i:08d}.png" for i in range(1, 5)]
    assert [path.name for path in (once.out / "pictures").iterdir()] == ["00000004.png"]
    for name in ("student.safetensors", "heads.safetensors", "checkpoints/00000004.safetensors"):
        ours, theirs = load_file(often.out / name), load_file(once.out / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    last = Path("pictures") / "00000004.png"
    assert (often.out / last).read_bytes() == (once.out / last).read_bytes()
    board = EventAccumulator(str(often.out / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Images("pictures")] == [1, 2, 3, 4]


def test_a_row_shows_a_held_out_view_the_stored_map_and_the_exported_students(
    config: TrainConfig, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path
) -> None:
    """Two targets; the maps are made anew from the stores and the files that the run left."""
    fine = make_store(tmp_path / "fine.zarr", tiny_corpus, tiny_weights, views=TWO_CROPS, sizes=(96,))
    config = replace(config, targets=(*config.targets, fine.path), ema=0.5)
    train(config)
    corpora = open_corpora(config)
    spec = resolve(config, corpora)
    targets = corpora[0]
    held_out = targets.views_of(targets.held_out)
    chosen = held_out[[i * (len(held_out) - 1) // 3 for i in range(4)]]
    (batch,) = stream(corpora, judged(spec, chosen), CPU)
    distiller = build_distiller(spec, targets, CPU)
    distiller.encoder.model.load_state_dict(load_file(config.out / "student.safetensors"))
    distiller.heads.load_state_dict(load_file(config.out / "heads.safetensors"))
    with torch.no_grad():
        predictions = distiller.predict(batch.pixels)
    grid = Image.open(config.out / "pictures" / "00000004.png")
    assert grid.size == (5 * STEP_PX - GAP_PX, TITLE_PX + 4 * STEP_PX - GAP_PX)
    for i, (_, dense) in enumerate(predictions):
        stored, norms = batch.targets[i].dense, distiller.norms[i][batch.targets[i].size]
        assert stored is not None and dense is not None
        predicted, tokens = (x.numpy() for x in match_grids(dense, norms["dense"](stored.decode())))
        pca, side = fit_pca(tokens), (4, 6)[i]
        for row in range(4):
            np.testing.assert_array_equal(cell(grid, row, 1 + 2 * i, side), pca.rgb(tokens)[row])
            ours, theirs = cell(grid, row, 2 + 2 * i, side), pca.rgb(predicted)[row]
            assert np.abs(ours.astype(int) - theirs).max() <= 1
            shown = Image.fromarray(batch.pixels[row].numpy()).resize((CELL_PX, CELL_PX), Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(cell(grid, row, 0), np.asarray(shown))


def test_a_student_that_predicts_the_target_has_its_colours_and_a_constant_one_has_one(config: TrainConfig) -> None:
    corpora = open_corpora(config)
    spec = resolve(config, corpora)
    views = corpora[0].views_of(corpora[0].held_out)[:4]
    batches = [batch for part in (views[:2], views[2:]) for batch in stream(corpora, judged(spec, part), CPU)]
    assert len(batches) == 2
    maps = dense_maps(build_distiller(spec, corpora[0], CPU), batches, ["it"], CPU)["it"]
    assert maps.stored.shape == maps.predicted.shape and len(maps.stored) == 4
    constant = np.zeros_like(maps.stored)
    grids = [draw_maps(batches, {"it": DenseMaps(maps.stored, p)}) for p in (maps.stored, constant)]
    for row in range(4):
        np.testing.assert_array_equal(cell(grids[0], row, 1), cell(grids[0], row, 2))
        assert len(np.unique(cell(grids[1], row, 2).reshape(-1, 3), axis=0)) == 1
        assert len(np.unique(cell(grids[1], row, 1).reshape(-1, 3), axis=0)) > 1
