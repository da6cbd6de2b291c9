"""Which views a training step sees: a pure function of (seed, step, rank) that keeps no list of views.

The order of an epoch is a keyed bijection, evaluated only where a batch asks for it.
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
from eupe.train.permutation import below, key_of, permute, random_words

Views = NDArray[np.int64]
"""[B, 2]: place of a sample in the join, and number of the view."""

VIEW_ORDERS = ("all", "cycle", "draw")

MIX_BLOCK = 100
"""Steps in which every corpus of a mix gets its share."""

_PARTS, _WINDOWS, _DRAWS, _TURNS = range(4)
"""What a key is for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """Batches of one corpus: every epoch in another order, its last partial batch left out."""

    samples: NDArray[np.int64]
    """[samples], distinct: places of the training samples in the join."""
    num_views: int
    """Stored views per sample."""
    seed: int
    views: str = "all"
    """`all`: an epoch is every view of every sample. `cycle`: every sample in one view, another in each of `num_views`
    epochs. `draw`: every sample in one view, drawn anew each epoch."""
    parts: NDArray[np.int64] | None = None
    """[samples], non-decreasing: the part of the store that each sample lies in. Where given, an epoch goes through
    the parts in a random order, `window` at a time; otherwise it is one permutation of everything."""
    window: int = 8
    """Parts whose views are mixed."""
    _memo: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
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
        """Views per epoch."""
        return len(self.samples) * self._views_per_sample

    @property
    def _views_per_sample(self) -> int:
        return self.num_views if self.views == "all" else 1

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches per epoch.

        Raises: ConfigError if there is none.
        """
        _require("the batch size", batch_size, at_least=1)
        if batch_size > len(self):
            raise ConfigError(
                f"a batch of {batch_size} exceeds the {len(self)} views of an epoch; give a smaller --batch-size"
            )
        return len(self) // batch_size

    def batch(self, step: int, *, batch_size: int, rank: int = 0, world: int = 1) -> Views:
        """A rank's share of a step's batch: rows of the global batch, which is the same for any number of ranks.

        Args:
            step: 0-based, going on over epochs.
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
            raise ConfigError(f"a batch of {batch_size} does not divide by {world} ranks; give a multiple of {world}")
        share = batch_size // world
        first = place * batch_size + rank * share
        return self._views_at(np.arange(first, first + share), epoch)

    def _views_at(self, positions: NDArray[np.int64], epoch: int) -> Views:
        """[B, 2]: the views at [B] positions of an epoch."""
        order, edges = self._part_order(epoch)
        window_edges = np.append(edges[: -1 : self.window], edges[-1])
        window = np.searchsorted(window_edges, positions, side="right") - 1
        begin = window_edges[window]
        keys = random_words(key_of(self.seed, _WINDOWS, epoch), window)
        shuffled = begin + permute(positions - begin, window_edges[window + 1] - begin, keys)
        slot = np.searchsorted(edges, shuffled, side="right") - 1
        sample, number = np.divmod(shuffled - edges[slot], self._views_per_sample)
        samples = self.samples[self._part_starts[order[slot]] + sample]
        if self.views == "cycle":
            number = (samples + epoch) % self.num_views
        elif self.views == "draw":
            drawn = random_words(key_of(self.seed, _DRAWS, epoch), samples)
            number = below(self.num_views, drawn).astype(np.int64)
        return np.stack([samples, number], axis=1)

    @cached_property
    def _part_starts(self) -> NDArray[np.int64]:
        """[parts + 1]: where each part begins among the samples, and their number."""
        if self.parts is None:
            return np.array([0, len(self.samples)])
        changes = np.flatnonzero(self.parts[1:] != self.parts[:-1]) + 1
        return np.concatenate([[0], changes, [len(self.samples)]])

    def _part_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The parts in an epoch's order, and [parts + 1] the views before each. The last epoch's is kept."""
        if (known := self._memo.get(epoch)) is None:
            counts = np.diff(self._part_starts)
            order = permute(np.arange(len(counts)), len(counts), key_of(self.seed, _PARTS, epoch))
            known = order, np.append(0, np.cumsum(counts[order] * self._views_per_sample))
            self._memo.clear()
            self._memo[epoch] = known
        return known


@dataclass(frozen=True, kw_only=True, eq=False)
class Mix:
    """Corpora that take turns, each batch from one of them (EUPE paper: 10% of the batches are ImageNet's)."""

    samplers: tuple[Sampler, ...]
    shares: tuple[float, ...]
    """Of the batches, per corpus; above 0, together 1. Each block of `MIX_BLOCK` steps holds them in a random order, as
    exactly as whole batches allow; what one block rounds away comes in a later one."""
    seed: int

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        _require_seed(self.seed)
        if not self.samplers or len(self.samplers) != len(self.shares):
            raise ConfigError(f"each corpus needs a share: got {len(self.shares)} for {len(self.samplers)} corpora")
        given = ", ".join(f"{share:g}" for share in self.shares)
        if not all(share > 0 for share in self.shares):
            raise ConfigError(f"the shares of a mix must be above 0, got {given}; leave out a corpus that has none")
        if abs(sum(self.shares) - 1) > 1e-6:
            raise ConfigError(f"the shares of a mix must sum to 1, got {given}, which is {sum(self.shares):g}")

    def batch(self, step: int, *, batch_size: int, rank: int = 0, world: int = 1) -> tuple[int, Views]:
        """Which corpus a step takes, and the rank's share of that corpus's next batch, see `Sampler.batch`."""
        for sampler in self.samplers:
            sampler.steps_per_epoch(batch_size)
        corpus, own_step = self.turn(step)
        return corpus, self.samplers[corpus].batch(own_step, batch_size=batch_size, rank=rank, world=world)

    def turn(self, step: int) -> tuple[int, int]:
        """Which corpus a step takes, and how many batches that corpus gave before."""
        _require("the step", step, at_least=0)
        block, place = divmod(step, MIX_BLOCK)
        before, after = self._turns_before(block * MIX_BLOCK), self._turns_before((block + 1) * MIX_BLOCK)
        in_turn = np.repeat(np.arange(len(before)), np.subtract(after, before))
        turns = in_turn[_block_order(self.seed, block)[: place + 1]]
        corpus = int(turns[place])
        return corpus, before[corpus] + int((turns[:place] == corpus).sum())

    def _turns_before(self, step: int) -> list[int]:
        """Turns of each corpus before the first step of a block.

        Each takes its part of what those before it left, rounded: such counts never fall as the steps go on.
        """
        turns, left, share_left = [], step, sum(self._fractions)
        for share in self._fractions:
            turns.append(floor(left * share / share_left + Fraction(1, 2)))
            left, share_left = left - turns[-1], share_left - share
        return turns

    @cached_property
    def _fractions(self) -> tuple[Fraction, ...]:
        """The shares as they are written: 0.1 is a tenth."""
        return tuple(Fraction(repr(float(share))) for share in self.shares)


@lru_cache(maxsize=4)  # step by step it is the same block, a hundred times over
def _block_order(seed: int, block: int) -> NDArray[np.int64]:
    """Return the order in which a block's steps are handed out, int64 [MIX_BLOCK]."""
    return permute(np.arange(MIX_BLOCK), MIX_BLOCK, key_of(seed, _TURNS, block))


def _require(what: str, value: int, *, at_least: int) -> None:
    if not isinstance(value, Integral) or value < at_least:
        raise ConfigError(f"{what} must be a whole number of at least {at_least}, got {value!r}")


def _require_seed(seed: int) -> None:
    _require("the seed", seed, at_least=0)
    if seed >= 2**64:
        raise ConfigError(f"the seed must be below 2^64, got {seed}")
