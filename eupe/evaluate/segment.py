"""Semantic segmentation: a linear layer on layer-normed dense tokens.

Source: EUPE, arXiv 2603.22387 (ADE20K): 512 px, batch 16, AdamW 1e-3, weight decay 1e-3, 40,000 steps, mIoU; windows of
the picture's shorter side, which overlap by a third. Deviation: features are computed once, so training views are not
resized, mirrored or recoloured at random (a store of several views has them).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from eupe.errors import CorpusError
from eupe.evaluate.dense_probe import Training, predictions, require_same_sides, require_truth, train_head
from eupe.evaluate.layouts import Mapped, class_names, mask_split, read_mask
from eupe.evaluate.pictures import windows
from eupe.evaluate.result import Result
from eupe.evaluate.subject import Subject, result_of
from eupe.store.layout import DENSE

SIZE = 512
TRAINING = Training(steps=40_000, lr=1e-3, warmup=1500 / 40_000)
IGNORED = -1
"""What pixels without a class become."""


class LinearSegmenter(nn.Module):
    """Tokens [B, h, w, D], each normed to mean 0 and variance 1, to logits [B, C, h, w]."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens_BhwD: Tensor) -> Tensor:
        normed = F.layer_norm(tokens_BhwD, tokens_BhwD.shape[-1:])
        return self.linear(normed).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Classes:
    """From the values in a mask to class numbers from 0 on."""

    count: int
    nothing: int
    offset: int
    """The value of class 0: 1 in ADE20K's layout, where 0 is nothing."""

    def read(self, mapped: Mapped, i: int) -> NDArray[np.int32]:
        """[H, W], `IGNORED` where nothing is said.

        Raises: CorpusError if the mask is of another size than its picture, or holds a value out of range.
        """
        values = require_same_sides(mapped, i, read_mask(mapped.maps[i])).astype(np.int32)
        labels = np.where(values == self.nothing, IGNORED, values - self.offset)
        beyond = (labels >= self.count) | ((labels < 0) & (values != self.nothing))
        if beyond.any():
            raise CorpusError(
                f"mask {mapped.maps[i]} holds class {int(values[beyond][0])}; there are {self.count}, "
                f"{self.offset} to {self.offset + self.count - 1}, and {self.nothing} for none"
            )
        return labels.astype(np.int32)


def segment(
    subject: Subject,
    *,
    data: Path,
    size: int | None = None,
    training: Training = TRAINING,
    limit: int | None = None,
    scratch: Path | None = None,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Mean intersection over union, and pixel accuracy, of a linear layer on a subject's dense tokens.

    Raises: CorpusError for a mask that is missing, of another size than its picture, or with a class out of range;
        StoreError, RunError, TeacherError, ConfigError.
    """
    whole, val = mask_split(data, "train"), mask_split(data, "val").limited(limit)
    classes, train = _classes(data, whole), whole.limited(limit)
    for part in (train, val):
        require_truth(len(part.maps), partial(classes.read, part))
    chosen = subject.size(size, usual=SIZE)
    seen = {
        part: subject.look(mapped.pictures, kinds=[DENSE], size=chosen, cut=windows, scratch=scratch)
        for part, mapped in (("val", val), ("train", train))  # the larger last, so that want of room is known soon
    }
    dense = seen["train"].dense
    assert dense is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        head = LinearSegmenter(dense.shape[-1], classes.count)
        train_head(head, seen["train"], partial(classes.read, train), segmentation_loss, training, on_step=on_step)
    confusion = np.zeros((classes.count, classes.count), dtype=np.int64)
    for logits, labels in predictions(head, seen["val"], partial(classes.read, val)):
        reached = torch.isfinite(logits[0]).cpu().numpy()
        predicted = logits.argmax(dim=0).cpu().numpy()
        confusion += confusion_of(predicted, np.where(reached, labels, IGNORED), classes.count)
    if not confusion.sum():
        raise CorpusError(f"the masks of the val split of {data} hold no class at all, only {val.nothing}")
    return result_of(
        subject,
        task="segment",
        scores={"miou": mean_iou(confusion), "pixel_accuracy": pixel_accuracy(confusion)},
        protocol={**subject.protocol(chosen), **asdict(training)},
        data={"path": str(data), "train": len(train.maps), "val": len(val.maps), "classes": classes.count},
    )


def segmentation_loss(logits_BCSS: Tensor, labels_BSS: Tensor) -> Tensor:
    """Cross-entropy, mean over the pixels that have a class."""
    labels = labels_BSS.long()
    if (labels == IGNORED).all():
        return logits_BCSS.sum() * 0
    return F.cross_entropy(logits_BCSS, labels, ignore_index=IGNORED)


def confusion_of(predicted_HW: NDArray[np.int64], labels_HW: NDArray[np.int32], num_classes: int) -> NDArray[np.int64]:
    """Pixels by (label, prediction), [C, C]; those without a class do not count."""
    judged = labels_HW != IGNORED
    pairs = labels_HW[judged].astype(np.int64) * num_classes + predicted_HW[judged]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_iou(confusion_CC: NDArray[np.int64]) -> float:
    """Over the classes that occur, in truth or prediction."""
    both = np.diag(confusion_CC)
    either = confusion_CC.sum(axis=0) + confusion_CC.sum(axis=1) - both
    occurs = either > 0
    return float((both[occurs] / either[occurs]).mean())


def pixel_accuracy(confusion_CC: NDArray[np.int64]) -> float:
    """Of all pixels that have a class."""
    return float(np.diag(confusion_CC).sum() / confusion_CC.sum())


def _classes(data: Path, train: Mapped) -> Classes:
    """As many as there are names, or as the masks of the training split show."""
    offset = 1 if train.nothing == 0 else 0
    names = class_names(data)
    if names is not None:
        return Classes(len(names), train.nothing, offset)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        greatest = max(pool.map(lambda path: _greatest(read_mask(path), train.nothing), train.maps))
    if greatest < offset:
        raise CorpusError(f"the masks of {data} hold no class at all, only {train.nothing}")
    return Classes(greatest - offset + 1, train.nothing, offset)


def _greatest(mask: NDArray[np.int32], nothing: int) -> int:
    return int(np.where(mask == nothing, -1, mask).max())
