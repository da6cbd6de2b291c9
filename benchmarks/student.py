"""A student of int8 targets against the same student of fp16 targets: same seed, same steps, real DINOv2-S features.

python -m benchmarks.student --folder SCRATCH [--steps N]
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.features import ASSETS, SOURCES
from demo.assets import prepare_assets
from eupe.corpus.index import index_folder
from eupe.corpus.views import ViewSpec
from eupe.device import pick_device
from eupe.extract.calibrate import measure, settle
from eupe.extract.plan import plan_parts, store_spec
from eupe.extract.worker import Computer
from eupe.store.layout import KINDS
from eupe.store.writer import StoreWriter, create_store, finish_store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import file_digest, load_teacher
from eupe.train.config import TrainConfig
from eupe.train.loop import train

VIEWS, SIZE, STUDENT = ViewSpec(policy="rrc", num_views=4), 112, "vit_tiny_patch16_224"


def make_stores(folder: Path) -> dict[str, Path]:
    """One forward pass of the teacher, committed at both precisions, with the views beside it."""
    prepare_assets(ASSETS)
    source, corpus = SOURCES["dinov2-s"], index_folder(ASSETS / "photos")
    teacher, weights = resolve_teacher(source.teacher), ASSETS / source.weights
    loaded = load_teacher(teacher, weights=weights, device=pick_device(), dtype=torch.bfloat16, sizes=(SIZE,))
    made = {}
    for precision in ("fp16", "int8"):
        spec = store_spec(
            teacher,
            corpus,
            views=VIEWS,
            sizes=(SIZE,),
            tokens=KINDS,
            weights_sha256=file_digest(weights),
            dtype="bf16",
            precision=precision,
            pixels=True,
        )
        made[precision] = replace(spec, samples_per_part=128)
    computer = Computer(loaded, made["fp16"], corpus_root=corpus.root, views=VIEWS, batch_size=16)
    parts = [computer.compute(task) for task in plan_parts(made["fp16"], corpus.samples, done=())]
    tried = measure(made["int8"], parts[0].features, dict.fromkeys(KINDS, ("int8",)))
    made["int8"] = settle(made["int8"], tried, None)
    for precision, spec in made.items():
        path = folder / f"{precision}.zarr"
        shutil.rmtree(path, ignore_errors=True)
        create_store(path, spec)
        writer = StoreWriter(path)
        for part in parts:
            writer.commit(part)
        finish_store(path)
    return {precision: folder / f"{precision}.zarr" for precision in made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    given = parser.parse_args()
    stores = make_stores(given.folder)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for words, precision, seed in (("fp16", "fp16", 0), ("int8", "int8", 0), ("fp16, another seed", "fp16", 1)):
        out = given.folder / words.replace(", ", "-").replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)
        config = TrainConfig(
            targets=(stores[precision],), student=STUDENT, out=out, steps=given.steps, batch_size=32, seed=seed
        )
        results[words] = next(iter(train(config).validation.values()))
    print(
        f"{STUDENT} at {SIZE} px, {given.steps} steps of 32 views; eupe {version('eupe')}, torch {torch.__version__}\n"
    )
    print("| targets | summary, raw | summary, normalised | dense, raw | dense, normalised |\n|---|---|---|---|---|")
    for words, kinds in results.items():
        cells = [f"{kinds[kind][measure]:.5f}" for kind in KINDS for measure in ("raw", "normalised")]
        print(f"| {words} | {' | '.join(cells)} |")
    apart = max(
        abs(results["fp16"][kind][name] - results["int8"][kind][name])
        for kind in KINDS
        for name in ("raw", "normalised")
    )
    print(f"\nint8 against fp16: at most {apart:.5f} apart (target ≤ 0.002)")


if __name__ == "__main__":
    main()
