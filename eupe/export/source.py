"""The source of an export: the student of a finished run, laid out for the requested size, and its heads.

Shapes: B pictures, H W pixels, h w cells, D width of a token, Ds width of the summary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from eupe.common.kinds import WEIGHTS_FILE
from eupe.errors import ConfigError, RunError, TeacherError
from eupe.export.config import EXECUTORCH, HF, ONNX, OPENVINO, TIMM, ExportConfig
from eupe.export.heads import chosen, folded
from eupe.models.checkpoints import load_state_dict_strictly
from eupe.models.encoder import Encoder, build_encoder, encoder_spec, load_encoder
from eupe.models.hub import brief
from eupe.models.outside import is_outside
from eupe.train.init import fitted
from eupe.train.predict import load_predictors
from eupe.train.run_spec import HEADS_FILE, NORMS_FILE, RunSpec, finished_run_spec

ForwardFunction = Callable[[Tensor], dict[str, Tensor]]
"""A function from normalised float32 pixels [B, 3, H, W] to outputs by name: `summary` [B, Ds], `dense` [B, h, w, D],
and `TARGET.KIND` of each head."""


@dataclass(frozen=True)
class Written:
    """A description of the files that a format wrote."""

    kind: str
    """The thing that users load: an architecture, a class or a graph."""
    notes: tuple[str, ...] = ()
    """Notes for users of the export, of one or a few sentences each."""


@dataclass(frozen=True)
class Source:
    """A run to export."""

    run: Path
    spec: RunSpec
    encoder: Encoder
    """The student laid out for the size of the export, in evaluation mode, on the CPU, in float32."""
    heads: dict[str, nn.Sequential]
    """Heads by output name; each maps the student's token of a kind to the teacher's."""
    reference: ForwardFunction
    """The run's student and heads as they are, through the code that training and evaluation use."""
    digest: str
    """sha256 of the files that decide the outputs."""

    @property
    def size(self) -> int:
        return self.encoder.spec.size

    @property
    def outputs(self) -> list[str]:
        """Return the names of the outputs, in order."""
        return ["summary", "dense", *self.heads]


def open_source(config: ExportConfig) -> Source:
    """Read a finished run and prepare its student and heads for the export.

    Raises: RunError if the run is not finished, or is damaged; ConfigError for a size that its architecture does not
        take, or heads that it does not have.
    """
    spec = finished_run_spec(config.run)
    trained = load_encoder(config.run).eval().requires_grad_(False)
    if is_outside(trained.spec.arch) and config.format in (TIMM, HF):
        raise ConfigError(
            f"--format {config.format} is for students of timm; the weights of {trained.spec.arch} are in "
            f"{config.run / WEIGHTS_FILE} by the names of its own tensors, for its own code; for a graph that needs "
            f"none of it, give --format {ONNX}, {OPENVINO} or {EXECUTORCH}"
        )
    predictors = chosen(load_predictors(config.run), config.heads) if config.heads else []

    @torch.inference_mode()
    def reference(pixels: Tensor) -> dict[str, Tensor]:
        tokens = trained(pixels)
        said = {"summary": tokens.summary, "dense": tokens.dense}
        for predictor in predictors:
            said |= {f"{predictor.name}.{kind}": one(said[kind]) for kind, one in predictor.kinds.items()}
        return said

    heads = {f"{each.name}.{kind}": folded(one) for each in predictors for kind, one in each.kinds.items()}  # type: ignore[arg-type]
    files = [WEIGHTS_FILE, *((HEADS_FILE, NORMS_FILE) if predictors else ())]
    return Source(
        run=config.run,
        spec=spec,
        encoder=_laid_out(trained, config.size or trained.spec.size, config),
        heads={name: head.requires_grad_(False) for name, head in heads.items()},
        reference=reference,
        digest=_digest([config.run / name for name in files]),
    )


def _laid_out(trained: Encoder, size: int, config: ExportConfig) -> Encoder:
    """Return the student for another input size; a learned position table is resampled as timm does on loading.

    Raises: ConfigError if the architecture does not take the size.
    """
    arch, own, run = trained.spec.arch, trained.spec.size, config.run
    if size == own:
        return trained
    encoder_spec(arch, size)
    if config.dynamic_size:  # the graph resamples positions itself; resampling twice would give other positions
        return Encoder(replace(trained.spec, size=size), trained.model)
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.random.fork_rng(devices=[]):
            encoder = build_encoder(arch, size=size, known=trained.spec).eval().requires_grad_(False)
        load_state_dict_strictly(encoder.model, fitted(trained.model.state_dict(), encoder.model), source=str(run))
        with torch.inference_mode():  # the trained layout resamples its positions in every pass, so both must agree
            torch.testing.assert_close(encoder(pixels).dense, trained(pixels).dense, rtol=1e-3, atol=1e-3)
    except (AssertionError, RuntimeError, ValueError, TeacherError) as error:
        raise ConfigError(
            f"--size {size} does not work for {arch}, which was trained at {own} px in {run} ({brief(error)}); leave "
            "--size out"
        ) from error
    return encoder


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise RunError(f"{error.filename} cannot be read: {error}") from error
    return digest.hexdigest()
