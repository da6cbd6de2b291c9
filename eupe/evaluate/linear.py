"""Logistic regression on frozen summaries, its penalty swept.

Source of the protocol: linear probing as in CLIP (arXiv 2103.00020, appendix A.3): L-BFGS on summaries, the penalty
chosen on a part of the training data that is held out, then fitted on all of it. Channels are standardised by the
training data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.corpus.choice import AS_FOUND, Choice
from eupe.device import pick_device
from eupe.errors import ConfigError
from eupe.evaluate.knn import Parts, Summaries, summaries_of
from eupe.evaluate.result import Result
from eupe.evaluate.splits import OTHERS, order_labels, tell_protocol
from eupe.evaluate.subject import Subject, result_of
from eupe.place import Where
from eupe.train.targets import is_held_out

PENALTIES = tuple(10.0**power for power in range(-6, 3))
"""Swept: factors of half the squared weights, beside the mean cross-entropy."""
TUNING_SHARE = 0.1
VAL_SHARE = 0.2
"""Of the pictures, where the data has no splits."""
MAX_ITERATIONS = 1000
UNKNOWN = -1
"""The code of a label that the training part does not have."""


@dataclass(frozen=True)
class Logistic:
    """A fitted classifier."""

    weight_CD: Tensor
    bias_C: Tensor

    def logits(self, features_ND: Tensor) -> Tensor:
        """[N, C]"""
        return features_ND @ self.weight_CD.T + self.bias_C


def linear(
    subject: Subject,
    *,
    data: Where | None = None,
    penalties: tuple[float, ...] = PENALTIES,
    size: int | None = None,
    choice: Choice = AS_FOUND,
) -> Result:
    """Accuracy of a linear classifier on a subject's summaries.

    Raises: as `knn`; ConfigError if fewer than two labels can be learnt, or a penalty is not above 0.
    """
    if not penalties or not all(0 < penalty < math.inf for penalty in penalties):
        raise ConfigError(f"--penalty must be above 0, and finite, got {', '.join(f'{p:g}' for p in penalties)}")
    parts = summaries_of(subject, data, size=size, choice=choice)
    train, val = (parts.train, parts.val) if parts.train is not None else _split(parts.val, VAL_SHARE)
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
    scaled_train, scaled_val = (
        ((part.features.double() - mean) / torch.where(std > 0, std, 1.0)) for part in (train, val)
    )
    judged_share = 0.0 if parts.train is not None else VAL_SHARE  # those that are judged have the first of the hashes
    tuning = torch.tensor([is_held_out(key, judged_share + TUNING_SHARE) for key in train.pictures])
    chosen = choose_penalty(scaled_train, codes_train, tuning, len(names), penalties)
    fitted = fit_logistic(scaled_train, codes_train, penalty=chosen, num_labels=len(names))
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
            **parts.splits.protocol,
        },
        data={"path": parts.data, **parts.choice.given(), "train": len(train), "val": len(val), "labels": len(names)},
        notes=(*_told(parts), *parts.splits.notes),
    )


def choose_penalty(
    features: Tensor, codes: Tensor, tuning: Tensor, num_labels: int, penalties: tuple[float, ...]
) -> float:
    """The penalty with the best accuracy on the tuning part; of several the greatest.

    Raises: ConfigError if there is nothing to tune on, or nothing else.
    """
    if len(penalties) == 1:
        return penalties[0]
    if not tuning.any() or tuning.all():
        raise ConfigError("there are too few pictures to choose a penalty on; give one --penalty")
    scored = []
    for penalty in sorted(penalties, reverse=True):
        fitted = fit_logistic(features[~tuning], codes[~tuning], penalty=penalty, num_labels=num_labels)
        right = fitted.logits(features[tuning].to(fitted.weight_CD)).argmax(dim=1).cpu() == codes[tuning]
        scored.append((float(right.double().mean()), penalty))
    return max(scored, key=lambda each: each[0])[1]


def fit_logistic(features_ND: Tensor, codes_N: Tensor, *, penalty: float, num_labels: int) -> Logistic:
    """Minimise the mean cross-entropy plus half the squared weights times the penalty; the bias is free.

    The problem is convex. In float64 on a CPU, and in float32 on a GPU.

    Args:
        features_ND: standardised.
        codes_N: int64, 0 to `num_labels` - 1.
    """
    device = pick_device()
    exact = torch.float64 if device.type == "cpu" else torch.float32
    features, codes = features_ND.to(device, exact), codes_N.to(device)
    weight = torch.zeros(num_labels, features.shape[1], device=device, dtype=exact, requires_grad=True)
    bias = torch.zeros(num_labels, device=device, dtype=exact, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
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


def _told(parts: Parts) -> tuple[str, ...]:
    """Return what is judged by what, a sentence each."""
    whole, train = parts.splits.val, parts.splits.train
    if train is not None:
        return tell_protocol(whole, train)
    held_out = [is_held_out(key, VAL_SHARE) for key in whole.pictures.keys]
    judged, rest = ([i for i, held in enumerate(held_out) if held == wanted] for wanted in (True, False))
    return tell_protocol(replace(whole.pick(judged, ""), unlabelled=whole.unlabelled), whole.pick(rest, OTHERS))


def _split(whole: Summaries, share: float) -> tuple[Summaries, Summaries]:
    """By a hash of the pictures' keys."""
    held_out = np.array([is_held_out(key, share) for key in whole.pictures])
    return _picked(whole, ~held_out), _picked(whole, held_out)


def _picked(whole: Summaries, mask: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Summaries:
    places = np.flatnonzero(mask).tolist()
    labels, pictures = (tuple(words[i] for i in places) for words in (whole.labels, whole.pictures))
    return Summaries(whole.features[torch.from_numpy(mask)], labels, pictures)
