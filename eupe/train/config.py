"""The options of `eupe train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eupe.common.option import about, option, wrong_values
from eupe.errors import ConfigError

if TYPE_CHECKING:
    from eupe.common.storage import AnyPath

STANDARD, PHI_S, NONE = "standard", "phi-s", "none"
NORMALISATIONS = (STANDARD, PHI_S, NONE)
VIEW_ORDERS = ("all", "cycle", "draw")
FROZEN_SHARE, ENCODER_LR_MULT = 0.2, 0.1
"""Protection of an encoder from `--init` under heads that are not: their first gradients would ruin it."""
BANK_SIZE, BANK_TEMPERATURE = 1024, 0.07
FROZEN_NORMS, RUNNING_NORMS = BATCH_NORMS = "frozen", "running"

HOW_DIVIDED = "how the work is divided"
WHICH_STAY = "which checkpoints stay"
WHAT_IS_TOLD = "what is reported during training"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options of `eupe train`; everything about one is defined only here."""

    targets: tuple[AnyPath, ...] = field(
        metadata=about(
            "A store to learn from, also s3:// or gs://. May be repeated.",
            recorded_as="targets, the fingerprints of the stores",
        )
    )
    student: str = option(
        "",
        "Any timm ViT or CNN; NAME.TAG starts from pretrained weights. Or torchvision:NAME, hf:DIR_OR_REPO, or "
        "PACKAGE.MODULE:FUNCTION, which returns a torch module. May be repeated, with one --out for each: several "
        "students on the same stream.",
        each=True,
        may_differ=True,
    )
    """By default that of the run in `init`."""
    out: Path = field(
        metadata=about(
            "The run's directory; one per student.",
            each=True,
            may_differ=True,
            in_files=False,
            indifferent="named after the key",
        )
    )
    init: Path | None = option(
        None,
        "A finished run to start from, or a weights file of such a model; one per student.",
        each=True,
        may_differ=True,
        recorded_as="init, a digest of the weights",
    )
    """A run brings its heads as well."""
    pretrained: bool = option(
        False,
        "Start from the weights that the student's library has for it, or that its factory returned. A student named "
        "with a tag of timm's, NAME.TAG, always does, unless --init is given.",
        recorded_as="pretrained, a digest of the weights",
    )
    mix: tuple[str, ...] = option(
        (),
        "SHARE:STORE[,STORE...]: another corpus, and the share of the steps that train on it.",
        recorded_as="mix, the shares and the fingerprints of the stores",
    )
    """The corpus has its own batches, from stores of the same teachers in the same order."""
    corpus: AnyPath | None = option(
        None,
        "Where the pictures are now.",
        unset="the location recorded in the store",
        indifferent="current location of the pictures; the stores say which pictures they are",
    )
    size: tuple[int, ...] = option(
        (),
        "Side of the student's input in pixels; of several, one is drawn per step.",
        unset="the first store's",
        least=1,
    )
    target_size: tuple[int, ...] = option(
        (),
        "Size of the targets; of several, one is drawn per step.",
        unset="each store's nearest to --size",
        least=1,
    )
    epochs: float | None = option(
        None,
        "Passes over all training views.",
        unset="1, unless --steps is given",
        above=0,
        recorded_as="total_steps",
    )
    steps: int | None = option(None, "Number of updates, instead of --epochs.", least=1, recorded_as="total_steps")
    batch_size: int = option(128, "Views per update, over all workers.", least=1)
    accumulate: int = option(
        1,
        "Number of pieces into which a worker splits its share of a batch.",
        least=1,
        indifferent=f"{HOW_DIVIDED}; changes rounding, and what a batch norm sees",
    )
    lr: float = option(1e-3, "Peak learning rate of AdamW.", above=0, may_differ=True)
    lr_scaling: str | None = option(
        None, "sqrt: the peak learning rate is --lr times 4 sqrt(batch size / 1024).", choices=("sqrt",)
    )
    weight_decay: float = option(1e-4, "Weight decay of AdamW.", least=0, may_differ=True)
    warmup: float = option(
        0.05, "Share of the steps in which the learning rate rises.", least=0, below=1, may_differ=True
    )
    freeze_encoder: float | None = option(
        None,
        "Share of the steps, from the first, in which the heads are trained and the encoder is not.",
        unset=f"{FROZEN_SHARE:g} if the encoder comes from --init and a head does not, 0 otherwise",
        least=0,
        below=1,
        may_differ=True,
    )
    encoder_lr_mult: float | None = option(
        None,
        "Factor of the learning rate for the encoder.",
        unset=f"{ENCODER_LR_MULT:g} if the encoder comes from --init and a head does not, 1 otherwise",
        above=0,
        may_differ=True,
    )
    batch_norms: str | None = option(
        None,
        "frozen: batch norms of the encoder keep the statistics that they start with; running: they follow the views.",
        unset=f"{FROZEN_NORMS} if the encoder comes from --init and a head does not, {RUNNING_NORMS} otherwise",
        choices=BATCH_NORMS,
        may_differ=True,
    )
    clip: float | None = option(None, "Maximum norm of the gradient.", unset="no clipping", above=0, may_differ=True)
    ema: float | None = option(
        None,
        "Decay of a moving average of the weights, which is validated and exported instead of them.",
        above=0,
        below=1,
        may_differ=True,
    )
    head_width: int = option(3072, "Hidden width of the adapter heads.", least=1, may_differ=True)
    """The paper has 1536 for the proxy and 3072 for students."""
    weight: tuple[str, ...] = option(
        (), "TARGET=W or TARGET/KIND=W (dinov2-s/dense=2): factor of a loss.", unset="1", may_differ=True
    )
    layers: tuple[str, ...] = option(
        (),
        "Maps of earlier layers to learn from, besides the last: 6,9 of the teacher's; 6=3 with the student's layer 3; "
        "TARGET/6 of one target; none.",
        unset="all that the stores have, each by the student's layer with cells nearest in size",
        may_differ=True,
    )
    """`LAYER` may be `last`, the teacher's last map, for another of the student's maps than its last."""
    normalise: str = option(
        STANDARD,
        "Normalisation of the targets: standard, phi-s or none.",
        choices=NORMALISATIONS,
        may_differ=True,
    )
    relational: float | None = option(
        None,
        "Weight of a loss on the similarities of the summaries that a worker takes at once: the student's own, each "
        "target's.",
        unset="0",
        above=0,
        may_differ=True,
    )
    gram: float | None = option(
        None,
        "Weight of a loss on the similarities of a view's cells: the student's own, each target's.",
        unset="0",
        above=0,
        may_differ=True,
    )
    bank: float | None = option(
        None,
        "Weight of a loss on the similarities to summaries of other views, drawn from the cache once.",
        unset="0",
        above=0,
        may_differ=True,
    )
    bank_size: int | None = option(
        None, "Number of summaries in that bank.", unset=str(BANK_SIZE), least=2, may_differ=True
    )
    bank_temperature: float | None = option(
        None, "Divides the similarities to the bank.", unset=f"{BANK_TEMPERATURE:g}", above=0, may_differ=True
    )
    drop: float = option(
        0.0,
        "Probability of dropping a target's loss for a view; the largest is never dropped.",
        least=0,
        below=1,
        may_differ=True,
    )
    views: str = option(
        "all",
        "Views of a picture in an epoch: all, or one, in turn (cycle) or at random (draw).",
        choices=VIEW_ORDERS,
    )
    photometric: str = option(
        "none", "eupe: recolour the student's views, differently at each step.", choices=("none", "eupe")
    )
    holdout: float = option(0.1, "Share of the pictures kept for validation.", above=0, below=1)
    dtype: str = option("auto", "Dtype of the training: auto, fp32 or bf16.", may_differ=True)
    seed: int = option(0, "Seed of the training.", least=0, below=2**63)
    num_workers: int = option(
        1,
        "Number of processes that share each batch, one per GPU if there are any.",
        least=1,
        indifferent=f"{HOW_DIVIDED}; changes rounding, and what a batch norm sees",
    )
    ray_address: str | None = option(
        None,
        "The Ray cluster of --num-workers.",
        unset="this machine",
        envvar="RAY_ADDRESS",
        indifferent="where the work is done",
    )
    shard: bool = option(
        False,
        "Shard weights and optimiser state over the workers (FSDP2).",
        indifferent=f"{HOW_DIVIDED}; changes rounding only",
    )
    compile: bool = option(False, "torch.compile the student.", indifferent="how fast it is; changes rounding only")
    sync_batch_norm: bool = option(
        False,
        "Compute batch norms over all workers' views (GPUs only).",
        recorded_as="batch_norm_views, if the student has batch norms",
    )
    rope_rescale: float | None = option(
        None,
        "R: in training, scale rotary coordinates by a random factor from 1/R to R; DINOv3 and EUPE use 2.",
        least=1,
    )
    recompute: bool = option(
        False,
        "Recompute activations in the backward pass, which saves memory.",
        indifferent="trades time for memory",
    )
    checkpoint_every: int = option(
        500, "Steps between checkpoints.", least=1, indifferent="how much is lost when a run is killed"
    )
    validate_every: int = option(500, "Steps between validations.", least=1, indifferent=WHAT_IS_TOLD)
    log_every: int = option(10, "Steps between entries of the log.", least=1, indifferent=WHAT_IS_TOLD)
    keep: int = option(2, "Number of newest checkpoints to keep.", least=1, indifferent=WHICH_STAY)
    keep_every: int | None = option(
        None, "N: also keep the checkpoint of every N-th step.", least=1, indifferent=WHICH_STAY
    )
    wandb: str | None = option(None, "Weights & Biases project to log to.", indifferent=WHAT_IS_TOLD)
    resume: bool = option(
        False, "Continue from the last checkpoint.", in_files=False, indifferent="finishes the run that was begun"
    )

    def __post_init__(self) -> None:
        from eupe.common.storage import StoragePath  # here, because it loads tensorstore

        wrong = wrong_values(self)
        if self.drop and len(self.targets) == 1:
            wrong.append("--drop never drops the only target; give several --targets")
        if self.epochs is not None and self.steps is not None:
            wrong.append("give --epochs or --steps, not both")
        if not StoragePath.of(self.out).is_local:
            wrong.append(f"--out must be a local folder, got {StoragePath.of(self.out)}")
        if not self.targets:
            wrong.append("give at least one store with --targets")
        if self.bank is None and (self.bank_size is not None or self.bank_temperature is not None):
            wrong.append("--bank-size and --bank-temperature belong to --bank; give it a weight, or leave them out")
        if self.pretrained and self.init is not None:
            wrong.append("--pretrained and --init are two starts; give one of them")
        if not self.student and self.init is None:
            wrong.append("give --student, or a run to start from with --init")
        if self.dtype == "fp16":
            wrong.append("--dtype fp16 would lose small gradients, because they are not scaled; use bf16, fp32 or auto")
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
