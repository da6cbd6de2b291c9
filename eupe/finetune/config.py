"""The options of `eupe finetune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from eupe.common.option import about, option, wrong_values
from eupe.errors import ConfigError

CLASSIFY, SEGMENT, DEPTH = TASKS = ("classify", "segment", "depth")
MOST_SEEDS = 30
"""Largest number of seeds, for which `eupe.finetune.results` knows the interval."""
USUAL_SCALE = "0.35,1"


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The options of `eupe finetune`; everything about one is defined only here."""

    subject: str
    """A finished run, or a student's name."""
    data: str = field(
        metadata=about(
            "Labelled pictures: train/CLASS and val/CLASS, or one corpus of any kind, of which a fifth is judged; with "
            "masks or depth maps as `eupe eval segment` and `eupe eval depth` take them."
        )
    )
    out: Path = field(metadata=about("Directory for the models, the table and the page.", indifferent="a place"))
    task: str = option(CLASSIFY, "What to learn: classify, segment or depth.", choices=TASKS)
    pretrained: bool = option(
        False, "Start from the weights that the student's library has for it, as NAME.TAG always does."
    )
    from_scratch: bool = option(
        False, "Also train the same network from random weights with the same labels, steps and seeds, to compare."
    )
    label_share: tuple[float, ...] = option(
        (1.0,),
        "Share of the training pictures of each class to learn from. May be repeated: 0.01, 0.1, 1.",
        unset="1",
        above=0,
        indifferent="each share is trained for itself",
    )
    seeds: int = option(
        1,
        "Number of trainings for each share, each with its own pictures, order, crops and weights.",
        least=1,
        indifferent="each seed is trained for itself",
    )
    size: int | None = option(
        None, "Side of the input in pixels.", unset="the run's own, or 224 for a student's name", least=1
    )
    epochs: float = option(
        30.0,
        "Passes over the whole training split; a smaller --label-share gets as many steps. 0 leaves the linear probe.",
        least=0,
    )
    batch_size: int = option(32, "Pictures per update.", least=2)
    lr: float = option(1e-3, "Peak learning rate of AdamW, of encoder and head.", above=0)
    weight_decay: float = option(0.05, "Weight decay of AdamW.", least=0)
    scale: str | None = option(
        None,
        "MIN,MAX: the part of a picture's area that a random crop shows; not for depth, whose crops are whole windows.",
        unset=USUAL_SCALE,
    )
    flip: float = option(
        0.5, "Probability of mirroring a picture; give 0 where left and right differ, as for text.", least=0
    )
    true_colours: bool = option(
        False, "Leave brightness, contrast, saturation and hue as they are; else they vary in training."
    )
    depth_unit: str | None = option(None, "Unit of depth maps, as for `eupe eval depth`.", unset="as there")
    max_depth: float = option(10.0, "Greatest depth in metres that counts.", above=0)
    mask_values: str | None = option(None, "Values of the classes in masks, as for `eupe eval segment`.")
    mask_ignore: str | None = option(None, "Values in masks that are no class, as for `eupe eval segment`.")

    def __post_init__(self) -> None:
        """Raise ConfigError that names all values that cannot be."""
        wrong = wrong_values(self)
        wrong += [f"--label-share must be at most 1, got {share:g}" for share in self.label_share if share > 1]
        if len(set(self.label_share)) < len(self.label_share):
            wrong.append("--label-share names a share twice")
        if self.flip > 1:
            wrong.append(f"--flip is a probability, at most 1, got {self.flip:g}")
        if self.seeds > MOST_SEEDS:
            wrong.append(f"--seeds must be at most {MOST_SEEDS}, got {self.seeds}")
        only = {
            "--depth-unit": (self.depth_unit is not None, DEPTH),
            "--max-depth": (self.max_depth != type(self).max_depth, DEPTH),
            "--mask-values": (self.mask_values is not None, SEGMENT),
            "--mask-ignore": (self.mask_ignore is not None, SEGMENT),
        }
        wrong += [
            f"{name} is only for --task {task}" for name, (given, task) in only.items() if given and task != self.task
        ]
        if self.scale is not None and self.task == DEPTH:
            wrong.append("--scale is not for --task depth: a crop that is enlarged would show other depths")
        if wrong:
            raise ConfigError("; ".join(wrong))
