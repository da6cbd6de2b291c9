"""Neighbours in common against a slow count."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from eupe.errors import ConfigError
from eupe.evaluate import neighbours as module
from eupe.evaluate.neighbours import mutual_neighbours


def slow_mutual_neighbours(a: Tensor, b: Tensor, k: int, groups: list[int]) -> float:
    def nearest(x: Tensor, i: int) -> set[int]:
        cosine = [float(x[i] @ x[j] / (x[i].norm() * x[j].norm())) for j in range(len(x))]
        others = (j for j in range(len(x)) if groups[j] != groups[i])
        return set(sorted(others, key=lambda j: -cosine[j])[:k])

    return float(np.mean([len(nearest(a, i) & nearest(b, i)) / k for i in range(len(a))]))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_mutual_neighbours_equal_a_slow_count(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(k)
    a, b = torch.randn(12, 5, generator=generator), torch.randn(12, 3, generator=generator)
    expected = slow_mutual_neighbours(a, b, k, list(range(12)))
    assert mutual_neighbours(a, b, k=k) == pytest.approx(expected)
    assert mutual_neighbours(a, 5 * a, k=k) == 1.0
    for rows in ("QUERIES", "BANK"):
        monkeypatch.setattr(module, rows, 5)
    assert mutual_neighbours(a, b, k=k) == pytest.approx(expected)


@pytest.mark.parametrize("block", [1024, 5])
def test_views_of_one_picture_are_no_neighbours(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in ("QUERIES", "BANK"):
        monkeypatch.setattr(module, rows, block)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(6, 4, generator=generator).repeat_interleave(2, dim=0)
    a, b = (pictures + 0.01 * torch.randn(12, 4, generator=generator) for _ in range(2))
    groups = [i // 2 for i in range(12)]
    expected = slow_mutual_neighbours(a, b, 3, groups)
    assert mutual_neighbours(a, b, k=3, groups_N=torch.tensor(groups)) == pytest.approx(expected)
    assert mutual_neighbours(a, b, k=1) == 1.0, "the other view of the picture"


def test_more_neighbours_than_there_are_are_refused_and_none_is_nothing() -> None:
    a, b = torch.eye(4), torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    assert mutual_neighbours(a, b, k=3) == 1.0
    with pytest.raises(ConfigError, match="--k 4 does not fit 4 views; give 1 to 3"):
        mutual_neighbours(a, b, k=4)
    with pytest.raises(ConfigError, match="give 1 to 2"):
        mutual_neighbours(a, b, k=3, groups_N=torch.tensor([0, 0, 1, 1]))
    assert mutual_neighbours(a, b, k=3, groups_N=torch.zeros(4, dtype=torch.int64)) is None
    assert mutual_neighbours(a[:1], b[:1], k=3) is None


def test_many_neighbours_take_memory_for_themselves_alone() -> None:
    """600 rows of 599: a table of every neighbour with every neighbour would take 215 MB."""
    a, b = torch.randn(2, 600, 4, generator=torch.Generator().manual_seed(0)).unbind()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        assert mutual_neighbours(a, b, k=599) == 1.0
    assert max(event.cpu_memory_usage for event in seen.events()) < 20e6
