"""Two workers on two nodes compared with one worker on one: the same job on Ray clusters of one-core nodes.

python -m benchmarks.cluster --folder SCRATCH [--views K] [--repeats N]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import ray
import torch
from ray.cluster_utils import Cluster

from benchmarks.features import ASSETS, SOURCES
from benchmarks.making import interleaved, spread
from demo.assets import prepare_assets
from eupe.corpus.views import ViewSpec
from eupe.extract.job import ExtractConfig, extract

SOURCE, SIZE = SOURCES["dinov2-s"], 112
RATIO = 1.8


@contextmanager
def cluster_of(nodes: int) -> Iterator[str]:
    """Start a cluster of one-core nodes on this machine, each pinned to its own core, and yield its address.

    Ray only counts cores, so each node's raylet is pinned; its workers, which start later, inherit the affinity.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < nodes:
        raise SystemExit(f"{nodes} nodes need one core each, but this machine lets us use only {len(cores)}")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1)
        for core, node in zip(cores, cluster.list_all_nodes(), strict=False):
            pin(node.all_processes["raylet"][0].process.pid, core)
        yield str(cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()


def pin(pid: int, core: int) -> None:
    """Pin a process, with all its threads and child processes, to one core."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})
        for child in (task / "children").read_text().split():
            pin(int(child), core)


def views_per_s(folder: Path, nodes: int, *, views: int) -> float:
    """Return the rate of one whole job with a worker on each node, counted from when the teachers were loaded."""
    out = folder / f"{nodes}.zarr"
    shutil.rmtree(out, ignore_errors=True)
    with cluster_of(nodes) as address:
        report = extract(
            ExtractConfig(
                teacher=SOURCE.teacher,
                weights=ASSETS / SOURCE.weights,
                corpus=ASSETS / "photos",
                out=out,
                sizes=(SIZE,),
                views=ViewSpec(policy="rrc", num_views=views),
                dtype="fp32",
                workers=nodes,
                ray_address=address,
            )
        )
    assert report.views_per_s is not None
    return report.views_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--views", type=int, default=16, help="Number of crops of each of 130 photographs.")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    prepare_assets(ASSETS)
    print(
        f"cluster: {SOURCE.teacher} at {SIZE} px, fp32, {given.views} crops of each photograph; "
        f"{os.cpu_count()} cores; eupe {version('eupe')}, ray {version('ray')}, torch {torch.__version__}\n"
    )
    measures = {f"{n}": partial(views_per_s, given.folder, n, views=given.views) for n in (1, 2)}
    found = interleaved(measures, given.repeats)
    print("| nodes of one core, a worker on each | views/s, median (range) |")
    print("|---|---|")
    for nodes, rates in found.items():
        print(f"| {nodes} | {spread(rates)} |")
    ratio = statistics.median(found["2"]) / statistics.median(found["1"])
    print("\n| ratio | measured | target |")
    print("|---|---|---|")
    print(f"| two nodes / one | {ratio:.2f} | ≥ {RATIO} |")


if __name__ == "__main__":
    main()
