"""A finished training run, opened for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from eupe.common.compute import fastest_format, pick_device
from eupe.common.storage import AnyPath
from eupe.errors import RunError
from eupe.models.encoder import load_encoder
from eupe.models.outside import require_trust
from eupe.train.model import Distiller, build_distiller
from eupe.train.run_spec import (
    CONFIG_FILE,
    HEADS_FILE,
    RunSpec,
    finished_run_spec,
    holdout_by,
    method_of,
    store_fingerprint,
)
from eupe.train.run_spec import is_run as is_run
from eupe.train.run_spec import read_run_spec as read_run_spec
from eupe.train.targets import TargetSet, holdout_words, is_held_out, open_targets

DECISIVE = ("student", "size", "head_width", "seed", "dtype", "normalise", "target_size", "holdout")
"""Options that are needed to open student, heads and targets."""


@dataclass(frozen=True)
class Run:
    """A trained student with its heads, and the targets that it learned from."""

    path: Path
    spec: RunSpec
    distiller: Distiller
    targets: TargetSet
    device: torch.device

    @property
    def size(self) -> int:
        return self.spec.size

    def untrained(self) -> Distiller:
        """Build student and heads with random weights, as before the first step of a run without `--init`."""
        return build_distiller(self.spec, self.targets, self.device)


def not_learned(samples: Sequence[Mapping[str, Any]], runs: Sequence[Path]) -> list[bool]:
    """Return whether each sample was held out of the training of all runs; False for all if there are no runs.

    Args:
        samples: mappings with `key` and `sha256`.
    Raises: RunError if one is not a run, or does not record what it held out.
    """
    held = np.full(len(samples), bool(runs))
    for run in runs:
        share, by = holdout(run), holdout_by(method_of(read_run_spec(run)))
        held &= [is_held_out(word, share) for word in holdout_words(samples, by)]
    return held.tolist()


def holdout(path: Path) -> float:
    """Return the share of its pictures that a run held out of training.

    Raises: RunError if there is no run, or it records no such share.
    """
    share = read_run_spec(path).config.get("holdout")
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise RunError(
            f"run {path} has a {CONFIG_FILE} whose holdout is {share!r}, not a share from 0 to 1; restore it"
        )
    return float(share)


def open_run(path: Path, *, corpus: AnyPath | None = None) -> Run:
    """Load student and heads, and open the stores that they learned from.

    Raises: RunError if the run is not finished, its spec or heads cannot be used, or a store is not the one that it
        learned from; StoreError or CorpusError if its targets or pictures are missing, or do not fit.
    """
    spec = finished_run_spec(path)
    lacking = [name for name in DECISIVE if name not in spec.config]
    lacking += [name for target in spec.targets for name in ("path", "fingerprint") if name not in target]
    if lacking:
        raise RunError(f"run {path} has a {CONFIG_FILE} without {', '.join(lacking)}; restore it, or train again")
    stores = [target["path"] for target in spec.targets]
    targets = open_targets(stores, corpus=corpus, holdout=holdout(path), holdout_by=holdout_by(method_of(spec)))
    for store, target in zip(targets.stores, spec.targets, strict=True):
        if store_fingerprint(store) != target["fingerprint"]:
            raise RunError(
                f"{store.path} is not the store that {path} learned from; it was made again, with other contents"
            )
    targets.check_views()
    device = pick_device()
    encoder = load_encoder(path)
    require_trust(spec.config["student"], str(path / CONFIG_FILE))  # it may name another than the student's file does
    distiller = build_distiller(spec, targets, device)
    try:
        distiller.encoder.load_state_dict(encoder.state_dict())
        distiller.heads.load_state_dict(load_file(path / HEADS_FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(f"run {path} has no usable heads ({error}); finish it with `eupe train ... --resume`") from error
    distiller.use_memory_format(fastest_format(distiller.encoder.model))
    return Run(path, spec, distiller, targets, device)
