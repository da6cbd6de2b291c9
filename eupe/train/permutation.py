"""Random numbers and random orders as functions of a key; nothing is drawn in sequence and nothing is stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = int | NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 20
"""Feistel rounds; with 12, permutations of six elements are measurably not uniform."""


def key_of(*numbers: int) -> Words:
    """Return a key, uint64 [1], that depends on every number and their order; each number is in [0, 2^64)."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = random_words(key, number)
    return key


def random_words(key: Words, counter: Words | Ints) -> Words:
    """Return output number `counter`, from 0, of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) seeded with `key`.

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
    """Return random words as numbers in [0, bound), nearly uniform if `bound` is small compared with 2^32."""
    half = np.uint64(32)
    # 32 random bits times a bound below 2^32 do not overflow 64 bits
    scaled: Words = (random >> half) * np.asarray(bound, np.uint64)
    return scaled >> half


def permute(index: NDArray[np.int64], size: Ints, key: Words) -> NDArray[np.int64]:
    """Return where a random permutation of [0, size) maps each index, in O(1) each and without a table.

    A Feistel network permutes [0, a) x [0, b), where a * b is at least `size` and hardly more. A result outside of
    [0, size) is permuted again until it is inside.

    Args:
        index: int64 [N], each in [0, size).
        size: at least 1; one, or [N]: each index has its own permutation.
        key: uint64 [1] or [N]: selects the permutation.
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
    """Permute [0, a * b), where a is just above the square root of `size`; all arguments are [N]."""
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
