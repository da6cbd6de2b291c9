"""A student that starts from weights: what its encoder can do before it is trained under new heads, and after.

python -m benchmarks.pretrained --folder SCRATCH [--student {dinov2-s,efficientnet_lite0}] [--steps N]

One of two encoders with real weights is the student, and learns from cached features of the other, on rendered pictures
whose labels are not used. k-NN accuracy is that of its summaries on other rendered pictures.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.features import ASSETS, SOURCES
from benchmarks.train import VIEWS, computer_of, store_of
from demo.assets import prepare_assets
from eupe.common.compute import pick_device
from eupe.corpus.index import index_folder
from eupe.evaluate.knn import knn
from eupe.evaluate.subject import open_subjects
from eupe.store.layout import KINDS
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import load_teacher
from eupe.train.config import ENCODER_LR_MULT, FROZEN_SHARE, RUNNING_NORMS, TrainConfig
from eupe.train.loop import TrainReport, train
from scenes.layouts import LAYOUTS, Request


@dataclass(frozen=True)
class Expert:
    """An encoder with real weights, and the side in pixels of its inputs here."""

    arch: str
    size: int


EXPERTS = {
    "dinov2-s": Expert("vit_small_patch14_dinov2", 84),
    "efficientnet_lite0": Expert("tf_efficientnet_lite0", 96),
}
WAYS: dict[str, dict[str, Any]] = {
    "all of it from the first step": {"freeze_encoder": 0.0, "encoder_lr_mult": 1.0, "batch_norms": RUNNING_NORMS},
    f"frozen in the first {FROZEN_SHARE:.0%} of the steps": {"encoder_lr_mult": 1.0, "batch_norms": RUNNING_NORMS},
    f"at {ENCODER_LR_MULT:g} of the learning rate": {"freeze_encoder": 0.0, "batch_norms": RUNNING_NORMS},
    "with frozen batch norms": {"freeze_encoder": 0.0, "encoder_lr_mult": 1.0},
    "all three, which is the default": {},
}
"""How the encoder is trained."""
TIMM_WORDS = {
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks",
    "attention.attention.query": "attn.qkv",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm": "norm",
}
"""Parts of the names of a `Dinov2Model`'s tensors, and timm's."""
BATCH_SIZE, HEAD_WIDTH, HOLDOUT, SIDE = 16, 512, 0.1, 96


def render_pictures(folder: Path, count: int) -> Path:
    """Render labelled pictures, a third of them to be judged on, and return their folder."""
    shutil.rmtree(folder, ignore_errors=True)
    draw = partial(LAYOUTS["classification"].draw, folder, Request(pictures=count, size=SIDE, seed=0))
    # not forked: threads of torch run already
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(draw, range(count), chunksize=4))
    return folder / "classification"


def timm_weights(name: str, folder: Path) -> Path:
    """Return a file with an expert's weights under timm's names."""
    weights = ASSETS / SOURCES[name].weights
    if weights.is_file():
        return weights
    save_file(in_timm_names(load_file(weights / "model.safetensors")), folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def in_timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a `Dinov2Model` as timm names them; queries, keys and values become one tensor."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if "attention.attention.query" in name:
            given = [state[name.replace("query", part)] for part in ("query", "key", "value")]
            renamed[_timm_name(name)] = torch.cat(given)
        elif "attention.attention" not in name and "mask_token" not in name:
            renamed[_timm_name(name)] = tensor
    return renamed


def _timm_name(name: str) -> str:
    for theirs, ours in TIMM_WORDS.items():
        name = name.replace(theirs, ours)
    return name


def make_store(name: str, pictures: Path, folder: Path) -> Path:
    """Write an expert's features of the pictures to a store."""
    spec, size, device = resolve_teacher(SOURCES[name].teacher), EXPERTS[name].size, pick_device()
    weights = ASSETS / SOURCES[name].weights
    teacher = load_teacher(spec, weights=weights, device=device, dtype=torch.float32, sizes=(size,))
    corpus = index_folder(pictures)
    return store_of(computer_of(teacher, corpus, size, VIEWS), corpus, folder)


def accuracy(subject: str, data: Path, size: int, weights: Path | None = None) -> float:
    """Return the k-NN accuracy of a run or a teacher."""
    (opened,) = open_subjects([subject], {} if weights is None else {subject: weights})
    return knn(opened, data=data, size=size).scores["accuracy"]


def cosines(report: TrainReport) -> str:
    """Return the held-out cosines in the loss's space, of summaries and dense tokens."""
    (kinds,) = report.validation.values()
    return " | ".join(f"{kinds[kind]['normalised']:.3f}" for kind in KINDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Scratch space.")
    parser.add_argument("--student", choices=EXPERTS, default="dinov2-s")
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-4)
    given = parser.parse_args()
    folder = given.folder.absolute() / "pretrained"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prepare_assets(ASSETS)
    data = render_pictures(folder / "scenes", given.pictures)
    (teacher,) = EXPERTS.keys() - {given.student}
    expert, weights = EXPERTS[given.student], timm_weights(given.student, folder)
    store = make_store(teacher, data / "train", folder / "store")
    print(
        f"{given.student} at {expert.size} px learns from {teacher}: {given.steps} steps of {BATCH_SIZE} views at "
        f"{given.lr:g}, heads of {HEAD_WIDTH}; {given.pictures} rendered pictures of {SIDE} px, a third of them are "
        f"judged; {os.cpu_count()} cores; eupe {version('eupe')}, torch {torch.__version__}, timm {version('timm')}\n"
    )
    print("| the encoder | k-NN | summary | dense | training, s |\n|---|---|---|---|---|")
    before = accuracy(f"timm:{expert.arch}", data, expert.size, weights)
    print(f"| before | {before:.3f} | | | |", flush=True)
    for number, (way, options) in enumerate(WAYS.items()):
        config = TrainConfig(
            targets=(store,),
            student=expert.arch,
            init=weights,
            out=folder / f"run{number}",
            size=(expert.size,),
            steps=given.steps,
            lr=given.lr,
            batch_size=BATCH_SIZE,
            head_width=HEAD_WIDTH,
            holdout=HOLDOUT,
            **options,
        )
        began = time.perf_counter()
        report = train(config)
        seconds = time.perf_counter() - began
        after = accuracy(str(config.out), data, expert.size)
        print(f"| {way} | {after:.3f} | {cosines(report)} | {seconds:.0f} |", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
