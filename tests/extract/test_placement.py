"""Where workers fit on a cluster, against trying to seat them one by one."""

from itertools import product

import pytest

from eupe.errors import ConfigError
from eupe.extract.actors import Node, place_workers


def seated(nodes: list[Node], cpus: int, gpus: float) -> int:
    """Return the number of workers of that size that Ray can run at once."""
    count = 0
    for node in nodes:
        free_cpus, free_gpus = float(node.cpus), node.gpus + 1e-6
        while free_cpus >= cpus and free_gpus >= gpus and count < 100:
            free_cpus, free_gpus, count = free_cpus - cpus, free_gpus - gpus, count + 1
    return count


SMALL = [Node(1, 0), Node(8, 0), Node(4, 1), Node(16, 4)]


@pytest.mark.parametrize("workers", [None, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("gpus_per_worker", [None, 0.0, 0.5, 0.6, 1.0])
def test_all_workers_run_at_once_or_are_refused(workers: int | None, gpus_per_worker: float | None) -> None:
    for count in (1, 2, 3):
        for nodes in product(SMALL, repeat=count):
            check_placement(list(nodes), workers, gpus_per_worker)


def check_placement(nodes: list[Node], workers: int | None, gpus_per_worker: float | None) -> None:
    try:
        count, cpus, gpus = place_workers(nodes, workers, gpus_per_worker)
    except ConfigError:
        wanted = workers or max(1, int(sum(node.gpus for node in nodes)))
        share = gpus_per_worker if gpus_per_worker is not None else 1.0
        assert seated(nodes, 1, share) < wanted or seated(nodes, 1, min(share, 1 / wanted)) < wanted
        return
    assert workers is None or count == workers
    assert cpus >= 1
    assert gpus <= 1
    if gpus_per_worker is not None:
        assert gpus == gpus_per_worker
    assert seated(nodes, cpus, gpus) >= count
    assert seated(nodes, cpus + 1, gpus) < count


def test_one_worker_per_gpu_or_one() -> None:
    assert place_workers([Node(16, 4)], None, None) == (4, 4, 1.0)
    assert place_workers([Node(16, 0)], None, None) == (1, 16, 0.0)
    assert place_workers([Node(8, 0), Node(8, 0)], None, None) == (1, 8, 0.0)
    assert place_workers([Node(8, 2)], 3, None) == (3, 2, 0.5)
