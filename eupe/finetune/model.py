"""A fine-tuned model: an encoder and the head of one task, and the directory that keeps both.

Shapes: B views, S side of a view in pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eupe.common.compute import Tokens, autocast, compute_dtype, fastest_format, normalise
from eupe.common.files import replacing, share, write_file
from eupe.common.reading import read_json
from eupe.errors import RunError, StorageError
from eupe.evaluate.depth import MIN_M, LinearDepth
from eupe.evaluate.encode import EncodedViews, encode_views
from eupe.evaluate.judged_pictures import CropFunction, Pictures
from eupe.evaluate.licences import Origin
from eupe.evaluate.segment import LinearSegmenter
from eupe.finetune.config import CLASSIFY, DEPTH, SEGMENT
from eupe.models.encoder import Encoder, load_encoder, save_encoder
from eupe.models.encoder_spec import EncoderSpec
from eupe.store.layout import DENSE, SUMMARY

HEAD_FILE = "head.safetensors"
TASK_FILE = "task.json"
OUTPUTS = {CLASSIFY: "logits", SEGMENT: "logits", DEPTH: "depth"}
"""Name of a head's output, by task."""
KINDS = {CLASSIFY: SUMMARY, SEGMENT: DENSE, DEPTH: DENSE}
"""Kind of token that a head reads, by task."""


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """Facts about a fine-tuned model, beside its tensors."""

    task: str
    classes: tuple[str, ...]
    """Names of the classes, in the order of the head's outputs; empty for depth."""
    max_m: float | None
    """Greatest depth that the head can answer; None for other tasks."""
    start: str
    """What it began as, in words."""
    learned_from: tuple[Origin, ...]
    """What its weights came from, with licences; empty if they were random."""
    settings: Mapping[str, Any]
    """Options that decided the training."""
    scores: Mapping[str, float]
    """On the judged pictures; the first is compared."""
    data: Mapping[str, Any]
    """Location of the pictures, and how many were learned from and judged."""
    versions: Mapping[str, str]
    """Of the libraries that decided the outcome."""


class FineTuned(nn.Module):
    """An encoder with a head, trained together."""

    def __init__(self, encoder: Encoder, head: nn.Module, task: str, device: torch.device) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.kind = KINDS[task]
        self.dtype = compute_dtype("auto", device)
        self.memory_format = fastest_format(encoder.model)
        self.to(device)
        self.encoder.to(memory_format=self.memory_format)

    def forward(self, views_u8_BSSC: Tensor) -> Tensor:
        """Return the head's output for views on this device: logits [B, C], or [B, C, h, w], or metres [B, 1, h, w]."""
        with autocast(self.dtype, views_u8_BSSC.device):
            tokens = getattr(self._tokens(views_u8_BSSC), self.kind)
        # a head is small, and its losses need float32
        return self.head(tokens.float())  # type: ignore[no-any-return]

    def use_head(self, head: nn.Module) -> None:
        """Put another head in place of the model's."""
        self.head = head.to(next(self.parameters()).device)

    def encode(self, pictures: Pictures, crop: CropFunction) -> EncodedViews:
        """Encode views of pictures, as evaluations do: the tokens that the head reads.

        Raises: as `encode_views`.
        """
        spec, device = self.encoder.spec, next(self.parameters()).device

        @torch.inference_mode()
        def encode(views_u8_BSSC: NDArray[np.uint8]) -> Tokens:
            with autocast(self.dtype, device):
                return self._tokens(torch.from_numpy(views_u8_BSSC).to(device))

        was_training = self.training
        self.eval()
        try:
            return encode_views(
                pictures,
                encode,
                kinds=[self.kind],
                size=spec.size,
                crop=crop,
                cells=(spec.size // spec.patch, spec.dense_dim),
                scratch=None,
                of=spec.arch,
            )
        finally:
            self.train(was_training)

    def _tokens(self, views_u8_BSSC: Tensor) -> Tokens:
        spec = self.encoder.spec
        pixels = normalise(views_u8_BSSC, spec.mean, spec.std, memory_format=self.memory_format)
        tokens: Tokens = self.encoder(pixels)
        return tokens


def save_model(model: FineTuned, facts: TaskFacts, folder: Path) -> None:
    """Write encoder, head and facts.

    Raises: StorageError.
    """
    save_encoder(model.encoder, folder)
    head = {name: tensor.detach().cpu().contiguous() for name, tensor in model.head.state_dict().items()}
    try:
        with replacing(folder / HEAD_FILE) as unfinished:
            save_file(head, unfinished)
            share(unfinished)
        # last, because it marks the model as whole
        write_file(folder / TASK_FILE, json.dumps(asdict(facts), indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"the model cannot be written to {folder}: {error}") from error


def is_finetuned(folder: Path) -> bool:
    """Return whether a directory holds a fine-tuned model."""
    return (folder / TASK_FILE).is_file()


def load_facts(folder: Path) -> TaskFacts:
    """Read what is known of a fine-tuned model.

    Raises: RunError if the directory holds none, or it is damaged.
    """
    try:
        plain = dict(read_json(folder / TASK_FILE))
        learned_from = tuple(
            Origin(each["name"], each["licence"], tuple(each["through"])) for each in plain["learned_from"]
        )
        facts = TaskFacts(**{**plain, "classes": tuple(plain["classes"]), "learned_from": learned_from})
        if facts.task not in OUTPUTS or not all(isinstance(name, str) for name in facts.classes):
            raise ValueError(f"its task is {facts.task!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} holds no readable {TASK_FILE} of a fine-tuned model ({error})") from error
    return facts


def load_model(folder: Path) -> tuple[Encoder, nn.Module, TaskFacts]:
    """Load a fine-tuned model on the CPU: encoder and head in evaluation mode, and what is known of them.

    Raises: RunError if the directory holds none, or it is damaged.
    """
    facts = load_facts(folder)
    encoder = load_encoder(folder).eval()
    head = make_head(facts.task, encoder.spec, num_classes=len(facts.classes), max_m=facts.max_m)
    try:
        head.load_state_dict(load_file(folder / HEAD_FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{folder} has no usable {HEAD_FILE} ({error}); fine-tune again") from error
    return encoder, head.eval(), facts


def make_head(task: str, spec: EncoderSpec, *, num_classes: int, max_m: float | None) -> nn.Module:
    """Build a task's head: a linear layer on the summary, or the head of `eupe eval segment` or `eupe eval depth`."""
    if task == CLASSIFY:
        # without weights all classes are as likely, whatever the scale of the features
        layer = nn.Linear(spec.summary_dim, num_classes)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer
    if task == SEGMENT:
        return LinearSegmenter(spec.dense_dim, num_classes)
    assert max_m is not None
    return LinearDepth(spec.dense_dim, min_m=MIN_M, max_m=max_m)
