"""Semantic segmentation: a linear layer on layer-normed dense tokens.

Source: EUPE, arXiv 2603.22387 (ADE20K): 512 px, batch 16, AdamW 1e-3, weight decay 1e-3, 40,000 steps, mIoU; windows of
the picture's shorter side that overlap by a third. Deviation: features are computed once, so training views are not
randomly resized, mirrored or recoloured, unless they come from a store with several views of each picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from eupe.errors import CorpusError
from eupe.evaluate.dense_probe import (
    Training,
    predictions,
    require_same_sides,
    require_truth,
    train_head,
)
from eupe.evaluate.encode import EncodedViews
from eupe.evaluate.judged_pictures import windows
from eupe.evaluate.layouts import Mapped, class_names, mask_split
from eupe.evaluate.masks import CLASS_NUMBERS, NOTHING, Classes, MaskCode, find_classes
from eupe.evaluate.result import Result
from eupe.evaluate.subject import Subject, result_of
from eupe.store.layout import DENSE

SIZE = 512
TRAINING = Training(steps=40_000, lr=1e-3, warmup=1500 / 40_000)
IGNORED = NOTHING


class LinearSegmenter(nn.Module):
    """A linear layer from tokens [B, h, w, D], each normed to mean 0 and variance 1, to logits [B, C, h, w]."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens_BhwD: Tensor) -> Tensor:
        normed = F.layer_norm(tokens_BhwD, tokens_BhwD.shape[-1:])
        return self.linear(normed).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def read_labels(classes: Classes, mapped: Mapped, i: int) -> NDArray[np.int32]:
    """Read the class numbers of a mask, [H, W], with `IGNORED` for pixels without a class.

    Raises: CorpusError if the mask's size is not its picture's, or it holds a value that is not a class.
    """
    return require_same_sides(mapped, i, classes.read(mapped.maps[i]))


@dataclass(frozen=True)
class Masks:
    """Pictures with masks, of which every one was read."""

    train: Mapped
    val: Mapped
    classes: Classes
    names: tuple[str, ...]
    """Name of each class; its value in the masks if the data set names none."""
    data: Path

    def read_train(self, i: int) -> NDArray[np.int32]:
        """Read the class numbers of a training picture's mask; see `read_labels`."""
        return read_labels(self.classes, self.train, i)

    def read_val(self, i: int) -> NDArray[np.int32]:
        """Read the class numbers of a judged picture's mask; see `read_labels`."""
        return read_labels(self.classes, self.val, i)

    def judge(self, head: nn.Module, seen: EncodedViews) -> tuple[NDArray[np.int64], list[float]]:
        """Count the pixels of all judged pictures by (label, prediction), [C, C].

        Returns: the counts; for each picture its pixel accuracy, NaN if no pixel of it has a class.
        Raises: CorpusError if that is so for all pictures.
        """
        confusion = np.zeros((self.classes.count, self.classes.count), dtype=np.int64)
        accuracies = []
        for logits, labels in predictions(head, seen, self.read_val):
            found = confusion_in(logits, labels)
            accuracies.append(pixel_accuracy(found) if found.any() else math.nan)
            confusion += found
        if not confusion.sum():
            raise CorpusError(
                f"the masks of the val split of {self.data} hold no class at all, only {self.classes.told}"
            )
        return confusion, accuracies


def open_masks(data: Path, code: MaskCode = CLASS_NUMBERS, *, limit: int | None = None) -> Masks:
    """Find the masks of a data set, what their values mean, and read each once.

    Args:
        code, limit: see `segment`.
    Raises: CorpusError as `segment`.
    """
    whole, val = mask_split(data, "train"), mask_split(data, "val").limited(limit)
    names, train = class_names(data), whole.limited(limit)
    # without names, all masks decide the number of classes: the head must not depend on `limit`
    shown = whole if names is None else train
    classes = find_classes(
        shown.maps,
        code,
        nothing=whole.nothing,
        names=None if names is None else len(names),
        data=data,
        whole=len(shown.maps) == len(whole.maps),
    )
    masks = Masks(train, val, classes, names or tuple(code.words(classes.values)), data)
    require_truth(len(train.maps), masks.read_train)
    require_truth(len(val.maps), masks.read_val)
    return masks


def segment(
    subject: Subject,
    *,
    data: Path,
    size: int | None = None,
    training: Training = TRAINING,
    code: MaskCode = CLASS_NUMBERS,
    limit: int | None = None,
    scratch: Path | None = None,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Train a linear layer on a subject's dense tokens; return mean intersection over union, and pixel accuracy.

    Args:
        code: meaning of the masks' values, if they are not the layout's class numbers.
        limit: use only the first pictures of each split.
        scratch: see `room_for`.
    Raises: CorpusError if a mask is missing, has another size than its picture, or a class out of range; StoreError,
        RunError, TeacherError, ConfigError.
    """
    masks = open_masks(data, code, limit=limit)
    train, val = masks.train, masks.val
    chosen = subject.size(size, usual=SIZE)
    encoded = {
        part: subject.encode_views(mapped.pictures, kinds=[DENSE], size=chosen, crop=windows, scratch=scratch)
        # val first: if both do not fit, the error comes before the long pass over train
        for part, mapped in (("val", val), ("train", train))
    }
    make_head = partial(LinearSegmenter, num_classes=masks.classes.count)
    head = train_head(make_head, encoded["train"], masks.read_train, segmentation_loss, training, on_step=on_step)
    confusion, _ = masks.judge(head, encoded["val"])
    return result_of(
        subject,
        task="segment",
        scores={"miou": mean_iou(confusion), "pixel_accuracy": pixel_accuracy(confusion)},
        protocol={**subject.protocol(chosen), **asdict(training), **code.protocol, **val.protocol},
        data={"path": str(data), "train": len(train.maps), "val": len(val.maps), "classes": masks.classes.count},
        notes=[
            f"judged: {len(val.maps):,} pictures of {val.name}, by {len(train.maps):,} of {train.name}; "
            f"{masks.classes.count:,} classes (values {masks.classes.told}), "
            f"{int(confusion.any(axis=1).sum()):,} of them judged"
        ],
    )


def segmentation_loss(logits_BCSS: Tensor, labels_BSS: Tensor) -> Tensor:
    """Return the cross-entropy, averaged over the pixels that have a class."""
    labels = labels_BSS.long()
    if (labels == IGNORED).all():
        return logits_BCSS.sum() * 0  # a mean over no pixels is NaN; this zero still has a gradient
    return F.cross_entropy(logits_BCSS, labels, ignore_index=IGNORED)


def confusion_in(logits_CHW: Tensor, labels_HW: NDArray[np.int32]) -> NDArray[np.int64]:
    """Count a picture's pixels by (label, prediction), [C, C]; those that no view reaches have NaN and do not count."""
    reached = torch.isfinite(logits_CHW[0]).cpu().numpy()
    predicted = logits_CHW.argmax(dim=0).cpu().numpy()
    return confusion_of(predicted, np.where(reached, labels_HW, IGNORED), len(logits_CHW))


def confusion_of(predicted_HW: NDArray[np.int64], labels_HW: NDArray[np.int32], num_classes: int) -> NDArray[np.int64]:
    """Count pixels by (label, prediction), [C, C]; pixels without a class do not count."""
    judged = labels_HW != IGNORED
    pairs = labels_HW[judged].astype(np.int64) * num_classes + predicted_HW[judged]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_iou(confusion_CC: NDArray[np.int64]) -> float:
    """Return the mean intersection over union of the classes that occur in truth or prediction."""
    both = np.diag(confusion_CC)
    either = confusion_CC.sum(axis=0) + confusion_CC.sum(axis=1) - both
    occurs = either > 0
    return float((both[occurs] / either[occurs]).mean())


def pixel_accuracy(confusion_CC: NDArray[np.int64]) -> float:
    """Return the share of right predictions among the pixels that have a class."""
    return float(np.diag(confusion_CC).sum() / confusion_CC.sum())
