"""Random numbers and random orders as functions of a key: nothing is drawn in sequence, nothing is kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = int | NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 20
"""With 12, permutations of six things are measurably not uniform."""


def key_of(*numbers: int) -> Words:
    """uint64 [1] that depends on every number and their order; each in [0, 2^64)."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = random_words(key, number)
    return key


def random_words(key: Words, counter: Words | Ints) -> Words:
    """The `counter`-th output, from 0, of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) seeded with `key`.

    Args:
        key: uint64 [1] or [N].
        counter: one, or [N].
    Returns: uint64 [N].
    """
    state: Words = key + (np.atleast_1d(counter).astype(np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)
    word = _xorshift(state, 30) * np.uint64(0xBF58476D1CE4E5B9)
    word = _xorshift(word, 27) * np.uint64(0x94D049BB133111EB)
    return _xorshift(word, 31)


def below(bound: Words | int, random: Words) -> Words:
    """Random words as numbers in [0, bound), uniform as far as `bound` is small against 2^32."""
    half = np.uint64(32)
    scaled: Words = (random >> half) * np.asarray(bound, np.uint64)
    return scaled >> half


def permute(index: NDArray[np.int64], size: Ints, key: Words) -> NDArray[np.int64]:
    """Where a random permutation of [0, size) takes each index, in O(1) each and without a table.

    A Feistel network on [0, a) x [0, b), of which a * b is at least `size` and hardly more; what falls outside is
    taken on until it is inside.

    Args:
        index: int64 [N], each in [0, size).
        size: at least 1; one, or [N]: each index has its own permutation.
        key: uint64 [1] or [N]: which permutation.
    Returns: int64 [N].
    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, methods 2 and 3; deviations:
        SplitMix64 as the round function and more rounds, for uniformity, not secrecy.
    """
    start, bound, keys = np.broadcast_arrays(index.astype(np.uint64), np.asarray(size, np.uint64), key)
    taken = _feistel(start, bound, keys)
    while len(outside := np.flatnonzero(taken >= bound)):
        taken[outside] = _feistel(taken[outside], bound[outside], keys[outside])
    return taken.astype(np.int64)


def _feistel(index: Words, size: Words, key: Words) -> Words:
    """A permutation of [0, a * b), all [N], with a just above the square root of `size`."""
    a = np.sqrt(size).astype(np.uint64) + 1
    b = (size + a - 1) // a
    right, left = np.divmod(index, a)
    for i in range(0, ROUNDS, 2):
        left = _add(left, below(a, random_words(random_words(key, i), right)), a)
        right = _add(right, below(b, random_words(random_words(key, i + 1), left)), b)
    return right * a + left


def _add(x: Words, y: Words, modulus: Words) -> Words:
    total: Words = x + y
    total -= np.where(total >= modulus, modulus, 0)
    return total


def _xorshift(word: Words, bits: int) -> Words:
    return word ^ (word >> np.uint64(bits))
