"""`eupe export check`: the gate of an export for a runtime that only the user can run, such as TensorRT or Core ML."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eupe.common.compute import normalise
from eupe.errors import ConfigError, ConformanceError
from eupe.export.config import ONNX, ExportConfig
from eupe.export.proof import REFERENCE_BATCH, compare, differences
from eupe.export.sample_pictures import varied_pictures
from eupe.export.source import Source, open_source

SUFFIXES = (".npy", ".bin")


@dataclass(frozen=True)
class InputsReport:
    """The pixels that a runtime has to be given."""

    inputs: str
    shape: tuple[int, ...]
    """P pictures, 3 channels, height, width; float32 in this order, normalised."""


@dataclass(frozen=True)
class OutputsReport:
    """The agreement of a runtime's outputs with the run's student."""

    outputs: dict[str, dict[str, float]]
    """Agreement by output, see `eupe.export.proof.Likeness`."""
    num_pictures: int


def write_inputs(run: Path, path: Path, *, size: int | None = None) -> InputsReport:
    """Write the normalised sample pictures, float32 [P, 3, S, S], as .npy or as plain bytes (.bin).

    Args:
        size: side of the input in pixels; None for the run's own size.
    Raises: ConfigError for a name of another kind, or if the file exists; RunError for a run that is not finished.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--inputs {path} must end with {' or '.join(SUFFIXES)} (plain float32, as trtexec reads it)")
    pixels = _pixels(_source(run, size, heads=(), precision="fp32")).numpy()
    try:
        with path.open("xb") as file:
            if path.suffix == ".npy":
                np.save(file, pixels)
            else:
                file.write(pixels.tobytes())
    except FileExistsError:
        raise ConfigError(f"--inputs {path} already exists; give another name, or remove it") from None
    except OSError as error:
        raise ConfigError(f"--inputs {path} cannot be written: {error}") from error
    return InputsReport(str(path), pixels.shape)


def check_outputs(
    run: Path, path: Path, *, size: int | None = None, heads: tuple[str, ...] = (), precision: str = "fp32"
) -> OutputsReport:
    """Compare a runtime's outputs for the sample pictures with those of the run's student.

    Args:
        path: a .npz with one array for each output, or the .json that trtexec exports.
        size: side of the input in pixels, as for `write_inputs`.
        heads: targets whose heads were exported, too, or `all`.
        precision: the precision whose tolerances apply.
    Raises: ConfigError if the file cannot be read, or outputs are missing or have other shapes; ConformanceError if
        outputs differ too much.
    """
    source = _source(run, size, heads, precision)
    pixels = _pixels(source)
    parts = [source.reference(batch) for batch in torch.split(pixels, REFERENCE_BATCH)]
    want = {name: torch.cat([part[name] for part in parts]) for name in source.outputs}
    given = _read(path)
    got = {name: torch.from_numpy(given[name].astype(np.float32)) for name in source.outputs if name in given}
    shapes = {name: tuple(value.shape) for name, value in want.items()}
    theirs = {name: value.shape for name, value in given.items()}
    if {name: theirs.get(name) for name in shapes} != shapes:
        raise ConfigError(
            f"--outputs {path} has other names or shapes than the run's outputs: got {theirs}, expected {shapes}"
        )
    found = compare(want, got)
    if said := differences(found, precision):
        raise ConformanceError(f"the outputs in {path} differ from those of {run}: {said}")
    return OutputsReport({name: asdict(each) for name, each in found.items()}, len(pixels))


def _source(run: Path, size: int | None, heads: tuple[str, ...], precision: str) -> Source:
    return open_source(ExportConfig(run=run, out=run, format=ONNX, size=size, heads=heads, precision=precision))


def _pixels(source: Source) -> torch.Tensor:
    spec = source.encoder.spec
    return normalise(torch.from_numpy(varied_pictures(spec.size, spec.size)), spec.mean, spec.std)


def _read(path: Path) -> Mapping[str, NDArray[np.float32]]:
    """Return the arrays in a .npz or in the .json of trtexec, by name.

    Raises: ConfigError if they cannot be read.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        if path.suffix == ".json":
            return {
                each["name"]: _from_json(each["dimensions"], each["values"]) for each in json.loads(path.read_text())
            }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, zipfile.BadZipFile) as error:
        raise ConfigError(f"--outputs {path} cannot be read as the outputs of a runtime: {error}") from error
    raise ConfigError(f"--outputs {path} must end with .npz (one array for each output) or .json (of trtexec)")


def _from_json(dimensions: str, values: list[float]) -> NDArray[np.float32]:
    """Return an array from trtexec's words for its shape, such as 19x4x4x192, and its values."""
    return np.array(values, np.float32).reshape([int(each) for each in dimensions.split("x")])
