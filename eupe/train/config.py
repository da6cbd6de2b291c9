"""One training run, as asked for, and what it resolved to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eupe.encoder import load_card, near, timm_card
from eupe.errors import ConfigError
from eupe.place import Place, Where
from eupe.store import Store
from eupe.train.normalise import NORMALISATIONS
from eupe.train.sampling import VIEW_ORDERS
from eupe.train.targets import TargetSet

CONFIG_FILE = "config.json"
VERSIONED = ("eupe", "torch", "timm", "pillow")

HOW = frozenset(
    [
        "targets",
        "mix",
        "out",
        "corpus",
        "resume",
        "epochs",
        "steps",
        "init",
        "wandb",
        "log_every",
        "checkpoint_every",
        "validate_every",
        "keep",
        "keep_every",
        "num_workers",
        "ray_address",
        "accumulate",
        "compile",
        "recompute",
        "shard",
    ]
)
"""Options that do not make another run: where things are, how long (the steps are kept apart), and how it is done."""


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
    """Sizes of the stores, one drawn for each step and store; each store's first where not given."""
    epochs: float | None = None
    steps: int | None = None
    """Give one of the two; one epoch where neither is given."""
    batch_size: int = 128
    """Views per update, over all workers."""
    accumulate: int = 1
    """Pieces in which a worker takes its share of a batch."""
    lr: float = 1e-3
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
        wrong = [*self._below_one(), *self._out_of_range()]
        if self.epochs is not None and self.steps is not None:
            wrong.append("give --epochs or --steps, not both")
        if not Place.of(self.out).is_local:
            wrong.append(f"--out must be a local folder, got {Place.of(self.out)}")
        if not self.targets:
            wrong.append("give at least one store with --targets")
        if not self.student and self.init is None:
            wrong.append("give --student, or a run to go on from with --init")
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
        if self.seed < 0:
            wrong.append(f"--seed must be at least 0, got {self.seed}")
        if self.lr <= 0:
            wrong.append(f"--lr must be above 0, got {self.lr:g}")
        if self.clip is not None and self.clip <= 0:
            wrong.append(f"--clip must be above 0, got {self.clip:g}")
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


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """What decides a run's outcome, kept as `config.json`: two runs with equal cards are the same run."""

    config: dict[str, Any]
    targets: tuple[dict[str, Any], ...]
    """Per store: place, fingerprint of its spec, teacher, licence, widths."""
    mix: tuple[dict[str, Any], ...] = ()
    """Per corpus mixed in: `share`, and `targets` as above."""
    total_steps: int
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of what trains, which does not make another run."""

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> RunCard:
        """Raises: TypeError, KeyError."""
        return cls(**{**plain, "targets": tuple(plain["targets"]), "mix": tuple(plain.get("mix", ()))})

    @property
    def size(self) -> int:
        """The student's first size in pixels, at which it is judged."""
        return int(self.config["size"][0])

    def target_sizes(self, store: Store) -> tuple[int, ...]:
        """The sizes of a store that are drawn from."""
        return tuple(self.config["target_size"]) or store.spec.sizes[:1]


def resolve(config: TrainConfig, corpora: Sequence[TargetSet]) -> RunCard:
    """Turn durations into steps and name the targets.

    Args:
        corpora: that of `config.targets`, then those of `config.mix`.
    Raises: ConfigError if the student is unknown or cannot take a size, a store lacks one, the batch exceeds what there
        is to train on, or nothing is held out.
    """
    targets = corpora[0]
    student = config.student or load_card(_run(config.init)).arch
    sizes = config.size or targets.stores[0].spec.sizes[:1]
    for size in sizes:
        timm_card(student, size)
    for store in (store for corpus in corpora for store in corpus.stores):
        if lacking := set(config.target_size) - set(store.spec.sizes):
            raise ConfigError(
                f"{store.path} has no features at {', '.join(map(str, sorted(lacking)))} px, only at "
                f"{', '.join(map(str, store.spec.sizes))}; give another --target-size"
            )
    mixes = parse_mix(config.mix, num_targets=len(config.targets))
    decisive = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in HOW}
    decisive |= {"student": student, "size": sizes, "init": None if config.init is None else _digest(config.init)}
    return RunCard(
        config=decisive,
        targets=tuple(target_card(store) for store in targets.stores),
        mix=tuple(
            {"share": mixed.share, "targets": tuple(target_card(store) for store in corpus.stores)}
            for mixed, corpus in zip(mixes, corpora[1:], strict=True)
        ),
        total_steps=_total_steps(config, corpora, mixes),
        versions={"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
    )


def _total_steps(config: TrainConfig, corpora: Sequence[TargetSet], mixes: Sequence[MixedIn]) -> int:
    """Steps asked for; an epoch is one of the first corpus.

    Raises: ConfigError if a corpus holds nothing out, or less than a batch.
    """
    for corpus in corpora:
        num_train = len(corpus.training) * (corpus.num_views if config.views == "all" else 1)
        if not corpus.held_out.any():
            raise ConfigError(
                f"--holdout {config.holdout:g} keeps out none of the {corpus.num_joined} pictures; give a larger share"
            )
        if config.batch_size > num_train:
            raise ConfigError(f"--batch-size {config.batch_size} exceeds the {num_train} views there are to train on")
    first = len(corpora[0].training) * (corpora[0].num_views if config.views == "all" else 1)
    per_epoch = first // config.batch_size / (1 - sum(mixed.share for mixed in mixes))
    return config.steps or max(1, round((config.epochs or 1) * per_epoch))


def _run(init: Path | None) -> Path:
    """Raises: ConfigError unless it is a run, whose architecture is known."""
    if init is None or not init.is_dir():
        raise ConfigError(f"--init {init} is no training run, so give --student, too")
    return init


def _digest(init: Path) -> str:
    """SHA-256 of the weights that a student starts from.

    Raises: ConfigError if there are none.
    """
    path = init / "student.safetensors" if init.is_dir() else init
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"--init {init} is neither a finished training run nor a file of weights: {error}") from error


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


def target_names(card: RunCard) -> list[str]:
    """One name per target: its teacher's, numbered where two are the same."""
    names = [Path(target["teacher"]).name for target in card.targets]
    return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]


def loss_weights(card: RunCard) -> list[dict[str, float]]:
    """Per target, the factor of each kind of token's loss.

    Raises: ConfigError for a word that is no weight, or names no target or kind.
    """
    names = target_names(card)
    weights = {
        f"{name}/{kind}": 1.0
        for name, target in zip(names, card.targets, strict=True)
        for kind in ("summary", "dense")
        if target[f"{kind}_dim"]
    }
    for word in card.config["weight"]:
        name, _, number = word.rpartition("=")
        chosen = [known for known in weights if known == name or known.rpartition("/")[0] == name]
        try:
            factor = float(number)
        except ValueError:
            factor = -1.0
        if not 0 <= factor < float("inf"):
            raise ConfigError(f"--weight takes TARGET=W or TARGET/KIND=W with W at least 0, got {word!r}")
        if not chosen:
            known = ", ".join([*names, *weights])
            raise ConfigError(f"--weight {word!r} names no target{near(name, list(weights))}; there are {known}")
        weights.update(dict.fromkeys(chosen, factor))
    if not any(weights.values()):
        raise ConfigError("--weight leaves no loss to learn from; give one of them a weight above 0")
    return [
        {known.rpartition("/")[2]: w for known, w in weights.items() if known.rpartition("/")[0] == name}
        for name in names
    ]


def store_fingerprint(store: Store) -> str:
    """SHA-256 of what decides a store's content, wherever it lies and whatever made it."""
    return hashlib.sha256(json.dumps(store.spec.identity(), sort_keys=True).encode()).hexdigest()
