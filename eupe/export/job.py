"""An export from beginning to end: read the run, write a directory, load it again, prove that it is the same model."""

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
from eupe.corpus.index import open_corpus
from eupe.errors import ConfigError, ConformanceError, EupeError, StorageError
from eupe.evaluate.licences import origins
from eupe.export import executorch_files, hf_files, onnx_files, timm_files
from eupe.export.config import EXECUTORCH, HF, INT8, ONNX, TIMM, ExportConfig
from eupe.export.model_card import write_card
from eupe.export.source import Says, Source, Written, open_source
from eupe.export.verify import Proof, prove, require_sameness
from eupe.files import publish
from eupe.locks import unfinished
from eupe.reading import read_json
from eupe.share import share
from eupe.teachers.weights import brief

RECORD_FILE = "export.json"
CARD_FILE = "README.md"


@dataclass(frozen=True)
class ExportReport:
    """What was left in the directory, and how it compares with the run."""

    out: str
    cached: bool
    """It was there already."""
    format: str
    kind: str
    """What is loaded: an architecture, a class, a graph."""
    arch: str
    size: int
    precision: str
    outputs: dict[str, dict[str, float]]
    """Per output, see `eupe.export.verify.Likeness`."""
    num_pictures: int
    torch_ms: float
    exported_ms: float
    num_bytes: int
    licences: dict[str, str]
    """By what the student learned from, proxies' teachers included."""
    notes: list[str]


@dataclass(frozen=True)
class _Format:
    write: Callable[[Source, ExportConfig, Path], Written]
    reopen: Callable[[Source, Path], Says]
    require_packages: Callable[[], None] = lambda: None


FORMATS = {
    TIMM: _Format(timm_files.write, timm_files.reopen),
    HF: _Format(hf_files.write, hf_files.reopen),
    ONNX: _Format(onnx_files.write, onnx_files.reopen, onnx_files.require_packages),
    EXECUTORCH: _Format(executorch_files.write, executorch_files.reopen, executorch_files.require_packages),
}


def export(config: ExportConfig) -> ExportReport:
    """Leave a finished run's student where other programs load it.

    Raises: ConfigError for what cannot work; RunError for a run that cannot be exported; ConformanceError if what was
        written is not the same model, and StorageError if the disk refuses: then no directory is left.
    """
    FORMATS[config.format].require_packages()
    source = open_source(config)
    asked = _identity(source, config)
    if (kept := _recognise(config.out, asked)) is not None:
        return kept
    with _whole(config.out.absolute()) as folder:
        if (kept := _recognise(config.out, asked)) is not None:  # by another process, just now
            return kept
        written = _written(source, config, folder)
        proof = _proven(source, config, folder)
        learned_from = origins(config.run, source.card)
        text = write_card(source, config, written, proof, learned_from)
        (folder / CARD_FILE).write_text(text, encoding="utf-8", errors="replace")
        files = {file.name: file.stat().st_size for file in folder.iterdir()}
        report = ExportReport(
            out=str(config.out),
            cached=False,
            format=config.format,
            kind=written.kind,
            arch=source.encoder.card.arch,
            size=source.size,
            precision=config.precision,
            outputs={name: asdict(found) for name, found in proof.outputs.items()},
            num_pictures=proof.num_pictures,
            torch_ms=proof.torch_ms,
            exported_ms=proof.exported_ms,
            num_bytes=sum(files.values()),
            licences={origin.name: origin.licence for origin in learned_from},
            notes=list(written.notes),
        )
        _keep(folder / RECORD_FILE, asked, report, proof, files)
        for file in folder.iterdir():
            share(file)
        publish(folder, config.out.absolute())
    return report


def _written(source: Source, config: ExportConfig, folder: Path) -> Written:
    """Raises: ConfigError if the format's library refuses; OSError, SafetensorError if the disk does."""
    try:
        return FORMATS[config.format].write(source, config, folder)
    except (EupeError, OSError, SafetensorError):
        raise
    except Exception as error:  # libraries refuse in many ways
        raise ConfigError(
            f"{config.run} cannot be written as --format {config.format} in {config.precision} ({brief(error)}), so "
            "nothing was left; try another format or precision"
        ) from error


def _proven(source: Source, config: ExportConfig, folder: Path) -> Proof:
    """Raises: ConformanceError if what lies in the folder is not the run's student; ConfigError if the sizes matter."""
    what = f"the {config.format} export of {config.run}"
    try:
        return _held_against_the_run(source, config, folder, what)
    except ConformanceError as error:
        if not config.dynamic_size:
            raise
        raise ConfigError(f"{error}; leave --dynamic-size out") from error


def _held_against_the_run(source: Source, config: ExportConfig, folder: Path, what: str) -> Proof:
    """Raises: ConformanceError."""
    try:
        exported = FORMATS[config.format].reopen(source, folder)
        proof = prove(source.reference, exported, source.encoder.card, _sizes(source, config))
    except EupeError:
        raise
    except Exception as error:  # libraries refuse in many ways
        raise ConformanceError(
            f"{what} cannot be loaded again and asked ({brief(error)}), so nothing was left"
        ) from error
    require_sameness(proof, config.precision, what)
    return proof


def _identity(source: Source, config: ExportConfig) -> dict[str, Any]:
    """What makes two exports the same."""
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
    """Heights and widths to be tried, all of them where any should work."""
    size, patch = source.size, source.encoder.card.patch
    if not config.dynamic_size:
        return [(size, size)]
    return [(size, size), (size + patch, size + patch), (size, size + 2 * patch), (size + 3 * patch, size)]


def _recognise(out: Path, asked: dict[str, Any]) -> ExportReport | None:
    """The report of this very export; None where there is nothing yet.

    Raises: ConfigError if something else is there, or a part of it is gone.
    """
    is_there = os.path.exists(out)  # noqa: PTH110 - which raises for a long name
    if not is_there or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        kept = read_json(out / RECORD_FILE)
        is_this = kept["asked"] == asked
        report = ExportReport(**{**kept["report"], "out": str(out), "cached": True})
        damaged = [name for name, size in kept["files"].items() if _size(out / name) != size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"--out {out} holds something that is no export; give another, or remove it") from None
    if not is_this:
        raise ConfigError(f"--out {out} holds another export; give another, or remove it")
    if damaged:
        raise ConfigError(
            f"--out {out} holds this export, but its {damaged[0]} is gone or not as long as it was; remove {out}, and "
            "export again"
        )
    if asked["precision"] == INT8 and not onnx_files.holds_int8(out):
        raise ConfigError(
            f"--out {out} holds an export that is called int8 and has float32 weights, as an earlier eupe left those "
            f"of CNNs; remove {out}, and export again"
        )
    return report


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _keep(path: Path, asked: dict[str, Any], report: ExportReport, proof: Proof, files: dict[str, int]) -> None:
    plain = {"asked": asked, "report": asdict(report), "proof": asdict(proof), "files": files}
    path.write_text(json.dumps(plain, indent=2) + "\n")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A neighbour to write to, which is gone afterwards unless it took the name `out`.

    Raises: ConfigError if another process is at work on the same; StorageError.
    """
    try:
        with unfinished(out, verb="export") as folder:
            yield folder
    except (OSError, SafetensorError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"the export cannot be written to {out}: {error}") from error
