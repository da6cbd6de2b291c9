"""Three principal components as colours, against scikit-learn's, and what is foreground."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from eupe.models.pca import find_foreground, fit_pca, leading_directions


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
    np.testing.assert_allclose(pca.explained_C, oracle.explained_variance_ratio_)


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
    assert (fit_pca(dense).explained_C == 0).all()


def test_missing_components_are_mid_grey_and_not_amplified_noise() -> None:
    line = np.random.default_rng(4).normal(size=(2, 4, 4, 1))
    for dense in (line, line * np.linspace(0.1, 0.9, 7, dtype=np.float32)):
        rgb = colours(dense)
        assert (rgb[..., 1:] == 128).all() and rgb[..., 0].max() == 255
        np.testing.assert_allclose(fit_pca(dense).explained_C, [1, 0, 0])


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


@pytest.mark.parametrize("shape", [(60, 8), (10, 40), (3, 5)], ids=["more tokens", "more channels", "few"])
def test_leading_directions_are_the_singular_vectors(shape: tuple[int, int]) -> None:
    tokens = np.random.default_rng(7).normal(size=shape) + 2
    squares, directions = leading_directions(tokens, 4)
    _, singular, vectors = np.linalg.svd(tokens, full_matrices=False)
    found = min(4, *shape)
    np.testing.assert_allclose(squares[:found], singular[:found] ** 2)
    np.testing.assert_allclose(np.abs(np.diag(vectors[:found] @ directions)), 1)
    assert not squares[found:].any() and not directions[:, found:].any()


def _scene(object_cells: slice, *, sign: float = 1) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Two pictures of an object on a ground, in features that vary a little on both, and where the object is."""
    rng = np.random.default_rng(8)
    mask = np.zeros((2, 12, 12), dtype=bool)
    mask[:, object_cells, object_cells] = True
    directions = np.linalg.qr(rng.normal(size=(16, 2)))[0].T
    return rng.normal(size=(2, 12, 12, 16)) * 0.05 + sign * 5 * directions[mask.astype(int)], mask


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("cells", [slice(4, 7), slice(3, 9), slice(1, 11), slice(5, 12)])
def test_foreground_is_what_the_borders_show_least_of(cells: slice, sign: float) -> None:
    """Small, larger than the ground, cut by the border, and whichever way the component points."""
    dense, mask = _scene(cells, sign=sign)
    np.testing.assert_array_equal(find_foreground(dense), mask)


def test_foreground_is_one_decision_for_all_pictures() -> None:
    """A picture of nothing but ground has none, one of nothing but the object is all foreground."""
    dense, mask = _scene(slice(2, 10))
    dense = np.concatenate([dense, np.broadcast_to(dense[:1, :1, :1], (1, 12, 12, 16))])
    dense = np.concatenate([dense, np.broadcast_to(dense[:1, 5:6, 5:6], (1, 12, 12, 16))])
    found = find_foreground(dense)
    np.testing.assert_array_equal(found[:2], mask)
    assert not found[2].any() and found[3].all()


def test_what_does_not_vary_has_no_foreground() -> None:
    for shape in ((2, 4, 4, 5), (1, 1, 1, 3)):
        assert not find_foreground(np.full(shape, 2.5)).any()


def test_where_all_cells_are_border_the_lesser_part_is_foreground() -> None:
    dense = np.zeros((3, 2, 2, 4))
    dense[0, 0, 0] = dense[1, 1, 1] = 7
    np.testing.assert_array_equal(find_foreground(dense), dense[..., 0] == 7)
