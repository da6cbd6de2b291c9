"""The source of an export: a run's student or a fine-tuned model, laid out for the requested size, with its heads.

Shapes: B pictures, H W pixels, h w cells, D width of a token, Ds width of the summary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from eupe.common.kinds import WEIGHTS_FILE
from eupe.errors import ConfigError, RunError, TeacherError
from eupe.evaluate.licences import Origin, origins
from eupe.export.config import FORMATS, HF, TIMM, ExportConfig
from eupe.export.heads import chosen, folded
from eupe.finetune.config import CLASSIFY
from eupe.finetune.job import ASKED_FILE
from eupe.finetune.model import HEAD_FILE, KINDS, OUTPUTS, TASK_FILE, TaskFacts, is_finetuned, load_model
from eupe.models.encoder import Encoder, encoder_spec, load_encoder
from eupe.models.hub import brief
from eupe.models.outside import is_outside
from eupe.train.init import laid_out
from eupe.train.predict import load_predictors
from eupe.train.run_spec import HEADS_FILE, NORMS_FILE, RunSpec, finished_run_spec

GRAPH_FORMATS = ", ".join(name for name in FORMATS if name not in (TIMM, HF))
"""Formats of a graph, which needs no code of the student, in words."""
ForwardFunction = Callable[[Tensor], dict[str, Tensor]]
"""A function from normalised float32 pixels [B, 3, H, W] to outputs by name: `summary` [B, Ds], `dense` [B, h, w, D],
`TARGET.KIND` of each head of a run, and of a fine-tuned model `logits` [B, C] or [B, h, w, C], or `depth` [B, h, w, 1].
"""


@dataclass(frozen=True)
class Written:
    """A description of the files that a format wrote."""

    kind: str
    """The thing that users load: an architecture, a class or a graph."""
    notes: tuple[str, ...] = ()
    """Notes for users of the export, of one or a few sentences each."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A run, or a fine-tuned model, to export."""

    run: Path
    spec: RunSpec | None = None
    """Of a run."""
    facts: TaskFacts | None = None
    """Of a fine-tuned model."""
    learned_from: tuple[Origin, ...]
    encoder: Encoder
    """The student laid out for the size of the export, in evaluation mode, on the CPU, in float32."""
    heads: Mapping[str, nn.Module]
    """Heads by output name; each maps the student's token of a kind to a teacher's, or to the answer of a task."""
    kinds: Mapping[str, str]
    """Kind of token that each head takes."""
    reference: ForwardFunction
    """Student and heads as they are, through the code that training and evaluation use."""
    digest: str
    """sha256 of the files that decide the outputs."""

    @property
    def size(self) -> int:
        return self.encoder.spec.size

    @property
    def outputs(self) -> list[str]:
        """Return the names of the outputs, in order."""
        return ["summary", "dense", *self.heads]

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of a fine-tuned model's classes."""
        return () if self.facts is None else self.facts.classes


def open_source(config: ExportConfig) -> Source:
    """Read a finished run or a fine-tuned model, and prepare student and heads for the export.

    Raises: RunError if it is not finished, or is damaged; ConfigError for a size that its architecture does not take,
        heads that it does not have, or a format that has no place for its head.
    """
    if (config.run / ASKED_FILE).exists():
        models = sorted(path.parent for path in config.run.glob(f"*/{TASK_FILE}"))
        if len(models) != 1:
            raise ConfigError(
                f"{config.run} holds {len(models)} fine-tuned models; give one of them, such as "
                f"{', '.join(map(str, models[:3])) or 'one that `eupe finetune` has finished'}"
            )
        config = replace(config, run=models[0])
    return _finetuned(config) if is_finetuned(config.run) else _of_run(config)


def _of_run(config: ExportConfig) -> Source:
    spec = finished_run_spec(config.run)
    trained = load_encoder(config.run).eval().requires_grad_(False)
    _require_a_place(trained, config)
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
        learned_from=tuple(origins(config.run, spec)),
        encoder=_laid_out(trained, config.size or trained.spec.size, config),
        heads={name: head.requires_grad_(False) for name, head in heads.items()},
        kinds={name: name.rpartition(".")[2] for name in heads},
        reference=reference,
        digest=_digest([config.run / name for name in files]),
    )


def _finetuned(config: ExportConfig) -> Source:
    encoder, head, facts = load_model(config.run)
    _require_a_place(encoder, config)
    if config.heads:
        raise ConfigError(f"--heads is for the targets of a run; the head of {config.run} is exported in any case")
    if config.format == HF or (config.format == TIMM and facts.task != CLASSIFY):
        instead = f", {TIMM}" if facts.task == CLASSIFY else ""
        raise ConfigError(
            f"--format {config.format} has no place for the head of {config.run}, which was fine-tuned to "
            f"{facts.task}; give --format {GRAPH_FORMATS}{instead}"
        )
    kind, output = KINDS[facts.task], OUTPUTS[facts.task]
    last = (head if facts.task == CLASSIFY else ChannelsLast(head)).requires_grad_(False)

    @torch.inference_mode()
    def reference(pixels: Tensor) -> dict[str, Tensor]:
        tokens = encoder(pixels)
        return {"summary": tokens.summary, "dense": tokens.dense, output: last(getattr(tokens, kind))}

    return Source(
        run=config.run,
        facts=facts,
        learned_from=facts.learned_from,
        encoder=_laid_out(encoder.requires_grad_(False), config.size or encoder.spec.size, config),
        heads={output: last},
        kinds={output: kind},
        reference=reference,
        digest=_digest([config.run / name for name in (WEIGHTS_FILE, HEAD_FILE, TASK_FILE)]),
    )


class ChannelsLast(nn.Module):
    """A head of dense tokens whose output has its channels last, as the tokens have."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, tokens_BhwD: Tensor) -> Tensor:
        """Return the head's output, [B, h, w, C]."""
        return self.head(tokens_BhwD).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


def _require_a_place(trained: Encoder, config: ExportConfig) -> None:
    """Raise ConfigError if the format takes timm's models alone, and this is another."""
    if is_outside(trained.spec.arch) and config.format in (TIMM, HF):
        raise ConfigError(
            f"--format {config.format} is for students of timm; the weights of {trained.spec.arch} are in "
            f"{config.run / WEIGHTS_FILE} by the names of its own tensors, for its own code; for a graph that needs "
            f"none of it, give --format {GRAPH_FORMATS}"
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
        encoder = laid_out(trained, size, source=str(run)).eval().requires_grad_(False)
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
