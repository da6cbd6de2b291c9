"""The flags of `eupe train`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eupe.errors import ConfigError
from eupe.place import Place, Where
from eupe.train.normalise import NORMALISATIONS
from eupe.train.sampling import VIEW_ORDERS
from eupe.train.schedule import LR_SCALINGS


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The flags of `eupe train`; defaults stand here and nowhere else."""

    targets: tuple[Where, ...]
    """Stores: folders, `s3://...` or `gs://...`."""
    student: str = ""
    """A timm architecture; that of the run in `init` where not given."""
    out: Path
    init: Path | None = None
    """A finished run to go on from (student and heads), or weights of such a model."""
    mix: tuple[str, ...] = ()
    """`SHARE:STORE[,STORE...]`: a corpus of its own batches, with stores of the same teachers in the same order."""
    corpus: Where | None = None
    """Where the pictures of `targets` are now; the place noted in the first store where not given."""
    size: tuple[int, ...] = ()
    """Sides of the student's input in pixels, one drawn for each step; the first store's first where not given."""
    target_size: tuple[int, ...] = ()
    """Sizes of the stores, one drawn for each step and store; where not given, each store's nearest to `size`."""
    epochs: float | None = None
    steps: int | None = None
    """Give one of the two; one epoch where neither is given."""
    batch_size: int = 128
    """Views per update, over all workers."""
    accumulate: int = 1
    """Pieces in which a worker takes its share of a batch."""
    lr: float = 1e-3
    lr_scaling: str | None = None
    """`sqrt`: the peak is `lr` times 4 sqrt(batch_size / 1024); `lr` itself where not given."""
    weight_decay: float = 1e-4
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    clip: float | None = None
    """Greatest norm of the gradient."""
    ema: float | None = None
    """Decay of the moving average of all weights that is validated and exported in place of the weights."""
    head_width: int = 3072
    """Hidden width of the adapter heads (the paper: 1536 for the proxy, 3072 for students)."""
    weight: tuple[str, ...] = ()
    """`TARGET=W` or `TARGET/KIND=W`: factors of the losses, 1 where not given."""
    normalise: str = "standard"
    """standard, phi-s or none."""
    drop: float = 0.0
    """Probability that a target, other than the one with the greatest loss, does not count for a view."""
    views: str = "all"
    """What an epoch is: all views of every picture, or one of each, cycled or drawn."""
    photometric: str = "none"
    """`eupe` recolours the views of the student alone, anew at each step."""
    holdout: float = 0.1
    """Share of the pictures that validation sees and training never does."""
    dtype: str = "auto"
    seed: int = 0
    num_workers: int = 1
    ray_address: str | None = None
    shard: bool = False
    """Weights, gradients and optimiser are spread over the workers (FSDP2)."""
    compile: bool = False
    sync_batch_norm: bool = False
    """Batch norms take their means over the views of all workers; only on GPUs."""
    rope_rescale: float | None = None
    """R: in training, coordinates of a rotary position embedding are scaled by a random factor from 1/R to R."""
    recompute: bool = False
    """Activations are computed again for the gradient in place of being kept."""
    checkpoint_every: int = 500
    validate_every: int = 500
    log_every: int = 10
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints of multiples of so many steps stay for good."""
    wandb: str | None = None
    """Project of Weights & Biases that is told, too."""
    resume: bool = False

    def __post_init__(self) -> None:
        if wrong := self._not_finite():
            raise ConfigError("; ".join(wrong))
        wrong = [*self._below_one(), *self._out_of_range()]
        if self.epochs is not None and self.steps is not None:
            wrong.append("give --epochs or --steps, not both")
        if not Place.of(self.out).is_local:
            wrong.append(f"--out must be a local folder, got {Place.of(self.out)}")
        if not self.targets:
            wrong.append("give at least one store with --targets")
        if not self.student and self.init is None:
            wrong.append("give --student, or a run to go on from with --init")
        if self.lr_scaling not in (None, *LR_SCALINGS):
            wrong.append(f"--lr-scaling {self.lr_scaling!r} is unknown; give {', '.join(LR_SCALINGS)}, or leave it out")
        if self.dtype == "fp16":
            wrong.append("--dtype fp16 would lose gradients that are not scaled; use bf16, fp32 or auto")
        for option, value, known in (
            ("--normalise", self.normalise, NORMALISATIONS),
            ("--views", self.views, VIEW_ORDERS),
            ("--photometric", self.photometric, ("none", "eupe")),
        ):
            if value not in known:
                wrong.append(f"{option} {value!r} is unknown; give {', '.join(known)}")
        if not wrong and self.batch_size % (self.num_workers * self.accumulate):
            wrong.append(
                f"--batch-size {self.batch_size} does not divide among {self.num_workers} workers in "
                f"{self.accumulate} pieces; give a multiple of {self.num_workers * self.accumulate}"
            )
        if self.shard and self.num_workers == 1:
            wrong.append("--shard spreads the model over workers; give --num-workers above 1")
        if wrong:
            raise ConfigError("; ".join(wrong))

    def _not_finite(self) -> list[str]:
        return [
            f"--{name.replace('_', '-')} must be a finite number, got {value}"
            for name, value in vars(self).items()
            if isinstance(value, float) and not math.isfinite(value)
        ]

    def _below_one(self) -> list[str]:
        counts = "steps batch_size accumulate head_width num_workers checkpoint_every validate_every log_every keep"
        return [
            f"--{name.replace('_', '-')} must be at least 1, got {number}"
            for name in ("size", "target_size", "keep_every", *counts.split())
            if (value := getattr(self, name)) is not None
            for number in (value if isinstance(value, tuple) else (value,))
            if number < 1
        ]

    def _out_of_range(self) -> list[str]:
        wrong = []
        if self.epochs is not None and self.epochs <= 0:
            wrong.append(f"--epochs must be above 0, got {self.epochs:g}")
        if not 0 < self.holdout < 1:
            wrong.append(f"--holdout must be between 0 and 1, got {self.holdout:g}")
        if not 0 <= self.warmup < 1:
            wrong.append(f"--warmup must be at least 0 and below 1, got {self.warmup:g}")
        if not 0 <= self.drop < 1:
            wrong.append(f"--drop must be at least 0 and below 1, got {self.drop:g}")
        if self.drop and len(self.targets) == 1:
            wrong.append("--drop leaves out targets, never the last; give several --targets")
        if not 0 <= self.seed < 2**63:
            wrong.append(f"--seed must be at least 0 and below 2^63, got {self.seed}")
        if self.weight_decay < 0:
            wrong.append(f"--weight-decay must be at least 0, got {self.weight_decay:g}")
        if self.lr <= 0:
            wrong.append(f"--lr must be above 0, got {self.lr:g}")
        if self.clip is not None and self.clip <= 0:
            wrong.append(f"--clip must be above 0, got {self.clip:g}")
        if self.rope_rescale is not None and self.rope_rescale < 1:
            wrong.append(f"--rope-rescale must be at least 1, got {self.rope_rescale:g}")
        if self.ema is not None and not 0 < self.ema < 1:
            wrong.append(f"--ema must be between 0 and 1, got {self.ema:g}")
        return wrong


@dataclass(frozen=True)
class MixedIn:
    """One `--mix`, parsed."""

    share: float
    stores: tuple[str, ...]


def parse_mix(words: Sequence[str], *, num_targets: int) -> tuple[MixedIn, ...]:
    """Raises: ConfigError."""
    parsed = []
    for word in words:
        share, _, stores = word.partition(":")
        try:
            mixed = MixedIn(float(share), tuple(stores.split(",")))
        except ValueError:
            mixed = MixedIn(0, ())
        if not 0 < mixed.share < 1 or not all(mixed.stores):
            raise ConfigError(f"--mix takes SHARE:STORE[,STORE...] with a share between 0 and 1, got {word!r}")
        if len(mixed.stores) != num_targets:
            raise ConfigError(
                f"--mix {word!r} names {len(mixed.stores)} stores, but there are {num_targets} --targets; "
                "every corpus needs one of each teacher, in the same order"
            )
        parsed.append(mixed)
    if sum(mixed.share for mixed in parsed) >= 1:
        raise ConfigError("the shares of --mix leave nothing for --targets; together they must be below 1")
    return tuple(parsed)
