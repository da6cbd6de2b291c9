"""Every command and every line of Python that README.md and docs/ show is run, page by page, and does what the page says.

Slow: one walk a page. Fast: that no page and no command is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pages import PAGES, blocks, commands, has_anything_to_run, unmarked_commands
from presupposed import make_presupposed, reader_environment, take
from walking import NOT_RUN, Walk, replaced

STEPS = "--batch-size 8 --steps 2 --head-width 16 --dtype fp32"
RUNS = ("runs/proxy", "runs/tiny")
AT_SCALE = "docs/extract-at-scale.md"
"""Has a test of its own, with a cluster."""


@dataclass(frozen=True)
class Trip:
    """How a page is walked."""

    takes: tuple[str, ...] = ()
    """What it presupposes, of what `presupposed` makes."""
    files: dict[str, str] = field(default_factory=dict)
    """Text files of the reader's own, by name."""
    assets: bool = False
    """`assets/` is there."""
    smaller: dict[str, str] = field(default_factory=dict)
    """Sizes of the page, and what they are here."""
    ahead: str = ""
    """Of its Python: what the page leaves to the reader."""
    says: dict[str, str] = field(default_factory=dict)
    """What is printed, by the beginning of the command that prints it."""
    leaves: tuple[str, ...] = ()
    """What is there in the end, beside what `--out` names."""


LANGUAGE_MODEL = """
from transformers import LlamaConfig, LlamaModel

LANGUAGE_MODEL, DIR, IMAGE_TOKEN, run = "llama", "tiny-hf", 31, "runs/tiny"
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
LlamaModel(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(LANGUAGE_MODEL)
"""

TRIPS = {
    "README.md": Trip(
        takes=("photos", "labelled", "ADEChallengeData2016"),
        assets=True,
        smaller={
            "--student vit_large_patch16_dinov3 --head-width 1536 --epochs 10": f"--student test_vit {STEPS}",
            "vit_tiny_patch16_dinov3_qkvb --epochs 10": f"vit_tiny_patch16_dinov3_qkvb {STEPS}",
            "eupe eval segment": "eupe eval segment --steps 2 --size 64",
            "eupe scenes": "eupe scenes --pictures 24 --size 64",
        },
        says={"eupe teachers": "siglip2-b-256", "eupe store ls": "proxy", "eupe store verify": "damaged: 0"},
        leaves=("runs/tiny/evaluations.jsonl", "tiny-hf/README.md"),
    ),
    "docs/evaluate.md": Trip(
        takes=(
            *("photos", "imagenet", "ADEChallengeData2016", "nyu", "SPair-71k", "teachers.jsonl"),
            *("runs/tiny", "runs/small", "store/dinov2.zarr"),
            *("store/clip.zarr=store/pe-core.zarr", "store/test_vit.zarr=store/siglip2.zarr"),
            "store/dinov2.zarr=store/dinov3.zarr",
        ),
        smaller={
            "eupe eval segment": "eupe eval segment --steps 2 --size 64",
            "eupe eval depth": "eupe eval depth --steps 2 --size 64",
        },
        leaves=("runs/tiny/evaluations.jsonl",),
    ),
    "docs/export.md": Trip(
        takes=("runs/tiny",),
        ahead=LANGUAGE_MODEL,
        leaves=("tiny-timm/README.md", "tiny-timm/export.json", "tiny-onnx/model.onnx", "weights.safetensors"),
    ),
    "docs/gallery.md": Trip(
        takes=(
            *("runs/proxy=demo-out/proxy-274602a3", "runs/tiny=demo-out/student-ba566ef4"),
            "scenes/classification/val=assets/scenes/classification/val",
        ),
        smaller={"=assets/weights/dinov2-small": "=../assets/weights/dinov2-small"},
    ),
    "docs/language.md": Trip(takes=("imagenet", "coco", "scenes", "classes.txt", *RUNS)),
    "docs/pipelines.md": Trip(takes=("photos=data/photos",)),
    "docs/quickstart.md": Trip(assets=True, leaves=("runs/tiny/report.json", "exported/README.md")),
    "docs/scaling.md": Trip(),
    "docs/scenes.md": Trip(
        smaller={"--out scenes": "--out scenes --pictures 24 --size 64"},
        leaves=("scenes/scenes.json", "tiny/scenes.json"),
    ),
    "docs/store.md": Trip(takes=("store/dinov2.zarr=store/dinov2-s.zarr",)),
    "docs/teachers.md": Trip(says={"eupe teachers dinov2": "antialiasing"}),
    "docs/training.md": Trip(
        takes=(
            *("photos", "store/proxy.zarr", "store/clip.zarr=store/pe-core.zarr"),
            *("store/test_vit.zarr=store/pe-lang.zarr", "store/dinov2.zarr=store/dinov3.zarr"),
        ),
    ),
    "docs/viz.md": Trip(takes=("photos", "store/dinov2.zarr", *RUNS)),
}


def test_no_page_is_left_out() -> None:
    assert {page for page in PAGES if has_anything_to_run(page)} == {*TRIPS, AT_SCALE}


def test_what_is_not_run_is_in_the_documents() -> None:
    assert [entry for entry in NOT_RUN if entry[1] not in commands(entry[0])] == []


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_commands_are_marked(page: str) -> None:
    """As `bash`, by which they are found; and no other block is."""
    assert unmarked_commands(page) == []
