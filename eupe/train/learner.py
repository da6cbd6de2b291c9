"""One student while it is trained: model, optimiser, average, and what is kept of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eupe.encoder import save_encoder
from eupe.errors import ConfigError, TrainingError
from eupe.train.batch import Batch
from eupe.train.checkpoint import Trainables, load_checkpoint, save_checkpoint, save_tensors
from eupe.train.config import RunCard, TrainConfig, target_names
from eupe.train.distiller import Distiller, build_distiller
from eupe.train.ema import Ema
from eupe.train.init import HEADS_FILE, InitReport, init_from_run, init_from_weights
from eupe.train.log import Rates, TrainStatus
from eupe.train.schedule import learning_rate
from eupe.train.targets import TargetSet
from eupe.train.world import World, gradients_kept_local, whole


@dataclass
class _Step:
    """What the pieces of one step add up to."""

    loss: Tensor | float = 0.0
    each: dict[str, Tensor] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)


class Learner:
    """A student, and all that training changes of it."""

    def __init__(
        self, config: TrainConfig, card: RunCard, targets: TargetSet, *, world: World, device: torch.device
    ) -> None:
        self.config = config
        self.card = card
        self.world = world
        self.device = device
        self.distiller = build_distiller(card, targets, device).train()
        self.initialised: InitReport | None = None
        if config.init is not None:
            self.initialised = self._initialise(config.init)
        if config.recompute:
            recompute_activations(self.distiller)
        if config.compile:
            self.distiller.encoder.compile()
        self._model = world.spread(self.distiller, shard=config.shard)
        self.optimizer = adamw(self.distiller, card)
        self.ema = None if config.ema is None else Ema(self.distiller, config.ema)
        self._names = target_names(card)
        self._step = _Step()

    @property
    def state(self) -> Trainables:
        """What a checkpoint holds."""
        return Trainables(self.distiller, self.optimizer, self.ema)

    def resume(self, step: int) -> None:
        """Go on as after `step` updates.

        Raises: RunError if its checkpoint is damaged or of another model.
        """
        if step:
            load_checkpoint(self.config.out, self.state, step=step)

    def learn(self, batch: Batch, *, piece: int) -> None:
        """Add the gradients of one piece of a step.

        Random numbers are a function of seed, step, piece and worker, so nothing of them needs to be kept.
        """
        pieces, step = self.config.accumulate, batch.request.step
        _seed(self.card.config["seed"], step, piece, self.world.rank)
        with gradients_kept_local(self._model, local=piece < pieces - 1):
            losses = self._model(batch)
            torch.autograd.backward(losses.total / pieces)
        self._step.loss += losses.total.detach() / pieces
        self._step.keys.update(batch.keys)
        for name, kinds in zip(self._names, losses.each, strict=True):
            for kind, value in kinds.items():
                self._step.each[f"{name}/{kind}"] = self._step.each.get(f"{name}/{kind}", 0) + value / pieces

    def update(self, step: int) -> Progress:
        """Make the update that the pieces ask for.

        Raises: TrainingError before it if the loss or the gradient is not finite.
        """
        done, self._step = self._step, _Step()
        assert isinstance(done.loss, Tensor)
        loss = self.world.mean(done.loss)
        self._require_finite("loss", loss, step, done.keys)
        norm = None
        if self.config.clip is not None:
            norm = whole(nn.utils.clip_grad_norm_(self.distiller.parameters(), self.config.clip))
            self._require_finite("gradient's norm", norm, step, done.keys)
        rate = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        return Progress(loss, done.each, rate, norm)

    def rate(self, step: int) -> float:
        """The learning rate of an update."""
        config, total = self.card.config, self.card.total_steps
        return learning_rate(step, peak=config["lr"], warmup_steps=round(config["warmup"] * total), total_steps=total)

    def save(self, step: int) -> None:
        """Leave a checkpoint; every worker must, and the first writes.

        Raises: StorageError.
        """
        tensors = self.state.tensors()
        if self.world.leads:
            run, config = self.config.out, self.config
            save_checkpoint(run, tensors, step=step, keep=config.keep, keep_every=config.keep_every)

    def averaged(self) -> AbstractContextManager[None]:
        """The weights that are judged and exported are in place."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def export(self, step: int) -> None:
        """Leave the student on its own, and its heads beside it; every worker must, and the first writes."""
        encoder, heads = self.distiller.encoder, self.distiller.heads
        with self.averaged():
            weights, of_heads = (
                {name: whole(value) for name, value in module.state_dict().items()} for module in (encoder.model, heads)
            )
            if self.world.leads:
                save_encoder(encoder, self.config.out, weights=weights)
                save_tensors(of_heads, self.config.out / HEADS_FILE, step=step)

    def _initialise(self, source: Path) -> InitReport:
        if source.is_dir():
            return init_from_run(source, self.distiller.encoder, self.distiller.heads, targets=self.card.targets)
        return init_from_weights(source, self.distiller.encoder)

    def _require_finite(self, what: str, value: Tensor, step: int, keys: set[str]) -> None:
        if not torch.isfinite(value):
            raise TrainingError(
                f"the {what} of step {step} of {self.config.out} is {value.item()}, so nothing was updated; its "
                f"pictures are {', '.join(sorted(keys)[:5])}, ...; a lower --lr or --dtype fp32 may help, with another "
                "--out"
            )


@dataclass(frozen=True)
class Progress:
    """What one update tells."""

    loss: Tensor
    """Mean over workers."""
    each: dict[str, Tensor]
    """By target and kind, of this worker's views."""
    learning_rate: float
    gradient_norm: Tensor | None

    def status(self, step: int, total_steps: int, rates: Rates) -> TrainStatus:
        """The same in numbers, which waits for a GPU."""
        return TrainStatus(
            **vars(rates),
            step=step,
            total_steps=total_steps,
            loss=self.loss.item(),
            losses={name: value.item() for name, value in self.each.items()},
            learning_rate=self.learning_rate,
            gradient_norm=None if self.gradient_norm is None else self.gradient_norm.item(),
        )


def _seed(*numbers: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def adamw(distiller: Distiller, card: RunCard) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone."""
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": card.config["weight_decay"]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=card.config["lr"])


def recompute_activations(distiller: Distiller) -> None:
    """Raises: ConfigError if the student's class does not know how."""
    model = distiller.encoder.model
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise ConfigError(
            f"--recompute: timm cannot recompute the activations of {distiller.encoder.card.arch}; leave it out"
        ) from error
