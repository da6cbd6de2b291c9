"""How far a student agrees with its targets on pictures that it never trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.errors import ConfigError
from eupe.evaluate.run import Run, open_run
from eupe.place import Where
from eupe.train.batch import Batch
from eupe.train.card import target_names
from eupe.train.distiller import Distiller
from eupe.train.loop import judged, training_sample
from eupe.train.sampling import Views
from eupe.train.stream import stream
from eupe.train.validate import fit_gains, held_out_cosines

NEIGHBOURS = 10
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class KindAgreement:
    """Mean cosines over held-out views for one kind of token."""

    cosine: float
    """Between prediction and feature as the teacher gives it; the prediction's length is fitted on training views."""
    cosine_untrained: float
    """The same student and heads with random weights."""
    cosine_mean: float
    """The predictor that always says the store's mean."""
    normalised_cosine: float
    """In the loss's space, where the mean predictor has 0."""
    normalised_untrained: float


@dataclass(frozen=True)
class TargetAgreement:
    """One target of a run."""

    target: str
    kinds: dict[str, KindAgreement]
    mutual_neighbours: float | None
    """Share of the nearest held-out views that both spaces have in common; None without summaries."""
    mutual_neighbours_untrained: float | None
    mutual_neighbours_chance: float | None


@dataclass(frozen=True)
class Agreement:
    """All targets of a run."""

    run: str
    num_views: int
    neighbours: int
    targets: list[TargetAgreement]


def agreement(path: Path, *, corpus: Where | None = None, neighbours: int = NEIGHBOURS) -> Agreement:
    """Judge a run on the views of its held-out pictures.

    Raises: RunError, StoreError, CorpusError.
    """
    if neighbours < 1:
        raise ConfigError(f"--k must be at least 1, got {neighbours}")
    run = open_run(path, corpus=corpus)
    trained, untrained = _measure(run, run.distiller, neighbours), _measure(run, run.untrained(), neighbours)
    targets = []
    for i, name in enumerate(target_names(run.card.targets)):
        kinds = {
            kind: KindAgreement(
                cosine=values["raw"],
                cosine_untrained=untrained.cosines[i][kind]["raw"],
                cosine_mean=values["mean_raw"],
                normalised_cosine=values["normalised"],
                normalised_untrained=untrained.cosines[i][kind]["normalised"],
            )
            for kind, values in trained.cosines[i].items()
        }
        has_summary = i in trained.mutual
        chance = min(1.0, neighbours / max(1, trained.num_views - 1)) if has_summary else None
        targets.append(TargetAgreement(name, kinds, trained.mutual.get(i), untrained.mutual.get(i), chance))
    return Agreement(str(path), trained.num_views, neighbours, targets)


@dataclass(frozen=True)
class _Measured:
    cosines: list[dict[str, dict[str, float]]]
    mutual: dict[int, float]
    num_views: int


def _measure(run: Run, distiller: Distiller, neighbours: int) -> _Measured:
    predicted: dict[int, list[Tensor]] = {}
    stored: dict[int, list[Tensor]] = {}

    def keep(target: int, said: Tensor, truth: Tensor) -> None:
        predicted.setdefault(target, []).append(said.cpu())
        stored.setdefault(target, []).append(truth.cpu())

    def batches(views: Views) -> Iterator[Batch]:
        return stream([run.targets], judged(run.card, views), run.device)

    gains = fit_gains(distiller, batches(training_sample(run.targets)), run.device)
    held_out = run.targets.views_of(run.targets.held_out)
    totals = held_out_cosines(distiller, batches(held_out), run.device, gains, on_summary=keep)
    mutual = {i: mutual_neighbours(torch.cat(predicted[i]), torch.cat(stored[i]), k=neighbours) for i in predicted}
    num_views = next(iter(totals[0].values())).views
    return _Measured([{kind: c.means() for kind, c in kinds.items()} for kinds in totals], mutual, num_views)


def mutual_neighbours(a_ND: Tensor, b_ND: Tensor, *, k: int) -> float:
    """Mean share of the k nearest neighbours by cosine, oneself aside, that two spaces have in common.

    Args:
        a_ND, b_ND: [N, Da] and [N, Db], row i of both being the same view.
    Source: Huh et al., "The Platonic Representation Hypothesis" (2024), mutual nearest-neighbour metric.
    """
    k = min(k, len(a_ND) - 1)
    near_a, near_b = _nearest(a_ND, k), _nearest(b_ND, k)
    shared = (near_a[:, :, None] == near_b[:, None, :]).any(dim=2).float().mean()
    return float(shared)


def _nearest(features_ND: Tensor, k: int) -> Tensor:
    unit = F.normalize(features_ND.float(), dim=1)
    blocks = []
    for start in range(0, len(unit), BLOCK_ROWS):
        similarity = unit[start : start + BLOCK_ROWS] @ unit.T
        own = torch.arange(len(similarity))
        similarity[own, start + own] = -torch.inf
        blocks.append(similarity.topk(k, dim=1).indices)
    return torch.cat(blocks)
