"""Agreement of a student with its targets on held-out pictures.

Cosine and mutual neighbours compare the predictions of the student's heads with the target's features. Linear CKA
compares the target with these predictions, and also with the student's own tokens, which are all that is left when the
heads are dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eupe.common.compute import Tokens, dtype_name
from eupe.common.storage import AnyPath
from eupe.errors import ConfigError
from eupe.evaluate.cka import PairSums, draw_cells, tokens_at
from eupe.evaluate.neighbours import fitting_k, most_together, mutual_neighbours
from eupe.evaluate.open_run import Run, open_run, read_run_spec
from eupe.evaluate.result import Result
from eupe.models.encoder import Encoder
from eupe.store.layout import SUMMARY
from eupe.train.loop import judged, training_sample
from eupe.train.losses import match_grids
from eupe.train.model import Distiller
from eupe.train.run_spec import target_names
from eupe.train.sampling import Views
from eupe.train.stream import stream
from eupe.train.targets import Batch
from eupe.train.validate import fit_gains, held_out_cosines

MOST_TOKENS = 2**15
"""Dense tokens that CKA uses in total, an equal number drawn at random from each view; all if there are fewer."""
TASK = "agreement"


@dataclass(frozen=True)
class KindAgreement:
    """Agreement over held-out views for one kind of token."""

    cosine: float
    """Mean cosine between prediction and raw teacher feature; the prediction's length is fitted on training views."""
    cosine_untrained: float
    """`cosine` of the same student and heads with random weights."""
    cosine_mean: float
    """`cosine` of a predictor that always returns the store's mean."""
    normalised_cosine: float
    """Mean cosine in the loss's space, where the mean predictor scores 0 (unless normalisation is `none`)."""
    normalised_untrained: float
    cka: float | None
    """Linear CKA between predictions and features; None for fewer than four samples, or if either does not vary."""
    cka_untrained: float | None
    cka_own: float | None
    """Linear CKA between the student's own tokens and the target's, on the larger of their grids."""
    cka_own_untrained: float | None


@dataclass(frozen=True)
class TargetAgreement:
    """Agreement with one target of a run."""

    target: str
    kinds: dict[str, KindAgreement]
    mutual_neighbours: float | None
    """Share of nearest held-out views of other pictures that are the same in both spaces; None without summaries."""
    mutual_neighbours_untrained: float | None
    mutual_neighbours_chance: float | None


@dataclass(frozen=True)
class Agreement:
    """Agreement with all targets of a run."""

    run: str
    num_views: int
    neighbours: int
    dtype: str
    """Compute dtype."""
    targets: list[TargetAgreement]


def agreement(path: Path, *, corpus: AnyPath | None = None, neighbours: int | None = None) -> Agreement:
    """Measure a run's agreement with its targets on the views of its held-out pictures.

    Args:
        neighbours: k of the mutual-neighbour measure; 10 by default, or all if there are fewer.
    Raises: ConfigError if `neighbours` is below 1 or does not fit the held-out views; RunError, StoreError,
        CorpusError.
    """
    if neighbours is not None and neighbours < 1:
        raise ConfigError(f"--k must be at least 1, got {neighbours}")
    run = open_run(path, corpus=corpus)
    pictures = _pictures(run)
    neighbours = fitting_k(neighbours, pictures)
    trained, untrained = _measure(run, run.distiller, neighbours), _measure(run, run.untrained(), neighbours)
    targets = []
    for i, name in enumerate(target_names(run.spec.targets)):
        kinds = {
            kind: KindAgreement(
                cosine=values["raw"],
                cosine_untrained=untrained.cosines[i][kind]["raw"],
                cosine_mean=values["mean_raw"],
                normalised_cosine=values["normalised"],
                normalised_untrained=untrained.cosines[i][kind]["normalised"],
                cka=trained.cka[i, kind],
                cka_untrained=untrained.cka[i, kind],
                cka_own=trained.cka_own[i, kind],
                cka_own_untrained=untrained.cka_own[i, kind],
            )
            for kind, values in trained.cosines[i].items()
        }
        has_summary = trained.mutual.get(i) is not None
        others = len(pictures) - most_together(pictures)
        chance = min(1.0, neighbours / max(1, others)) if has_summary else None
        targets.append(TargetAgreement(name, kinds, trained.mutual.get(i), untrained.mutual.get(i), chance))
    return Agreement(str(path), trained.num_views, neighbours, dtype_name(run.distiller.dtype), targets)


def agreement_results(report: Agreement) -> list[Result]:
    """Return two results per target, of the trained and the untrained student; the first score is a mean over kinds."""
    spec = read_run_spec(Path(report.run))
    sizes = zip(report.targets, spec.targets, spec.target_sizes, strict=True)
    return [
        Result(
            task=TASK,
            subject=report.run,
            kind="run",
            untrained=untrained,
            scores=_scores(target, untrained),
            protocol={
                "size": spec.size,
                "target_size": target_sizes[0],
                "holdout": spec.config["holdout"],
                "normalise": spec.config["normalise"],
                "k": report.neighbours,
                "neighbours": "views of other pictures",
                "dtype": report.dtype,
                "cka_tokens": MOST_TOKENS,
            },
            data={
                "path": store["path"],
                "target": target.target,
                "fingerprint": store["fingerprint"],
                "pictures": spec.pictures[0],
                "views": report.num_views,
            },
        )
        for target, store, target_sizes in sizes
        for untrained in (False, True)
    ]


def _scores(target: TargetAgreement, untrained: bool) -> dict[str, float]:
    scores: dict[str, float | None] = {}
    for kind, a in target.kinds.items():
        scores[f"normalised/{kind}"] = a.normalised_untrained if untrained else a.normalised_cosine
        scores[f"cosine/{kind}"] = a.cosine_untrained if untrained else a.cosine
        scores[f"mean_feature/{kind}"] = a.cosine_mean
        scores[f"cka/{kind}"] = a.cka_untrained if untrained else a.cka
        scores[f"cka_own/{kind}"] = a.cka_own_untrained if untrained else a.cka_own
    scores["mutual_neighbours"] = target.mutual_neighbours_untrained if untrained else target.mutual_neighbours
    scores["mutual_neighbours_chance"] = target.mutual_neighbours_chance
    known = {name: score for name, score in scores.items() if score is not None}
    return {"normalised": float(np.mean([known[f"normalised/{kind}"] for kind in target.kinds])), **known}


@dataclass
class _Seen:
    """Tokens and sums for CKA and mutual neighbours, by target and kind of token."""

    cells_of_view: int
    predicted: defaultdict[tuple[int, str], PairSums] = field(default_factory=lambda: defaultdict(PairSums))
    own: defaultdict[tuple[int, str], PairSums] = field(default_factory=lambda: defaultdict(PairSums))
    summaries: defaultdict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    # The same seed for the trained and the untrained student, so that both are judged on the same cells.
    cells: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def add(self, target: int, kind: str, said: Tensor, truth: Tensor, own: Tokens) -> None:
        """Add a batch's predictions, stored tokens and the student's own tokens."""
        if kind == SUMMARY:
            assert own.summary is not None
            self.summaries[target].append((said.cpu(), truth.cpu()))
            rows = [x.float().cpu().numpy() for x in (said, own.summary, truth)]
        else:
            matched, _ = match_grids(own.dense.float(), truth)
            cells = draw_cells(self.cells, len(truth), truth.shape[1] * truth.shape[2], self.cells_of_view)
            rows = [tokens_at(x, cells) for x in (said, matched, truth)]
        self.predicted[target, kind].add(rows[0], rows[2])
        self.own[target, kind].add(rows[1], rows[2])


@dataclass(frozen=True)
class _Measured:
    cosines: list[dict[str, dict[str, float]]]
    mutual: dict[int, float | None]
    cka: dict[tuple[int, str], float | None]
    cka_own: dict[tuple[int, str], float | None]
    num_views: int


def _pictures(run: Run) -> Tensor:
    """Return the picture of each held-out view, int64 [V]: views of one picture do not count as neighbours."""
    return torch.from_numpy(run.targets.views_of(run.targets.held_out)[:, 0])


def _measure(run: Run, distiller: Distiller, neighbours: int) -> _Measured:
    def batches(views: Views) -> Iterator[Batch]:
        return stream([run.targets], judged(run.spec, views), run.device)

    # Gains come from training views, so that no held-out target influences its own score.
    gains = fit_gains(distiller, batches(training_sample(run.targets)), run.device)
    held_out = run.targets.views_of(run.targets.held_out)
    seen = _Seen(max(1, MOST_TOKENS // max(1, len(held_out))))
    with _last_tokens(distiller.encoder) as own:
        totals = held_out_cosines(
            distiller,
            batches(held_out),
            run.device,
            gains,
            on_tokens=lambda i, kind, said, truth: seen.add(i, kind, said, truth, own[0]),
        )
    mutual = {
        i: mutual_neighbours(
            *(torch.cat(side) for side in zip(*pairs, strict=True)), k=neighbours, groups_N=_pictures(run)
        )
        for i, pairs in seen.summaries.items()
    }
    return _Measured(
        cosines=[{kind: c.means() for kind, c in kinds.items()} for kinds in totals],
        mutual=mutual,
        cka={which: sums.cka() for which, sums in seen.predicted.items()},
        cka_own={which: sums.cka() for which, sums in seen.own.items()},
        num_views=next(iter(totals[0].values())).views,
    )


@contextmanager
def _last_tokens(encoder: Encoder) -> Iterator[list[Tokens]]:
    """Yield a list that holds the encoder's latest output while the context is open."""
    last: list[Tokens] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], tokens: Tokens) -> None:
        last[:] = [tokens]  # in place, because the caller holds this list

    hook = encoder.register_forward_hook(keep)
    try:
        yield last
    finally:
        hook.remove()
