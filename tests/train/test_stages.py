"""What the paper's stages ask of the trainer, on tiny stores."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from making import TINY_STUDENT, make_corpus, make_store, random_weights, tiny_config
from safetensors.torch import load_file
from shallow import register_shallow

from eupe.corpus.views import ViewSpec, apply_photometric, draw_colours, render_view
from eupe.errors import ConfigError, RunError, TrainingError
from eupe.store import Store
from eupe.train.config import TrainConfig
from eupe.train.loop import train, train_together
from eupe.train.model import Distiller, build_distiller
from eupe.train.parallel import World
from eupe.train.run_spec import RunSpec, resolve
from eupe.train.stream import draw_sizes, open_corpora, stream, training_requests
from eupe.train.targets import Batch

CPU = torch.device("cpu")
VIEWS = ViewSpec(policy="rrc", num_views=2)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_weights: Path) -> Store:
    """Two sizes of the same views. Not to be changed."""
    return make_store(
        tmp_path_factory.mktemp("pyramid") / "p.zarr", tiny_corpus, tiny_weights, views=VIEWS, sizes=(32, 64)
    )


@pytest.fixture
def config(pyramid: Store, tmp_path: Path) -> TrainConfig:
    return tiny_config(pyramid.path, tmp_path / "run", steps=6, log_every=1)


def batches_of(config: TrainConfig, *, world: World | None = None) -> list[Batch]:
    corpora = open_corpora(config)
    spec = resolve(config, corpora)
    requests = training_requests(spec, corpora, world or World(), first_step=0, num_microbatches=config.accumulate)
    return list(stream(corpora, requests, CPU))


def distiller_of(config: TrainConfig) -> Distiller:
    corpora = open_corpora(config)
    return build_distiller(resolve(config, corpora), corpora[0], CPU)


def test_student_and_target_draw_their_sizes_each_for_itself(config: TrainConfig, pyramid: Store) -> None:
    batches = batches_of(replace(config, size=(32, 64), target_size=(32, 64), steps=40))
    drawn = [(batch.pixels.shape[1], batch.targets[0].size) for batch in batches]
    assert set(drawn) == {(32, 32), (32, 64), (64, 32), (64, 64)}
    for batch, (_, size) in zip(batches, drawn, strict=True):
        dense = batch.targets[0].dense
        assert dense is not None
        rows = pyramid.rows(batch.keys)
        stored = pyramid.read(rows, batch.request.views[:, 1].tolist(), size=size)
        assert np.array_equal(dense.decode().numpy(), stored.dense.astype(np.float32))


def test_every_size_is_drawn_equally_often_and_alike_on_every_worker() -> None:
    choices = [(256, 384, 512), (256, 384, 512)]
    drawn = np.array([draw_sizes(0, step, choices) for step in range(9000)])
    pairs, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(pairs) == 9 and abs(counts - 1000).max() < 120
    assert draw_sizes(0, 5, choices) == draw_sizes(0, 5, choices)
    assert any(draw_sizes(1, step, choices) != draw_sizes(0, step, choices) for step in range(9))


def test_targets_of_each_size_are_normalised_by_their_own_statistics(config: TrainConfig, pyramid: Store) -> None:
    distiller = distiller_of(replace(config, size=(32, 64), target_size=(32, 64)))
    for size in (32, 64):
        assert np.allclose(distiller.norms[0][size]["dense"].mean, pyramid.stats(size, "dense").mean, atol=1e-6)
    assert not np.allclose(distiller.norms[0][32]["dense"].mean, distiller.norms[0][64]["dense"].mean, atol=1e-6)


def test_a_size_that_the_store_lacks_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="no features at 96 px, only at 32, 64"):
        train(replace(config, target_size=(32, 96)))


def test_weights_multiply_their_losses_alone(config: TrainConfig) -> None:
    batch = batches_of(config)[0]
    plain = distiller_of(config)(batch)
    assert plain.total.item() == pytest.approx(sum(loss.item() for loss in plain.each[0].values()), rel=1e-6)
    name = "timm:test_vit"
    weighted = distiller_of(replace(config, weight=(f"{name}/dense=3", f"{name}/summary=0")))(batch)
    assert weighted.each[0]["dense"].item() == plain.each[0]["dense"].item()
    assert weighted.total.item() == pytest.approx(3 * plain.each[0]["dense"].item(), rel=1e-6)
    both = distiller_of(replace(config, weight=(f"{name}=2",)))(batch)
    assert both.total.item() == pytest.approx(2 * plain.total.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("dinov2=2", "names no target; the targets are timm:test_vit, timm:test_vit/summary, timm:test_vit/dense"),
        ("timm:test_vit/dence=2", "did you mean timm:test_vit/dense"),
        ("timm:test_vit=-1", "with W at least 0"),
        ("timm:test_vit", "takes TARGET=W"),
        ("timm:test_vit=0", "sets every loss to 0"),
    ],
)
def test_a_weight_that_cannot_be_is_refused(config: TrainConfig, word: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(replace(config, weight=(word,)))


def test_dropped_targets_count_for_nothing_but_never_the_worst(
    config: TrainConfig, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path
) -> None:
    other = make_store(tmp_path / "o.zarr", tiny_corpus, tiny_weights, views=VIEWS, sizes=(32,))
    two = replace(config, targets=(*config.targets, other.path), batch_size=8)
    batch = batches_of(two)[0]
    kept, dropped = distiller_of(two)(batch), distiller_of(replace(two, drop=1 - 1e-7))(batch)
    assert [losses.keys() for losses in kept.each] == [losses.keys() for losses in dropped.each]
    sums = [sum(loss.item() for loss in losses.values()) for losses in kept.each]
    assert max(sums) - 1e-6 <= dropped.total.item() < kept.total.item()


def test_the_student_alone_is_recoloured_and_anew_at_each_step(config: TrainConfig, pyramid: Store) -> None:
    plain, coloured = batches_of(config), batches_of(replace(config, photometric="eupe"))
    for ours, theirs in zip(plain, coloured, strict=True):
        assert torch.equal(ours.targets[0].dense.stored, theirs.targets[0].dense.stored)
        assert not torch.equal(ours.pixels, theirs.pixels)
    batch = coloured[2]
    corpora = open_corpora(config)
    for i, (sample, k) in enumerate(batch.request.views.tolist()):
        params = pyramid.read(pyramid.rows([batch.keys[i]]), [k]).params[0]
        view = render_view(corpora[0].read_image(sample), params, 32)
        expected = apply_photometric(view, draw_colours(0, batch.keys[i], 2, whose=f"student {k} "))
        assert np.array_equal(batch.pixels[i].numpy(), expected)


def test_workers_share_a_batch_and_its_sizes(config: TrainConfig) -> None:
    config = replace(config, size=(32, 64), photometric="eupe")
    whole = batches_of(config)
    halves = [batches_of(config, world=World(rank, 2)) for rank in range(2)]
    quarters = [batches_of(replace(config, accumulate=2), world=World(rank, 2)) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([half[step].pixels for half in halves]), batch.pixels)
        pieces = [worker[2 * step + piece] for worker in quarters for piece in range(2)]
        assert torch.equal(torch.cat([piece.pixels for piece in pieces]), batch.pixels)
        assert [piece.request.first for piece in pieces] == [0, 2, 4, 6]


class TestMix:
    @pytest.fixture
    def mixed(self, config: TrainConfig, tmp_path: Path, tiny_weights: Path) -> TrainConfig:
        corpus = make_corpus(tmp_path / "other", count=40)
        other = make_store(tmp_path / "other.zarr", corpus, tiny_weights, views=VIEWS, sizes=(32,))
        return replace(config, mix=(f"0.25:{other.path}",), steps=40)

    def test_batches_are_of_one_corpus_and_have_their_share(self, mixed: TrainConfig) -> None:
        corpora = open_corpora(mixed)
        batches = batches_of(mixed)
        for batch in batches:
            keys = corpora[batch.request.corpus].keys
            assert list(batch.keys) == [keys[sample] for sample in batch.request.views[:, 0]]
        assert 5 <= sum(batch.request.corpus for batch in batches) <= 15
        assert sum(batch.request.corpus for batch in batches_of(replace(mixed, steps=400))) == 100

    def test_a_run_of_two_corpora_normalises_by_the_first(self, mixed: TrainConfig) -> None:
        report = train(mixed)
        assert report.steps == 40 and report.pictures == 24
        assert len(load_file(mixed.out / "heads.safetensors")) == 8

    def test_stores_of_another_teacher_or_without_the_sizes_are_refused(
        self, mixed: TrainConfig, tmp_path: Path, tiny_corpus: Path
    ) -> None:
        weights = random_weights("test_vit2", tmp_path / "w.safetensors")
        other = make_store(
            tmp_path / "x.zarr", tiny_corpus, weights, teacher="timm:test_vit2", views=VIEWS, sizes=(32,)
        )
        words = r"x\.zarr holds summary\+dense of timm:test_vit2, but the store at the same position"
        with pytest.raises(ConfigError, match=words):
            train(replace(mixed, mix=(f"0.25:{other.path}",)))
        with pytest.raises(ConfigError, match=r"other\.zarr has no features at 64 px, only at 32"):
            train(replace(mixed, target_size=(64,)))

    @pytest.mark.parametrize(
        ("word", "words"),
        [("x.zarr", "takes SHARE:STORE"), ("1.5:x.zarr", "share between 0 and 1"), ("0.5:a,b", "names 2 stores")],
    )
    def test_a_mix_that_cannot_be_is_refused(self, config: TrainConfig, word: str, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            train(replace(config, mix=(word,)))


class TestFamily:
    def test_students_of_one_stream_become_what_they_become_alone(self, config: TrainConfig, tmp_path: Path) -> None:
        configs = [
            replace(config, out=tmp_path / "a"),
            replace(config, out=tmp_path / "b", student="test_vit2", lr=3e-4),
        ]
        together = train_together(configs)
        for each in configs:
            alone = replace(each, out=tmp_path / f"{each.out.name}-alone")
            train(alone)
            for name in ("student.safetensors", "heads.safetensors"):
                ours, theirs = load_file(each.out / name), load_file(alone.out / name)
                assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert [report.run for report in together] == [str(each.out) for each in configs]
        assert all(report.cached for report in train_together(configs))

    def test_they_go_on_from_the_newest_step_that_all_have(self, config: TrainConfig, tmp_path: Path) -> None:
        configs = [
            replace(config, out=tmp_path / name, checkpoint_every=2, keep=3, student=student)
            for name, student in (("a", TINY_STUDENT), ("b", "test_vit2"))
        ]
        train_together(configs)
        whole = [load_file(each.out / "student.safetensors") for each in configs]
        for each in configs:
            (each.out / "report.json").unlink()
        (tmp_path / "b" / "checkpoints" / "00000006.safetensors").unlink()
        train_together([replace(each, resume=True) for each in configs])
        for each, before in zip(configs, whole, strict=True):
            after = load_file(each.out / "student.safetensors")
            assert all(torch.equal(after[key], before[key]) for key in before)

    def test_students_of_different_streams_are_refused(self, config: TrainConfig, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot differ in batch_size: 8 and 4"):
            train_together([config, replace(config, out=tmp_path / "b", batch_size=4)])
        with pytest.raises(ConfigError, match="give each student its own --out"):
            train_together([config, config])
        with pytest.raises(ConfigError, match="with --keep 1 the students may have no"):
            train_together([replace(config, keep=1), replace(config, keep=1, out=tmp_path / "b")])


def test_a_batch_in_pieces_gives_the_same_student_within_rounding(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, seed=1)  # with 0, rounding decides the sign of a gradient, and Adam's step
    train(config)
    train(replace(config, out=tmp_path / "pieces", accumulate=4))
    ours, theirs = (load_file(run / "student.safetensors") for run in (config.out, tmp_path / "pieces"))
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-4


def test_clipping_bounds_the_first_update(config: TrainConfig, tmp_path: Path) -> None:
    train(replace(config, steps=1))
    train(replace(config, steps=1, clip=1e-9, out=tmp_path / "clipped"))
    start = distiller_of(config).encoder.model.state_dict()
    moved = [
        sum((load_file(run / "student.safetensors")[key] - start[key]).abs().sum().item() for key in start)
        for run in (config.out, tmp_path / "clipped")
    ]
    assert moved[1] < moved[0] / 2


def test_the_average_is_what_is_judged_and_exported(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    averaged = replace(config, out=tmp_path / "averaged", ema=0.5)
    train(averaged)
    plain, average = (load_file(run / "student.safetensors") for run in (config.out, averaged.out))
    kept = load_file(averaged.out / "checkpoints" / "00000006.safetensors")
    assert all(torch.equal(kept[f"encoder.model.{key}"], plain[key]) for key in plain)
    assert any(not torch.equal(average[key], plain[key]) for key in plain)


def test_recomputing_activations_changes_nothing(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    train(replace(config, out=tmp_path / "recomputed", recompute=True))
    ours, theirs = (load_file(run / "student.safetensors") for run in (config.out, tmp_path / "recomputed"))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in ours)
    with pytest.raises(ConfigError, match="would count every batch twice in the running"):
        train(replace(config, out=tmp_path / "x", student="test_resnet", recompute=True))


def test_the_third_stage_goes_on_from_the_second(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    third = replace(config, student="", init=config.out, out=tmp_path / "third", size=(32, 64), target_size=(32, 64))
    report = train(third)
    told = json.loads((third.out / "init.json").read_text())
    assert told["share"] == 1.0 and not told["fresh"] and report.steps == 6
    assert distiller_of(third).encoder.spec.arch == TINY_STUDENT
    start = load_file(config.out / "student.safetensors")
    train(replace(third, out=tmp_path / "still", lr=1e-12))
    end = load_file(tmp_path / "still" / "student.safetensors")
    assert all(torch.allclose(start[key], end[key], atol=1e-6) for key in start)
    with pytest.raises(RunError, match="init: was"):
        train(replace(third, init=third.out))


def test_views_of_an_epoch_are_cycled_or_all(config: TrainConfig) -> None:
    one_epoch = replace(config, steps=None, epochs=1.0, batch_size=1)
    seen = {
        how: [tuple(batch.request.views[0].tolist()) for batch in batches_of(replace(one_epoch, views=how))]
        for how in ("all", "cycle", "draw")
    }
    samples = set(open_corpora(config)[0].training.tolist())
    assert len(seen["all"]) == 2 * len(samples) and len(set(seen["all"])) == len(seen["all"])
    for how in ("cycle", "draw"):
        assert len(seen[how]) == len(samples) and {sample for sample, _ in seen[how]} == samples


@pytest.mark.slow
def test_a_compiled_student_goes_the_way_of_a_plain_one(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, student=register_shallow("vit_of_one_block", "test_vit", depth=1))
    train(config)
    train(replace(config, out=tmp_path / "compiled", compile=True))
    ours, theirs = (load_file(run / "student.safetensors") for run in (config.out, tmp_path / "compiled"))
    assert ours.keys() == theirs.keys()
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-4


def test_a_student_whose_pool_no_target_needs_goes_on_after_a_stop(
    config: TrainConfig, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path
) -> None:
    """test_vit2 pools by attention, which dense tokens do not depend on."""
    store = make_store(tmp_path / "d.zarr", tiny_corpus, tiny_weights, views=VIEWS, sizes=(32,), tokens=("dense",))
    config = replace(config, targets=(store.path,), student="test_vit2", checkpoint_every=2, keep=3)
    train(config)
    whole = load_file(config.out / "student.safetensors")
    (config.out / "report.json").unlink()
    (config.out / "checkpoints" / "00000006.safetensors").unlink()
    train(replace(config, resume=True))
    assert all(torch.equal(value, whole[key]) for key, value in load_file(config.out / "student.safetensors").items())


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eupe.train import trainer

    adamw = trainer.adamw

    def poisoned(distiller: Distiller, spec: RunSpec) -> torch.optim.Optimizer:
        steps = iter(range(100))
        weight = next(distiller.heads.parameters())
        weight.register_hook(lambda gradient: gradient * (torch.inf if next(steps) == 3 else 1))
        return adamw(distiller, spec)

    monkeypatch.setattr(trainer, "adamw", poisoned)
    with pytest.raises(TrainingError, match=r"the norm of its gradient is (inf|nan), so nothing was updated"):
        train(replace(config, checkpoint_every=1))
    saved = load_file(config.out / "checkpoints" / "00000003.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


def test_the_same_pictures_make_the_same_run(
    config: TrainConfig, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path
) -> None:
    """A store that was made again, with a picture that it could not read, has the same specification."""
    train(config)
    spec = RunSpec.from_json(json.loads((config.out / "config.json").read_text()))
    assert spec.differences(spec) == []
    assert spec.differences(replace(spec, pictures=("x",))) == [
        "the set of pictures that all targets have differs (a store was repaired or extended)"
    ]
    with pytest.raises(RunError, match="the set of pictures that all targets have differs"):
        write_json(config.out / "config.json", {**spec.to_json(), "pictures": ["x"]})
        train(replace(config, resume=True))


def write_json(path: Path, plain: dict[str, object]) -> None:
    path.write_text(json.dumps(plain))


def test_words_for_what_is_so_anyway_make_the_same_run(config: TrainConfig) -> None:
    train(config)
    assert train(replace(config, target_size=(32,), size=(32,), weight=("timm:test_vit=1",))).cached


def test_where_a_student_starts_from_is_part_of_the_run(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    third = replace(config, student=TINY_STUDENT, init=config.out, out=tmp_path / "third")
    train(third)
    with pytest.raises(RunError, match="init: was"):
        train(replace(third, init=config.out / "student.safetensors"))


def test_a_mistake_found_before_the_first_step_does_not_block_the_directory(config: TrainConfig) -> None:
    with pytest.raises(ConfigError):
        train(replace(config, student="test_resnet", recompute=True))
    assert not train(replace(config, student="test_resnet")).cached


def test_something_else_in_the_directory_is_refused(config: TrainConfig) -> None:
    config.out.mkdir()
    for text in ("", "{}", '{"architectures": ["Dinov2Model"]}'):
        (config.out / "config.json").write_text(text)
        with pytest.raises(RunError, match="not from a training run; give another --out"):
            train(config)


def test_a_student_that_takes_one_size_only_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="nest_tiny_jx"):
        train(replace(config, student="nest_tiny_jx", size=(224, 256)))
