"""Names for what an encoder's two outputs are, without torch, so that a teacher's spec can be read without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SummaryKind = Literal["cls", "cls_concat", "cls_mean", "attention_pool", "projected", "mean", "pooled", "own", "none"]
"""Source of the summary: `cls`, the class token as it leaves the backbone; `cls_concat`, several class tokens side by
side (RADIO); `cls_mean`, the class token and the mean of the dense tokens side by side (Virchow2); `attention_pool`, a
learned attention pool before any projection; `projected`, the class token or the pool after the projection to the text
space; `mean`, the mean of the dense tokens; `pooled`, the library's own pooled vector before the classifier; `own`, the
vector that a module from outside the libraries returns beside its map; `none`, no summary."""

DenseKind = Literal["normed", "raw", "last_stage"]
"""Source of the dense tokens: `normed`, after the model's final norm; `raw`, as the library's feature forward gives
them, if the model has no final norm; `last_stage`, a CNN's last stage before its head convolution, or that of a model
whose features are no map."""


@dataclass(frozen=True)
class LayerShape:
    """Shape of the dense map that a layer of an encoder gives, whatever the size of its input."""

    dim: int
    """Channels of a token."""
    patch: int
    """Pixels of input per cell, along either side."""


LOCAL_DIR = "local-dir:"
"""Prefix of a directory's path, which timm takes in place of an architecture."""
HF_HUB = "hf-hub:"
"""Prefix of a repository on the hub in timm's layout, likewise."""

STUDENT_FILE = "student.json"
WEIGHTS_FILE = "student.safetensors"
RUN_FILES = (STUDENT_FILE, "options.yaml")
"""Files that mark a training run: its student, once it is finished, and its options, from the beginning."""

TRUST_VARIABLE = "EUPE_TRUST_FACTORY"
"""Environment variable that `eupe --trust-factory` sets, so that the processes that it starts trust factories, too."""
