"""The workers of a run, and what they tell each other."""

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

from eupe.train.distiller import Distiller


@dataclass(frozen=True)
class World:
    """One worker among `size`, which are in one process group where there is more than one."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this worker writes what a run keeps."""
        return self.rank == 0

    def spread(self, distiller: Distiller, *, shard: bool) -> nn.Module:
        """The module as every worker runs it: gradients become the mean over workers.

        Args:
            shard: parameters are spread over the workers and gathered block by block (FSDP2); to be called before the
                optimiser is made.
        """
        if self.size == 1:
            return distiller
        if not shard:
            return DistributedDataParallel(distiller)
        mesh = init_device_mesh(next(distiller.parameters()).device.type, (self.size,))
        for block in _blocks(distiller.encoder.model):
            fully_shard(block, mesh=mesh)
        fully_shard(distiller, mesh=mesh)
        register_fsdp_forward_method(distiller, "predict")
        return distiller

    def mean(self, value: Tensor) -> Tensor:
        """Over workers; not finite where one of them is not."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def agree(self, words: str) -> bool:
        """Whether all workers say the same."""
        said: list[Any] = [words]
        if self.size > 1:
            said *= self.size
            dist.all_gather_object(said, words)
        return len(set(said)) == 1

    def any(self, asked: bool, device: torch.device) -> bool:
        """Whether one of the workers says so."""
        if self.size == 1:
            return asked
        flag = torch.tensor(float(asked), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What a model is made of in sequence: a ViT's blocks, a CNN's stages."""
    series = [child for child in model.children() if isinstance(child, nn.ModuleList | nn.Sequential)]
    return [block for child in series for block in child if any(True for _ in block.parameters())]


def forget_gathered(module: nn.Module) -> None:
    """Free what a forward pass without a backward pass gathered, which the next one would take for current (FSDP2)."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over workers; every one of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, place: Tensor) -> Tensor:
    """A whole tensor, spread as `place` is."""
    tensor = tensor.to(place.device)
    return distribute_tensor(tensor, place.device_mesh, place.placements) if isinstance(place, DTensor) else tensor


@contextmanager
def gradients_kept_local(module: nn.Module, *, local: bool) -> Iterator[None]:
    """Gradients of a piece that is not the last of its step stay with their worker."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not local)
    with module.no_sync() if local and isinstance(module, DistributedDataParallel) else nullcontext():
        yield
