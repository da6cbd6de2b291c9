"""One student in training: its model, optimizer and average, and the files that are written of them."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from eupe.common.compute import dtype_name, fastest_format
from eupe.errors import ConfigError, TrainingError
from eupe.models.encoder import build_encoder, has_batch_norm, save_encoder
from eupe.models.meta import built_on_meta
from eupe.models.timm_models import rescale_rope
from eupe.store.layout import KINDS
from eupe.train.checkpoint import Trainables, forget_after, load_checkpoint, on_cpu, save_checkpoint, save_tensors
from eupe.train.config import TrainConfig
from eupe.train.init import InitReport, init_from_library, init_from_run, init_from_weights
from eupe.train.log import Rates, TrainStatus
from eupe.train.model import Distiller, Ema, build_distiller
from eupe.train.parallel import World, forget_gathered, gradients_kept_local, whole
from eupe.train.predict import norm_tensors
from eupe.train.run_spec import (
    HEADS_FILE,
    NORMS_FILE,
    RunSpec,
    encoder_lr_mult,
    frozen_steps,
    method_of,
    target_names,
)
from eupe.train.targets import Batch, TargetSet
from eupe.train.validate import Gains

PART, ENCODER, HEADS = "part", "encoder", "heads"
"""Key of the optimizer's groups, and its values."""


@dataclass
class _Step:
    """Sums over the microbatches of one step."""

    loss: Tensor | float = 0.0
    each: dict[str, Tensor] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)


class Trainer:
    """A student with everything that training changes, and its training step."""

    def __init__(
        self, config: TrainConfig, spec: RunSpec, targets: TargetSet, *, world: World, device: torch.device
    ) -> None:
        self.config = config
        self.spec = spec
        self.world = world
        self.device = device
        self.distiller = build_distiller(spec, targets, device).train()
        self.initialised: InitReport | None = None
        if config.init is not None:
            self.initialised = self._initialise(config.init)
        elif spec.config.get("pretrained") is not None:
            self.initialised = init_from_library(self.distiller.encoder)
        # FSDP2 shards contiguous tensors only
        if method_of(spec) > 2 and not config.shard:
            self.distiller.use_memory_format(fastest_format(self.distiller.encoder.model))
        # before DDP, which expects a gradient for every trainable parameter, and before the optimizer
        freeze_unused(self.distiller)
        if config.rope_rescale is not None:
            rescale_rope(self.distiller.encoder.model, config.rope_rescale)
        if config.sync_batch_norm and world.size > 1:
            self.distiller.encoder.model = synchronised(self.distiller.encoder.model, device)
        if config.recompute:
            recompute_activations(self.distiller)
        if config.compile:
            # in place: a wrapper would change the names of the tensors in checkpoints
            self.distiller.encoder.compile()
        self.distiller.train()
        self._model = world.parallelize(self.distiller, shard=config.shard)
        # after sharding, which replaces the parameters by sharded ones
        self.optimizer = adamw(self.distiller, spec)
        self._encoder_parameters = [p for p in self.distiller.encoder.parameters() if p.requires_grad]
        self._frozen_steps, self._encoder_lr_mult = frozen_steps(spec), encoder_lr_mult(spec)
        self.ema = None if config.ema is None else Ema(self.distiller, config.ema)
        self._ema_rises = method_of(spec) > 1
        self._names = target_names(spec.targets)
        self._step = _Step()
        self._dtype = dtype_name(self.distiller.dtype)

    @property
    def state(self) -> Trainables:
        """Return what a checkpoint holds."""
        return Trainables(self.distiller, self.optimizer, self.ema)

    def resume(self, step: int) -> None:
        """Continue from the state after `step` optimizer steps; later checkpoints are removed.

        Raises: RunError if the checkpoint is damaged or of another model.
        """
        if step:
            load_checkpoint(self.config.out, self.state, step=step, dtype=self._dtype)
        if self.world.is_main_process:
            forget_after(self.config.out, step)

    def forward_backward(self, batch: Batch, *, microbatch: int) -> None:
        """Add the gradients of one microbatch.

        Random numbers are a function of seed, step, microbatch and worker, so no generator state is saved for a resume.

        Args:
            microbatch: number of the microbatch within its step.
        """
        num_microbatches, step = self.config.accumulate, batch.request.step
        self._freeze_encoder(step < self._frozen_steps)
        _seed(self.spec.config["seed"], step, microbatch, self.world.rank)
        # the forward pass, too: DDP decides in it whether the backward pass averages gradients
        with gradients_kept_local(self._model, local=microbatch < num_microbatches - 1):
            losses = self._model(batch)
            # microbatches are of equal size, so this adds up to the gradient of the mean over all views
            torch.autograd.backward(losses.total / num_microbatches)
        self._step.loss += losses.total.detach() / num_microbatches
        self._step.keys.update(batch.keys)
        for name, kinds in zip(self._names, losses.each, strict=True):
            for kind, value in kinds.items():
                self._step.each[f"{name}/{kind}"] = self._step.each.get(f"{name}/{kind}", 0) + value / num_microbatches

    def optimizer_step(self, step: int) -> Progress:
        """Make an optimizer step with the gradients of all microbatches.

        Raises: TrainingError before the step if the loss or the gradient is not finite.
        """
        done, self._step = self._step, _Step()
        assert isinstance(done.loss, Tensor)
        # loss and norm are the same on all workers, so either all of them stop below or none does
        loss = self.world.mean(done.loss)
        parameters = [p for p in self.distiller.parameters() if p.grad is not None]
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        # before the optimizer step, so that weights and checkpoints stay finite
        self._require_finite(loss, norm, step, done.keys)
        if self.config.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
        rates = self.rates(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group[PART]]
        # it skips parameters without a gradient, weight decay included: those of a frozen encoder
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            # the average of a frozen encoder is the encoder itself
            self.ema.update(step if self._ema_rises else None)
        return Progress(loss, done.each, rates[HEADS], norm)

    def rates(self, step: int) -> dict[str, float]:
        """Return the learning rates of a step, of the encoder and of the heads."""
        config, total = self.spec.config, self.spec.total_steps
        peak = peak_rate(config["lr"], scaling=config.get("lr_scaling"), batch_size=config["batch_size"])
        begun = {ENCODER: (self._frozen_steps, self._encoder_lr_mult * peak), HEADS: (0, peak)}
        return {
            part: rate_from(begin, step, peak=highest, warmup=config["warmup"], total_steps=total)
            for part, (begin, highest) in begun.items()
        }

    def save(self, step: int) -> None:
        """Write a checkpoint; every worker must call this, and the main process writes.

        Raises: StorageError.
        """
        # on every worker: sharded tensors are gathered by a collective operation
        tensors = self.state.tensors(keep=self.world.is_main_process)
        if self.world.is_main_process:
            run, config = self.config.out, self.config
            save_checkpoint(run, tensors, step=step, keep=config.keep, keep_every=config.keep_every, dtype=self._dtype)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the weights to validate and export into the model: the averages if there are any."""
        with nullcontext() if self.ema is None else self.ema.applied():
            yield
            # FSDP2 kept the weights that it gathered here; the next training step needs its own
            forget_gathered(self.distiller)

    def export(self, step: int, gains: Gains) -> None:
        """Write the student alone, its heads, and the tensors that undo the normalisation of their targets.

        Every worker must call this, and the main process writes.

        Args:
            gains: fitted for these heads.
        """
        encoder, heads = self.distiller.encoder, self.distiller.heads
        with self.averaged():
            weights, of_heads = (
                on_cpu(each.state_dict(), keep=self.world.is_main_process) for each in (encoder.model, heads)
            )
            if self.world.is_main_process:
                save_encoder(encoder, self.config.out, weights=weights)
                save_tensors(of_heads, self.config.out / HEADS_FILE, step=step)
                judged_at = (sizes[0] for sizes in self.spec.target_sizes)
                norms = [sizes[size] for sizes, size in zip(self.distiller.norms, judged_at, strict=True)]
                save_tensors(norm_tensors(norms, gains), self.config.out / NORMS_FILE, step=step)

    def _freeze_encoder(self, frozen: bool) -> None:
        """Freeze the encoder, or train it again; all workers do so before the same step."""
        if frozen == self.distiller.encoder_frozen:
            return
        for parameter in self._encoder_parameters:
            parameter.requires_grad_(not frozen)
        self.distiller.encoder_frozen = frozen
        self.distiller.train()
        self._model = self.world.parallelize(self.distiller, shard=self.config.shard)
        # DDP refers to itself, so the former one would stay, with buckets as large as the gradients
        gc.collect()

    def _initialise(self, source: Path) -> InitReport:
        if source.is_dir():
            return init_from_run(source, self.distiller.encoder, self.distiller.heads, targets=self.spec.targets)
        return init_from_weights(source, self.distiller.encoder)

    def _require_finite(self, loss: Tensor, norm: Tensor, step: int, keys: set[str]) -> None:
        # one test of the sum, which waits for the GPU once
        if not torch.isfinite(loss + norm):
            raise TrainingError(
                f"the loss of step {step} of {self.config.out} is {loss.item()}, and the norm of its gradient is "
                f"{norm.item()}, so nothing was updated; its pictures are {', '.join(sorted(keys)[:5])}, ...; a lower "
                "--lr, --clip or --dtype fp32 may help, in a new run with another --out"
            )


@dataclass(frozen=True)
class Progress:
    """The results of one optimizer step."""

    loss: Tensor
    """Mean over workers."""
    each: dict[str, Tensor]
    """Losses by target and kind, of this worker's views."""
    learning_rate: float
    """Of the heads; that of the encoder may differ."""
    gradient_norm: Tensor
    """Norm before clipping, of what is trained in this step."""

    def status(self, step: int, total_steps: int, rates: Rates) -> TrainStatus:
        """Return the results as numbers; reading them waits for the GPU."""
        return TrainStatus(
            **vars(rates),
            step=step,
            total_steps=total_steps,
            loss=self.loss.item(),
            losses={name: value.item() for name, value in self.each.items()},
            learning_rate=self.learning_rate,
            gradient_norm=self.gradient_norm.item(),
        )


def _seed(*numbers: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def freeze_unused(distiller: Distiller) -> None:
    """Freeze parameters that no loss depends on, such as an attention pool if no target has a summary.

    They would have no gradient to average over workers, and no optimizer state to put into a checkpoint.
    """
    kinds = {kind for kinds in distiller.kinds for kind in kinds}
    spec = distiller.encoder.spec
    outside = spec.origin is not None  # such a model may hold layers that no output depends on, as a pooler
    if kinds == set(KINDS) and not outside:
        return
    if outside:
        # a copy, as this changes running statistics; not on the meta device, which modules of others may not know
        model, where = copy.deepcopy(distiller.encoder).train().cpu(), torch.device("cpu")
    else:
        where = torch.device("meta")  # a backward pass costs nothing there, and shows which parameters get a gradient
        with built_on_meta():
            model = build_encoder(spec.arch, size=spec.size).train()
    with where, torch.random.fork_rng(devices=[]):
        tokens = vars(model(torch.zeros(2, 3, spec.size, spec.size)))
        torch.autograd.backward([tokens[kind].sum() for kind in sorted(kinds)])
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    for name, parameter in distiller.encoder.named_parameters():
        parameter.requires_grad_(name not in unused)


def adamw(distiller: Distiller, spec: RunSpec) -> torch.optim.Optimizer:
    """Build the optimizer of encoder and heads, which have learning rates of their own; see `adamw_of`."""
    parts = {ENCODER: distiller.encoder, HEADS: distiller.heads}
    return adamw_of(parts, lr=spec.config["lr"], weight_decay=spec.config["weight_decay"])


def adamw_of(parts: Mapping[str, nn.Module], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Build AdamW with weight decay for all parameters but biases, norms and scales.

    It applies to matrices and to class, register and position tokens, that is, to parameters of more than one axis.

    Each group has the name of its part.

    Source: the parameter groups of DINOv2 and DINOv3, which decay all but biases, norms and LayerScale.
    """
    groups: list[dict[str, Any]] = []
    # in this order: checkpoints number the parameters of all groups
    for decayed in (True, False):
        for part, module in parts.items():
            parameters = [p for p in module.parameters() if p.requires_grad and (p.ndim > 1) == decayed]
            groups.append({"params": parameters, "weight_decay": weight_decay if decayed else 0.0, PART: part})
    # On a GPU, PyTorch chooses a fast way itself; on a CPU, the default takes twice as long.
    on_cpu = all(parameter.device.type == "cpu" for module in parts.values() for parameter in module.parameters())
    return torch.optim.AdamW(groups, lr=lr, fused=True if on_cpu else None)


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with batch norms that take their means over the views of all workers (timm's conversion).

    Raises: ConfigError if PyTorch has no such layer for the device.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"--sync-batch-norm is only for GPUs, as PyTorch does not have it for {device.type}; leave it out"
        )
    converted: nn.Module = convert_sync_batchnorm(model)
    return converted


def recompute_activations(distiller: Distiller) -> None:
    """Make the student recompute activations in the backward pass instead of keeping them.

    Raises: ConfigError if its class cannot, or if it has batch norms.
    """
    model = distiller.encoder.model
    if has_batch_norm(model):
        raise ConfigError(
            f"--recompute would count every batch twice in the running statistics of {distiller.encoder.spec.arch}; "
            "leave it out"
        )
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:
        raise ConfigError(
            f"--recompute: the activations of {distiller.encoder.spec.arch} cannot be recomputed by timm; leave it out"
        ) from error


def peak_rate(lr: float, *, scaling: str | None, batch_size: int) -> float:
    """Return the peak of the learning rate.

    Args:
        scaling: `sqrt` if `lr` is a base rate for a batch of 64; None to take `lr` as it is.
    Source: `scaling_rule: sqrt_wrt_1024` of DINOv3's and EUPE's released configurations.
    """
    return lr if scaling is None else lr * 4 * math.sqrt(batch_size / 1024)


def rate_from(begin: int, step: int, *, peak: float, warmup: float, total_steps: int) -> float:
    """Return the learning rate of what is trained from step `begin` on: 0 before, then a schedule over what is left.

    It has a warm-up of its own, because AdamW's first updates have the full rate in every weight, however small the
    gradient.

    Args:
        warmup: share of the steps that are left in which the rate rises.
    """
    if step < begin:
        return 0.0
    left = total_steps - begin
    return learning_rate(step - begin, peak=peak, warmup_steps=round(warmup * left), total_steps=left)


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate: linear warm-up to `peak`, then half a cosine to 0 at `total_steps`.

    Args:
        step: 0-based; the update about to be made.
    """
    if step < warmup_steps:
        # step + 1, so that the first step has a rate above 0
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
