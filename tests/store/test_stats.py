"""Statistics that merge, against numpy over everything at once.

Tolerance: both sides work in float64, whose rounding error over n values stays far below 1e-12 of their magnitude.
"""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from eupe.store.stats import BLOCK_ROWS, Moments, merge_all

RTOL = 1e-12


def check(moments: Moments, vectors: NDArray[np.floating]) -> None:
    exact = vectors.astype(np.float64)
    scale = np.abs(exact).max()
    assert moments.count == len(exact)
    assert moments.mean.dtype == moments.m2.dtype == np.float64
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=RTOL, atol=RTOL * scale)
    np.testing.assert_allclose(moments.std, exact.std(axis=0), rtol=RTOL, atol=RTOL * scale)


@pytest.mark.parametrize("num_rows", [1, 2, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 3 * BLOCK_ROWS + 7])
def test_of_equals_numpy_across_blocks(num_rows: int) -> None:
    vectors = np.random.default_rng(num_rows).normal(3, 2, (num_rows, 3)).astype(np.float32)
    check(Moments.of(vectors), vectors)


@pytest.mark.parametrize("offset", [0, 300, -60_000])
def test_fp16_far_from_zero_loses_nothing(offset: int) -> None:
    """Squares of 60,000 overflow fp16 and leave fp32 seven digits: only centred float64 sums get this right."""
    step = float(np.spacing(np.float16(abs(offset))))
    steps = np.random.default_rng(0).integers(-8, 9, (20_000, 4))
    vectors = (offset + step * steps).astype(np.float16)
    moments = Moments.of(vectors)
    check(moments, vectors)
    np.testing.assert_allclose(moments.std, step * steps.std(axis=0), rtol=1e-9)


def test_a_constant_channel_has_no_deviation() -> None:
    vectors = np.full((BLOCK_ROWS + 5, 2), 0.1, np.float16)
    np.testing.assert_allclose(Moments.of(vectors).std, 0, atol=1e-15)


@given(
    values=hnp.arrays(np.float16, st.tuples(st.integers(1, 60), st.integers(1, 4)), elements={"min_value": -6e4}),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_merging_equals_numpy_over_the_whole(values: NDArray[np.float16], cuts: list[int]) -> None:
    values = np.nan_to_num(values, posinf=65504)
    pieces = np.split(values, sorted(min(cut, len(values)) for cut in cuts))
    check(merge_all(Moments.of(piece) for piece in pieces), values)


def test_any_order_of_merging_agrees_and_the_same_order_gives_the_same_bits() -> None:
    rng = np.random.default_rng(1)
    pieces = [rng.normal(10.0**i, 1, (5 + i, 3)) for i in range(4)]
    whole = np.concatenate(pieces)
    for order in permutations(map(Moments.of, pieces)):
        first, second = merge_all(order), merge_all(order)
        check(first, whole)
        assert (first.mean.tobytes(), first.m2.tobytes()) == (second.mean.tobytes(), second.m2.tobytes())


def test_merging_is_a_tree_or_a_chain() -> None:
    rng = np.random.default_rng(2)
    a, b, c, d = (Moments.of(rng.normal(size=(n, 2))) for n in (3, 50, 1, 8))
    chain, tree = a.merge(b).merge(c).merge(d), a.merge(b).merge(c.merge(d))
    np.testing.assert_allclose(chain.std, tree.std, rtol=RTOL)
    np.testing.assert_allclose(chain.mean, tree.mean, rtol=RTOL)


def test_nothing_merged_changes_nothing() -> None:
    moments = Moments.of(np.random.default_rng(3).normal(size=(9, 2)))
    empty = Moments.of(np.empty((0, 2), np.float16))
    for merged in (moments.merge(empty), empty.merge(moments)):
        assert merged.count == 9
        assert merged.mean.tobytes() == moments.mean.tobytes()
        assert merged.m2.tobytes() == moments.m2.tobytes()
    assert empty.merge(empty).count == 0


float64_vectors = hnp.arrays(np.float64, 3, elements=st.floats(allow_nan=False))


@given(count=st.integers(0, 2**60), mean=float64_vectors, m2=float64_vectors)
def test_json_keeps_every_bit(count: int, mean: NDArray[np.float64], m2: NDArray[np.float64]) -> None:
    again = Moments.from_json(json.loads(json.dumps(Moments(count, mean, m2).to_json())))
    assert (again.count, again.mean.tobytes(), again.m2.tobytes()) == (count, mean.tobytes(), m2.tobytes())


def test_json_is_base64_of_little_endian_float64() -> None:
    assert Moments(2, np.array([1.0]), np.array([-2.0])).to_json() == {
        "count": 2,
        "mean": "AAAAAAAA8D8=",
        "m2": "AAAAAAAAAMA=",
    }
