"""Statistics by torch against those by NumPy, which `tests/store/test_stats.py` holds against naive loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eupe.extract import count
from eupe.extract.count import FAST_FLOAT64, count_on, counter
from eupe.store.stats import Counted

CPU = torch.device("cpu")


def tokens(shape: tuple[int, ...], dtype: type, failed: tuple[int, ...] = ()) -> np.ndarray:  # type: ignore[type-arg]
    rng = np.random.default_rng(0)
    values = rng.normal(100, 3, shape) * rng.uniform(0.1, 9, shape[-1])
    if len(shape) == 4:
        values[:, 0, 1] *= 50
    values[list(failed)] = np.nan
    return values.astype(dtype)


@pytest.mark.parametrize("shape", [(9, 4, 4, 33), (50, 33)], ids=["dense", "summary"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("failed", [(), (0, 7)])
def test_torch_counts_as_numpy(shape: tuple[int, ...], dtype: type, failed: tuple[int, ...]) -> None:
    values = tokens(shape, dtype, failed)
    got, expected = count_on(values, CPU), Counted.of(values)
    assert got.moments.count == expected.moments.count == (shape[0] - len(failed)) * int(np.prod(shape[1:-1]))
    np.testing.assert_allclose(got.moments.mean, expected.moments.mean, rtol=1e-13)
    np.testing.assert_allclose(got.moments.covariance, expected.moments.covariance, rtol=1e-11, atol=1e-12)
    assert np.array_equal(got.norms, expected.norms) and got.norms.sum() == got.moments.count
    assert np.array_equal(got.outliers, expected.outliers)
    if len(shape) == 4:
        assert got.outliers[0, 1] == shape[0] - len(failed)


def test_views_that_all_failed_count_for_nothing() -> None:
    got = count_on(tokens((3, 2, 2, 5), np.float16, (0, 1, 2)), CPU)
    assert got.moments.count == 0 == got.norms.sum() == got.outliers.sum()
    assert got.moments.scatter.shape == (5, 5)


@pytest.mark.parametrize(
    ("device", "capability", "on_gpu"),
    [("cuda", (9, 0), True), ("cuda", (8, 0), True), ("cuda", (8, 9), False), ("cpu", (9, 0), False)],
)
def test_a_gpu_counts_only_where_it_is_good_at_float64(
    device: str, capability: tuple[int, int], on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert (counter(torch.device(device)) != Counted.of) == on_gpu == (device == "cuda" and capability in FAST_FLOAT64)


def test_a_device_without_room_leaves_the_counting_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Counted:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    values = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float16)
    monkeypatch.setattr(count, "count_on", full)
    got, expected = count._count_where_there_is_room(values, CPU), Counted.of(values)
    assert np.array_equal(got.moments.scatter, expected.moments.scatter) and got.moments.count == 15

    def broken(*_: object, **__: object) -> Counted:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(count, "count_on", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        count._count_where_there_is_room(values, CPU)
