"""Comparison of teachers before training, from their cached features of the same views.

Three things are measured for every pair of stores: linear CKA, mutual neighbours, and how well ridge regression
predicts each space from the other, on pictures that it was not fitted to. What these numbers mean for a student is a
judgement, which `eupe.evaluate.verdict` makes.

Views are spread over the pictures: one of each picture before a second of any. The larger grid is pooled to the
smaller, so that no token is invented by interpolation. Some tokens of each view are drawn at random, from the same
cells of both stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eupe.common.storage import AnyPath
from eupe.errors import ConfigError
from eupe.evaluate.cka import PairSums, draw_cells, tokens_at
from eupe.evaluate.neighbours import fitting_k, most_together, mutual_neighbours
from eupe.evaluate.paired import LEAST_PICTURES, PairBatch, PairedStores
from eupe.evaluate.result import Result
from eupe.evaluate.ridge import Predicted, predict
from eupe.evaluate.verdict import Verdict, judge
from eupe.store import Store
from eupe.store.layout import DENSE, SUMMARY
from eupe.train.targets import open_stores

TASK = "conflict"
LIMIT = 2000
MOST_TOKENS = 2**17
"""Dense tokens used of a pair in total, an equal number from each view; all if there are fewer."""

OnViews = Callable[[str, int, int], None]
"""Callback that takes the pair's name, the number of views done, and the number of all views."""


@dataclass(frozen=True)
class Alike:
    """Similarity of one kind of token in two stores."""

    samples: int
    cka: float | None
    """Linear CKA; None for fewer than four samples or if a space does not vary."""
    forward: Predicted | None
    """Prediction of the second store from the first; None if nothing varies."""
    backward: Predicted | None
    """Prediction of the first store from the second; None if nothing varies."""


@dataclass(frozen=True)
class Pair:
    """Comparison of two stores."""

    name: str
    """Short names of the stores, joined by ` ~ `."""
    stores: tuple[str, str]
    teachers: tuple[str, str]
    num_pictures: int
    num_views: int
    grid: int | None
    """Cells along a side of the dense maps that were compared; None without dense tokens."""
    kinds: dict[str, Alike]
    neighbours: int
    """k of the mutual-neighbour measure."""
    mutual_neighbours: float | None
    """Share of common nearest views of other pictures, by summaries; None without summaries."""
    mutual_neighbours_chance: float | None
    verdict: Verdict


def conflict(
    paths: Sequence[AnyPath],
    *,
    limit: int = LIMIT,
    neighbours: int | None = None,
    on_views: OnViews = lambda pair, done, of: None,
) -> list[Pair]:
    """Compare every pair of stores, each at its first size.

    Args:
        limit: greatest number of views of a pair.
        neighbours: k of the mutual-neighbour measure; 10 by default, or all if there are fewer.
    Raises: ConfigError for fewer than two stores, different views, too few common pictures, or a limit or k that does
        not fit; StoreError, PartCorruptError.
    """
    if len(paths) < 2:
        raise ConfigError(f"a comparison needs at least two stores, got {', '.join(map(str, paths)) or 'none'}")
    if neighbours is not None and neighbours < 1:
        raise ConfigError(f"--k must be at least 1, got {neighbours}")
    if limit < LEAST_PICTURES:
        raise ConfigError(f"--limit must be at least {LEAST_PICTURES} views, got {limit}")
    # All pairs are checked first, so that a bad one is found before the first long comparison.
    joined = [PairedStores.of(pair, limit=limit) for pair in combinations(open_stores(paths), 2)]
    fitting = [fitting_k(neighbours, torch.from_numpy(pair.views[:, 0])) for pair in joined]
    return [_compare(pair, k, on_views) for pair, k in zip(joined, fitting, strict=True)]


def conflict_results(pairs: Sequence[Pair], *, limit: int) -> list[Result]:
    """Return a result for each pair; the first score is a CKA."""
    return [
        Result(
            task=TASK,
            subject=" ~ ".join(pair.stores),
            kind="store",
            scores=_scores(pair),
            protocol={"limit": limit, "k": pair.neighbours, "tokens": MOST_TOKENS, "grid": pair.grid},
            data={
                "stores": list(pair.stores),
                "pictures": pair.num_pictures,
                "views": pair.num_views,
                "verdict": dataclasses.asdict(pair.verdict),
            },
        )
        for pair in pairs
    ]


def _scores(pair: Pair) -> dict[str, float]:
    scores: dict[str, float | None] = {}
    for kind, alike in sorted(pair.kinds.items()):
        scores[f"cka/{kind}"] = alike.cka
        scores[f"r2/{kind}"] = None if alike.forward is None else alike.forward.r2
        scores[f"r2_back/{kind}"] = None if alike.backward is None else alike.backward.r2
    scores["mutual_neighbours"] = pair.mutual_neighbours
    return {name: score for name, score in scores.items() if score is not None}


def _compare(pair: PairedStores, neighbours: int, on_views: OnViews) -> Pair:
    names = _short_names(pair.stores)
    name = " ~ ".join(names)
    sums = {kind: PairSums(3) for kind in pair.kinds}
    summaries: list[tuple[Tensor, Tensor]] = []
    cells, most = np.random.default_rng(0), max(1, MOST_TOKENS // len(pair.views))
    done = 0
    for batch in pair.read():
        if SUMMARY in pair.kinds:
            summaries.append((batch.tokens[0][SUMMARY], batch.tokens[1][SUMMARY]))
        _add(sums, batch, cells, most)
        done += len(batch.folds)
        on_views(name, done, len(pair.views))
    # Popped, so that the large sums of one kind are freed before the next.
    alike = {kind: _alike(sums.pop(kind)) for kind in pair.kinds}
    mutual, chance = _neighbours(pair, summaries, neighbours)
    specs = [store.spec.teacher for store in pair.stores]
    kind = DENSE if DENSE in pair.kinds else SUMMARY
    return Pair(
        name=name,
        stores=(str(pair.stores[0].path), str(pair.stores[1].path)),
        teachers=(str(specs[0]["name"]), str(specs[1]["name"])),
        num_pictures=pair.num_pictures,
        num_views=len(pair.views),
        grid=pair.grid if DENSE in pair.kinds else None,
        kinds=alike,
        neighbours=neighbours,
        mutual_neighbours=mutual,
        mutual_neighbours_chance=chance,
        verdict=judge(
            names,
            kind=kind,
            cka=alike[kind].cka,
            forward=alike[kind].forward,
            backward=alike[kind].backward,
            num_pictures=pair.num_pictures,
            width=max(int(spec[f"{kind}_dim"]) for spec in specs),
            specs=(specs[0], specs[1]),
        ),
    )


def _add(sums: dict[str, PairSums], batch: PairBatch, cells: np.random.Generator, most: int) -> None:
    """Add a batch's tokens to the sums of their folds, at most `most` dense tokens per view."""
    for kind, total in sums.items():
        tokens, folds = [each[kind] for each in batch.tokens], batch.folds
        if kind == DENSE:
            places = draw_cells(cells, len(folds), tokens[0].shape[1] * tokens[0].shape[2], most)
            rows, folds = [tokens_at(each, places) for each in tokens], np.repeat(folds, places.shape[1])
        else:
            rows = [each.numpy() for each in tokens]
        for fold in np.unique(folds):
            total.add(rows[0][folds == fold], rows[1][folds == fold], to=int(fold))


def _alike(sums: PairSums) -> Alike:
    train, tuning, test = sums.totals()
    assert train is not None and tuning is not None and test is not None
    forward, backward = (predict(train, tuning, test, backward=way) for way in (False, True))
    return Alike(train.count + tuning.count + test.count, sums.cka(), forward, backward)


def _neighbours(
    pair: PairedStores, summaries: Sequence[tuple[Tensor, Tensor]], neighbours: int
) -> tuple[float | None, float | None]:
    """Return the share of common neighbours, and the share expected by chance; None for both without summaries."""
    if not summaries:
        return None, None
    pictures = torch.from_numpy(pair.views[:, 0])
    first, second = (torch.cat(side) for side in zip(*summaries, strict=True))
    shared = mutual_neighbours(first, second, k=neighbours, groups_N=pictures)
    return shared, None if shared is None else min(1.0, neighbours / (len(pictures) - most_together(pictures)))


def _short_names(stores: tuple[Store, Store]) -> tuple[str, str]:
    """Return the last parts of the stores' paths if these differ, otherwise the whole paths."""
    first, second = (Path(str(store.path)).name for store in stores)
    return (first, second) if first != second else (str(stores[0].path), str(stores[1].path))
