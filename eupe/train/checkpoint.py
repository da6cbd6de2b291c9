"""A run's state on disk: one safetensors file a checkpoint, no pickle, written whole or not at all.

Tensors are named `encoder.*`, `heads.*`, `optimizer.<parameter number>.<name>` and `rng`; the step is in the metadata.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eupe.encoder import Encoder
from eupe.errors import RunError, StorageError

FOLDER = "checkpoints"
KEPT = 2
RNG = "rng"


@dataclass(frozen=True)
class Trainables:
    """All that training changes."""

    encoder: Encoder
    heads: nn.ModuleList
    optimizer: torch.optim.Optimizer


def save_checkpoint(run: Path, state: Trainables, *, step: int) -> None:
    """Write the state after `step` updates; the last `KEPT` files stay.

    Raises: StorageError; the files that were there stay.
    """
    tensors = {f"encoder.{k}": v for k, v in state.encoder.state_dict().items()}
    tensors |= {f"heads.{k}": v for k, v in state.heads.state_dict().items()}
    for number, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in values.items()}
    tensors[RNG] = torch.get_rng_state()
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    save_tensors(tensors, folder / f"{step:08d}.safetensors", step=step)
    for old in checkpoints(run)[:-KEPT]:
        old.unlink()


def save_tensors(tensors: dict[str, Tensor], path: Path, *, step: int) -> None:
    """A safetensors file under a temporary name, synced, then renamed.

    Raises: StorageError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(contiguous, temporary, metadata={"step": str(step)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be written: {error}; free some space and go on with --resume") from error
    finally:
        temporary.unlink(missing_ok=True)


def checkpoints(run: Path) -> list[Path]:
    """Oldest first."""
    return sorted((run / FOLDER).glob("[0-9]*.safetensors"))


def load_checkpoint(run: Path, state: Trainables) -> int:
    """Restore the newest checkpoint into `state`; returns its step, 0 where there is none.

    Raises: RunError if it cannot be read or is of another model.
    """
    files = checkpoints(run)
    if not files:
        return 0
    try:
        with safe_open(files[-1], "pt") as file:
            step = int(file.metadata()["step"])
        tensors = load_file(files[-1])
        state.encoder.load_state_dict(_below("encoder.", tensors))
        state.heads.load_state_dict(_below("heads.", tensors))
        _load_optimizer(state.optimizer, _below("optimizer.", tensors))
        torch.set_rng_state(tensors[RNG])
    except (SafetensorError, RuntimeError, KeyError, OSError) as error:
        raise RunError(
            f"checkpoint {files[-1]} cannot be resumed: {error}; remove it to go on from the one before"
        ) from error
    return step


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, slot = name.split(".", 1)
        state.setdefault(int(number), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
