"""Three principal components as colours, against scikit-learn's."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from eupe.pca import fit_pca


def scores(dense: NDArray[np.floating]) -> NDArray[np.float64]:
    return fit_pca(dense).scores(dense)


def colours(dense: NDArray[np.floating]) -> NDArray[np.uint8]:
    return fit_pca(dense).rgb(dense)


@pytest.mark.parametrize("shape", [(3, 5, 4, 8), (2, 2, 2, 40)], ids=["more tokens", "more channels"])
def test_scores_are_those_of_scikit_learn_up_to_sign(shape: tuple[int, ...]) -> None:
    dense = np.random.default_rng(0).normal(size=shape) * np.linspace(3, 1, shape[-1]) + 7
    pca = fit_pca(dense)
    oracle = PCA(3, svd_solver="full").fit(dense.reshape(-1, shape[-1]))
    expected = oracle.transform(dense.reshape(-1, shape[-1])).reshape(*shape[:-1], 3)
    np.testing.assert_allclose(np.abs(pca.scores(dense)), np.abs(expected), atol=1e-9)
    assert pca.explained == pytest.approx(oracle.explained_variance_ratio_.sum())


def test_sign_and_colours_do_not_depend_on_the_solver() -> None:
    """A turned basis of the channels gives the same scores, by either of the square products."""
    rng = np.random.default_rng(1)
    dense = rng.normal(size=(2, 4, 4, 6)) * np.array([9, 6, 4, 1, 1, 1])
    turn = np.linalg.qr(rng.normal(size=(50, 6)))[0]
    np.testing.assert_allclose(scores(dense), scores(dense @ turn.T), atol=1e-9)
    largest = np.abs(scores(dense)).reshape(-1, 3).argmax(axis=0)
    assert (scores(dense).reshape(-1, 3)[largest, [0, 1, 2]] > 0).all()


def test_one_projection_for_all_pictures() -> None:
    rng = np.random.default_rng(2)
    dense = rng.normal(size=(4, 3, 3, 8))
    dense[2] = dense[0]
    rgb = colours(dense)
    np.testing.assert_array_equal(rgb[0], rgb[2])
    assert (rgb[0] != rgb[1]).any()
    alone = np.concatenate([colours(one[None]) for one in dense])
    assert (alone != rgb).any()


def test_one_scale_for_all_pictures_and_places() -> None:
    """Over every token of every picture, a larger score is never a darker shade."""
    dense = np.random.default_rng(5).normal(size=(3, 4, 6, 8)) * np.arange(1, 4)[:, None, None, None]
    ours, rgb = scores(dense).reshape(-1, 3), colours(dense).reshape(-1, 3).astype(int)
    for component in range(3):
        assert (np.diff(rgb[ours[:, component].argsort(), component]) >= 0).all()


def test_colours_span_the_percentiles_and_outliers_are_clipped() -> None:
    dense = np.random.default_rng(3).normal(size=(2, 16, 16, 3))
    dense[0, 0, 0] = 1e6
    rgb = colours(dense)
    assert rgb[..., 1:].min() == 0 and rgb[..., 1:].max() == 255
    assert rgb[0, 0, 0, 0] == 255


@pytest.mark.parametrize(
    "dense",
    [np.full((2, 3, 3, 5), 4.0), np.zeros((1, 1, 1, 8)), np.ones((1, 1, 1, 1))],
    ids=["constant", "one token", "one number"],
)
def test_what_does_not_vary_is_mid_grey(dense: NDArray[np.float64]) -> None:
    rgb = colours(dense)
    assert (rgb == 128).all() and rgb.shape == (*dense.shape[:-1], 3)
    assert fit_pca(dense).explained == 0


def test_missing_components_are_mid_grey_and_not_amplified_noise() -> None:
    line = np.random.default_rng(4).normal(size=(2, 4, 4, 1))
    for dense in (line, line * np.linspace(0.1, 0.9, 7, dtype=np.float32)):
        rgb = colours(dense)
        assert (rgb[..., 1:] == 128).all() and rgb[..., 0].max() == 255
        assert fit_pca(dense).explained == pytest.approx(1)


@pytest.mark.parametrize("shape", [(3, 5, 4, 8), (2, 2, 2, 40)], ids=["more tokens", "more channels"])
def test_other_tokens_are_projected_as_scikit_learn_does_and_shaded_alike(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    fitted, others = rng.normal(size=shape), rng.normal(size=(4, 2, 2, shape[-1])) + 0.5
    pca = fit_pca(fitted)
    oracle = PCA(3, svd_solver="full").fit(fitted.reshape(-1, shape[-1]))
    expected = oracle.transform(others.reshape(-1, shape[-1])).reshape(4, 2, 2, 3)
    np.testing.assert_allclose(np.abs(pca.scores(others)), np.abs(expected), atol=1e-9)
    both = pca.rgb(np.concatenate([fitted.reshape(1, 1, -1, shape[-1]), others.reshape(1, 1, -1, shape[-1])], axis=2))
    np.testing.assert_array_equal(both[0, 0, : fitted[..., 0].size], colours(fitted).reshape(-1, 3))
    np.testing.assert_array_equal(both[0, 0, fitted[..., 0].size :], pca.rgb(others).reshape(-1, 3))
