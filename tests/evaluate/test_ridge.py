"""Ridge regression from moments against scikit-learn on the rows themselves."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from eupe.evaluate.cka import PairMoments
from eupe.evaluate.ridge import PENALTIES, predict

Rows = NDArray[np.float64]
TRAIN, TUNING, TEST = slice(0, 120), slice(120, 160), slice(160, 240)


def folds(x: Rows, y: Rows) -> list[PairMoments]:
    origin = np.concatenate([x[:5].mean(axis=0), y[:5].mean(axis=0)])
    return [PairMoments.of(x[rows], y[rows], origin) for rows in (TRAIN, TUNING, TEST)]


def sklearn_says(x: Rows, y: Rows, penalties: tuple[float, ...]) -> tuple[float, float]:
    """R² on the test rows, and the penalty that the tuning rows choose."""

    def fitted(rows: slice, judged: slice, penalty: float) -> tuple[Rows, Rows, Any]:
        means, scales = ([f(side[rows], axis=0) for side in (x, y)] for f in (np.mean, np.std))
        scales = [np.where(scale > 0, scale, 1.0) for scale in scales]
        (a, b), (c, d) = (
            [(side[part] - m) / s for side, m, s in zip((x, y), means, scales, strict=True)] for part in (rows, judged)
        )
        model = Ridge(alpha=penalty * len(a), solver="cholesky").fit(a, b)
        alive = y[TRAIN].std(axis=0) > 0
        return d[:, alive], model.predict(c)[:, alive], model

    errors = []
    for penalty in penalties:
        truth, said, _ = fitted(TRAIN, TUNING, penalty)
        errors.append(float(np.square(truth - said).sum()))
    chosen = penalties[int(np.argmin(errors))]
    truth, said, _ = fitted(slice(0, 160), TEST, chosen)
    return float(r2_score(truth, said, multioutput="variance_weighted")), chosen


def related(seed: int, noise: float, widths: tuple[int, int] = (12, 7)) -> tuple[Rows, Rows]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(240, widths[0])) * generator.uniform(0.1, 9, widths[0]) + 40
    y = x @ generator.normal(size=widths) + noise * generator.normal(size=(240, widths[1])) - 3
    return x, y


@pytest.mark.parametrize("noise", [0.0, 5.0, 60.0, 1e4])
@pytest.mark.parametrize("backward", [False, True])
def test_r2_and_penalty_are_those_of_scikit_learn(noise: float, backward: bool) -> None:
    x, y = related(1, noise)
    expected, chosen = sklearn_says(*((y, x) if backward else (x, y)), PENALTIES)
    said = predict(*folds(x, y), backward=backward)
    assert said is not None
    assert said.r2 == pytest.approx(expected, abs=1e-6)
    assert said.penalty == chosen
    assert said.samples == 160


@pytest.mark.parametrize("penalty", [1e-6, 0.1, 100.0])
def test_one_penalty_is_taken_as_it_is(penalty: float) -> None:
    x, y = related(2, 20.0)
    said = predict(*folds(x, y), penalties=[penalty])
    assert said is not None
    assert said.r2 == pytest.approx(sklearn_says(x, y, (penalty,))[0], abs=1e-6)


def test_more_channels_than_samples_are_borne_and_the_penalty_helps() -> None:
    x, y = related(3, 5.0, widths=(300, 4))
    said, barely = predict(*folds(x, y)), predict(*folds(x, y), penalties=[1e-6])
    assert said is not None and barely is not None
    assert said.r2 == pytest.approx(sklearn_says(x, y, PENALTIES)[0], abs=1e-6)
    assert said.penalty > 1e-6 and said.r2 > barely.r2


def test_dead_channels_neither_count_nor_harm() -> None:
    x, y = related(4, 10.0)
    plain = predict(*folds(x, y))
    dead = predict(*folds(np.insert(x, 2, 5.0, axis=1), np.insert(y, 0, -1.0, axis=1)))
    assert plain is not None and dead is not None
    assert dead.r2 == pytest.approx(plain.r2, abs=1e-9)
    assert predict(*folds(x, np.full_like(y, 2.0))) is None


def test_a_rotation_is_predicted_both_ways_noise_neither_and_half_the_channels_one_way() -> None:
    generator = np.random.default_rng(5)
    x = generator.normal(size=(240, 10))
    rotation = np.linalg.qr(generator.normal(size=(10, 10)))[0]
    cases = {"rotation": x @ rotation, "noise": generator.normal(size=(240, 10)), "half": x[:, :5]}
    found = {}
    for name, y in cases.items():
        ways = [predict(*folds(x, y), backward=backward) for backward in (False, True)]
        found[name] = [way.r2 for way in ways if way is not None]
    assert found["rotation"] == pytest.approx([1, 1], abs=1e-6)
    assert found["noise"] == pytest.approx([0, 0], abs=0.1)
    assert found["half"] == pytest.approx([1, 0.5], abs=0.15)
