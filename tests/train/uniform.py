"""A chi-square test for counts that should be equal."""

import numpy as np
from numpy.typing import NDArray


def assert_uniform(counts: NDArray[np.int64]) -> None:
    """Beyond what happens to one honest key in some 10 000; tests fix their keys."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square <= freedom + 5 * np.sqrt(2 * freedom) + 5, counts
