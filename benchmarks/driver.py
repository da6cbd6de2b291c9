"""The cost of a big job's driver: made-up pictures, and a worker that immediately commits a small token per sample.

python -m benchmarks.driver --folder SCRATCH [--samples N] [--profile]

The job is stopped by SIGTERM when 99% of its views are done, and then started again, so the second start is that of a
resumed run. Everything that the driver does is real. With fewer than about 100,000 samples, no part is left for the
second run.
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
import os
import pstats
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch
from safetensors.torch import save_file

from benchmarks.making import seconds
from benchmarks.null_worker import SIZE, NullActor
from eupe.common.storage import StoragePath
from eupe.corpus.index import SCHEMA, Corpus, write_index
from eupe.corpus.views import ViewSpec
from eupe.errors import IncompleteError
from eupe.extract import actors, job
from eupe.extract.dispatch import Status
from eupe.store.layout import StoreSpec

SAMPLES_PER_PART = 256
"""Samples in a part, as in a store of DINOv2-B's tokens at 224 px."""
MS_PER_VIEW = 1.0
RESUMED_AT = 0.99
OVERHEAD, START_S = 0.05, 10.0
TEACHER = "test_vit"


def made_up_index(folder: Path, samples: int) -> Path:
    """Write an index with keys and hashes of pictures that do not exist, and return its path."""
    (root := folder / "photos").mkdir()
    names = [f"class{i % 1000:03d}/{i:08d}.jpg" for i in range(samples)]
    columns: dict[str, Any] = {
        "key": names,
        "sha256": [hashlib.sha256(name.encode()).hexdigest() for name in names],
        "num_bytes": np.full(samples, 100_000),
        "mtime_ns": np.zeros(samples, np.int64),
        "label": [name.partition("/")[0] for name in names],
    }
    table = pa.table(columns, schema=SCHEMA).sort_by("key")
    write_index(Corpus(StoragePath.of(root), table), folder / "photos.parquet")
    return folder / "photos.parquet"


@dataclass
class Watch:
    """The times at which a run reached its stages."""

    stop_at: float | None
    """Share of the views at which this process sends itself SIGTERM."""
    began: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)
    asked: bool = False

    def note(self, status: Status) -> None:
        self.stages.setdefault(status.stage, time.perf_counter() - self.began)
        if self.stop_at is not None and not self.asked and status.done >= self.stop_at * status.total > 0:
            self.asked = True
            os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class Run:
    """The time that one run took in this process."""

    wall_s: float
    cpu_s: float
    start_s: float
    """Time until the first parts were being computed."""
    done: int
    """Number of parts that are committed at the end of the run."""


def run(config: job.ExtractConfig, *, stop_at: float | None) -> Run:
    watch, cpu = Watch(stop_at), time.process_time()
    try:
        job.extract(config, on_status=watch.note)
    except IncompleteError:
        if not watch.asked:
            raise
    done = len(list(Path(str(config.out)).glob("parts/[0-9]*.parquet")))
    wall_s = time.perf_counter() - watch.began
    return Run(wall_s, time.process_time() - cpu, watch.stages.get("extracting", wall_s), done)


def use_null_worker() -> None:
    """Replace the job's worker by the null worker, and make as many parts as a big teacher's features would need."""
    wanted = job.wanted_spec

    def in_many_parts(*args: Any, **options: Any) -> StoreSpec:
        return replace(wanted(*args, **options), samples_per_part=SAMPLES_PER_PART)

    job.wanted_spec = in_many_parts
    actors.ExtractActor = NullActor  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument(
        "--profile", action="store_true", help="Also print where the time goes, which makes the run slower."
    )
    given = parser.parse_args()
    folder = given.folder.absolute() / "driver"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = folder / "weights.safetensors"
    save_file(timm.create_model(TEACHER, num_classes=0).state_dict(), weights)
    config = job.ExtractConfig(
        teacher=f"timm:{TEACHER}",
        weights=weights,
        corpus=made_up_index(folder, given.samples),
        out=folder / "s.zarr",
        sizes=(SIZE,),
        views=ViewSpec(),
        tokens=("summary",),
        dtype="fp32",
        workers=1,
    )
    use_null_worker()
    profiler = cProfile.Profile() if given.profile else None
    if profiler:
        profiler.enable()
    first, resumed = run(config, stop_at=RESUMED_AT), run(config, stop_at=None)
    if profiler:
        profiler.disable()
    imports_s = seconds(lambda: subprocess.run([sys.executable, "-c", "import eupe.extract.job"], check=True))

    print(
        f"driver: {given.samples:,} samples of one view in {resumed.done:,} parts, one worker; {os.cpu_count()} cores; "
        f"eupe {version('eupe')}, ray {version('ray')}, torch {torch.__version__}\n"
    )
    print("| run | parts at its end | until the first part, s | in all, s | processor time of the driver, s |")
    print("|---|---:|---:|---:|---:|")
    for name, one in (("from nothing, stopped", first), ("resumed, to the end", resumed)):
        print(f"| {name} | {one.done:,} | {one.start_s:.1f} | {one.wall_s:.1f} | {one.cpu_s:.1f} |")
    job_s = given.samples * MS_PER_VIEW / 1000
    print(f"\nimporting eupe.extract.job, before any run: {imports_s:.1f} s\n")
    print("| what | measured | target |")
    print("|---|---|---|")
    cpu_s, wall_s = first.cpu_s + resumed.cpu_s, first.wall_s + resumed.wall_s
    print(f"| driver's processor time / a job of {MS_PER_VIEW:g} ms a view | {cpu_s / job_s:.1%} | < {OVERHEAD:.0%} |")
    print(f"| both runs, the null worker's commits with them / the same job | {wall_s / job_s:.1%} |  |")
    print(f"| start of the resumed run, s | {resumed.start_s:.1f} | < {START_S:g} |")
    if profiler:
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(45)


if __name__ == "__main__":
    main()
