"""Views that two stores have in common, read side by side.

Shapes: B views of a batch, V views in all, h w cells of a dense map, D width of a dense token, Ds of a summary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eupe.common.storage import StoragePath
from eupe.errors import ConfigError
from eupe.store import Store
from eupe.store.features import StoredFeatures
from eupe.store.layout import DENSE, KINDS, SUMMARY
from eupe.store.reader import PendingFeatures
from eupe.train.sampling import Views
from eupe.train.targets import TargetSet

LEAST_PICTURES = 10
TEST_SHARE, TUNING_SHARE = 0.2, 0.1
"""Shares of the pictures."""
TRAIN, TUNING, TEST = range(3)
AT_ONCE = 32
"""Number of views read together."""


@dataclass(frozen=True)
class PairBatch:
    """Tokens of B views from both stores."""

    folds: NDArray[np.int64]
    """[B]: `TRAIN`, `TUNING` or `TEST`, by picture."""
    tokens: tuple[dict[str, Tensor], dict[str, Tensor]]
    """Tokens of each store by kind, float32: summaries [B, Ds], and dense tokens [B, h, w, D] on a common grid."""


@dataclass(frozen=True)
class PairedStores:
    """Two stores, and the views of them that are compared."""

    targets: TargetSet
    kinds: tuple[str, ...]
    """Kinds of token that both stores have."""
    views: Views
    fold_of_picture: NDArray[np.int64]

    @classmethod
    def of(cls, stores: tuple[Store, Store], *, limit: int) -> PairedStores:
        """Choose the views to compare among those that both stores have.

        Args:
            limit: the most views to compare.
        Raises: ConfigError if the stores have no kind of token in common, or too few pictures.
        """
        targets = TargetSet(stores, StoragePath.of(stores[0].spec.corpus["root"]), holdout=0)
        names = f"{stores[0].path} and {stores[1].path}"
        tokens = [store.spec.tokens for store in stores]
        kinds = tuple(kind for kind in KINDS if all(kind in each for each in tokens))
        if not kinds:
            raise ConfigError(
                f"{names} hold different kinds of tokens, {'+'.join(tokens[0])} and {'+'.join(tokens[1])}; extract "
                "both with --tokens summary,dense"
            )
        if targets.num_joined < LEAST_PICTURES:
            raise ConfigError(
                f"{names} have {targets.num_joined} pictures in common; a comparison needs {LEAST_PICTURES}, "
                "and hundreds to be informative"
            )
        views = spread_views(targets.num_joined, targets.num_views, limit)
        return cls(targets, kinds, views, _folds(targets.keys, np.unique(views[:, 0])))

    @property
    def stores(self) -> tuple[Store, Store]:
        return self.targets.stores[0], self.targets.stores[1]

    @property
    def grid(self) -> int:
        """Return the side, in cells, of the dense maps that are compared: the smaller of the two stores'."""
        return min(store.spec.grids[0] for store in self.stores)

    @property
    def num_pictures(self) -> int:
        return len(np.unique(self.views[:, 0]))

    def read(self) -> Iterator[PairBatch]:
        """Yield all views in order, at each store's first size.

        Raises (while iterating): ConfigError if the stores hold different views; PartCorruptError.
        """
        blocks = [self.views[start : start + AT_ONCE] for start in range(0, len(self.views), AT_ONCE)]
        ahead = self._begin(blocks[0])
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            # start the next read before this batch is used, so that reading and computing overlap
            pending, ahead = ahead, [] if following is None else self._begin(following)
            first, second = (reads.stored() for reads in pending)
            self.targets.require_same_views([first, second], block[:, 0])
            yield PairBatch(self.fold_of_picture[block[:, 0]], (self._tokens(first), self._tokens(second)))

    def _begin(self, block: Views) -> list[PendingFeatures]:
        keys = [self.targets.keys[i] for i in block[:, 0]]
        return [store.read_async(store.rows(keys), block[:, 1].tolist()) for store in self.stores]

    def _tokens(self, stored: StoredFeatures) -> dict[str, Tensor]:
        held = {SUMMARY: stored.summary, DENSE: stored.dense}
        tokens = {
            kind: torch.from_numpy(np.asarray(each.decode(), dtype=np.float32))
            for kind, each in held.items()
            if each is not None and kind in self.kinds
        }
        return {kind: pooled(each, self.grid) if kind == DENSE else each for kind, each in tokens.items()}


def spread_views(num_pictures: int, num_views: int, limit: int) -> Views:
    """Choose at most `limit` views: one of every picture before a second one of any.

    If only some pictures get one more view, these are spread evenly over all.

    Returns: place of the picture and number of the view, [V, 2], sorted.
    """
    rounds = []
    for number in range(num_views):
        left = min(num_pictures, limit - number * num_pictures)
        if left <= 0:
            break
        rounds.append(np.stack([np.arange(left) * num_pictures // left, np.full(left, number)], axis=1))
    views = np.concatenate(rounds)
    return views[np.lexsort((views[:, 1], views[:, 0]))]


def pooled(dense_BhwD: Tensor, side: int) -> Tensor:
    """Average dense tokens over the cells that fall into each cell of a coarser grid, [B, side, side, D]."""
    if dense_BhwD.shape[1] == side:
        return dense_BhwD
    return F.adaptive_avg_pool2d(dense_BhwD.movedim(-1, 1), side).movedim(1, -1)


def _folds(keys: Sequence[str], pictures: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the fold of each picture: ordered by a hash of the key, the first test, the next tune, the rest train."""
    ranked = sorted(pictures.tolist(), key=lambda i: hashlib.blake2b(keys[i].encode(), digest_size=8).digest())
    num_test, num_tuning = (max(1, round(share * len(ranked))) for share in (TEST_SHARE, TUNING_SHARE))
    folds = np.full(len(keys), TRAIN)
    folds[ranked[:num_test]] = TEST
    folds[ranked[num_test : num_test + num_tuning]] = TUNING
    return folds
