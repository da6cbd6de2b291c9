"""What README.md and docs/ show is run, every command and all Python, page by page, and does what the page says.

Slow: one walk a page. Fast: that no page and no command is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pages import PAGES, commands, has_anything_to_run, listing, unmarked_commands
from presupposed import reader_environment, take
from walking import NOT_RUN, Walk

from demo.assets import PRODUCTS

STEPS = "--batch-size 8 --steps 2 --head-width 16 --dtype fp32"
RUNS = ("runs/proxy", "runs/tiny")
RUN_FILES = tuple(
    f"runs/tiny/{name}"
    for name in [
        "config.json",
        "options.yaml",
        "metrics.jsonl",
        "tensorboard",
        "pictures",
        "checkpoints",
        "student.json",
        "student.safetensors",
        "report.json",
        "heads.safetensors",
        "norms.safetensors",
    ]
)
"""As docs/training.md lists them."""
AT_SCALE = "docs/extract-at-scale.md"
"""Has a test of its own, with a cluster."""


@dataclass(frozen=True)
class Trip:
    """Settings for a walk through a page: what it needs, what is made smaller, what it must print and leave."""

    takes: tuple[str, ...] = ()
    """What it presupposes, of what `presupposed` makes."""
    files: dict[str, str] = field(default_factory=dict)
    """Text files of the reader's own, by name."""
    assets: bool = False
    """`assets/` is there, as `python -m demo.assets` leaves it."""
    file: str = ""
    """What the page calls the file that its YAML block is."""
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

LANGUAGE_MODEL, DIR, IMAGE_TOKEN = "llama", "tiny-hf", 31
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
LlamaModel(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(LANGUAGE_MODEL)
"""

TRIPS = {
    "README.md": Trip(
        takes=("photos", "labelled", "ADEChallengeData2016", "rendered"),
        assets=True,
        smaller={
            "--size 224": "--size 112",
            "--size 256": "--size 64",
            "rrc:4": "rrc:2",
            "--student vit_large_patch16_dinov3 --head-width 1536 --epochs 10": f"--student test_vit {STEPS}",
            "vit_tiny_patch16_dinov3_qkvb --epochs 10": f"vit_tiny_patch16_dinov3_qkvb {STEPS}",
            "eupe eval segment": "eupe eval segment --steps 2 --size 64",
            "eupe eval latency": "eupe eval latency --repeats 1 --size 64",
            "python -m scenes": "python -m scenes --pictures 24 --size 64",
        },
        says={"eupe teachers": "dinov2-s", "eupe store ls": "100.0%", "eupe store verify": "is whole"},
        leaves=("runs/tiny/evaluations.jsonl", "tiny-hf/README.md"),
    ),
    "docs/edge.md": Trip(
        takes=("runs/small=runs/tiny", "photos"),
        files={"compare.py": listing("docs/edge.md", "py")},
        says={"eupe export check runs/tiny --outputs": "summary"},
        leaves=("edge-onnx/model.onnx", "edge-ov/model.bin", "pixels.npy", "outputs.npz"),
    ),
    "docs/evaluate.md": Trip(
        takes=(
            *("photos", "imagenet", "ADEChallengeData2016", "nyu", "SPair-71k", "teachers.jsonl"),
            *("runs/tiny", "runs/small", "store/dinov2.zarr"),
            *("store/clip.zarr=store/pe-core.zarr", "store/test_vit.zarr=store/siglip2.zarr"),
            "store/dinov2.zarr=store/dinov3.zarr",
        ),
        smaller={
            "eupe eval knn": "eupe eval knn --size 112",
            "eupe eval linear": "eupe eval linear --penalty 1",
            "eupe eval segment": "eupe eval segment --steps 2 --size 64",
            "eupe eval depth": "eupe eval depth --steps 2 --size 64",
            "eupe eval correspond": "eupe eval correspond --size 64",
            "eupe eval latency": "eupe eval latency --repeats 1 --size 64",
        },
        leaves=("runs/tiny/evaluations.jsonl",),
    ),
    "docs/export.md": Trip(
        takes=("runs/tiny",),
        ahead=LANGUAGE_MODEL,
        leaves=("tiny-timm/README.md", "tiny-timm/export.json", "tiny-onnx/model.onnx", "weights.safetensors"),
    ),
    "docs/finetune.md": Trip(
        takes=("runs/small=runs/tiny", "labelled", "ADEChallengeData2016", "nyu"),
        smaller={
            "eupe finetune": "eupe finetune --epochs 0.5",
            "--seeds 3": "--seeds 2",
            "resnet18.a1_in1k": "test_vit.r160_in1k",
            "mobilenetv4_conv_small": "test_vit2",
            "--size 128": "--size 64",
        },
        says={"eupe finetune runs/tiny --data labelled --label-share": "weights are better than random ones by"},
        leaves=(
            *(f"tuned/{name}" for name in ("finetune.json", "report.json", "report.html")),
            *(f"tuned/weights-1-0/{name}" for name in ("student.json", "student.safetensors", "head.safetensors")),
            *(f"tuned/weights-1-0/{name}" for name in ("task.json", "judged.json", "curve.jsonl")),
            *("app/model.onnx", "app/labels.txt", "few-labels/scratch-0.1-1/task.json"),
        ),
    ),
    "docs/gallery.md": Trip(
        takes=(
            *("runs/proxy=demo-out/proxy-274602a3", "runs/tiny=demo-out/student-ba566ef4"),
            "rendered/classification/val=assets/rendered/classification/val",
        ),
        assets=True,
    ),
    "docs/language.md": Trip(
        takes=("imagenet", "coco", "rendered", "classes.txt", *RUNS),
        smaller={"eupe eval vqa": "eupe eval vqa --dropout 0.5"},
    ),
    "docs/millions.md": Trip(
        takes=("photos=data/photos", "imagenet=data/imagenet"),
        smaller={
            "/data/": "data/",
            "--views rrc:4 --precision int8": "--views rrc:1 --precision int8",
            "--student vit_large_patch16_dinov3": "--student test_vit",
            "--student vit_tiny_patch16_dinov3_qkvb": "--student test_vit",
            "--student convnext_tiny": "--student test_vit2",
            "--head-width 1536 --batch-size 1024 --epochs 20 --num-workers 4": STEPS,
            "--batch-size 1024 --epochs 20 --num-workers 4": f"{STEPS} --num-workers 2",
        },
        says={"eupe store verify": "is whole"},
        leaves=("data/runs/convnext/student.json", "data/runs/tiny/evaluations.jsonl", "data/tiny-timm/README.md"),
    ),
    "docs/pipelines.md": Trip(
        takes=("photos=data/photos",),
        file="first.yaml",
        smaller={
            "steps: 5000": "steps: 2",
            "steps=9000": "steps=3",
            "vit_large_patch16_dinov3,": "test_vit, batch-size: 8, head-width: 16,",
            "vit_tiny_patch16_dinov3_qkvb,": "test_vit, batch-size: 8, head-width: 16,",
            "size: 224": "size: 112",
        },
        says={"eupe run first.yaml --set": "agreement"},
        leaves=("runs/first",),
    ),
    "docs/quickstart.md": Trip(
        takes=("rendered",),
        assets=True,
        smaller={
            "--pictures 48 --size 128": "--pictures 24 --size 64",
            "rrc:4": "rrc:2",
            "--size 112 --batch-size 32 --head-width 512 --steps 40": f"--size 64 {STEPS}",
            "--steps 200": "--steps 2",
        },
        says={
            "eupe eval knn": "accuracy",
            "eupe eval segment": "miou",
            "eupe eval correspond": "pck",
            "python -c": "192",
        },
        leaves=("runs/tiny/report.json", "exported/README.md"),
    ),
    "docs/scaling.md": Trip(),
    "docs/scenes.md": Trip(
        takes=("rendered",),
        smaller={"--out rendered": "--out rendered --pictures 24 --size 64"},
        leaves=("rendered/scenes.json", "tiny/scenes.json"),
    ),
    "docs/store.md": Trip(takes=("store/dinov2.zarr=store/dinov2-s.zarr",), says={"eupe store convert": "done; "}),
    "docs/students.md": Trip(
        takes=("imagenet", "store/proxy.zarr", "photos", "runs/proxy", "ADEChallengeData2016"),
        files={"nets.py": listing("docs/students.md", "py")},
        smaller={
            "--layers 12,18": "--layers 2,4",
            "--layers 12=3,18=4": "--layers 2=3,4=4",
            "eupe eval segment": "eupe eval segment --steps 2 --size 64",
            "--epochs 10": STEPS,
            "resnet18.a1_in1k": "test_vit.r160_in1k",
            "--size 224": "--size 56",
            "eupe --trust-factory eval knn": "eupe --trust-factory eval knn --size 64",
        },
        says={"eupe students mobile": "mobilenetv4_conv_small.e", "PYTHONPATH=. eupe --trust-factory eval": "accuracy"},
        leaves=("runs/better/init.json", "runs/dino/student.json", "own-onnx/model.onnx"),
    ),
    "docs/teachers.md": Trip(says={"eupe teachers dinov2": "antialiases"}),
    "docs/training.md": Trip(
        takes=(
            *("photos", "store/proxy.zarr", "store/clip.zarr=store/pe-core.zarr"),
            *("store/test_vit.zarr=store/pe-lang.zarr", "store/dinov2.zarr=store/dinov3.zarr"),
        ),
        files={"proxy.yaml": "targets: store/proxy.zarr\nstudent: test_vit\nhead-width: 16\nbatch-size: 8\nsteps: 2\n"},
        smaller={
            "--epochs 10": STEPS,
            "--recipe stage1": f"--recipe stage1 --student test_vit {STEPS}",
            "--recipe stage2": f"--recipe stage2 {STEPS}",
            "--recipe stage3": f"--recipe stage3 {STEPS}",
            "vit_base_patch16_dinov3_qkvb": "test_vit",
            "rrc:4": "rrc:1",
            "/shared/": "shared/",
            "--num-workers 8 --ray-address auto": "--num-workers 2",
        },
        says={"eupe train --targets store/proxy.zarr": "nothing to do"},
        leaves=("runs/stage3/student.json", "runs/stage3/init.json", "shared/runs/proxy/report.json", *RUN_FILES),
    ),
    "docs/viz.md": Trip(takes=("photos", "store/dinov2.zarr", *RUNS)),
}


def test_no_page_is_left_out() -> None:
    assert {page for page in PAGES if has_anything_to_run(page)} == {*TRIPS, AT_SCALE}


def test_what_is_not_run_is_in_the_documents() -> None:
    assert [entry for entry in NOT_RUN if entry[1] not in commands(entry[0])] == []


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_commands_are_marked(page: str) -> None:
    """Blocks of commands are found by their mark `bash`, so a block without a mark must not hold commands."""
    assert unmarked_commands(page) == []


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", TRIPS)
def test_every_command_of_a_page_is_run_and_does_what_it_says(
    page: str, presupposed: Path, readers_programs: Path, pages_ray: dict[str, str], assets: Path, tmp_path: Path
) -> None:
    trip = TRIPS[page]
    take(presupposed, tmp_path, trip.takes)
    for name, text in trip.files.items():
        (tmp_path / name).write_text(text)
    if trip.assets:
        for name in (".stamps", *(product.path for product in PRODUCTS)):
            (link := tmp_path / "assets" / name).parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(assets / name)
    environment = {**reader_environment(presupposed), **pages_ray}
    walk = Walk(tmp_path, environment, programs=readers_programs)
    walk.page(page, file=trip.file, smaller=trip.smaller, ahead=trip.ahead)
    assert len(walk.said) == len(set(commands(page))) - sum(entry[0] == page for entry in NOT_RUN)
    for beginning, words in trip.says.items():
        assert any(words in told for command, told in walk.said.items() if command.startswith(beginning)), beginning
    assert [name for name in trip.leaves if not (tmp_path / name).exists()] == []
