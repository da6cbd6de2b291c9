"""Which of timm's models can be students: of each of its files, the smallest is trained for a step and exported.

python -m benchmarks.students --folder SCRATCH [--only FILE ...]

Rows are added to SCRATCH/students.jsonl as they come, and rows that are there are not made again; the table is printed
from all of them. A model whose features are no map and no patch tokens, or that takes no size, is refused by a
sentence before it is trained: that sentence is its row.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models import model_entrypoint
from torch import nn

from eupe.errors import EupeError
from eupe.export.config import ExportConfig
from eupe.export.job import export
from eupe.models.encoder import load_encoder, save_encoder
from eupe.models.timm_models import timm_on_paper, timm_spec
from eupe.train.config import TrainConfig
from eupe.train.loop import train

SIDE = 64
LEAST_COSINE = 0.9999
MOST_PARAMETERS = 200_000_000
"""Larger models are not tried: a step of one takes more memory than the machines have on which this is run."""
PICTURES = 24
TEACHER = "test_vit"


@dataclass(frozen=True)
class Row:
    """The outcome for the smallest model of a file."""

    file: str
    arch: str
    parameters: int
    size: int | None = None
    cosine: float | None = None
    """Least cosine between the exported and the trained student, over all tokens; None if it got no further."""
    said: str = ""
    """The sentence with which it was refused, or why it was not tried."""

    @property
    def was_tried(self) -> bool:
        return self.parameters <= MOST_PARAMETERS


def files() -> dict[str, list[str]]:
    """Return the architectures of each file of timm's models that has any."""
    found: dict[str, list[str]] = {}
    for arch in timm.list_models():
        found.setdefault(model_entrypoint(arch).__module__.rpartition(".")[2], []).append(arch)
    return found


def smallest(archs: list[str]) -> tuple[str, int]:
    """Return the architecture with the fewest parameters, and their number."""
    counts = {}
    for arch in archs:
        try:
            counts[arch] = sum(parameter.numel() for parameter in timm_on_paper(arch).parameters())
        except Exception as error:  # a model that cannot be built at all is not the smallest
            print(f"{arch}: {error}", file=sys.stderr)
    arch = min(counts, key=counts.__getitem__)
    return arch, counts[arch]


def fitting_size(arch: str) -> int:
    """Return a small size that an architecture takes, or else its own, or one near it.

    Raises: ConfigError if it takes none.
    """
    own = int(timm_on_paper(arch).pretrained_cfg["input_size"][-1])
    for size in (SIDE, own, 256):
        with suppress(EupeError):
            return timm_spec(arch, size).size
    return timm_spec(arch, None).size


def tried(file: str, archs: list[str], store: Path, folder: Path, *, format: str = "onnx") -> Row:
    """Train the smallest of a file's models for a step, export it, and return its row."""
    arch, parameters = smallest(archs)
    run, out = folder / "run", folder / "export"
    for path in (run, out):
        shutil.rmtree(path, ignore_errors=True)
    row = Row(file, arch, parameters)
    if not row.was_tried:
        return Row(file, arch, parameters, said="not tried: too large for this machine")
    try:
        size = fitting_size(arch)
        row = Row(file, arch, parameters, size)
        train(
            TrainConfig(
                targets=(store,), student=arch, out=run, size=(size,), target_size=(SIDE,), steps=1, batch_size=4,
                head_width=16, lr=1e-4,
            )
        )  # fmt: skip
        settle(run)
        report = export(ExportConfig(run=run, out=out, format=format))
    except EupeError as error:
        return Row(file, arch, parameters, row.size, said=str(error))
    return Row(file, arch, parameters, size, cosine=min(found["least"] for found in report.outputs.values()))


def settle(run: Path) -> None:
    """Give a run's batch norms statistics of their own activations: after one step, all pictures would look alike."""
    encoder = load_encoder(run)
    for part in encoder.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.momentum = 1.0
    with torch.no_grad():
        encoder.train()(torch.randn(8, 3, encoder.spec.size, encoder.spec.size))
    save_encoder(encoder, run)


def made_store(folder: Path) -> Path:
    """Make a small store of rendered pictures with a teacher of random weights, unless it is there."""
    from eupe.cli.app import app
    from scenes.layouts import LAYOUTS, Request

    if (store := folder / "store.zarr").exists():
        return store
    pictures = folder / "pictures"
    for number in range(PICTURES):
        LAYOUTS["classification"].draw(pictures, Request(pictures=PICTURES, size=SIDE, seed=0), number)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(timm.create_model(TEACHER, num_classes=0).state_dict(), folder / "weights.safetensors")
    words = ["extract", "--teacher", f"timm:{TEACHER}", "--weights", folder / "weights.safetensors", "--size", SIDE]
    app([*map(str, [*words, "--corpus", pictures, "--views", "rrc:1", "--out", store])], standalone_mode=False)
    return store


def kept(path: Path) -> Iterator[Row]:
    """Yield the rows that were made before."""
    if path.exists():
        yield from (Row(**json.loads(line)) for line in path.read_text().splitlines())


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown, and their sum."""
    lines = ["| file of timm | smallest model | parameters | px | least cosine, or why not |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.file} | {row.arch} | {row.parameters / 1e6:.1f}M | {row.size or ''} "
        f"| {row.said if row.cosine is None else f'{row.cosine:.6f}'} |"
        for row in sorted(rows, key=lambda row: row.file)
    ]
    judged = [row for row in rows if row.was_tried]
    good = sum(row.cosine is not None and row.cosine >= LEAST_COSINE for row in judged)
    sentence = f"{good} of {len(judged)} train a step and agree after export (least cosine {LEAST_COSINE} or more)."
    if left := len(rows) - len(judged):
        sentence += f" {left} too large to be tried."
    return "\n".join([*lines, "", sentence])


def main() -> None:
    """Try every file that was not tried yet, and print the table."""
    parser = argparse.ArgumentParser(description="Which of timm's models can be students.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="Names of files of timm.models.")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    store = made_store(folder)
    results = folder / "students.jsonl"
    rows = {row.file: row for row in kept(results)}
    for file, archs in files().items():
        if file in rows or (arguments.only and file not in arguments.only):
            continue
        rows[file] = tried(file, archs, store, folder)
        print(rows[file], file=sys.stderr, flush=True)
        with results.open("a") as lines:
            lines.write(json.dumps(asdict(rows[file])) + "\n")
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
