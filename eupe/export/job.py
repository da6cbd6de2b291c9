"""An export from start to end: read the run, write a directory, reload it, prove that it is the same model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import eupe
from eupe.common.files import publish, share
from eupe.common.locks import unfinished
from eupe.common.reading import read_json
from eupe.corpus.index import open_corpus
from eupe.errors import ConfigError, ConformanceError, EupeError, StorageError
from eupe.export import (
    coreml_files,
    executorch_files,
    hf_files,
    litert_files,
    onnx_files,
    openvino_files,
    timm_files,
)
from eupe.export.config import COREML, EXECUTORCH, HF, INT8, LITERT, ONNX, OPENVINO, TIMM, ExportConfig
from eupe.export.model_card import write_card
from eupe.export.proof import Proof, prove, require_sameness, time_alone
from eupe.export.source import ForwardFunction, Source, Written, open_source
from eupe.models.hub import brief

RECORD_FILE = "export.json"
CARD_FILE = "README.md"
LABELS_FILE = "labels.txt"
"""Names of a fine-tuned model's classes, one a line, in the order of its logits."""


@dataclass(frozen=True)
class ExportReport:
    """A report on the files in the directory and on how they compare with the run."""

    out: str
    cached: bool
    """The export already existed."""
    format: str
    kind: str
    """The thing that users load: an architecture, a class or a graph."""
    arch: str
    size: int
    precision: str
    outputs: dict[str, dict[str, float]]
    """Agreement by output, see `eupe.export.proof.Likeness`; empty if the format does not run on this system."""
    num_pictures: int
    torch_ms: float
    exported_ms: float | None
    num_bytes: int
    licences: dict[str, str]
    """Licences by the model that the student learned from, including the teachers of proxies."""
    notes: list[str]


@dataclass(frozen=True)
class _Format:
    write: Callable[[Source, ExportConfig, Path], Written]
    reopen: Callable[[Source, Path], ForwardFunction] | None
    """Loads the model as a user would; None if it does not run on this system."""
    require_packages: Callable[[str], None] = lambda precision: None
    """Raises ConfigError if a package is missing that the format needs for a precision."""
    check_file: Callable[[Source, Path], None] = lambda source, folder: None
    """Raises ConformanceError if a file that cannot be run here is wrong."""


FORMATS = {
    TIMM: _Format(timm_files.write, timm_files.reopen),
    HF: _Format(hf_files.write, hf_files.reopen),
    ONNX: _Format(onnx_files.write, onnx_files.reopen, onnx_files.require_packages),
    OPENVINO: _Format(openvino_files.write, openvino_files.reopen, openvino_files.require_packages),
    EXECUTORCH: _Format(executorch_files.write, executorch_files.reopen, executorch_files.require_packages),
    LITERT: _Format(litert_files.write, litert_files.reopen, litert_files.require_packages),
    COREML: _Format(coreml_files.write, None, coreml_files.require_packages, coreml_files.check_file),
}


def export(config: ExportConfig) -> ExportReport:
    """Export a finished run's student, or a fine-tuned model, so that other programs can load it.

    Raises: ConfigError for settings that cannot work; RunError for a run that cannot be exported; ConformanceError if
        the written model is not the same; StorageError if writing fails. After an error no new directory is left.
    """
    FORMATS[config.format].require_packages(config.precision)
    source = open_source(config)
    asked = _identity(source, config)
    if (kept := _recognise(config.out, asked)) is not None:
        return kept
    with _whole(config.out.absolute()) as folder:
        if (kept := _recognise(config.out, asked)) is not None:  # another process may have finished it before the lock
            return kept
        written = _written(source, config, folder)
        proof = _proven(source, config, folder)
        if source.classes:
            labels = "".join(f"{name}\n" for name in source.classes)
            (folder / LABELS_FILE).write_text(labels, encoding="utf-8", errors="replace")
        text = write_card(source, config, written, proof)
        (folder / CARD_FILE).write_text(text, encoding="utf-8", errors="replace")
        files = {
            file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()
        }
        report = ExportReport(
            out=str(config.out),
            cached=False,
            format=config.format,
            kind=written.kind,
            arch=source.encoder.spec.arch,
            size=source.size,
            precision=config.precision,
            outputs={name: asdict(found) for name, found in proof.outputs.items()},
            num_pictures=proof.num_pictures,
            torch_ms=proof.torch_ms,
            exported_ms=proof.exported_ms,
            num_bytes=sum(files.values()),
            licences={origin.name: origin.licence for origin in source.learned_from},
            notes=list(written.notes),
        )
        _keep(folder / RECORD_FILE, asked, report, proof, files)
        for path in folder.rglob("*"):
            share(path)
        publish(folder, config.out.absolute())  # last: a directory that has this name is complete
    return report


def _written(source: Source, config: ExportConfig, folder: Path) -> Written:
    """Write the model in the requested format.

    Raises: ConfigError if the format's library fails; OSError, SafetensorError if the disk does.
    """
    try:
        return FORMATS[config.format].write(source, config, folder)
    except (EupeError, OSError, SafetensorError):
        raise
    except Exception as error:  # libraries raise many types of exceptions
        raise ConfigError(
            f"{config.run} cannot be written as --format {config.format} in {config.precision} ({brief(error)}), so "
            "nothing was exported; try another format or precision"
        ) from error


def _proven(source: Source, config: ExportConfig, folder: Path) -> Proof:
    """Prove that the model in the folder is the run's student.

    Raises: ConformanceError if it is not; ConfigError instead if dynamic sizes were requested.
    """
    what = f"the {config.format} export of {config.run}"
    try:
        return _held_against_the_run(source, config, folder, what)
    except ConformanceError as error:
        if not config.dynamic_size:
            raise
        raise ConfigError(f"{error}; leave --dynamic-size out") from error


def _held_against_the_run(source: Source, config: ExportConfig, folder: Path, what: str) -> Proof:
    """Reload the model in the folder and compare it with the run; check the file alone if it does not run here.

    Raises: ConformanceError if it cannot be run or differs.
    """
    form = FORMATS[config.format]
    try:
        if form.reopen is None:
            form.check_file(source, folder)
            return time_alone(source.reference, source.size)
        exported = form.reopen(source, folder)
        proof = prove(source.reference, exported, source.encoder.spec, _sizes(source, config))
    except EupeError:
        raise
    except Exception as error:  # libraries raise many types of exceptions
        raise ConformanceError(
            f"{what} cannot be reloaded and run ({brief(error)}), so the export was removed"
        ) from error
    require_sameness(proof, config.precision, what)
    return proof


def _identity(source: Source, config: ExportConfig) -> dict[str, Any]:
    """Return the values that two exports must share to be the same."""
    return {
        "eupe": eupe.__version__,
        "student": source.digest,
        "format": config.format,
        "size": source.size,
        "outputs": source.outputs,
        "precision": config.precision,
        "dynamic_size": config.dynamic_size,
        "calibrate": None if config.calibrate is None else open_corpus(config.calibrate).fingerprint,
    }


def _sizes(source: Source, config: ExportConfig) -> Sequence[tuple[int, int]]:
    """Return the heights and widths to verify: the export's size, and others if any size should work."""
    size, patch = source.size, source.encoder.spec.patch
    if not config.dynamic_size:
        return [(size, size)]
    return [(size, size), (size + patch, size + patch), (size, size + 2 * patch), (size + 3 * patch, size)]


def _recognise(out: Path, asked: dict[str, Any]) -> ExportReport | None:
    """Return the report of the same export if it is already there; None if nothing is there.

    Raises: ConfigError if something else is there, or a file of the export is missing or changed its size.
    """
    is_there = os.path.exists(out)  # noqa: PTH110 - Path.exists raises for a name that is too long
    if not is_there or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        kept = read_json(out / RECORD_FILE)
        is_this = kept["asked"] == asked
        report = ExportReport(**{**kept["report"], "out": str(out), "cached": True})
        damaged = [name for name, size in kept["files"].items() if _size(out / name) != size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"--out {out} already exists and is not an export; give another --out, or remove it"
        ) from None
    if not is_this:
        raise ConfigError(f"--out {out} holds another export; give another --out, or remove it")
    if damaged:
        raise ConfigError(
            f"--out {out} holds this export, but its {damaged[0]} is missing or has changed in size; remove {out} and "
            "export again"
        )
    if (asked["format"], asked["precision"]) == (ONNX, INT8) and not onnx_files.holds_int8(out):
        raise ConfigError(
            f"--out {out} holds an export that is called int8 but has float32 weights, as an earlier eupe wrote them "
            f"for CNNs; remove {out} and export again"
        )
    return report


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _keep(path: Path, asked: dict[str, Any], report: ExportReport, proof: Proof, files: dict[str, int]) -> None:
    plain = {"asked": asked, "report": asdict(report), "proof": asdict(proof), "files": files}
    path.write_text(json.dumps(plain, indent=2) + "\n")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Make a temporary folder beside `out`, and remove it afterwards unless it was renamed to `out`.

    Raises: ConfigError if another process is writing the same export; StorageError.
    """
    try:
        with unfinished(out, verb="export") as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"the export cannot be written to {out}: {error}") from error
