"""What an encoder is fine-tuned for: to classify pictures, to segment them, or to see depth.

Shapes: B views, S side of a view in pixels, C outputs of a head, h w cells, D width of a dense token, Ds of a summary.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from eupe.corpus.views import NEUTRAL, ViewParams, draw_colours, draw_view, parse_views
from eupe.errors import ConfigError
from eupe.evaluate.dense_probe import Training, predictions, resized, train_head, view_of
from eupe.evaluate.depth import TRAINING as DEPTH_TRAINING
from eupe.evaluate.depth import DepthMaps, depth_measures, open_depth
from eupe.evaluate.encode import EncodedViews
from eupe.evaluate.judged_pictures import CropFunction, Pictures, centre, windows
from eupe.evaluate.layouts import depth_unit
from eupe.evaluate.linear import fit_logistic, learned_and_judged
from eupe.evaluate.masks import read_code
from eupe.evaluate.segment import TRAINING as SEGMENT_TRAINING
from eupe.evaluate.segment import Masks, mean_iou, open_masks, pixel_accuracy, segmentation_loss
from eupe.evaluate.splits import labelled_splits, order_labels, require_classes, tell_protocol
from eupe.finetune.config import CLASSIFY, DEPTH, SEGMENT, USUAL_SCALE, FinetuneConfig
from eupe.finetune.model import make_head
from eupe.models.encoder_spec import EncoderSpec

SMOOTHING = 0.1
"""Share of a label that is spread over all classes; source: Szegedy et al., arXiv 1512.00567."""
PROBE_PENALTY = 0.01
"""Penalty of the linear probe that a classifier's head starts from."""
MOST_WRONG = 12
"""Number of pictures that are kept as the worst."""

Encode = Callable[[Pictures, CropFunction], EncodedViews]
"""Function that encodes views of pictures with the encoder as it is, the tokens of the task's kind."""


@dataclass(frozen=True)
class Wrong:
    """A judged picture that a model gets wrong."""

    picture: int
    """Its index among the judged pictures."""
    key: str
    words: str
    """What is wrong, in words."""


@dataclass(frozen=True)
class Judged:
    """Scores of a model on the judged pictures, and its mistakes."""

    scores: dict[str, float]
    """By measure; the first is compared."""
    confusion: list[list[int]]
    """Counts by (truth, prediction): of pictures, or of pixels; empty for depth."""
    worst: list[Wrong]


class Task(ABC):
    """Pictures with their truth, and how a head learns it and is judged."""

    name: ClassVar[str]
    lower_is_better: ClassVar[bool] = False

    learned: Pictures
    judged: Pictures
    classes: tuple[str, ...] = ()
    max_m: float | None = None
    """Greatest depth that counts; None for other tasks."""
    groups: Sequence[str]
    """Group of each training picture; a share of the labels is drawn from each group."""
    notes: tuple[str, ...] = ()
    """Sentences for people about the data."""

    def __init__(self, config: FinetuneConfig) -> None:
        self._views = replace(parse_views("rrc:1", seed=0, scale=config.scale or USUAL_SCALE), flip=config.flip)
        self._true_colours = config.true_colours

    def draw(self, i: int, k: int, width: int, height: int, *, seed: int) -> ViewParams:
        """Draw view `k` of a training picture: crop, mirroring and colours."""
        key = self.learned.keys[i]
        colours = NEUTRAL if self._true_colours else draw_colours(seed, key, k)
        # greyscale, blur and solarisation take away what labels may depend on
        colours = colours._replace(grey=NEUTRAL.grey, blur=NEUTRAL.blur, solarise=NEUTRAL.solarise)
        return self._crop(i, k, width, height, seed=seed)._replace(photometric=colours)

    def _crop(self, i: int, k: int, width: int, height: int, *, seed: int) -> ViewParams:
        return draw_view(replace(self._views, seed=seed), self.learned.keys[i], k, width, height)

    @abstractmethod
    def truths(self) -> Iterator[Iterable[str]]:
        """Yield the truth of each training picture, and of each judged one: a label, or the sha256 of a map."""

    @abstractmethod
    def truth(self, i: int, view: ViewParams, size: int) -> NDArray[Any]:
        """Return the truth of a view of a training picture, as `loss` takes it."""

    def make_head(self, spec: EncoderSpec) -> nn.Module:
        """Build the task's head with random weights for an encoder's tokens."""
        return make_head(self.name, spec, num_classes=len(self.classes), max_m=self.max_m)

    @abstractmethod
    def probe(self, encode: Encode, spec: EncoderSpec, places: Sequence[int], *, steps: int, seed: int) -> nn.Module:
        """Return a head that was trained on the tokens of some training pictures, with the encoder as it is."""

    @abstractmethod
    def loss(self, said: Tensor, truth: Tensor) -> Tensor:
        """Return the mean loss of a head's output for a batch of views."""

    @abstractmethod
    def judge(self, head: nn.Module, encode: Encode) -> Judged:
        """Judge encoder and head on the judged pictures, as `eupe eval` does.

        Raises: CorpusError if none of them can be judged.
        """


class Classify(Task):
    """A label for each picture, from its summary by one linear layer."""

    name = CLASSIFY

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        splits = labelled_splits(config.data)
        require_classes(splits.val, splits.train, config.data)
        self._train, self._val = learned_and_judged(splits)
        self.learned, self.judged, self.groups = self._train.pictures, self._val.pictures, self._train.labels
        self.classes = order_labels(self._train.labels)
        if len(self.classes) < 2 or not len(self._val):
            raise ConfigError(
                f"{config.data} has {len(self.classes)} labels to learn and {len(self._val)} pictures to judge; a "
                "classifier needs two labels and a few pictures of each"
            )
        self._code = {name: code for code, name in enumerate(self.classes)}
        self.notes = (*tell_protocol(self._val, self._train), *splits.notes)

    def truths(self) -> Iterator[Iterable[str]]:
        yield from (self._train.labels, self._val.labels)

    def truth(self, i: int, view: ViewParams, size: int) -> NDArray[Any]:
        return np.array(self._code[self._train.labels[i]])

    def probe(self, encode: Encode, spec: EncoderSpec, places: Sequence[int], *, steps: int, seed: int) -> nn.Module:
        """Return logistic regression on standardised summaries, as one layer; see `eupe.evaluate.linear`."""
        seen = encode(self.learned.pick(places), centre)
        assert seen.summary is not None
        features = seen.summary.double()
        mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        codes = torch.tensor([self._code[self._train.labels[places[i]]] for i in seen.picture_V.tolist()])
        fitted = fit_logistic((features - mean) / std, codes, penalty=PROBE_PENALTY, num_labels=len(self.classes))
        weight, bias = fitted.weight_CD.double().cpu() / std, fitted.bias_C.double().cpu()
        head = self.make_head(spec)
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias - weight @ mean)
        return head

    def loss(self, said: Tensor, truth: Tensor) -> Tensor:
        return F.cross_entropy(said, truth, label_smoothing=SMOOTHING)

    @torch.inference_mode()
    def judge(self, head: nn.Module, encode: Encode) -> Judged:
        seen = encode(self.judged, centre)
        assert seen.summary is not None
        device = next(head.parameters()).device
        shares = head(seen.summary.to(device)).float().softmax(dim=1).cpu()
        labels = [self._val.labels[i] for i in seen.picture_V.tolist()]
        said = shares.argmax(dim=1).tolist()
        confusion = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        wrong: list[tuple[float, Wrong]] = []
        right = 0
        for i, (label, code) in enumerate(zip(labels, said, strict=True)):
            true = self._code.get(label)  # None for a class that the training pictures lack, which counts as wrong
            right += code == true
            if true is not None:
                confusion[true, code] += 1
            if code != true:
                share = float(shares[i, code])
                words = f"{label}, taken for {self.classes[code]} ({share:.0%})"
                wrong.append((share, Wrong(int(seen.picture_V[i]), self.judged.keys[seen.picture_V[i]], words)))
        wrong.sort(key=lambda each: -each[0])  # the surest mistakes first
        scores = {"accuracy": right / len(labels), "majority": max(Counter(labels).values()) / len(labels)}
        return Judged(scores, confusion.tolist(), [each for _, each in wrong[:MOST_WRONG]])


class Dense(Task):
    """A truth for each pixel, from dense tokens."""

    training: ClassVar[Training]
    """How the linear probe is trained, apart from the number of steps."""

    def __init__(self, config: FinetuneConfig, data: Masks | DepthMaps) -> None:
        super().__init__(config)
        self._data = data
        self.learned, self.judged = data.train.pictures, data.val.pictures
        self.groups = [""] * len(self.learned)

    def probe(self, encode: Encode, spec: EncoderSpec, places: Sequence[int], *, steps: int, seed: int) -> nn.Module:
        """Return a head that was trained on fixed tokens; see `eupe.evaluate.dense_probe`."""
        seen = encode(self.learned.pick(places), windows)
        return train_head(
            lambda _: self.make_head(spec),
            seen,
            lambda i: self._data.read_train(places[i]),
            self._loss_of_views,
            replace(self.training, steps=max(1, steps), seed=seed),
        )

    def truths(self) -> Iterator[Iterable[str]]:
        for part in (self._data.train, self._data.val):
            yield (hashlib.sha256(file.read_bytes()).hexdigest() for file in part.maps)

    def truth(self, i: int, view: ViewParams, size: int) -> NDArray[Any]:
        return view_of(self._data.read_train(i), view, size)

    @torch.inference_mode()
    def truth_and_answer(self, head: nn.Module, encode: Encode, i: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the truth of a judged picture, and what a model says of every pixel, [H, W] both."""
        seen = encode(self.judged.pick([i]), windows)
        ((said, truth),) = predictions(head, seen, lambda _: self._data.read_val(i))
        return truth, self._answer(said).cpu().numpy()

    def loss(self, said: Tensor, truth: Tensor) -> Tensor:
        return self._loss_of_views(resized(said, truth.shape[1:]), truth)

    @abstractmethod
    def _answer(self, said_CHW: Tensor) -> Tensor:
        """Return what a prediction says of every pixel, [H, W]: a class number, or a depth in metres."""

    @abstractmethod
    def _loss_of_views(self, said_BCSS: Tensor, truth_BSS: Tensor) -> Tensor:
        """Return the loss of predictions of every pixel."""


class Segment(Dense):
    """A class for each pixel, by one linear layer on layer-normed tokens."""

    name = SEGMENT
    training = SEGMENT_TRAINING

    def __init__(self, config: FinetuneConfig) -> None:
        self._masks = open_masks(Path(config.data), read_code(config.mask_values, config.mask_ignore))
        super().__init__(config, self._masks)
        self.classes = self._masks.names
        self.notes = (
            f"judged: {len(self.judged):,} pictures of {self._masks.val.name}, by {len(self.learned):,} of "
            f"{self._masks.train.name}; {len(self.classes):,} classes (values {self._masks.classes.told})",
        )

    def _answer(self, said_CHW: Tensor) -> Tensor:
        return said_CHW.argmax(dim=0)

    def _loss_of_views(self, said_BCSS: Tensor, truth_BSS: Tensor) -> Tensor:
        return segmentation_loss(said_BCSS, truth_BSS)

    def judge(self, head: nn.Module, encode: Encode) -> Judged:
        confusion, accuracies = self._masks.judge(head, encode(self.judged, windows))
        worst = [i for i in np.argsort(accuracies).tolist() if accuracies[i] < 1][:MOST_WRONG]  # NaN is never below 1
        return Judged(
            {"miou": mean_iou(confusion), "pixel_accuracy": pixel_accuracy(confusion)},
            confusion.tolist(),
            [Wrong(i, self.judged.keys[i], f"{accuracies[i]:.0%} of the pixels are right") for i in worst],
        )


class Depth(Dense):
    """The depth of each pixel, by BatchNorm and a linear layer over bins."""

    name = DEPTH
    training = DEPTH_TRAINING
    lower_is_better = True

    def __init__(self, config: FinetuneConfig) -> None:
        unit = None if config.depth_unit is None else depth_unit(config.depth_unit)
        self._maps = open_depth(Path(config.data), unit=unit, max_m=config.max_depth)
        super().__init__(config, self._maps)
        self.max_m = config.max_depth
        self._flip = config.flip
        self.notes = tuple(self._maps.notes)

    def _crop(self, i: int, k: int, width: int, height: int, *, seed: int) -> ViewParams:
        """Draw a square of the picture's shorter side: a crop that is enlarged would show other depths."""
        random = np.random.default_rng([seed, i, k])
        side = min(width, height)
        x, y = (int(random.integers(0, length - side + 1)) for length in (width, height))
        return ViewParams((x, y, x + side, y + side), bool(random.random() < self._flip), NEUTRAL)

    def _answer(self, said_CHW: Tensor) -> Tensor:
        return said_CHW[0]

    def _loss_of_views(self, said_BCSS: Tensor, truth_BSS: Tensor) -> Tensor:
        return self._maps.loss(said_BCSS, truth_BSS)

    def judge(self, head: nn.Module, encode: Encode) -> Judged:
        errors = self._maps.judge(head, encode(self.judged, windows))
        worst = sorted(errors, key=lambda i: -errors[i]["rmse"])[:MOST_WRONG]
        return Judged(
            depth_measures(list(errors.values())),
            [],
            [Wrong(i, self.judged.keys[i], f"off by {errors[i]['rmse']:.3g} m (RMSE)") for i in worst],
        )


TASKS: dict[str, type[Task]] = {task.name: task for task in (Classify, Segment, Depth)}


def open_task(config: FinetuneConfig) -> Task:
    """Read the pictures and the truth that a config names.

    Raises: ConfigError, CorpusError as the tasks of `eupe eval`.
    """
    return TASKS[config.task](config)
