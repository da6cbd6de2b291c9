"""Memory that does not grow with the corpus: the peak memory of an extraction's processes.

python -m benchmarks.memory --folder SCRATCH [--views 1000 10000 100000]

First, whole jobs on Ray over few pictures under many keys, with a tiny teacher of random weights at 64 px: the peaks of
the driver and its worker. Then DINOv2-S at 224 px in parts of full size, compared with a bound: the memory that the
same process held after small parts, plus three full parts and the queues. Each measurement has its own process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from benchmarks.extract import DINOV2, VIEWS, computer_of, fresh, loaded
from benchmarks.features import ASSETS
from benchmarks.making import peak_mb, repeated_corpus
from demo.assets import prepare_assets
from eupe.common.compute import compute_dtype, pick_device
from eupe.corpus.index import Corpus, write_index
from eupe.extract.actors import DEFAULT_BATCH, UNITS_IN_FLIGHT
from eupe.extract.config import ExtractConfig
from eupe.extract.job import extract
from eupe.extract.load import WorkUnit
from eupe.extract.parts import part_task
from eupe.extract.process import prepare_process
from eupe.extract.worker import PartExtractor, Worker
from eupe.store.writer import VECTORS_PER_JOB, create_store

TINY, SIZE = "test_vit", 64
CORPUS_OF_FULL_PARTS = 4096
"""Number of pictures; a smaller corpus is cut into smaller parts."""
SMALL_PART = 16
PARTS_IN_MEMORY = 3
GROWTH = 1.1
"""Maximum ratio of the peak memory over the largest corpus to that over the smallest."""


def whole_job(folder: Path, views: int) -> list[float]:
    """Return the peak memory of the driver and of the worker of a job over this many views."""
    corpus = repeated_corpus(ASSETS / "photos", folder / "pictures", -(-views // VIEWS.num_views))
    index, weights = folder / "pictures.parquet", folder / "tiny.safetensors"
    write_index(corpus, index)
    save_file(timm.create_model(TINY, num_classes=0).state_dict(), weights)
    peaks = [0.0]
    config = ExtractConfig(
        teacher=f"timm:{TINY}",
        weights=weights,
        corpus=index,
        out=fresh(folder / "job.zarr"),
        sizes=(SIZE,),
        views=VIEWS,
        batch_size=64,
        workers=1,
    )
    report = extract(config, on_status=lambda status: peaks.append(max([0.0, *worker_peaks_mb()])))
    assert report.num_failed == 0
    return [peak_mb(), max(peaks)]


def worker_peaks_mb() -> list[float]:
    """Return the peak memory of each Ray actor that this process started through its raylet."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.joinpath("cmdline").read_bytes().startswith(b"ray::ExtractActor") and is_ours(process.name):
                found.append(peak_mb(int(process.name)))
        except OSError:  # the process has ended in the meantime
            continue
    return found


def is_ours(process: str) -> bool:
    """Return whether this process is an ancestor of the given one."""
    while process not in ("0", str(os.getpid())):
        process = Path(f"/proc/{process}/status").read_text().split("PPid:")[1].split()[0]
    return process != "0"


def full_parts(folder: Path, num_parts: int) -> list[float]:
    """Return a worker's peak memory before and after full parts, and the bytes of one part and of the queues, in MB."""
    teacher = loaded(DINOV2, compute_dtype("auto", pick_device()))
    corpus = repeated_corpus(ASSETS / "photos", folder / "pictures", CORPUS_OF_FULL_PARTS)
    extractor = computer_of(DINOV2, teacher, corpus, DEFAULT_BATCH)
    spec = extractor.spec
    small = replace(spec, samples_per_part=SMALL_PART)
    make_parts(
        PartExtractor(teacher, small, corpus_root=corpus.root, views=VIEWS, batch_size=DEFAULT_BATCH), corpus, folder, 4
    )
    before = peak_mb()
    make_parts(extractor, corpus, folder, num_parts)
    one_part = spec.samples_per_part * spec.num_views * spec.bytes_per_view
    decoded = UNITS_IN_FLIGHT * extractor.samples_ahead * spec.num_views * 3 * DINOV2.size**2
    coded = 2 * (os.cpu_count() or 1) * VECTORS_PER_JOB * 2 * teacher.spec.dense_dim
    return [before, peak_mb(), one_part / 1e6, (decoded + coded) / 1e6]


def make_parts(extractor: PartExtractor, corpus: Corpus, folder: Path, num_parts: int) -> None:
    """Make the first parts of a store, UNITS_IN_FLIGHT at once, as an actor does."""
    create_store(store := fresh(folder / "worker.zarr"), extractor.spec)
    worker = Worker([extractor], [store])
    units = [WorkUnit(((0, part_task(extractor.spec, corpus.samples, part)),)) for part in range(num_parts)]
    with ThreadPoolExecutor(UNITS_IN_FLIGHT) as pool:
        assert sum(pool.map(worker.run, units)) == 0


CHILDREN = {"job": whole_job, "full": full_parts}


def in_a_process(folder: Path, child: str, number: int) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.memory", "--folder", str(folder), "--child", child, str(number)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [float(word) for word in done.stdout.splitlines()[-1].split()]


def print_claims(folder: Path, views: list[int], num_parts: int) -> None:
    print("| tiny teacher, views | driver, peak MB | worker, peak MB |\n|---|---|---|")
    workers, drivers = [], []
    for count in views:
        driver, worker = in_a_process(folder, "job", count)
        print(f"| {count:,} | {driver:,.0f} | {worker:,.0f} |", flush=True)
        drivers.append(driver)
        workers.append(worker)
    before, after, part, queues = in_a_process(folder, "full", num_parts)
    bound = before + PARTS_IN_MEMORY * part + queues
    print(f"\n| DINOv2-S at {DINOV2.size} px, {num_parts} full parts | MB |\n|---|---|")
    print(f"| the process before, with model and libraries | {before:,.0f} |\n| a part | {part:,.0f} |")
    print(f"| queues | {queues:,.0f} |\n| peak | {after:,.0f} |")
    span = f"{max(views):,} views / {min(views):,}"
    print("\n| ratio | measured | target |\n|---|---|---|")
    print(f"| worker, {span} | {workers[-1] / workers[0]:.3f} | ≤ {GROWTH} |")
    print(f"| driver, {span} | {drivers[-1] / drivers[0]:.3f} | ≤ {GROWTH} |")
    print(f"| full parts: peak / (before + {PARTS_IN_MEMORY} parts + queues) | {after / bound:.3f} | ≤ 1 |")
    print(f"| full parts: parts in memory | {(after - before - queues) / part:.2f} | ≤ {PARTS_IN_MEMORY} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Scratch space.")
    parser.add_argument("--views", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--parts", type=int, default=6, help="Number of parts of full size.")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.folder.absolute() / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    if given.child:
        prepare_process()
        print(*CHILDREN[given.child[0]](folder, int(given.child[1])))
        return
    prepare_assets(ASSETS)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("eupe", "torch", "ray"))
    print(f"memory: {os.cpu_count()} cores; {libraries}; torch computes with {torch.get_num_threads()} threads\n")
    print_claims(given.folder.absolute(), sorted(given.views), given.parts)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
