"""Training of a small head on frozen dense tokens with ground-truth maps, shared by segmentation and depth.

Features are computed once, before the first step. Views are windows that cover a picture, or the views that a store
holds. Predictions are averaged where views overlap.

Shapes: B views of a batch, S side of a view in pixels, C outputs of the head, H W height and width of a whole picture.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from eupe.common.compute import pick_device
from eupe.common.prefetch import map_ahead
from eupe.common.resize import interpolation_matrix
from eupe.corpus.views import ViewParams
from eupe.errors import ConfigError, CorpusError, TrainingError
from eupe.evaluate.encode import EncodedViews
from eupe.evaluate.layouts import Mapped
from eupe.train.trainer import learning_rate

Truth = NDArray[Any]
ReadTruth = Callable[[int], Truth]
"""Function from a picture's index to its ground-truth map, [H, W]."""

Head = TypeVar("Head", bound=nn.Module)

BATCHES_AHEAD = 4


@dataclass(frozen=True, kw_only=True)
class Training:
    """Hyperparameters of a head's training."""

    steps: int
    lr: float
    batch_size: int = 16
    weight_decay: float = 1e-3
    warmup: float
    """Share of the steps over which the learning rate rises to `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ConfigError(f"--steps and --batch-size must be at least 1, got {self.steps} and {self.batch_size}")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"--lr must be above 0, and finite, got {self.lr:g}")


def train_head(
    make_head: Callable[[int], Head],
    encoded: EncodedViews,
    read_truth: ReadTruth,
    loss: Callable[[Tensor, Tensor], Tensor],
    how: Training,
    *,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Head:
    """Train a head with AdamW on batches of views, drawn without replacement in each epoch; return it in eval mode.

    Its weights are drawn with the seed of `how`; the caller's random state stays as it was.

    Args:
        make_head: function from D to a module from dense tokens [B, h, w, D] to [B, C, h, w], which is resized
            bilinearly to the view.
        loss: function of the predictions [B, C, S, S] and the views' ground truth [B, S, S].
    Raises: TrainingError if the loss is not finite; CorpusError if a map cannot be read.
    """
    device = pick_device()
    assert encoded.dense is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        head = make_head(encoded.dense.shape[-1]).to(device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=how.lr, betas=how.betas, weight_decay=how.weight_decay)
    for step, (tokens, truth) in enumerate(_batches(encoded, read_truth, how)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, peak=how.lr, warmup_steps=round(how.warmup * how.steps), total_steps=how.steps
            )
        said = head(tokens.to(device).float())
        value = loss(resized(said, truth.shape[1:]), truth.to(device))
        if not torch.isfinite(value):
            raise TrainingError(f"the head's loss is {value.item()} at step {step}; a lower --lr may help")
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        if how.clip is not None:
            nn.utils.clip_grad_norm_(head.parameters(), how.clip)
        optimizer.step()
        on_step(step + 1, how.steps)
    return head.eval()


def _batches(encoded: EncodedViews, read_truth: ReadTruth, how: Training) -> Iterator[tuple[Tensor, Tensor]]:
    assert encoded.dense is not None
    dense = encoded.dense

    def load(views: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        maps = [view_of(read_truth(int(encoded.picture_V[v])), encoded.params[v], encoded.size) for v in views]
        return dense[torch.from_numpy(views)], torch.from_numpy(np.stack(maps))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from map_ahead(
            pool, load, drawn(len(encoded), how.batch_size, how.steps, seed=how.seed), ahead=BATCHES_AHEAD
        )


def drawn(count: int, batch_size: int, steps: int, *, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield a batch of indices below `count` for each step, drawn without replacement in each epoch."""
    generator = np.random.default_rng(seed)
    left = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(left) < batch_size:
            left = np.concatenate([left, generator.permutation(count)])
        yield left[:batch_size]
        left = left[batch_size:]


@torch.inference_mode()
def predictions(head: nn.Module, encoded: EncodedViews, read_truth: ReadTruth) -> Iterator[tuple[Tensor, Truth]]:
    """Yield for each picture the head's prediction of every pixel, and the ground truth.

    Yields: float32 [C, H, W], NaN where no view covers the pixel; the ground truth, [H, W].
    """
    device = pick_device()
    assert encoded.dense is not None
    for i in np.unique(encoded.picture_V).tolist():
        truth = read_truth(i)
        total: Tensor | None = None
        covered = torch.zeros(truth.shape, device=device)
        for v in np.flatnonzero(encoded.picture_V == i).tolist():
            x0, y0, x1, y1 = encoded.params[v].box
            said = resized(head(encoded.dense[v : v + 1].to(device).float()), (y1 - y0, x1 - x0))[0]
            said = said.flip(-1) if encoded.params[v].flip else said
            if total is None:
                total = said.new_zeros(len(said), *truth.shape)
            total[:, y0:y1, x0:x1] += said
            covered[y0:y1, x0:x1] += 1
        assert total is not None
        yield total.div_(covered).masked_fill_(covered == 0, torch.nan), truth


def require_truth(pictures: int, read_truth: ReadTruth) -> None:
    """Read every map once, so that a bad one is found before any other work.

    Raises: the errors of `read_truth`.
    """
    for _ in each_truth(pictures, read_truth):
        pass


def each_truth(pictures: int, read_truth: ReadTruth) -> Iterator[Truth]:
    """Yield every map once, in order, while several are read at a time.

    Raises: the errors of `read_truth`.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from map_ahead(pool, read_truth, range(pictures), ahead=BATCHES_AHEAD)


def view_of(truth: Truth, params: ViewParams, size: int) -> Truth:
    """Return the part of a ground-truth map that a view shows, [S, S]; nearest neighbour, so that values never mix."""
    image = Image.fromarray(truth).crop(params.box).resize((size, size), Image.Resampling.NEAREST)
    values = np.asarray(image)
    return np.ascontiguousarray(values[:, ::-1]) if params.flip else values


def require_same_sides(mapped: Mapped, i: int, truth: Truth) -> Truth:
    """Return the map, or raise CorpusError if its size is not that of its picture."""
    width, height = mapped.pictures.sides(i)
    if truth.shape != (height, width):
        raise CorpusError(
            f"{mapped.maps[i]} has {truth.shape[1]}x{truth.shape[0]} pixels, but its picture "
            f"{mapped.pictures.keys[i]} has {width}x{height}; they must be the same"
        )
    return truth


def resized(said_BChw: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Return a head's output for every pixel, float32 [B, C, H, W], by bilinear interpolation to `sides`."""
    rows_Hh, columns_Ww = (
        interpolation_matrix(before, after, mode="bilinear", device=said_BChw.device)
        for before, after in zip(said_BChw.shape[2:], sides, strict=True)
    )
    return rows_Hh @ said_BChw.float() @ columns_Ww.T
