"""What the user of a run may not have intended."""

from __future__ import annotations

from collections.abc import Sequence

from eupe.models.encoder import on_paper
from eupe.models.timm_models import has_rope
from eupe.train.config import RUNNING_NORMS, TrainConfig
from eupe.train.layers import LAST, pairs_of
from eupe.train.run_spec import (
    PROTECTION,
    RunSpec,
    encoder_lr_mult,
    frozen_steps,
    holdout_by,
    is_run,
    method_of,
    read_run_spec,
    target_names,
)
from eupe.train.targets import TargetSet

MOST_PASSES = 100
"""Passes over each stored view above which the command warns; the paper draws new crops at each step."""


def advice(config: TrainConfig, spec: RunSpec, corpora: Sequence[TargetSet]) -> list[str]:
    """Return what the user may not have intended, one sentence each, such as targets of another size."""
    notes = []
    notes += [
        f"{name}: {'its last map' if pair.layer == LAST else f'layer {pair.layer}'} teaches the student's layer "
        f"{pair.student} (--layers)"
        for name, target in zip(target_names(spec.targets), spec.targets, strict=True)
        for pair in pairs_of(target)
    ]
    for target, sizes in zip(spec.targets, spec.target_sizes, strict=True):
        if not config.target_size and list(sizes) != [spec.size]:
            notes.append(
                f"{target['path']} has no features at the student's {spec.size} px; the student learns from those at "
                f"{sizes[0]} px"
            )
    if config.rope_rescale is not None and not has_rope(on_paper(spec.config["student"])):
        notes.append(f"{spec.config['student']} has no rotary position embedding, so --rope-rescale changes nothing")
    if any(getattr(config, name) is None and spec.config[name] is not None for name in PROTECTION):
        notes.append(
            f"the encoder starts from {config.init or 'pretrained weights'}, but heads start from random weights, "
            f"whose gradients could ruin it: it is frozen in the first {frozen_steps(spec)} of {spec.total_steps} "
            f"steps, and then trained at {encoder_lr_mult(spec):g} of the learning rate, with "
            f"{spec.config['batch_norms'] or RUNNING_NORMS} batch norms (--freeze-encoder, --encoder-lr-mult, "
            "--batch-norms)"
        )
    if config.init is not None and is_run(config.init):
        before = read_run_spec(config.init)
        fewer = before.config.get("holdout", 0) < spec.config["holdout"]
        if fewer or holdout_by(method_of(before)) != holdout_by(method_of(spec)):
            notes.append(
                f"{config.init} held out other pictures, so it may have been trained on some that are held out here, "
                "and what is measured on them may be too good"
            )
    shares = [1 - sum(mixed["share"] for mixed in spec.mix), *(mixed["share"] for mixed in spec.mix)]
    for corpus, share in zip(corpora, shares, strict=True):
        times = passes(spec.total_steps * config.batch_size * share, len(corpus.training) * corpus.num_views)
        notes.append(passes_note(f"each stored view of {corpus.stores[0].path}", times))
    return notes


def passes(num_seen: float, num_stored: int) -> float:
    """Return how often training sees each stored view, at least 1."""
    return max(1.0, num_seen / max(1, num_stored))


def passes_note(views: str, times: float) -> str:
    """Return how often training sees some views, with what to do if that is too often."""
    note = f"{views} will be seen about {times:,.0f} times"
    if times > MOST_PASSES:
        note += f"; more than {MOST_PASSES} times teaches little new: extract with more views (rrc:K), or train less"
    return note
