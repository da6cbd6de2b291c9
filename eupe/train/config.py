"""The options of `eupe train`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eupe.errors import ConfigError
from eupe.place import Place, Where
from eupe.train.normalise import NORMALISATIONS
from eupe.train.sampling import VIEW_ORDERS

LR_SCALINGS = ("sqrt",)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options of `eupe train`; their defaults are defined only here."""

    targets: tuple[Where, ...]
    """Stores: folders, `s3://...` or `gs://...`."""
    student: str = ""
    """A timm architecture; by default that of the run in `init`."""
    out: Path
    init: Path | None = None
    """A finished run to start from (student and heads), or a weights file for such a model."""
    mix: tuple[str, ...] = ()
    """`SHARE:STORE[,STORE...]`: a corpus with its own batches, from stores of the same teachers in the same order."""
    corpus: Where | None = None
    """Current location of the pictures of `targets`; by default the one recorded in the first store."""
    size: tuple[int, ...] = ()
    """Sides of the student's input in pixels, one drawn for each step; by default the first store's first size."""
    target_size: tuple[int, ...] = ()
    """Feature sizes, one drawn for each step and store; by default each store's nearest to the first of `size`."""
    epochs: float | None = None
    steps: int | None = None
    """At most one of `epochs` and `steps` may be given; one epoch by default."""
    batch_size: int = 128
    """Views per optimizer step, over all workers."""
    accumulate: int = 1
    """Number of microbatches into which a worker splits its share of a batch."""
    lr: float = 1e-3
    lr_scaling: str | None = None
    """`sqrt`: the peak rate is `lr` times 4 sqrt(batch_size / 1024); by default it is `lr`."""
    weight_decay: float = 1e-4
    warmup: float = 0.05
    """Share of the steps during which the learning rate rises."""
    clip: float | None = None
    """Maximum norm of the gradient; no clipping by default."""
    ema: float | None = None
    """Decay of a moving average of the weights, which is validated and exported instead of them."""
    head_width: int = 3072
    """Hidden width of the adapter heads (the paper: 1536 for the proxy, 3072 for students)."""
    weight: tuple[str, ...] = ()
    """`TARGET=W` or `TARGET/KIND=W`: factors of the losses; 1 by default."""
    normalise: str = "standard"
    """`standard`, `phi-s` or `none`."""
    drop: float = 0.0
    """Probability of dropping a target's loss for a view; a view's largest loss is never dropped."""
    views: str = "all"
    """Views in an epoch: `all` of each picture, or one of each, in turn (`cycle`) or at random (`draw`)."""
    photometric: str = "none"
    """`eupe` recolours the student's views alone, differently at each step."""
    holdout: float = 0.1
    """Share of the pictures that are used for validation and never for training."""
    dtype: str = "auto"
    seed: int = 0
    num_workers: int = 1
    ray_address: str | None = None
    shard: bool = False
    """Shard weights, gradients and optimizer state over the workers (FSDP2)."""
    compile: bool = False
    sync_batch_norm: bool = False
    """Let batch norms take their means over the views of all workers; only on GPUs."""
    rope_rescale: float | None = None
    """R: in training, scale the coordinates of a rotary position embedding by a random factor from 1/R to R."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    checkpoint_every: int = 500
    validate_every: int = 500
    log_every: int = 10
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int | None = None
    """Also keep checkpoints whose step is a multiple of this."""
    wandb: str | None = None
    """Project of Weights & Biases to log to."""
    resume: bool = False

    def __post_init__(self) -> None:
        # first, because NaN passes some of the range checks
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
            wrong.append("give --student, or a run to start from with --init")
        if self.lr_scaling not in (None, *LR_SCALINGS):
            wrong.append(f"--lr-scaling {self.lr_scaling!r} is unknown; give {', '.join(LR_SCALINGS)}, or leave it out")
        if self.dtype == "fp16":
            wrong.append("--dtype fp16 would lose small gradients, because they are not scaled; use bf16, fp32 or auto")
        for option, value, known in (
            ("--normalise", self.normalise, NORMALISATIONS),
            ("--views", self.views, VIEW_ORDERS),
            ("--photometric", self.photometric, ("none", "eupe")),
        ):
            if value not in known:
                wrong.append(f"{option} {value!r} is unknown; give {', '.join(known)}")
        # only once the counts are known to be valid: 0 workers would divide by zero
        if not wrong and self.batch_size % (self.num_workers * self.accumulate):
            wrong.append(
                f"--batch-size {self.batch_size} is not divisible by the number of workers x microbatches "
                f"({self.num_workers} x {self.accumulate}); give a multiple of {self.num_workers * self.accumulate}"
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
            wrong.append("--drop never drops the only target; give several --targets")
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
    """One `--mix` option, parsed."""

    share: float
    stores: tuple[str, ...]


def parse_mix(words: Sequence[str], *, num_targets: int) -> tuple[MixedIn, ...]:
    """Parse the `--mix` options.

    Raises: ConfigError if one is malformed or names another number of stores than `num_targets`, or if the shares leave
        nothing for the targets.
    """
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
                "every corpus needs one store of each teacher, in the same order"
            )
        parsed.append(mixed)
    if sum(mixed.share for mixed in parsed) >= 1:
        raise ConfigError("the shares of --mix leave nothing for --targets; their sum must be below 1")
    return tuple(parsed)
