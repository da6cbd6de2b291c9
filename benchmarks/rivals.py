"""The same student, expert and pictures in the same time, by lightly-train and by eupe: what the students can do.

python -m benchmarks.rivals --folder SCRATCH --lightly PYTHON [--seconds S] [--seeds N ...]

PYTHON is one in whose environment lightly-train is installed, which asks for other releases than eupe does. DINOv2-S
teaches a MobileNetV4 of 2.5M parameters on rendered pictures; lightly-train runs it in every step, eupe once. Either
may try three learning rates with the first seed; the best is run with the others. The time of a run is that of its
whole process, and eupe's run pays for the extraction. If five runs share it, each is shorter, so that all five together
take half the time of five of lightly-train's.

What is finished is kept in SCRATCH, so that a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.features import ASSETS
from benchmarks.pretrained import in_timm_names
from benchmarks.study import interval, judged
from demo.assets import prepare_assets
from demo.outcome import share_closed
from eupe.models.encoder import build_encoder, save_encoder
from scenes.make import ScenesConfig, make_scenes

STUDENT, SIZE, BATCH_SIZE, VIEWS = "mobilenetv4_conv_small", 112, 32, 4
RUNS = 5
"""Runs that share a cache."""
THEIRS, OURS, SHARED = "lightly-train", "eupe", "eupe, one of five"
LEARNING_RATES = {THEIRS: (5e-4, 5e-3, 2e-2), OURS: (2e-3, 4e-3, 8e-3)}
"""lightly-train multiplies by the root of the batch size over 1,536; 5e-4 is its default."""
JUDGED = {
    "knn": ["classification"],
    "segment": ["segmentation", "--steps", 100, "--batch-size", 8, "--lr", 0.01],
    "depth": ["depth", "--steps", 100, "--batch-size", 8, "--lr", 0.01],
}
"""Folder of the pictures and options of each task."""

Scores = dict[str, dict[str, float]]
"""Of students by name and task, negated where less is better."""


@dataclass(frozen=True)
class Bench:
    """The files of a comparison, and its commands."""

    folder: Path
    python: str
    """One that has lightly-train."""

    @property
    def scenes(self) -> Path:
        return self.folder / "scenes"

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def store(self) -> Path:
        return self.folder / "dinov2.zarr"

    def run(self, *words: object) -> str:
        """Run a command of eupe, and return what it prints."""
        command = [sys.executable, "-m", "eupe", *map(str, words)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def prepare(self, pictures: int) -> None:
        """Render pictures; collect those to learn from, none of which is judged, in a folder without labels."""
        wanted = ("classification", "segmentation")
        make_scenes(ScenesConfig(out=self.scenes, pictures=pictures, size=128, seed=0, only=wanted))
        self.corpus.mkdir(exist_ok=True)
        for part in ("classification/train", "segmentation/images/training"):
            for picture in (self.scenes / part).rglob("*.jpg"):
                shutil.copy(picture, self.corpus / picture.name)
        state = load_file(ASSETS / "weights/dinov2-small/model.safetensors")
        tensors = {**in_timm_names(state), "mask_token": torch.zeros(1, 384)}  # which the teacher never uses
        torch.save(tensors, self.folder / "dinov2.pt")

    def extract(self) -> None:
        weights = ["--teacher", "dinov2", "--weights", ASSETS / "weights/dinov2-small"]
        views = ["--size", SIZE, "--views", f"rrc:{VIEWS}"]
        self.run("extract", *weights, "--corpus", self.corpus, *views, "--out", self.store)

    def train(self, out: Path, steps: int, lr: float, seed: int) -> None:
        """Train a student from the cache."""
        options = ["--size", 96, "--batch-size", BATCH_SIZE, "--head-width", 512, "--lr", lr, "--seed", seed]
        self.run("train", "--targets", self.store, "--student", STUDENT, "--steps", steps, *options, "--out", out)

    def distil(self, out: Path, epochs: int, lr: float, seed: int) -> None:
        """Train a student with lightly-train, and keep its encoder as a run of eupe does, to be judged likewise."""
        encoder = build_encoder(STUDENT, size=128)  # as judged; its weights are the same for any
        work = self.folder / "lightly" / out.name
        options: dict[str, Any] = {
            "out": str(work),
            "data": str(self.corpus),
            "model": f"timm/{STUDENT}",
            "method": "distillation",
            "method_args": {"teacher": "dinov2/vits14-noreg", "teacher_weights": str(self.folder / "dinov2.pt")},
            "epochs": epochs,
            "batch_size": BATCH_SIZE,
            "seed": seed,
            "optim_args": {"lr": lr},
            "transform_args": {
                "image_size": [SIZE, SIZE],
                "normalize": {"mean": encoder.spec.mean, "std": encoder.spec.std},
            },
            "accelerator": "cpu",
            "overwrite": True,
        }
        with (self.folder / "lightly.log").open("w") as log:
            words = [self.python, "-m", "benchmarks.lightly", json.dumps(options)]
            subprocess.run(words, check=True, stdout=log, stderr=log, env=quiet())
        state = torch.load(work / "exported_models" / "exported_last.pt", weights_only=True)
        encoder.model.load_state_dict({name: state[name] for name in encoder.model.state_dict()})
        save_encoder(encoder, out)

    def judge(self, subjects: Sequence[Path], *, untrained: bool = False) -> Scores:
        """Return the scores of students on pictures that nothing was trained on."""
        scores: Scores = {}
        words = ["--untrained"] if untrained else ["--weights", f"dinov2={ASSETS / 'weights/dinov2-small'}"]
        named = list(subjects) if untrained else [*subjects, "dinov2"]
        for task, (data, *how) in JUDGED.items():
            said = self.run("eval", task, *named, "--data", self.scenes / data, "--size", 128, *how, *words, "--json")
            for result in json.loads(said)["results"]:
                name, quality = judged(result, Path(result["subject"]).name)
                scores.setdefault(name, {})[task] = quality
        return scores


def quiet() -> dict[str, str]:
    """Return the variables of lightly-train's process, which reports nothing to its makers and asks no hub."""
    return {**os.environ, "LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "HF_HUB_OFFLINE": "1"}


def seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Kept:
    """Measurements by name, kept in a file, so that nothing is measured twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self.found:
            self.found[name] = measure()
            self._path.write_text(json.dumps(self.found, indent=1))
            print(f"{name}: {self.found[name]}", file=sys.stderr, flush=True)
        return self.found[name]


def affordable(
    kept: Kept, name: str, run: Callable[[int], None], few: int, many: int, budget: float
) -> tuple[int, float]:
    """Return how many steps or epochs fit into a budget of seconds, by the times of two short runs; and their time."""
    short = kept.get(f"{name}, {few} to time it", lambda: seconds(partial(run, few)))
    long = kept.get(f"{name}, {many} to time it", lambda: seconds(partial(run, many)))
    each = (long - short) / (many - few)
    count = max(1, few + int((budget - short) / each))
    return count, short + (count - few) * each


def mean_closed(scores: Scores, name: str) -> float:
    """Return the mean over tasks of the share of the gap between random weights and the expert that was closed."""
    shares = [share_closed(scores["untrained"][task], scores[name][task], scores["dinov2"][task]) for task in JUDGED]
    return fmean(share for share in shares if share is not None)


def measure(bench: Bench, kept: Kept, budget: float, seeds: Sequence[int]) -> list[str]:
    """Train and judge all students, and return the lines of the table and what stands above it."""
    extraction = kept.get("extraction", lambda: seconds(bench.extract))
    rate = {tool: rates[0] for tool, rates in LEARNING_RATES.items()}
    distil = lambda epochs: bench.distil(bench.folder / f"trial-{epochs}", epochs, rate[THEIRS], 0)  # noqa: E731
    train = lambda steps: bench.train(bench.folder / f"trial-{steps}", steps, rate[OURS], 0)  # noqa: E731
    epochs, theirs = affordable(kept, THEIRS, distil, 1, 3, budget)
    fit = partial(affordable, kept, OURS, train, 10, 60)
    lengths = {THEIRS: epochs, OURS: fit(theirs - extraction)[0], SHARED: fit(theirs / 2 - extraction / RUNS)[0]}

    def student(way: str, lr: float, seed: int) -> Path:
        out = bench.folder / f"{way.replace(', ', '-').replace(' ', '-')}-{lr:g}-{seed}"
        run = bench.distil if way == THEIRS else bench.train
        kept.get(out.name, lambda: seconds(partial(run, out, lengths[way], lr, seed)))
        return out

    tried = {(tool, lr): student(tool, lr, seeds[0]) for tool, rates in LEARNING_RATES.items() for lr in rates}
    scores: Scores = kept.get("scores of the tried", lambda: bench.judge(list(tried.values())))
    untrained = [tried[OURS, rate[OURS]]]
    scores |= kept.get("scores of random weights", lambda: bench.judge(untrained, untrained=True))
    best = {
        tool: max((mean_closed(scores, path.name), lr) for (by, lr), path in tried.items() if by == tool)[1]
        for tool in LEARNING_RATES
    }
    best[SHARED] = best[OURS]
    finals = {way: [student(way, best[way], seed) for seed in seeds] for way in lengths}
    others = [path for paths in finals.values() for path in paths if path.name not in scores]
    scores |= kept.get("scores of the others", lambda: bench.judge(others))

    lines = [
        f"learning rates tried: {LEARNING_RATES}; best: {best}",
        f"steps or epochs: {lengths}; extraction: {extraction:.0f} s",
        "",
        f"| | s a run | {' | '.join(JUDGED)} | mean share of the gap closed |",
        "|---" * (len(JUDGED) + 3) + "|",
    ]
    for name in ("untrained", "dinov2"):
        lines.append(f"| {name} | | {' | '.join(f'{abs(scores[name][task]):.3f}' for task in JUDGED)} | |")
    shares = {THEIRS: 0.0, OURS: extraction, SHARED: extraction / RUNS}
    for way, paths in finals.items():
        took = fmean(kept.found[path.name] for path in paths) + shares[way]
        means = [f"{abs(fmean(scores[path.name][task] for path in paths)):.3f}" for task in JUDGED]
        closed = [mean_closed(scores, path.name) for path in paths]
        lines.append(f"| {way} | {took:.0f} | {' | '.join(means)} | {fmean(closed):.0%} ± {interval(closed):.0%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Scratch space.")
    parser.add_argument("--lightly", required=True, metavar="PYTHON", help="A Python that has lightly-train.")
    parser.add_argument("--pictures", type=int, default=300, help="Of each of two tasks.")
    parser.add_argument("--seconds", type=float, default=240, help="Of a run.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    bench = Bench(given.folder.absolute(), given.lightly)
    bench.folder.mkdir(parents=True, exist_ok=True)
    prepare_assets(ASSETS)
    bench.prepare(given.pictures)
    lines = measure(bench, Kept(bench.folder / "measured.json"), given.seconds, given.seeds)
    print(
        f"{STUDENT} from DINOv2-S at {SIZE} px, {len(list(bench.corpus.iterdir()))} pictures, batches of {BATCH_SIZE}; "
        f"seeds {', '.join(map(str, given.seeds))}; {os.cpu_count()} cores; eupe {version('eupe')}, torch "
        f"{torch.__version__}"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
