"""Several maps of a student that learn, against its last one alone: dense tasks through a head of stride 8.

python -m benchmarks.scales --folder SCRATCH [--seeds N] [--steps N]

Students from random weights learn from DINOv2-S with real weights, on rendered pictures whose labels are not used. A
linear layer on the student's stages of strides 8, 16 and 32, side by side at stride 8, and on the stage of stride 8
alone, is then trained on labelled pictures and judged on others. All ways have the same views, steps and seeds. Every
command is one that a user types; what SCRATCH holds already is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.features import ASSETS
from benchmarks.study import interval
from demo.assets import prepare_assets

STUDENT, SIDE = "mobilenetv4_conv_small", 96
WAYS = {
    "last map alone": "none",
    "stages of strides 8 and 16 learn the teacher's last map, too": "last=3,last=4",
    "stages of strides 8 and 16 learn the teacher's blocks 6 and 9, too": "6=3,9=4",
}
JUDGED = {"strides 8, 16 and 32, side by side": "3,4,5", "stride 8 alone": "3"}
MEASURE = {"segment": "miou", "depth": "rmse"}


def eupe(*words: object) -> Any:
    """Run a command as a user does and return its report."""
    said = [str(word) for word in words]
    print("eupe", *said, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "eupe", *said, "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def scores(folder: Path, pictures: Path, store: Path, way: str, seed: int, steps: int) -> dict[str, float]:
    """Train a student in one way and judge it."""
    run = folder / f"{list(WAYS).index(way)}-{seed}"
    learnt = ("--size", SIDE, "--batch-size", 32, "--head-width", 512, "--lr", 4e-3, "--steps", steps, "--seed", seed)
    resumed = ["--resume"] if (run / "config.json").exists() else []
    eupe("train", "--targets", store, "--student", STUDENT, "--layers", WAYS[way], *learnt, "--out", run, *resumed)
    found = {}
    for task, measure in MEASURE.items():
        data = pictures / {"segment": "segmentation", "depth": "depth"}[task]
        for words, layers in JUDGED.items():
            judged = ("--data", data, "--size", 128, "--steps", 100, "--batch-size", 8, "--lr", 0.01)
            report = eupe("eval", task, run, *judged, "--layers", layers, "--seed", seed)
            found[f"{task}, {words}"] = report["results"][0]["scores"][measure]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return means over seeds as Markdown, with the mean difference to the last map alone over pairs of a seed.

    ± is half the width of the 95% interval of that difference.
    """
    names = list(rows[0]["scores"])
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    by = {(row["way"], row["seed"]): row["scores"] for row in rows}
    seeds = sorted({seed for _, seed in by if all((way, seed) in by for way in WAYS)})
    first = next(iter(WAYS))
    for way in WAYS:
        cells = []
        for name in names:
            cell = f"{mean(by[way, seed][name] for seed in seeds):.3f}"
            if way != first:
                gaps = [by[way, seed][name] - by[first, seed][name] for seed in seeds]
                cell += f" ({mean(gaps):+.3f} ± {interval(gaps):.3f})"
            cells.append(cell)
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Seeds: {', '.join(map(str, seeds))}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, help="rendered pictures; made in FOLDER by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    pictures = given.pictures or given.folder / "rendered"
    if not pictures.exists():
        made = ("--out", str(pictures), "--pictures", "300", "--only", "classification")
        also = ("--only", "segmentation", "--only", "depth")
        subprocess.run([sys.executable, "-m", "scenes", *made, *also], check=True)
    prepare_assets(ASSETS)
    store = given.folder / "dinov2.zarr"
    corpus = (
        "--corpus",
        pictures,
        "--include",
        "classification/train/*",
        "--include",
        "segmentation/images/training/*",
    )
    weights = ASSETS / "weights" / "dinov2-small"
    views = ("--size", 112, "--views", "rrc:12", "--layers", "6,9")
    eupe("extract", "--teacher", "dinov2-s", "--weights", weights, *corpus, *views, "--out", store)
    kept = given.folder / "scores.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    there = {(row["way"], row["seed"], row["steps"]) for row in rows}
    for seed in range(given.seeds):
        for way in WAYS:
            if (way, seed, given.steps) not in there:
                found = scores(given.folder, pictures, store, way, seed, given.steps)
                rows.append({"way": way, "seed": seed, "steps": given.steps, "scores": found})
                with kept.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(table([row for row in rows if row["steps"] == given.steps]))


if __name__ == "__main__":
    main()
