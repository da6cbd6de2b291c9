"""Random orders that are functions of a key: bijections, and as uniform as shuffling."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from numpy.typing import NDArray
from uniform import assert_uniform

from eupe.train.sampling import below, key_of, permute, random_words


def many_keys(count: int) -> NDArray[np.uint64]:
    return random_words(key_of(2026), np.arange(count))


def naive_permute(index: int, size: int, key: int) -> int:
    """The same network with Python's own integers, one index at a time."""
    mask = 2**64 - 1

    def word(key: int, counter: int) -> int:
        z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    a = int(size**0.5) + 1
    b = -(-size // a)
    while True:
        right, left = divmod(index, a)
        for i in range(20):
            if i % 2 == 0:
                left = (left + ((word(word(key, i), right) >> 32) * a >> 32)) % a
            else:
                right = (right + ((word(word(key, i), left) >> 32) * b >> 32)) % b
        index = right * a + left
        if index < size:
            return index


def test_the_words_are_those_of_split_mix_64() -> None:
    """The published sequence of seed 1234567."""
    words = random_words(np.array([1234567], np.uint64), np.arange(5))
    assert words.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_a_key_depends_on_every_number_and_their_order() -> None:
    numbers = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (2**64 - 1,)]
    assert len({int(key_of(*n)[0]) for n in numbers}) == len(numbers)


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 4096])
def test_numbers_below_a_bound_are_uniform(bound: int) -> None:
    numbers = below(bound, random_words(key_of(3), np.arange(100_000)))
    assert_uniform(np.bincount(numbers.astype(np.int64), minlength=bound))
    assert numbers.max() == bound - 1


def test_a_permutation_of_any_size_takes_every_place_once() -> None:
    for size in [*range(1, 301), 65_536, 65_537, 1_000_003]:
        places = permute(np.arange(size), size, key_of(size))
        assert places.dtype == np.int64
        assert np.array_equal(np.sort(places), np.arange(size)), size


@pytest.mark.parametrize("size", [200_000_000, 2**40 + 1, 10**15])
def test_huge_permutations_stay_inside_and_never_collide(size: int) -> None:
    indices = np.concatenate([np.arange(50_000), np.arange(size - 50_000, size)])
    places = permute(indices, size, key_of(1))
    assert places.min() >= 0 and places.max() < size
    assert len(np.unique(places)) == len(places)
    assert_uniform(np.bincount(places // -(-size // 100), minlength=100))


def test_each_index_may_have_its_own_size_and_key() -> None:
    """The places equal those that are computed one index at a time, without NumPy."""
    sizes = np.array([1, 2, 3, 10, 10, 99, 100, 101, 10_007, 10**12])
    keys = many_keys(len(sizes))
    places = permute(sizes - 1, sizes, keys)
    assert places.tolist() == [naive_permute(int(n) - 1, int(n), int(key)) for n, key in zip(sizes, keys, strict=True)]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_every_order_of_a_few_things_is_equally_likely(size: int) -> None:
    keys = many_keys(100_000)
    orders = np.stack([permute(np.full(len(keys), i), size, keys) for i in range(size)], axis=1)
    codes = orders @ size ** np.arange(size)
    possible = [int(np.array(order) @ size ** np.arange(size)) for order in permutations(range(size))]
    counts = np.array([(codes == code).sum() for code in possible])
    assert counts.sum() == len(keys)
    assert_uniform(counts)


@pytest.mark.parametrize("size", [7, 9, 16, 25, 30, 64])
def test_each_place_is_equally_likely_to_hold_each_thing_whatever_its_neighbour_holds(size: int) -> None:
    keys = many_keys(30_000)
    columns = [permute(np.full(len(keys), i), size, keys) for i in range(size)]
    for left, right in pairwise(columns):
        assert_uniform(np.bincount(left, minlength=size))
        pairs = np.bincount(left * size + right, minlength=size**2).reshape(size, size)
        assert_uniform(pairs[~np.eye(size, dtype=bool)])


def test_neighbours_in_a_large_permutation_are_unrelated() -> None:
    size = 200_000
    places = permute(np.arange(size), size, key_of(5))
    for lag in (1, 2, 447, 448, 449):
        correlation = np.corrcoef(places[:-lag], places[lag:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(size), f"lag {lag}"
    steps = np.diff(places) % size
    assert_uniform(np.bincount(steps * 100 // size, minlength=100))


def test_permutations_of_neighbouring_keys_are_unrelated() -> None:
    """Two random orders of any size agree in one place on average."""
    size = 10_000
    orders = np.stack([permute(np.arange(size), size, key_of(0, epoch)) for epoch in range(100)])
    agreements = [int((a == b).sum()) for a, b in pairwise(orders)]
    assert 0.5 < np.mean(agreements) < 1.5
    correlations = np.corrcoef(orders)[~np.eye(100, dtype=bool)]
    assert np.abs(correlations).max() < 6 / np.sqrt(size)
