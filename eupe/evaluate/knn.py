"""k-nearest-neighbour accuracy of summaries.

Source of the protocol (k = 10, L2, majority vote, 224 px): EUPE, arXiv 2603.22387, evaluation. If the data has no
training split, each picture is classified by all *other* pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.common.storage import AnyPath
from eupe.corpus.choice import AS_FOUND, Choice
from eupe.errors import ConfigError
from eupe.evaluate.judged_pictures import centre
from eupe.evaluate.neighbours import QUERIES, Metric, nearest
from eupe.evaluate.result import Result
from eupe.evaluate.splits import (
    Labelled,
    Splits,
    corpus_splits,
    labelled_splits,
    order_labels,
    require_classes,
    tell_protocol,
)
from eupe.evaluate.subject import StoreSubject, Subject, result_of
from eupe.store.layout import SUMMARY

SIZE = 224
K = 10


@dataclass(frozen=True)
class Summaries:
    """Summaries of labelled views."""

    features: Tensor
    """float32 [N, Ds]"""
    labels: tuple[str, ...]
    pictures: tuple[str, ...]
    """Key of the picture that each row is a view of."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Parts:
    """Summaries to judge (`val`) and to learn from (`train`, which is None if the data has no training split)."""

    train: Summaries | None
    val: Summaries
    size: int
    data: str
    splits: Splits
    choice: Choice
    """Options that select labels and pictures of the data."""


def summaries_of(subject: Subject, data: AnyPath | None, *, size: int | None, choice: Choice = AS_FOUND) -> Parts:
    """Return the summaries of both splits, from the data's pictures or from a store's own labelled samples.

    Raises: ConfigError, CorpusError, StoreError, RunError, TeacherError.
    """
    if data is None:
        if not isinstance(subject, StoreSubject):
            raise ConfigError(f"{subject.name} is not a store; give labelled pictures to evaluate it on with --data")
        if choice != AS_FOUND:
            raise ConfigError(
                f"{choice.words()} chooses among the labels or pictures of --data, but no --data is given"
            )
        chosen, path = subject.size(size), str(subject.store.path)
        splits = corpus_splits(subject.labelled(), path)
    else:
        chosen, path = subject.size(size, usual=SIZE), str(data)
        splits = labelled_splits(data, choice)
    require_classes(splits.val, splits.train, path)
    train, val = (None if part is None else _look(subject, part, chosen, data) for part in (splits.train, splits.val))
    assert val is not None
    return Parts(train, val, chosen, path, splits, choice)


def _look(subject: Subject, part: Labelled, size: int, data: AnyPath | None) -> Summaries:
    if isinstance(subject, StoreSubject) and data is None:
        encoded = subject.summaries(part.pictures.keys, size=size)
    else:
        encoded = subject.encode_views(part.pictures, kinds=[SUMMARY], size=size, crop=centre)
    assert encoded.summary is not None
    places = encoded.picture_V.tolist()
    labels = tuple(part.labels[i] for i in places)
    return Summaries(encoded.summary, labels, tuple(part.pictures.keys[i] for i in places))


def knn(
    subject: Subject,
    *,
    data: AnyPath | None = None,
    k: int = K,
    metric: Metric = "l2",
    size: int | None = None,
    choice: Choice = AS_FOUND,
) -> Result:
    """Measure the k-NN accuracy of a subject's summaries.

    Raises: StoreError, RunError, TeacherError, CorpusError; ConfigError if there are no labels or no summaries, the
        metric is unknown, or `k` does not fit the labelled views.
    """
    if metric not in ("l2", "cosine"):
        raise ConfigError(f"--metric {metric} is unknown; give l2 or cosine")
    parts = summaries_of(subject, data, size=size, choice=choice)
    val, bank = parts.val, parts.train or parts.val
    names = order_labels(bank.labels + val.labels)
    code_of = {name: code for code, name in enumerate(names)}
    bank_labels, val_labels = (torch.tensor([code_of[label] for label in part.labels]) for part in (bank, val))
    groups = None if parts.train is not None else torch.from_numpy(np.unique(val.pictures, return_inverse=True)[1])
    most = 0 if groups is None else int(torch.bincount(groups).max())
    if k < 1 or k > len(bank) - most:
        raise ConfigError(f"--k {k} does not fit {len(bank)} labelled views; give 1 to {len(bank) - most}")
    correct = accuracy(
        val.features, val_labels, bank.features, bank_labels, k=k, metric=metric, groups_N=groups, num_labels=len(names)
    )
    return result_of(
        subject,
        task="knn",
        scores={"accuracy": correct, "majority": int(torch.bincount(val_labels).max()) / len(val_labels)},
        protocol={
            **subject.protocol(parts.size),
            "k": k,
            "metric": metric,
            "judged_by": "the other pictures" if parts.train is None else "the training split",
            **parts.splits.protocol,
        },
        data={"path": parts.data, **parts.choice.given(), "train": len(bank), "val": len(val), "labels": len(names)},
        notes=(*tell_protocol(parts.splits.val, parts.splits.train), *parts.splits.notes),
    )


def accuracy(
    queries_ND: Tensor,
    labels_N: Tensor,
    bank_MD: Tensor,
    bank_labels_M: Tensor,
    *,
    k: int,
    metric: Metric,
    num_labels: int,
    groups_N: Tensor | None = None,
) -> float:
    """Return the share of queries whose k nearest rows of the bank vote for their label.

    A tie goes to the label whose votes rank nearer.

    Args:
        groups_N: groups of the rows if the queries are the bank itself; rows of one group do not vote for each other.
    """
    near_NK = nearest(queries_ND, bank_MD, groups_N, k=k, metric=metric)
    # All k bonuses together are less than one vote, so they only break ties.
    nearness = torch.arange(k, 0, -1, dtype=torch.float64) / (2 * k * k)
    correct = 0
    for near, labels in zip(torch.split(near_NK, QUERIES), torch.split(labels_N, QUERIES), strict=True):
        votes = (F.one_hot(bank_labels_M[near], num_labels) * (1 + nearness[None, :, None])).sum(dim=1)
        correct += int((votes.argmax(dim=1) == labels).sum())
    return correct / len(queries_ND)
