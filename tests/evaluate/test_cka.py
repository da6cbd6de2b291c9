"""Unbiased linear CKA against its definition with Gram matrices, in loops."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eupe.evaluate import cka as module
from eupe.evaluate.cka import PairMoments, PairSums, draw_cells, tokens_at

Rows = NDArray[np.float64]


def slow_hsic(x: Rows, y: Rows) -> float:
    """Song et al. (2012), equation 5, term by term."""
    n = len(x)
    k = [[0.0 if i == j else float(x[i] @ x[j]) for j in range(n)] for i in range(n)]
    m = [[0.0 if i == j else float(y[i] @ y[j]) for j in range(n)] for i in range(n)]
    product = [[sum(k[i][t] * m[t][j] for t in range(n)) for j in range(n)] for i in range(n)]
    trace = sum(product[i][i] for i in range(n))
    totals = sum(map(sum, k)) * sum(map(sum, m)) / ((n - 1) * (n - 2))
    return (trace + totals - 2 / (n - 2) * sum(map(sum, product))) / (n * (n - 3))


def slow_cka(x: Rows, y: Rows) -> float:
    return slow_hsic(x, y) / np.sqrt(slow_hsic(x, x) * slow_hsic(y, y))


def biased_cka(x: Rows, y: Rows) -> float:
    """Kornblith et al. (2019)."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return float(np.square(y.T @ x).sum() / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def cka_of(x: NDArray[Any], y: NDArray[Any], *, size: int | None = None, num_sets: int = 1) -> float | None:
    sums = PairSums(num_sets)
    size = size or len(x)
    for number, start in enumerate(range(0, len(x), size)):
        sums.add(x[start : start + size], y[start : start + size], to=number % num_sets)
    return sums.cka()


def made(seed: int, n: int, widths: tuple[int, int], *, away: float = 0.0) -> tuple[Rows, Rows]:
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=(n, 3))
    x, y = (shared @ generator.normal(size=(3, w)) + generator.normal(size=(n, w)) + away for w in widths)
    return x, y


@pytest.mark.parametrize("away", [0.0, 3.0, 500.0])
@pytest.mark.parametrize(("n", "widths"), [(4, (2, 3)), (15, (4, 2)), (15, (40, 30))])
def test_cka_equals_its_definition(n: int, widths: tuple[int, int], away: float) -> None:
    """Few samples and many, wide and narrow, far from the origin: the Gram matrices' formula is what moments give."""
    x, y = made(n, n, widths, away=away)
    centred = slow_cka(x - x.mean(axis=0), y - y.mean(axis=0))
    assert cka_of(x, y) == pytest.approx(centred, rel=1e-7, abs=1e-9)
    if away == 0:
        assert cka_of(x, y) == pytest.approx(slow_cka(x, y), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("size", [1, 7, 20])
def test_batches_and_sets_make_no_difference(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = made(1, 40, (6, 5), away=2.0)
    expected = cka_of(x, y)
    assert cka_of(x, y, size=size) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(module, "BLOCK_ROWS", 8)
    assert cka_of(x, y, size=size) == pytest.approx(expected, rel=1e-9)
    assert cka_of(x, y, size=size, num_sets=3) == pytest.approx(expected, rel=1e-9)


def test_a_rotation_a_scale_and_a_shift_change_nothing() -> None:
    x, _ = made(2, 50, (8, 8))
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    assert cka_of(x, 3 * x @ rotation - 7) == pytest.approx(1, abs=1e-9)


def test_wide_noise_is_not_alike_where_the_biased_estimator_says_so() -> None:
    generator = np.random.default_rng(3)
    x, y = generator.normal(size=(60, 2000)), generator.normal(size=(60, 1500))
    assert biased_cka(x, y) > 0.9
    assert cka_of(x, y) == pytest.approx(0, abs=0.05)


def test_nothing_is_said_of_too_few_samples_or_of_a_space_that_does_not_vary() -> None:
    x, y = made(4, 9, (3, 4))
    assert cka_of(x[:3], y[:3]) is None
    assert cka_of(x, np.full_like(y, 0.5)) is None
    assert PairSums().cka() is None


def test_moments_of_sets_are_kept_apart_and_merge() -> None:
    x, y = made(5, 30, (3, 2))
    sums = PairSums(3)
    sums.add(x[:10], y[:10], to=0)
    sums.add(x[10:], y[10:], to=2)
    first, second, third = sums.totals()
    assert first is not None and second is None and third is not None
    assert (first.count, third.count) == (10, 20)
    whole = PairMoments.of(x, y, np.zeros(5))
    merged = PairMoments.of(x[:10], y[:10], np.zeros(5)).merge(PairMoments.of(x[10:], y[10:], np.zeros(5)))
    np.testing.assert_allclose(merged.lengths, whole.lengths)
    np.testing.assert_allclose(merged.weighted, whole.weighted)
    np.testing.assert_allclose(merged.moments.scatter, whole.moments.scatter)


def test_cells_are_drawn_without_repetition_and_anew_for_each_view() -> None:
    cells = draw_cells(np.random.default_rng(0), 50, 9, 4)
    assert cells.shape == (50, 4)
    assert all(len(set(row)) == 4 for row in cells.tolist())
    assert set(cells.flatten().tolist()) == set(range(9))
    assert len({tuple(row) for row in cells.tolist()}) > 10
    assert draw_cells(np.random.default_rng(0), 2, 9, 100).tolist() == [list(range(9))] * 2


def test_tokens_are_those_of_the_cells() -> None:
    dense = torch.arange(2 * 2 * 3 * 4).reshape(2, 2, 3, 4)
    rows = tokens_at(dense, torch.tensor([[5, 0], [2, 3]]))
    expected = [dense[0, 1, 2], dense[0, 0, 0], dense[1, 0, 2], dense[1, 1, 0]]
    np.testing.assert_array_equal(rows, torch.stack(expected).numpy())
