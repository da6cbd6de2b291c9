"""The words for what an encoder's two outputs are; torch-free, so that a teacher's card can be read without torch."""

from __future__ import annotations

from typing import Literal

SummaryKind = Literal["cls", "cls_concat", "attention_pool", "projected", "mean", "pooled", "none"]
"""Where the summary comes from: the class token as it leaves the backbone; several class tokens side by side (RADIO);
a learned attention pool before any projection; either of them behind the projection to the text space; the mean of the
dense tokens; the library's own pooled vector before the classifier; nothing."""

DenseKind = Literal["normed", "raw", "last_stage"]
"""Dense tokens after the model's final norm; as the library's feature forward gives them, where it has no final norm;
a CNN's last stage before its head convolution."""

LOCAL_DIR = "local-dir:"
"""What timm has ahead of the path of a directory, in place of an architecture."""

CARD_FILE = "student.json"
WEIGHTS_FILE = "student.safetensors"
RUN_FILES = (CARD_FILE, "options.yaml")
"""Of a training run: its student, which a finished one has, and its options, which it has from the beginning."""
