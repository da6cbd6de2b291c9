"""One training run, as asked for, and what it resolved to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eupe.encoder import timm_card
from eupe.errors import ConfigError
from eupe.place import Place, Where
from eupe.store import Store
from eupe.train.targets import TargetSet

CONFIG_FILE = "config.json"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The flags of `eupe train`; defaults stand here and nowhere else."""

    targets: tuple[Where, ...]
    """Stores: folders, `s3://...` or `gs://...`."""
    student: str
    """A timm architecture."""
    out: Path
    corpus: Where | None = None
    """Where the pictures are now; the place noted in the first store where not given."""
    size: int | None = None
    """Side of the student's input in pixels; the first store's where not given."""
    epochs: float | None = None
    steps: int | None = None
    """Give one of the two; one epoch where neither is given."""
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    head_width: int = 3072
    """Hidden width of the adapter heads (the paper: 1536 for the proxy, 3072 for students)."""
    holdout: float = 0.1
    """Share of the pictures that validation sees and training never does."""
    dtype: str = "auto"
    seed: int = 0
    checkpoint_every: int = 500
    validate_every: int = 500
    log_every: int = 10
    resume: bool = False

    def __post_init__(self) -> None:
        wrong = [
            f"--{name.replace('_', '-')} must be at least 1, got {value}"
            for name in (
                "size",
                "steps",
                "batch_size",
                "head_width",
                "checkpoint_every",
                "validate_every",
                "log_every",
            )
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if self.epochs is not None and self.epochs <= 0:
            wrong.append(f"--epochs must be above 0, got {self.epochs:g}")
        if self.epochs is not None and self.steps is not None:
            wrong.append("give --epochs or --steps, not both")
        if not Place.of(self.out).is_local:
            wrong.append(f"--out must be a local folder, got {Place.of(self.out)}")
        if not self.targets:
            wrong.append("give at least one store with --targets")
        if not 0 < self.holdout < 1:
            wrong.append(f"--holdout must be between 0 and 1, got {self.holdout:g}")
        if not 0 <= self.warmup < 1:
            wrong.append(f"--warmup must be at least 0 and below 1, got {self.warmup:g}")
        if self.dtype == "fp16":
            wrong.append("--dtype fp16 would lose gradients that are not scaled; use bf16, fp32 or auto")
        if self.lr <= 0:
            wrong.append(f"--lr must be above 0, got {self.lr:g}")
        if wrong:
            raise ConfigError("; ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """What decides a run's outcome, kept as `config.json`: two runs with equal cards are the same run."""

    config: dict[str, Any]
    targets: tuple[dict[str, Any], ...]
    """Per store: place, fingerprint of its spec, teacher, licence, widths."""
    total_steps: int

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "targets": list(self.targets)}


def resolve(config: TrainConfig, targets: TargetSet, *, size: int) -> RunCard:
    """Turn durations into steps and name the targets.

    Raises: ConfigError if the student is unknown or cannot take the size, the batch exceeds what there is to train on,
        or nothing is held out.
    """
    timm_card(config.student, size)
    num_train = int((~targets.held_out).sum()) * targets.num_views
    if not targets.held_out.any():
        raise ConfigError(
            f"--holdout {config.holdout:g} keeps out none of the {targets.num_joined} pictures; give a larger share"
        )
    if config.batch_size > num_train:
        raise ConfigError(f"--batch-size {config.batch_size} exceeds the {num_train} views there are to train on")
    steps_per_epoch = num_train // config.batch_size
    total = config.steps or max(1, round((config.epochs or 1) * steps_per_epoch))
    decisive = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("targets", "out", "corpus", "resume", "log_every", "checkpoint_every", "epochs", "steps")
    }
    return RunCard(
        config={**decisive, "size": size},
        targets=tuple(target_card(store) for store in targets.stores),
        total_steps=total,
    )


def target_card(store: Store) -> dict[str, Any]:
    """What a run keeps of a target."""
    teacher = store.spec.teacher
    return {
        "path": str(store.path),
        "fingerprint": store_fingerprint(store),
        "teacher": teacher["name"],
        "licence": teacher["licence"],
        "summary_dim": teacher["summary_dim"] if "summary" in store.spec.tokens else 0,
        "dense_dim": teacher["dense_dim"] if "dense" in store.spec.tokens else 0,
    }


def store_fingerprint(store: Store) -> str:
    """SHA-256 of what decides a store's content, wherever it lies and whatever made it."""
    return hashlib.sha256(json.dumps(store.spec.identity(), sort_keys=True).encode()).hexdigest()
