"""Which views a step sees: whole epochs, any number of ranks, whole turns of a mix, and nothing kept."""

import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from uniform import assert_uniform

from eupe.errors import ConfigError
from eupe.train.sampling import MIX_BLOCK, VIEW_ORDERS, Mix, Sampler, Views

SAMPLES = np.flatnonzero(np.arange(60) % 7 != 3)
"""51 samples; others are held out."""


def a_sampler(**changes: Any) -> Sampler:
    return Sampler(**{"samples": SAMPLES, "num_views": 4, "seed": 0, **changes})


def epoch_of(sampler: Sampler, epoch: int, batch_size: int) -> Views:
    steps = sampler.steps_per_epoch(batch_size)
    return np.concatenate([sampler.batch(epoch * steps + i, batch_size=batch_size) for i in range(steps)])


def pairs(views: Views) -> set[tuple[int, int]]:
    return {(sample, number) for sample, number in views.tolist()}


@st.composite
def samplers(draw: st.DrawFn) -> Sampler:
    samples = np.array(sorted(draw(st.sets(st.integers(0, 10**9), min_size=1, max_size=80))))
    parts = np.sort(np.array(draw(st.lists(st.integers(0, 12), min_size=len(samples), max_size=len(samples)))))
    return Sampler(
        samples=samples,
        num_views=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 2**64 - 1)),
        views=draw(st.sampled_from(VIEW_ORDERS)),
        parts=draw(st.sampled_from([None, parts])),
        window=draw(st.integers(1, 15)),
    )


@settings(deadline=None)
@given(samplers(), st.data())
def test_an_epoch_repeats_nothing_and_leaves_out_less_than_a_batch(sampler: Sampler, data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, len(sampler)))
    views = epoch_of(sampler, data.draw(st.integers(0, 1000)), batch_size)
    assert len(sampler) - batch_size < len(views) <= len(sampler)
    assert len(pairs(views)) == len(views)
    assert np.isin(views[:, 0], sampler.samples).all()
    assert views.dtype == np.int64 and views.min() >= 0 and views[:, 1].max() < sampler.num_views
    if sampler.views == "all":
        assert len(sampler) == len(sampler.samples) * sampler.num_views
    else:
        assert len(sampler) == len(sampler.samples)
        assert len(np.unique(views[:, 0])) == len(views)


@settings(deadline=None)
@given(samplers(), st.integers(1, 64), st.integers(0, 10**6), st.data())
def test_the_ranks_batches_in_order_are_the_global_batch(
    sampler: Sampler, world: int, step: int, data: st.DataObject
) -> None:
    world = min(world, len(sampler))
    batch_size = world * data.draw(st.integers(1, len(sampler) // world))
    shares = [sampler.batch(step, batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    assert {len(share) for share in shares} == {batch_size // world}
    assert np.array_equal(np.concatenate(shares), sampler.batch(step, batch_size=batch_size))


@settings(deadline=None)
@given(samplers(), st.lists(st.integers(0, 10**6), min_size=1, max_size=10))
def test_a_step_depends_on_no_step_before_it(sampler: Sampler, steps: list[int]) -> None:
    """Nor on the process that asks: a sampler that has been used is sent to another."""
    used = [sampler.batch(step, batch_size=1) for step in steps]
    sent = pickle.loads(pickle.dumps(sampler))
    assert np.array_equal(used[::-1], [sent.batch(step, batch_size=1) for step in reversed(steps)])


@pytest.mark.parametrize("parts", [None, SAMPLES // 10])
@pytest.mark.parametrize("views", VIEW_ORDERS)
def test_epochs_and_seeds_have_their_own_orders(views: str, parts: NDArray[np.int64] | None) -> None:
    orders = [epoch_of(a_sampler(views=views, parts=parts, seed=s), e, 3)[:, 0] for s in range(3) for e in range(3)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.5
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.9


def test_the_order_of_views_stays_the_same_in_every_version_and_on_every_machine() -> None:
    """A run that is resumed after an upgrade goes on with the views that it would have had."""
    assert a_sampler().batch(100, batch_size=4).tolist() == [[54, 2], [58, 3], [29, 2], [16, 1]]
    drawn = a_sampler(views="draw", parts=SAMPLES // 10, window=2).batch(100, batch_size=4)
    assert drawn.tolist() == [[49, 3], [36, 0], [32, 1], [18, 1]]
    mix = Mix(samplers=(a_sampler(), a_sampler()), shares=(0.5, 0.5), seed=0)
    assert "".join(str(mix.turn(step)[0]) for step in range(30)) == "001000010111101101101111001110"


def test_all_sees_every_view_of_every_sample() -> None:
    assert pairs(epoch_of(a_sampler(), 5, 17)) == {(s, k) for s in SAMPLES.tolist() for k in range(4)}


@pytest.mark.parametrize("parts", [None, SAMPLES // 10])
def test_cycle_sees_every_view_once_over_as_many_epochs_as_views(parts: NDArray[np.int64] | None) -> None:
    sampler = a_sampler(views="cycle", parts=parts)
    views = np.concatenate([epoch_of(sampler, epoch, 17) for epoch in range(6, 10)])
    assert len(views) == 4 * len(SAMPLES)
    assert pairs(views) == {(s, k) for s in SAMPLES.tolist() for k in range(4)}


def test_cycle_mixes_the_numbers_of_views_in_a_batch() -> None:
    sampler = Sampler(samples=np.arange(4000), num_views=4, seed=0, views="cycle")
    for step in range(10):
        counts = np.bincount(sampler.batch(step, batch_size=400)[:, 1], minlength=4)
        assert counts.min() > 60


def test_draw_takes_each_view_of_each_sample_equally_often_whatever_it_took_before() -> None:
    sampler = a_sampler(views="draw")
    drawn = np.empty((800, len(SAMPLES)), np.int64)
    for epoch in range(len(drawn)):
        views = epoch_of(sampler, epoch, len(SAMPLES))
        drawn[epoch] = views[np.argsort(views[:, 0]), 1]
    for of_sample in drawn.T:
        assert_uniform(np.bincount(of_sample, minlength=4))
    assert_uniform(np.bincount((4 * drawn[:-1] + drawn[1:]).ravel(), minlength=16))
    assert_uniform(np.bincount((4 * drawn[:, :-1] + drawn[:, 1:]).ravel(), minlength=16))


@settings(deadline=None)
@given(samplers(), st.integers(0, 100))
def test_a_window_of_parts_is_finished_before_the_next_begins(sampler: Sampler, epoch: int) -> None:
    if sampler.parts is None:
        return
    part_of = dict(zip(sampler.samples.tolist(), sampler.parts.tolist(), strict=True))
    met = [part_of[sample] for sample in epoch_of(sampler, epoch, 1)[:, 0].tolist()]
    sizes = {part: met.count(part) for part in met}
    place = 0
    while place < len(met):
        window: set[int] = set()
        begin = place
        while place < len(met) and (met[place] in window or len(window) < sampler.window):
            window.add(met[place])
            place += 1
        if place < len(met):
            assert len(window) == sampler.window
        assert place - begin == sum(sizes[part] for part in window)


def test_a_batch_touches_few_parts_and_mixes_them() -> None:
    """100 parts of 30 samples; a batch is smaller than a window, so it touches two windows at most."""
    parts = np.repeat(np.arange(100), 30)
    for window in (1, 4):
        sampler = Sampler(samples=np.arange(3000), num_views=2, seed=0, parts=parts, window=window)
        touched = [
            len(np.unique(parts[sampler.batch(step, batch_size=50)[:, 0]]))
            for step in range(sampler.steps_per_epoch(50))
        ]
        assert max(touched) <= 2 * window
        assert np.median(touched) >= window


def test_parts_come_in_another_order_every_epoch() -> None:
    parts = np.repeat(np.arange(10), 5)
    sampler = Sampler(samples=np.arange(50), num_views=1, seed=0, parts=parts, window=1)
    first = [int(sampler.batch(10 * epoch, batch_size=5)[0, 0]) // 5 for epoch in range(500)]
    assert_uniform(np.bincount(first, minlength=10))


def test_each_window_has_its_own_order() -> None:
    parts = np.repeat(np.arange(10), 20)
    sampler = Sampler(samples=np.arange(200), num_views=1, seed=0, parts=parts, window=1)
    orders = [sampler.batch(step, batch_size=20)[:, 0] % 20 for step in range(10)]
    assert len(np.unique(orders, axis=0)) == 10


def test_memory_grows_neither_with_the_corpus_nor_with_the_epochs() -> None:
    """Two million samples of four views would be 128 MB as a list of views, 64 MB as an order."""
    samples = np.arange(2_000_000)
    for parts in (None, samples // 1000):
        sampler = Sampler(samples=samples, num_views=4, seed=0, parts=parts)
        sampler.batch(0, batch_size=64)
        tracemalloc.start()
        for epoch in range(50):
            sampler.batch(epoch * sampler.steps_per_epoch(64), batch_size=64)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_000_000
        assert kept < 100_000


@pytest.mark.parametrize(
    ("shares", "counts"),
    [((0.1, 0.9), [10, 90]), ((0.25, 0.7, 0.05), [25, 70, 5])],
)
def test_every_block_of_a_mix_holds_its_shares_exactly_and_in_its_own_order(
    shares: tuple[float, ...], counts: list[int]
) -> None:
    mix = Mix(samplers=(a_sampler(),) * len(shares), shares=shares, seed=0)
    blocks = np.array([mix.turn(step)[0] for step in range(20 * MIX_BLOCK)]).reshape(20, MIX_BLOCK)
    assert all(np.bincount(block).tolist() == counts for block in blocks)
    assert len(np.unique(blocks, axis=0)) == 20
    turns = np.flatnonzero(blocks.ravel() == 0) % MIX_BLOCK
    assert_uniform(np.bincount(turns // 10, minlength=10))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(0, 10**6))
def test_no_mix_drifts_from_its_shares_in_the_long_run(weights: list[int], blocks: int) -> None:
    shares = tuple(weight / sum(weights) for weight in weights)
    mix = Mix(samplers=(a_sampler(),) * len(shares), shares=shares, seed=0)
    first = blocks * MIX_BLOCK
    own_steps = dict(map(mix.turn, range(first, first + MIX_BLOCK)))
    for corpus, last in own_steps.items():
        assert abs(last + 1 - shares[corpus] * (first + MIX_BLOCK)) < len(shares)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(0, 2**32), st.integers(0, 10**6))
def test_each_corpus_of_a_mix_counts_its_own_steps(weights: list[int], seed: int, block: int) -> None:
    """None lost or repeated, over the ends of blocks, however small the shares."""
    shares = tuple(weight / sum(weights) for weight in weights)
    mix = Mix(samplers=(a_sampler(),) * len(shares), shares=shares, seed=seed)
    own: dict[int, list[int]] = {}
    for step in range(block * MIX_BLOCK, (block + 2) * MIX_BLOCK):
        corpus, own_step = mix.turn(step)
        own.setdefault(corpus, []).append(own_step)
    for steps in own.values():
        assert steps == list(range(steps[0], steps[0] + len(steps)))
        assert block > 0 or steps[0] == 0


def test_each_corpus_of_a_mix_gives_the_batches_that_it_gives_alone() -> None:
    alone = (a_sampler(seed=1), a_sampler(samples=np.arange(40), views="cycle", seed=2))
    mix = Mix(samplers=alone, shares=(0.3, 0.7), seed=3)
    own_steps = [0, 0]
    for step in range(250):
        for rank in range(2):
            corpus, views = mix.batch(step, batch_size=8, rank=rank, world=2)
            expected = alone[corpus].batch(own_steps[corpus], batch_size=8, rank=rank, world=2)
            assert np.array_equal(views, expected)
        own_steps[corpus] += 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": SAMPLES[:0]}, "no sample to train on"),
        ({"num_views": 0}, "number of views must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"seed": 2**64}, "seed must be below 2"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"views": "most"}, "one of all, cycle, draw, got 'most'"),
        ({"parts": SAMPLES[1:]}, "parts of 50 samples were given for 51 samples"),
        ({"parts": SAMPLES[::-1]}, "in the order of their parts"),
    ],
)
def test_a_sampler_that_cannot_work_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        a_sampler(**changes)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"step": -1}, "step must be a whole number of at least 0, got -1"),
        ({"step": 1.5}, "step must be a whole number of at least 0, got 1.5"),
        ({"batch_size": 0}, "batch size must be a whole number of at least 1, got 0"),
        ({"batch_size": 205}, "a batch of 205 exceeds the 204 views of an epoch; give a smaller --batch-size"),
        ({"world": 0}, "number of ranks must be a whole number of at least 1, got 0"),
        ({"rank": -1}, "rank must be a whole number of at least 0, got -1"),
        ({"rank": 2, "world": 2}, "rank must be below the number of ranks, 2, got 2"),
        ({"world": 3}, "a batch of 8 is not divisible by 3 ranks; give a multiple of 3"),
    ],
)
def test_a_batch_that_cannot_be_had_is_refused(asked: dict[str, Any], words: str) -> None:
    for source in (a_sampler(), Mix(samplers=(a_sampler(),), shares=(1.0,), seed=0)):
        with pytest.raises(ConfigError, match=words):
            source.batch(**{"step": 0, "batch_size": 8, **asked})


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ((0.5, 0.4), "must sum to 1, got 0.5, 0.4, whose sum is 0.9"),
        ((1.0, 0.0), "must be above 0, got 1, 0; leave out"),
        ((1.5, -0.5), "must be above 0"),
        ((float("nan"), 0.5), "must be above 0"),
        ((1.0,), "each corpus needs a share: got 1 for 2 corpora"),
    ],
)
def test_shares_that_make_no_mix_are_refused(shares: tuple[float, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Mix(samplers=(a_sampler(), a_sampler()), shares=shares, seed=0)


def test_a_mix_with_a_corpus_smaller_than_a_batch_is_refused_at_its_first_step() -> None:
    small = a_sampler(samples=np.arange(2), num_views=1)
    mix = Mix(samplers=(a_sampler(), small), shares=(0.99, 0.01), seed=0)
    with pytest.raises(ConfigError, match="a batch of 8 exceeds the 2 views"):
        mix.batch(0, batch_size=8)
