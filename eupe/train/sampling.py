"""The views of each training step: a pure function of (seed, step, rank) that stores no list of views.

The order of an epoch is a keyed permutation, evaluated only at the positions that a batch needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from math import floor
from numbers import Integral

import numpy as np
from numpy.typing import NDArray

from eupe.errors import ConfigError
from eupe.train.config import VIEW_ORDERS

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


Views = NDArray[np.int64]
"""[B, 2]: index of a sample in the join, and number of its view."""

MIX_BLOCK = 100
"""Number of steps in which every corpus of a mix gets its share."""

_PARTS, _WINDOWS, _DRAWS, _TURNS = range(4)
"""Purposes of keys, which set the random numbers of one seed apart."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """Batches of one corpus; every epoch has another order and leaves out its last partial batch."""

    samples: NDArray[np.int64]
    """[samples], distinct: indices of the training samples in the join."""
    num_views: int
    """Stored views per sample."""
    seed: int
    views: str = "all"
    """`all`: an epoch has every view of every sample. `cycle`: it has one view of every sample, a different one in each
    of `num_views` epochs. `draw`: it has one view of every sample, drawn again for each epoch."""
    parts: NDArray[np.int64] | None = None
    """[samples], non-decreasing: the store part that each sample is in. If given, an epoch goes through the parts in
    random order, `window` at a time; otherwise it is one permutation of everything."""
    window: int = 8
    """Number of parts whose views are shuffled together."""
    _memo: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ConfigError for arguments that cannot work."""
        if len(self.samples) == 0:
            raise ConfigError("there is no sample to train on")
        _require("the number of views", self.num_views, at_least=1)
        _require_seed(self.seed)
        _require("the window", self.window, at_least=1)
        if self.views not in VIEW_ORDERS:
            raise ConfigError(f"views must be one of {', '.join(VIEW_ORDERS)}, got {self.views!r}")
        if self.parts is None:
            return
        if self.parts.shape != self.samples.shape:
            raise ConfigError(f"parts of {len(self.parts)} samples were given for {len(self.samples)} samples")
        if (self.parts[1:] < self.parts[:-1]).any():
            raise ConfigError("the samples must be in the order of their parts; sort them by part")

    def __len__(self) -> int:
        """Return the number of views in an epoch."""
        return len(self.samples) * self._views_per_sample

    @property
    def _views_per_sample(self) -> int:
        return self.num_views if self.views == "all" else 1

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of whole batches in an epoch.

        Raises: ConfigError if there is none.
        """
        _require("the batch size", batch_size, at_least=1)
        if batch_size > len(self):
            raise ConfigError(
                f"a batch of {batch_size} exceeds the {len(self)} views of an epoch; give a smaller --batch-size"
            )
        return len(self) // batch_size

    def batch(self, step: int, *, batch_size: int, rank: int = 0, world: int = 1) -> Views:
        """Return a rank's share of a step's batch: rows of the global batch, which is the same for any number of ranks.

        Args:
            step: 0-based, counted over all epochs.
            batch_size: of the global batch.
        Returns: int64 [batch_size / world, 2].
        Raises: ConfigError if the batch does not divide by `world`, or exceeds an epoch.
        """
        _require("the step", step, at_least=0)
        _require("the number of ranks", world, at_least=1)
        _require("the rank", rank, at_least=0)
        epoch, place = divmod(step, self.steps_per_epoch(batch_size))
        if rank >= world:
            raise ConfigError(f"the rank must be below the number of ranks, {world}, got {rank}")
        if batch_size % world:
            raise ConfigError(f"a batch of {batch_size} is not divisible by {world} ranks; give a multiple of {world}")
        share = batch_size // world
        first = place * batch_size + rank * share
        return self._views_at(np.arange(first, first + share), epoch)

    def _views_at(self, positions: NDArray[np.int64], epoch: int) -> Views:
        """Return the views at positions [B] of an epoch, [B, 2]."""
        order, edges = self._part_order(epoch)
        window_edges = np.append(edges[: -1 : self.window], edges[-1])
        window = np.searchsorted(window_edges, positions, side="right") - 1
        begin = window_edges[window]
        # views are shuffled within their window only, so that a batch reads from few parts
        keys = random_words(key_of(self.seed, _WINDOWS, epoch), window)
        shuffled = begin + permute(positions - begin, window_edges[window + 1] - begin, keys)
        slot = np.searchsorted(edges, shuffled, side="right") - 1
        sample, number = np.divmod(shuffled - edges[slot], self._views_per_sample)
        samples = self.samples[self._part_starts[order[slot]] + sample]
        if self.views == "cycle":
            # samples start at different views, so that a batch mixes the numbers of views
            number = (samples + epoch) % self.num_views
        elif self.views == "draw":
            drawn = random_words(key_of(self.seed, _DRAWS, epoch), samples)
            number = below(self.num_views, drawn).astype(np.int64)
        return np.stack([samples, number], axis=1)

    @cached_property
    def _part_starts(self) -> NDArray[np.int64]:
        """Return where each part begins among the samples, and their number at the end, [parts + 1]."""
        if self.parts is None:
            return np.array([0, len(self.samples)])
        changes = np.flatnonzero(self.parts[1:] != self.parts[:-1]) + 1
        return np.concatenate([[0], changes, [len(self.samples)]])

    def _part_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the parts in an epoch's order, and the views before each, [parts + 1]; the last epoch's are cached."""
        if (known := self._memo.get(epoch)) is None:
            counts = np.diff(self._part_starts)
            order = permute(np.arange(len(counts)), len(counts), key_of(self.seed, _PARTS, epoch))
            known = order, np.append(0, np.cumsum(counts[order] * self._views_per_sample))
            self._memo.clear()
            self._memo[epoch] = known
        return known


@dataclass(frozen=True, kw_only=True, eq=False)
class Mix:
    """Corpora that take turns; each batch is from one of them (EUPE paper: 10% of the batches are ImageNet's)."""

    samplers: tuple[Sampler, ...]
    shares: tuple[float, ...]
    """Each corpus's share of the batches; above 0, together 1. Each block of `MIX_BLOCK` steps holds them in random
    order, as exactly as whole batches allow; a later block makes up for what rounding left out."""
    seed: int

    def __post_init__(self) -> None:
        """Raise ConfigError for corpora, shares or a seed that cannot work."""
        _require_seed(self.seed)
        if not self.samplers or len(self.samplers) != len(self.shares):
            raise ConfigError(f"each corpus needs a share: got {len(self.shares)} for {len(self.samplers)} corpora")
        given = ", ".join(f"{share:g}" for share in self.shares)
        if not all(share > 0 for share in self.shares):
            raise ConfigError(f"the shares of a mix must be above 0, got {given}; leave out a corpus with a share of 0")
        if abs(sum(self.shares) - 1) > 1e-6:
            raise ConfigError(f"the shares of a mix must sum to 1, got {given}, whose sum is {sum(self.shares):g}")

    def batch(self, step: int, *, batch_size: int, rank: int = 0, world: int = 1) -> tuple[int, Views]:
        """Return the corpus of a step, and the rank's share of that corpus's next batch; see `Sampler.batch`."""
        # a corpus smaller than a batch is refused at the first step, not at that corpus's first turn
        for sampler in self.samplers:
            sampler.steps_per_epoch(batch_size)
        corpus, own_step = self.turn(step)
        return corpus, self.samplers[corpus].batch(own_step, batch_size=batch_size, rank=rank, world=world)

    def turn(self, step: int) -> tuple[int, int]:
        """Return the corpus of a step, and the number of batches that this corpus gave before."""
        _require("the step", step, at_least=0)
        block, place = divmod(step, MIX_BLOCK)
        before, after = self._turns_before(block * MIX_BLOCK), self._turns_before((block + 1) * MIX_BLOCK)
        in_turn = np.repeat(np.arange(len(before)), np.subtract(after, before))
        turns = in_turn[_block_order(self.seed, block)[: place + 1]]
        corpus = int(turns[place])
        return corpus, before[corpus] + int((turns[:place] == corpus).sum())

    def _turns_before(self, step: int) -> list[int]:
        """Return the number of turns of each corpus before the first step of a block.

        Each corpus takes its share of what the ones before it left, rounded; such counts never fall from one block to
        the next.
        """
        turns, left, share_left = [], step, sum(self._fractions)
        for share in self._fractions:
            turns.append(floor(left * share / share_left + Fraction(1, 2)))
            left, share_left = left - turns[-1], share_left - share
        return turns

    @cached_property
    def _fractions(self) -> tuple[Fraction, ...]:
        """Return the shares as exact fractions of their decimal form: 0.1 is a tenth."""
        return tuple(Fraction(repr(float(share))) for share in self.shares)


@lru_cache(maxsize=4)  # a hundred steps in a row use the same block
def _block_order(seed: int, block: int) -> NDArray[np.int64]:
    """Return the order in which a block's steps are given to the corpora, int64 [MIX_BLOCK]."""
    return permute(np.arange(MIX_BLOCK), MIX_BLOCK, key_of(seed, _TURNS, block))


def _require(what: str, value: int, *, at_least: int) -> None:
    if not isinstance(value, Integral) or value < at_least:
        raise ConfigError(f"{what} must be a whole number of at least {at_least}, got {value!r}")


def _require_seed(seed: int) -> None:
    _require("the seed", seed, at_least=0)
    if seed >= 2**64:
        raise ConfigError(f"the seed must be below 2^64, got {seed}")
