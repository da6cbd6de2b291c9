"""Logistic regression on frozen summaries, with a sweep over the penalty.

Source of the protocol: linear probing as in CLIP (arXiv 2103.00020, appendix A.3): L-BFGS on summaries. The penalty is
chosen on a held-out part of the training data; the classifier is then fitted on all of it. Channels are standardised
with the training data's mean and standard deviation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.common.compute import pick_device
from eupe.common.storage import AnyPath
from eupe.corpus.choice import AS_FOUND, Choice
from eupe.errors import ConfigError
from eupe.evaluate.knn import Parts, Summaries, summaries_of
from eupe.evaluate.result import Result
from eupe.evaluate.splits import OTHERS, Labelled, Splits, few_pictures, order_labels, tell_protocol
from eupe.evaluate.subject import Subject, result_of
from eupe.train.targets import is_held_out

PENALTIES = tuple(10.0**power for power in range(-6, 3))
"""Penalties of the sweep: factors of half the squared weights, added to the mean cross-entropy."""
TUNING_SHARE = 0.1
"""Share of the pictures that are held out of training to choose the penalty."""
VAL_SHARE = 0.2
"""Share of the pictures that are judged if the data has no splits."""
MAX_ITERATIONS = 1000
LAST_CHANGE, LAST_CHANGE_TUNING = 1e-14, 1e-7
"""Change of the loss in an iteration at which a fit ends, and at which one that only helps to choose a penalty does.

A choice does not need what hundreds of further iterations add.
"""
UNKNOWN = -1
"""Code of a label that the training part does not have."""


@dataclass(frozen=True)
class Logistic:
    """A fitted classifier."""

    weight_CD: Tensor
    bias_C: Tensor

    def logits(self, features_ND: Tensor) -> Tensor:
        """Return the logits, [N, C]."""
        return features_ND @ self.weight_CD.T + self.bias_C


def linear(
    subject: Subject,
    *,
    data: AnyPath | None = None,
    penalties: tuple[float, ...] = PENALTIES,
    size: int | None = None,
    choice: Choice = AS_FOUND,
    label_share: float = 1.0,
    seed: int = 0,
) -> Result:
    """Measure the accuracy of a linear classifier on a subject's summaries.

    Args:
        label_share: share of the pictures of each label that the classifier may learn from; see `few_labels`.
        seed: of the choice of these pictures.
    Raises: as `summaries_of`; ConfigError if fewer than two labels can be learned, no views are left to judge, a
        penalty is not finite and above 0, or the share is not above 0 and at most 1.
    """
    _require_settings(penalties, label_share, seed)
    parts = summaries_of(subject, data, size=size, choice=choice)
    train, val = (parts.train, parts.val) if parts.train is not None else _split(parts.val, VAL_SHARE)
    of_all, train = train, few_labels(train, label_share, seed=seed)
    names = order_labels(train.labels)
    if len(names) < 2 or not len(val):
        raise ConfigError(
            f"{parts.data} has {len(names)} labels to learn and {len(val)} views to judge; a classifier needs two "
            "labels and a few pictures of each"
        )
    code_of = {name: code for code, name in enumerate(names)}
    codes_train, codes_val = (
        torch.tensor([code_of.get(label, UNKNOWN) for label in part.labels]) for part in (train, val)
    )
    known = codes_val != UNKNOWN
    mean, std = train.features.double().mean(dim=0), train.features.double().std(dim=0, correction=0)
    # Channels without variance are only shifted to 0, so that they do not become NaN.
    scaled_train, scaled_val = (
        ((part.features.double() - mean) / torch.where(std > 0, std, 1.0)) for part in (train, val)
    )
    # Judged pictures have the lowest hashes; the threshold for tuning lies above theirs.
    judged_share = 0.0 if parts.train is not None else VAL_SHARE
    tuning = torch.tensor([is_held_out(key, judged_share + TUNING_SHARE) for key in train.pictures])
    chosen, start = choose_penalty(scaled_train, codes_train, tuning, len(names), penalties)
    fitted = fit_logistic(scaled_train, codes_train, penalty=chosen, num_labels=len(names), start=start)
    correct = (fitted.logits(scaled_val.to(fitted.weight_CD)).argmax(dim=1).cpu() == codes_val) & known
    majority = int(torch.bincount(codes_val[known], minlength=1).max()) / len(val)
    return result_of(
        subject,
        task="linear",
        scores={"accuracy": float(correct.double().mean()), "majority": majority, "penalty": chosen},
        protocol={
            **subject.protocol(parts.size),
            "penalties": list(penalties),
            "judged_on": "the val split" if parts.train is not None else f"{VAL_SHARE:.0%} of the pictures",
            **({"label_share": label_share, "label_seed": seed} if label_share < 1 else {}),
            **parts.splits.protocol,
        },
        data={"path": parts.data, **parts.choice.given(), "train": len(train), "val": len(val), "labels": len(names)},
        notes=(*_told(parts), *parts.splits.notes, *_told_share(train, of_all)),
    )


def _require_settings(penalties: tuple[float, ...], label_share: float, seed: int) -> None:
    if not 0 < label_share <= 1:
        raise ConfigError(f"--label-share must be above 0 and at most 1, got {label_share:g}")
    if seed and label_share == 1:
        raise ConfigError(f"--seed {seed} chooses the pictures of --label-share, which is 1; give both, or neither")
    if not penalties or not all(0 < penalty < math.inf for penalty in penalties):
        raise ConfigError(f"--penalty must be above 0, and finite, got {', '.join(f'{p:g}' for p in penalties)}")


def choose_penalty(
    features: Tensor, codes: Tensor, tuning: Tensor, num_labels: int, penalties: tuple[float, ...]
) -> tuple[float, Logistic | None]:
    """Return the penalty with the best accuracy on the tuning part, and its classifier; ties go to the greatest.

    Each fit starts from that of the penalty above it, which is near: a sweep takes little longer than one fit.

    Args:
        tuning: bool, the rows of the tuning part.
    Raises: ConfigError if none or all of the rows are in the tuning part.
    """
    if len(penalties) == 1:
        return penalties[0], None
    if not tuning.any() or tuning.all():
        raise ConfigError("there are too few pictures to choose a penalty on; give one --penalty")
    scored: list[tuple[float, float, Logistic]] = []
    fitted: Logistic | None = None
    for penalty in sorted(penalties, reverse=True):
        fitted = fit_logistic(
            features[~tuning],
            codes[~tuning],
            penalty=penalty,
            num_labels=num_labels,
            start=fitted,
            last_change=LAST_CHANGE_TUNING,
        )
        right = fitted.logits(features[tuning].to(fitted.weight_CD)).argmax(dim=1).cpu() == codes[tuning]
        scored.append((float(right.double().mean()), penalty, fitted))
    # `max` returns the first of equal scores, which has the greatest penalty.
    _, penalty, fitted = max(scored, key=lambda each: each[0])
    return penalty, fitted


def fit_logistic(
    features_ND: Tensor,
    codes_N: Tensor,
    *,
    penalty: float,
    num_labels: int,
    start: Logistic | None = None,
    last_change: float = LAST_CHANGE,
) -> Logistic:
    """Minimise the mean cross-entropy plus `penalty` times half the squared weights; the bias is not penalised.

    The problem is convex. It is solved in float64 on a CPU and in float32 on a GPU.

    Args:
        features_ND: standardised features.
        codes_N: int64 codes of the labels, 0 to `num_labels` - 1.
        start: a classifier to start from; None for zeros.
        last_change: the change of the loss in an iteration at which the fit ends.
    """
    device = pick_device()
    exact = torch.float64 if device.type == "cpu" else torch.float32
    features, codes = features_ND.to(device, exact), codes_N.to(device)
    if start is None:
        start = Logistic(features.new_zeros(num_labels, features.shape[1]), features.new_zeros(num_labels))
    weight, bias = (tensor.clone().requires_grad_() for tensor in (start.weight_CD, start.bias_C))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-9,
        tolerance_change=last_change,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, codes) + penalty / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Logistic(weight.detach(), bias.detach())


def few_labels(whole: Summaries, share: float, *, seed: int) -> Summaries:
    """Return a share of the pictures of each label with all their views; see `few_pictures`."""
    return _picked(whole, np.array(few_pictures(whole.labels, whole.pictures, share, seed=seed)))


def _told_share(train: Summaries, of_all: Summaries) -> tuple[str, ...]:
    counts = [len(set(part.pictures)) for part in (train, of_all)]
    return () if counts[0] == counts[1] else (f"learned from the labels of {counts[0]:,} of {counts[1]:,} pictures",)


def _told(parts: Parts) -> tuple[str, ...]:
    """Return notes on what is judged by what, one sentence each."""
    train, val = learned_and_judged(parts.splits)
    return tell_protocol(val, train)


def learned_and_judged(splits: Splits) -> tuple[Labelled, Labelled]:
    """Return the pictures to learn from and those to judge; without splits, a share is judged, by a hash of the key."""
    whole = splits.val
    if splits.train is not None:
        return splits.train, whole
    held_out = [is_held_out(key, VAL_SHARE) for key in whole.pictures.keys]
    judged, rest = ([i for i, held in enumerate(held_out) if held == wanted] for wanted in (True, False))
    return whole.pick(rest, OTHERS), replace(whole.pick(judged, ""), unlabelled=whole.unlabelled)


def _split(whole: Summaries, share: float) -> tuple[Summaries, Summaries]:
    """Split by a hash of the pictures' keys into the rest and a judged `share`."""
    held_out = np.array([is_held_out(key, share) for key in whole.pictures])
    return _picked(whole, ~held_out), _picked(whole, held_out)


def _picked(whole: Summaries, mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Summaries:
    places = np.flatnonzero(mask).tolist()
    labels, pictures = (tuple(words[i] for i in places) for words in (whole.labels, whole.pictures))
    return Summaries(whole.features[torch.from_numpy(mask)], labels, pictures)
