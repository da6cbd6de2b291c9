"""The workers of a run, and the communication between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from eupe.train.model import Distiller


@dataclass(frozen=True)
class World:
    """One worker among `size`; if there is more than one, they form a process group."""

    rank: int = 0
    size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Return whether this is the main process, which writes the run's files."""
        return self.rank == 0

    def parallelize(self, distiller: Distiller, *, shard: bool) -> nn.Module:
        """Return the module as every worker runs it; gradients become the mean over workers.

        To be called again, by all workers, after parameters were frozen or freed.

        Args:
            shard: whether to shard parameters over the workers and gather them block by block (FSDP2); the optimizer
                must be built afterwards.
        """
        if self.size == 1:
            return distiller
        if not shard:
            # it expects a gradient for exactly those parameters that are trained when it is made
            return DistributedDataParallel(distiller)
        if isinstance(distiller, FSDPModule):
            # sharded already; FSDP2 looks in each step which parameters are trained
            return distiller
        mesh = init_device_mesh(next(distiller.parameters()).device.type, (self.size,))
        # each block on its own, so that only one of them is gathered at a time
        for block in _blocks(distiller.encoder.model):
            fully_shard(block, mesh=mesh)
        fully_shard(distiller, mesh=mesh)
        # validation calls `predict` itself, and FSDP2 gathers parameters only for methods that it knows
        register_fsdp_forward_method(distiller, "predict")
        return distiller

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a value over workers; it is not finite if one worker's value is not."""
        if self.size > 1:
            # all_reduce works in place
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def agree(self, words: str) -> bool:
        """Return whether all workers pass the same words."""
        said: list[Any] = [words]
        if self.size > 1:
            said *= self.size
            dist.all_gather_object(said, words)
        return len(set(said)) == 1

    def any(self, asked: bool, device: torch.device) -> bool:
        """Return whether `asked` is true on any worker."""
        if self.size == 1:
            return asked
        flag = torch.tensor(float(asked), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that a model runs in sequence: a ViT's blocks, a CNN's stages."""
    series = [child for child in model.children() if isinstance(child, nn.ModuleList | nn.Sequential)]
    return [block for child in series for block in child if any(True for _ in block.parameters())]


def forget_gathered(module: nn.Module) -> None:
    """Free what a forward pass without a backward pass gathered; the next one would take it for current (FSDP2)."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded; every worker must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, place: Tensor) -> Tensor:
    """Return a whole tensor, sharded as `place` is."""
    tensor = tensor.to(place.device)
    return distribute_tensor(tensor, place.device_mesh, place.placements) if isinstance(place, DTensor) else tensor


@contextmanager
def gradients_kept_local(module: nn.Module, *, local: bool) -> Iterator[None]:
    """Skip averaging gradients over workers if `local`, as for every microbatch but the last of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not local)
    with module.no_sync() if local and isinstance(module, DistributedDataParallel) else nullcontext():
        yield
