"""A student of int8 targets compared with one of fp16 targets: same seed, same steps, real DINOv2-S features.

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
from eupe.common.compute import pick_device
from eupe.corpus.index import index_folder
from eupe.corpus.views import ViewSpec
from eupe.evaluate.agreement import agreement
from eupe.extract.calibrate import measure, settle
from eupe.extract.parts import plan_parts, store_spec
from eupe.extract.worker import PartExtractor
from eupe.store.layout import KINDS
from eupe.store.writer import StoreWriter, create_store, finish_store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import file_digest, load_teacher
from eupe.train.config import TrainConfig
from eupe.train.loop import train

VIEWS, SIZE = ViewSpec(policy="rrc", num_views=16), 112
STUDENT = "test_vit"
"""Architecture small enough for thousands of steps on a CPU."""
LR = 3e-4
"""A low rate: at 1e-3 and 32 views per step, changing the initial weights by 1e-6 moves the result by 0.01, and int8
targets move it by 0.007."""
BATCH_SIZE, HOLDOUT, SEEDS = 16, 0.3, (0, 1)


def make_stores(folder: Path) -> dict[str, Path]:
    """Run the teacher once and write its features to a store of each precision, with the views."""
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
    extractor = PartExtractor(loaded, made["fp16"], corpus_root=corpus.root, views=VIEWS, batch_size=16)
    parts = [extractor.compute(task) for task in plan_parts(made["fp16"], corpus.samples, done=())]
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


def agree(store: Path, out: Path, *, steps: int, seed: int) -> list[float]:
    """Train on a store in float32 until the learning rate is 0; return the agreement on all held-out views."""
    shutil.rmtree(out, ignore_errors=True)
    config = TrainConfig(
        targets=(store,),
        student=STUDENT,
        out=out,
        steps=steps,
        batch_size=BATCH_SIZE,
        lr=LR,
        warmup=0.1,
        head_width=512,
        holdout=HOLDOUT,
        dtype="fp32",
        seed=seed,
    )
    train(config)
    (target,) = agreement(out).targets
    return [x for kind in KINDS for x in (target.kinds[kind].cosine, target.kinds[kind].normalised_cosine)]


def apart(a: list[float], b: list[float]) -> str:
    """Return the largest difference, and all differences, as text."""
    each = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return f"at most {max(each):.5f} apart ({', '.join(f'{x:.5f}' for x in each)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    given = parser.parse_args()
    stores = make_stores(given.folder)
    print(
        f"{STUDENT} at {SIZE} px, {given.steps} steps of {BATCH_SIZE} views at {LR:g}, float32, {HOLDOUT:.0%} of the "
        f"pictures held out; eupe {version('eupe')}, torch {torch.__version__}\n"
    )
    print("| targets | seed | summary, raw | summary, normalised | dense, raw | dense, normalised |")
    print("|---|---|---|---|---|---|", flush=True)
    found: dict[tuple[str, int], list[float]] = {}
    for seed in SEEDS:
        for precision, store in stores.items():
            out = given.folder / f"{precision}-seed{seed}"
            found[precision, seed] = agree(store, out, steps=given.steps, seed=seed)
            cells = " | ".join(f"{x:.5f}" for x in found[precision, seed])
            print(f"| {precision} | {seed} | {cells} |", flush=True)
    print()
    for seed in SEEDS:
        print(f"int8 against fp16, seed {seed}: {apart(found['int8', seed], found['fp16', seed])}; target ≤ 0.002")
    print(f"fp16, seed {SEEDS[1]} against {SEEDS[0]}: {apart(found['fp16', SEEDS[1]], found['fp16', SEEDS[0]])}")


if __name__ == "__main__":
    main()
