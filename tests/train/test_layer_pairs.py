"""Maps of a student that learn from layers of a teacher: how they are paired, their loss, and what is not read."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from making import TINY_SIZE, make_store, random_weights, tiny_config
from torch import Tensor, nn

from eupe.common.compute import normalise
from eupe.errors import ConfigError, PartCorruptError
from eupe.models.encoder import encoder_layers, load_encoder
from eupe.store import Store, open_store
from eupe.train.advice import advice
from eupe.train.config import TrainConfig
from eupe.train.layers import pairs_of
from eupe.train.loop import train
from eupe.train.model import Distiller, Losses, build_distiller
from eupe.train.parallel import World
from eupe.train.run_spec import RunSpec, resolve
from eupe.train.stream import open_corpora, stream, training_requests
from eupe.train.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vit_store(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_weights: Path) -> Store:
    """Blocks 2 and 4, of 6, and the last map of a ViT of stride 16."""
    place = tmp_path_factory.mktemp("vit") / "s.zarr"
    return make_store(place, tiny_corpus, tiny_weights, layers=(2, 4))


@pytest.fixture(scope="module")
def staged_store(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Store:
    """Stages of strides 4, 8, 16 and the last map, of stride 32."""
    folder = tmp_path_factory.mktemp("staged")
    weights = random_weights("convnext_atto", folder / "w.safetensors")
    return make_store(folder / "s.zarr", tiny_corpus, weights, teacher="timm:convnext_atto", layers=(1, 2, 3))


def spec_of(config: TrainConfig) -> RunSpec:
    return resolve(config, open_corpora(config))


def pairs(config: TrainConfig) -> list[str]:
    """The pairs of the first target."""
    return [pair.name for pair in pairs_of(spec_of(config).targets[0])]


def losses_of(config: TrainConfig) -> tuple[Distiller, Losses, RunSpec]:
    """The losses of a run's first batch, with gradients."""
    corpora = open_corpora(config)
    spec = resolve(config, corpora)
    distiller = build_distiller(spec, corpora[0], CPU)
    requests = training_requests(spec, corpora, World(), first_step=0, num_microbatches=1)
    losses: Losses = distiller(next(stream(corpora, [next(requests)], CPU)))
    return distiller, losses, spec


def last_weights(run: Path) -> dict[str, Tensor]:
    return load_encoder(run).model.state_dict()


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ("mobilenetv4_conv_small", ["1=2", "2=3", "3=4"]),  # strides 2, 4, 8, 16, 32
        ("repvit_m0_9", ["1=1", "2=2", "3=3"]),  # strides 4, 8, 16, 32
        ("convnext_atto", ["1=1", "2=2", "3=3"]),
        ("test_vit", ["1=1", "2=3", "3=4"]),  # one stride: by the share of the depth, of 6 and of 4
    ],
)
def test_by_default_all_layers_are_matched_by_stride(
    student: str, expected: list[str], staged_store: Store, tmp_path: Path
) -> None:
    assert pairs(tiny_config(staged_store.path, tmp_path, student=student)) == expected


def test_blocks_are_matched_by_their_share_of_the_depth(vit_store: Store, tmp_path: Path) -> None:
    config = tiny_config(vit_store.path, tmp_path)
    assert pairs(config) == ["2=2", "4=4"]
    assert pairs(replace(config, student="convnext_atto")) == ["2=3", "4=3"]  # the stage of stride 16
    # at twice the size the cells of stage 4 are as large
    assert pairs(replace(config, student="convnext_atto", size=(2 * TINY_SIZE,))) == ["2=4", "4=4"]


def test_pairs_are_chosen_by_words(vit_store: Store, staged_store: Store, tmp_path: Path) -> None:
    config = tiny_config(vit_store.path, tmp_path, student="convnext_atto")
    assert pairs(replace(config, layers=("none",))) == []
    assert pairs(replace(config, layers=("4",))) == ["4=3"]
    assert pairs(replace(config, layers=("2=1,last=2", "last=4"))) == ["2=1", "last=2", "last=4"]
    both = replace(config, targets=(vit_store.path, staged_store.path))
    both = replace(both, layers=("timm:test_vit/last=2", "3"))
    assert [[pair.name for pair in pairs_of(target)] for target in spec_of(both).targets] == [["last=2"], ["3=3"]]
    # a word without a target is for all that have the layer
    both = replace(both, layers=("2=2",))
    assert [[pair.name for pair in pairs_of(target)] for target in spec_of(both).targets] == [["2=2"], ["2=2"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("5",), r"--layers '5': timm:test_vit has 2, 4, last; give one of these"),
        (("other/2",), r"--layers 'other/2': timm:test_vit has 2, 4, last"),
        (("2=9",), r"--layers 2=9: test_vit has layers 1 of stride 16, .*give one of these"),
        (("2=1,2=1",), "--layers names 2=1 twice"),
        (("two",), "--layers takes LAYER or LAYER=STUDENT_LAYER.*got 'two'"),
        (("2=",), "got '2='"),
    ],
)
def test_words_that_name_nothing_are_refused(
    words: tuple[str, ...], said: str, vit_store: Store, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        spec_of(tiny_config(vit_store.path, tmp_path, layers=words))


def test_a_student_of_one_map_says_so(vit_store: Store, tmp_path: Path) -> None:
    config = tiny_config(vit_store.path, tmp_path, student="making:own_net")
    with pytest.raises(ConfigError, match="making:own_net gives its last map only, no layers"):
        spec_of(config)
    assert pairs(replace(config, layers=("none",))) == []
    assert pairs(replace(config, student="making:OwnPyramid")) == ["2=2", "4=2"]


@pytest.mark.parametrize("student", ["mobilenetv4_conv_small", "repvit_m0_9", "convnext_atto", "test_vit"])
def test_a_pair_trains_its_stage_and_what_is_before_it(student: str, vit_store: Store, tmp_path: Path) -> None:
    """Parameters behind the paired layer have no gradient if all other losses are off; those of it have one."""
    alone = ("timm:test_vit=0", "timm:test_vit/layers=1")
    table = None
    for number in range(1, len(encoder_layers(student, TINY_SIZE)) + 1):
        config = tiny_config(
            vit_store.path, tmp_path, student=student, layers=(f"4={number}",), weight=alone, batch_size=2
        )
        distiller, losses, _ = losses_of(config)
        losses.total.backward()
        model: nn.Module = distiller.encoder.model
        table = [stage["module"] for stage in model.feature_info]  # type: ignore[union-attr,index]
        reached = [any(_moves(part) for part in model.get_submodule(name).parameters()) for name in table]
        parameters = [any(True for _ in model.get_submodule(name).parameters()) for name in table]
        assert reached == [has and i < number for i, has in enumerate(parameters)], (number, table)
    assert table


def _moves(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)


def test_the_loss_of_a_pair_is_the_naive_one(vit_store: Store, tmp_path: Path) -> None:
    """It is computed from zarr's own reading, the statistics as they lie in the store, and the head's matrices."""
    config = tiny_config(vit_store.path, tmp_path, layers=("2=3,4=1",), batch_size=4)
    corpora = open_corpora(config)
    spec = resolve(config, corpora)
    distiller = build_distiller(spec, corpora[0], CPU)
    requests = training_requests(spec, corpora, World(), first_step=0, num_microbatches=1)
    batch = next(stream(corpora, [next(requests)], CPU))
    losses = distiller(batch)

    group = zarr.open_group(vit_store.path.local, mode="r")
    keys = vit_store.samples["key"].to_pylist()
    rows = [keys.index(key) for key in batch.keys]
    views = batch.request.views[:, 1].tolist()
    encoder = distiller.encoder
    pixels = normalise(batch.pixels, encoder.spec.mean, encoder.spec.std)
    blocks = encoder.model.get_intermediate_layers(pixels, n=6, norm=True, reshape=True)  # type: ignore[operator]
    expected = {}
    for layer, place in ((2, 3), (4, 1)):
        head = distiller.heads[0].layers[f"{layer}={place}"]  # type: ignore[union-attr,index]
        total = 0.0
        for i, (row, view) in enumerate(zip(rows, views, strict=True)):
            teacher = np.asarray(group[f"64/dense-{layer}"][row, view], np.float64)
            mean, std = (np.asarray(group[f"stats/64/dense-{layer}/{name}"]) for name in ("mean", "std"))
            said = head(blocks[place - 1][i].permute(1, 2, 0)).detach().double().numpy()
            cells = []
            for a, b in zip(said.reshape(16, -1), ((teacher - mean) / std).reshape(16, -1), strict=True):
                cosine = a @ b / math.sqrt((a @ a) * (b @ b))
                gaps = np.abs(a - b)
                smooth = np.where(gaps < 1, gaps**2 / 2, gaps - 0.5).mean()
                cells.append(0.9 * (1 - cosine) + 0.1 * smooth)
            total += float(np.mean(cells)) / len(rows)
        expected[f"{layer}={place}"] = total
    found = losses.each[0]
    assert {name: found[name].item() for name in expected} == pytest.approx(expected, rel=1e-4)
    # the pairs of a target weigh, together, as much as one kind of token
    sum_of_kinds = found["summary"].item() + found["dense"].item()
    assert losses.total.item() == pytest.approx(sum_of_kinds + np.mean(list(expected.values())), rel=1e-5)
    doubled = replace(config, weight=("timm:test_vit/layers=2",))
    _, twice, _ = losses_of(doubled)
    assert twice.total.item() - losses.total.item() == pytest.approx(np.mean(list(expected.values())), rel=1e-3)


def test_layers_that_are_not_asked_for_are_not_read(vit_store: Store, tmp_path: Path) -> None:
    """They are gone, and training without them is the same as from a store that never had them."""
    plain = tmp_path / "less.zarr"
    shutil.copytree(vit_store.path.local, plain)
    shutil.rmtree(plain / "64" / "dense-2" / "c")
    some = tiny_config(plain, tmp_path / "some", layers=("4=3",), steps=2)
    train(some)
    names = {name for line in _metrics(some.out) for name in line.get("losses", {})}
    assert names == {f"timm:test_vit/{kind}" for kind in ("summary", "dense", "4=3")}

    shutil.rmtree(plain / "64" / "dense-4" / "c")
    none = tiny_config(plain, tmp_path / "none", layers=("none",), steps=2)
    train(none)
    with pytest.raises(PartCorruptError, match=r"dense-[24]"):
        train(replace(none, out=tmp_path / "all", layers=()))
    assert any(not torch.equal(a, b) for a, b in _both(some.out, none.out))


def test_without_layers_a_run_is_as_it_was_before_there_were_any(
    vit_store: Store, tiny_store: Store, tmp_path: Path
) -> None:
    with_layers = tiny_config(vit_store.path, tmp_path / "a", layers=("none",), steps=2)
    without = tiny_config(tiny_store.path, tmp_path / "b", steps=2)
    for config in (with_layers, without):
        train(config)
    assert all(torch.equal(a, b) for a, b in _both(with_layers.out, without.out))
    spec = spec_of(without)
    # a run's spec from before has no such key
    assert spec.config["layers"] is None and "layers" not in spec.targets[0]
    assert spec.config["weight"].keys() == {"timm:test_vit/summary", "timm:test_vit/dense"}


def test_a_run_with_layers_resumes_and_begins_the_next(vit_store: Store, tmp_path: Path) -> None:
    whole = tiny_config(vit_store.path, tmp_path / "whole", steps=4, checkpoint_every=2, log_every=1)
    train(whole)
    halved = replace(whole, out=tmp_path / "halved")
    shutil.copytree(whole.out, halved.out)
    (halved.out / "report.json").unlink()
    (halved.out / "checkpoints" / "00000004.safetensors").unlink()
    train(replace(halved, resume=True))
    assert all(torch.equal(a, b) for a, b in _both(whole.out, halved.out))

    follows = tiny_config(vit_store.path, tmp_path / "next", init=whole.out, student=None, steps=1)
    corpora = open_corpora(follows)
    begun = Trainer(follows, resolve(follows, corpora), corpora[0], world=World(), device=CPU).initialised
    assert begun is not None and begun.fresh == () and begun.unused == ()
    assert spec_of(follows).config["freeze_encoder"] is None  # all heads come along
    # a head for another pair is fresh, and so the encoder is protected
    other = replace(follows, out=tmp_path / "other", layers=("2=1",))
    assert spec_of(other).config["freeze_encoder"] is not None
    assert any(
        "layer 2 teaches the student's layer 1" in note for note in advice(other, spec_of(other), open_corpora(other))
    )


def _metrics(run: Path) -> list[dict[str, dict[str, float]]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _both(one: Path, other: Path) -> list[tuple[Tensor, Tensor]]:
    ours, theirs = last_weights(one), last_weights(other)
    assert ours.keys() == theirs.keys()
    return [(ours[name], theirs[name]) for name in ours]


def test_a_mixed_in_store_needs_the_layers(vit_store: Store, tiny_store: Store, tmp_path: Path) -> None:
    config = tiny_config(vit_store.path, tmp_path, mix=(f"0.5:{tiny_store.path}",))
    with pytest.raises(ConfigError, match=r"tiny.zarr does not hold layer 2 as .* does; extract it with the same"):
        spec_of(config)
    assert spec_of(replace(config, layers=("none",))).config["layers"] is None
    assert open_store(tiny_store.path).spec.layers == {}
