"""Checkpoints of a run: one safetensors file each, without pickle, written atomically.

Tensors are named `encoder.*`, `heads.*`, `optimizer.<parameter number>.<name>` and `ema.*`; the metadata holds step,
dtype and a checksum. Random numbers, learning rate and position in the data are functions of the step, so they are
not stored.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eupe.common.files import remove_unfinished, replacing, share
from eupe.errors import RunError, StorageError
from eupe.models.checkpoints import read_metadata
from eupe.train.model import Distiller, Ema
from eupe.train.parallel import placed_like, whole

FOLDER = "checkpoints"
CHECKSUM = "crc32"
DTYPE = "dtype"


@dataclass(frozen=True)
class Trainables:
    """Everything that training changes."""

    distiller: Distiller
    optimizer: torch.optim.Optimizer
    ema: Ema | None

    def tensors(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Return all tensors on the CPU; see `on_cpu`."""
        return on_cpu(self._places(), keep=keep)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the model, the optimizer and the average.

        Raises: RuntimeError unless their names and shapes are those of this model.
        """
        places = self._places()
        if odd := sorted(places.keys() ^ tensors.keys()):
            raise RuntimeError(f"{len(odd)} tensors are missing or unknown ({', '.join(odd[:3])})")
        with torch.no_grad():
            for name, place in places.items():
                if place.shape != tensors[name].shape:
                    raise RuntimeError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(place.shape)}")
                place.copy_(placed_like(tensors[name], place))

    def _places(self) -> dict[str, Tensor]:
        """Return the live tensors, in the same order on all workers."""
        _fill_slots(self.optimizer)
        places = {f"encoder.{name}": value for name, value in self.distiller.encoder.state_dict().items()}
        places |= {f"heads.{name}": value for name, value in self.distiller.heads.state_dict().items()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(parameters):
            slots = sorted(self.optimizer.state[parameter].items())
            places |= {f"optimizer.{number}.{name}": value for name, value in slots}
        if self.ema is not None:
            places |= {f"ema.{name}": value for name, value in self.ema.state_dict().items()}
        return places


def on_cpu(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return whole tensors on the CPU; if they are sharded, every worker must call this.

    Args:
        keep: False for a worker that only takes part in the gathering and gets an empty dict.
    """
    # lazily, so that a device holds one whole tensor at a time
    gathered = ((name, whole(tensor)) for name, tensor in tensors.items())
    return {name: tensor.cpu() for name, tensor in gathered if keep}


def forget_after(run: Path, step: int) -> None:
    """Remove checkpoints of later steps, which will be trained again."""
    for later in steps_kept(run):
        if later > step:
            (run / FOLDER / _name(later)).unlink()


def _fill_slots(optimizer: torch.optim.Optimizer) -> None:
    """Create AdamW's state, as it is before the first step, for parameters that have not made one.

    AdamW itself creates it in that step: too late for a checkpoint that is loaded into a new run, and for one that is
    saved while a part of the model is frozen.
    """
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if not optimizer.state.get(parameter):
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def save_checkpoint(
    run: Path, tensors: Mapping[str, Tensor], *, step: int, keep: int, keep_every: int | None, dtype: str
) -> None:
    """Write the state after `step` optimizer steps.

    Args:
        keep: number of newest checkpoints to keep.
        keep_every: also keep checkpoints whose step is a multiple of this.
        dtype: dtype in which the run computes.
    Raises: StorageError; existing checkpoints stay.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    remove_unfinished(folder)
    for leftover in folder.glob(".*.tmp"):  # temporary files of earlier versions
        leftover.unlink()
    save_tensors(tensors, folder / _name(step), step=step, dtype=dtype)
    # only after the new one is on disk: there must always be one to resume from
    for old in steps_kept(run)[:-keep]:
        if keep_every is None or old % keep_every:
            (folder / _name(old)).unlink()


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, step: int, dtype: str | None = None) -> None:
    """Write a safetensors file atomically.

    Raises: StorageError.
    """
    contiguous = _apart({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    facts = {"step": str(step), CHECKSUM: checksum(contiguous, step)} | ({DTYPE: dtype} if dtype else {})
    try:
        with replacing(path) as unfinished:
            save_file(contiguous, unfinished, metadata=facts)
            # safetensors creates files that only their owner can read
            share(unfinished)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be written: {error}; free some space and resume with --resume") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with copies of those that lie in the memory of another, as layers that share weights have.

    A safetensors file cannot hold one tensor under two names.
    """
    seen: set[int] = set()
    apart = {}
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        apart[name] = value.clone() if place in seen else value
        seen.add(place)
    return apart


def steps_kept(run: Path) -> list[int]:
    """Return the steps of the existing checkpoints, in ascending order."""
    return sorted(int(path.stem) for path in (run / FOLDER).glob("[0-9]*.safetensors"))


def load_checkpoint(run: Path, state: Trainables, *, step: int, dtype: str) -> None:
    """Restore the state after `step` optimizer steps.

    Raises: RunError if the checkpoint is missing, damaged, of another model, or made in another dtype.
    """
    path = run / FOLDER / _name(step)
    try:
        facts = read_metadata(path)
        tensors = load_file(path)
        # before anything is copied, so that a damaged file leaves no half-loaded model
        if checksum(tensors, step) != facts.get(CHECKSUM):
            raise RuntimeError("it fails its checksum")
        # `--dtype auto` may resolve to another dtype on this machine, which would be another run
        if (made_in := facts.get(DTYPE)) != dtype:
            raise RunError(
                f"{run} has been trained in {made_in} so far, but --dtype auto is {dtype} here; resume it on a machine "
                f"that computes in {made_in}, or start another run with an explicit --dtype"
            )
        state.load(tensors)
    except RunError:
        raise
    except (SafetensorError, RuntimeError, OSError) as error:
        raise RunError(
            f"checkpoint {path} cannot be resumed: {error}; remove it to resume from the previous one"
        ) from error


def checksum(tensors: Mapping[str, Tensor], step: int) -> str:
    """Return the CRC-32 of the step, names, dtypes, shapes and bytes, as eight hexadecimal digits."""
    crc = zlib.crc32(str(step).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(data, crc)
    return f"{crc:08x}"


def _name(step: int) -> str:
    return f"{step:08d}.safetensors"
