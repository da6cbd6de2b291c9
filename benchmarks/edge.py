"""What each format and precision of an export costs on tasks: k-NN accuracy and mean IoU of the exported files.

python -m benchmarks.edge RUN ... --rendered RENDERED --calibrate PICTURES [--formats onnx openvino litert] [--steps N]

RENDERED is a folder of `python -m scenes`; int8 is calibrated on PICTURES. Each export is run by its own runtime on the
views that `eupe eval` makes, and judged by its tasks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from eupe.common.compute import Tokens, normalise
from eupe.evaluate.knn import knn
from eupe.evaluate.segment import TRAINING, segment
from eupe.evaluate.subject import EncoderSubject, open_subjects
from eupe.export.config import FORMATS, FP32, INT8, LITERT, ONNX, OPENVINO, ExportConfig
from eupe.export.job import FORMATS as WAYS
from eupe.export.job import ExportReport, export
from eupe.export.source import ForwardFunction, open_source

TORCH = "PyTorch"
SIZE_OF = {"README.md", "export.json"}
"""Files of an export that are not the model."""


@dataclass(frozen=True)
class ExportedSubject(EncoderSubject):
    """A run's student whose tokens come from an exported file."""

    forward: ForwardFunction | None = None

    def encode(self, views_u8_VSSC: NDArray[np.uint8], *, size: int) -> Tokens:
        assert self.forward is not None
        answers = self.forward(normalise(torch.from_numpy(views_u8_VSSC), self.spec.mean, self.spec.std))
        return Tokens(answers["summary"], answers["dense"])


@dataclass(frozen=True)
class Cost:
    """The measurements of one export of one run, or of the run in PyTorch."""

    format: str
    precision: str
    num_bytes: float
    ms: float
    least: float
    """Least cosine of a token with the run's own, on the pictures of the proof."""
    knn: float
    miou: float


def costs_of(run: Path, options: argparse.Namespace) -> Iterator[Cost]:
    """Judge a run in PyTorch, then each of its exports."""
    (subject,) = open_subjects([str(run)], {})
    assert isinstance(subject, EncoderSubject)
    weights_bytes = (run / "student.safetensors").stat().st_size
    yield Cost(TORCH, FP32, weights_bytes, float("nan"), 1.0, **scores_of(subject, options))
    for form in options.formats:
        for precision in FORMATS[form]:
            with TemporaryDirectory() as folder:
                calibrate = options.calibrate if precision == INT8 else None
                out = Path(folder) / "out"
                config = ExportConfig(run=run, out=out, format=form, precision=precision, calibrate=calibrate)
                report = export(config)
                reopen = WAYS[form].reopen
                assert reopen is not None
                exported = ExportedSubject(subject.name, subject.spec, forward=reopen(open_source(config), out))
                yield Cost(form, precision, *measured(report, out), **scores_of(exported, options))


def measured(report: ExportReport, out: Path) -> tuple[float, float, float]:
    """Return the bytes of an export's model, its milliseconds per picture and its least cosine."""
    num_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file() and file.name not in SIZE_OF)
    assert report.exported_ms is not None
    return num_bytes, report.exported_ms, min(each["least"] for each in report.outputs.values())


def scores_of(subject: EncoderSubject, options: argparse.Namespace) -> dict[str, float]:
    """Return k-NN accuracy and mean IoU on rendered pictures, at the subject's own size."""
    size = subject.spec.native_size
    training = replace(TRAINING, steps=options.steps)
    accuracy = knn(subject, data=options.rendered / "classification", size=size).scores["accuracy"]
    miou = segment(subject, data=options.rendered / "segmentation", size=size, training=training).scores["miou"]
    return {"knn": accuracy, "miou": miou}


def main() -> None:
    """Print a table: means over the runs, and the drop against PyTorch run by run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--rendered", type=Path, required=True)
    parser.add_argument("--calibrate", type=str, required=True)
    parser.add_argument("--formats", nargs="+", choices=[ONNX, OPENVINO, LITERT], default=[ONNX, OPENVINO, LITERT])
    parser.add_argument("--steps", type=int, default=200, help="updates of the segmentation head")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[list[Cost]] = []
    for run in options.runs:
        found.append([])
        for cost in costs_of(run, options):
            print(cost, file=sys.stderr, flush=True)
            found[-1].append(cost)
    print("| format | precision | MB | ms | least cosine | k-NN | drop | mIoU | drop |")
    print("|---|---|---|---|---|---|---|---|---|")
    for rows in zip(*found, strict=True):
        print(row_of(rows, [costs[0] for costs in found]), flush=True)


def row_of(rows: tuple[Cost, ...], bases: list[Cost]) -> str:
    """Return the row of one format and precision over all runs; a drop is shown for each run."""

    def drops(of: Callable[[Cost], float]) -> str:
        return ", ".join(f"{100 * (of(base) - of(row)):+.2f}" for row, base in zip(rows, bases, strict=True))

    size, ms, accuracy, miou = (mean(getattr(row, name) for row in rows) for name in ("num_bytes", "ms", "knn", "miou"))
    cells = (
        *(rows[0].format, rows[0].precision, f"{size / 1e6:.2f}", f"{ms:.2f}", f"{min(row.least for row in rows):.6f}"),
        *(f"{100 * accuracy:.2f}", drops(lambda cost: cost.knn), f"{100 * miou:.2f}", drops(lambda cost: cost.miou)),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
