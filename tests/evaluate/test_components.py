"""Components against scikit-learn's, and where tokens are."""

import numpy as np
import torch
from sklearn.decomposition import PCA

from eupe.evaluate import components as module
from eupe.evaluate.components import as_features, components, places_of


def values(pictures: int, tokens: int, width: int) -> torch.Tensor:
    """Correlated, neither centred nor of one scale."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator)
    return torch.randn(pictures, tokens, width, generator=generator) @ mix + 3


def test_components_are_whitened_ones_of_what_is_learnt_from() -> None:
    """Up to their signs; in pieces, and of as few as are wanted."""
    given, learnt_from = values(150, 6, 10), list(range(0, 150, 2))
    theirs = PCA(whiten=True).fit(given[learnt_from].reshape(-1, 10).double().numpy())
    wanted = theirs.transform(given.reshape(-1, 10).double().numpy()).reshape(150, 6, 10)
    got = components(given, learnt_from).numpy()
    signs = np.sign((got * wanted).sum(axis=(0, 1)))
    assert np.abs(got * signs - wanted).max() < 5e-3  # scikit-learn divides by one row less
    assert np.abs(got[learnt_from].reshape(-1, 10).std(axis=0) - 1).max() < 1e-4


def test_a_wide_encoder_has_as_many_components_as_a_narrow_one() -> None:
    wide = components(values(40, 9, 200), range(40))
    assert wide.shape == (40, 9, module.COMPONENTS)
    assert torch.cov(wide.flatten(0, 1).T).sub(torch.eye(module.COMPONENTS)).abs().max() < 0.01


def test_channels_that_hardly_vary_make_no_component() -> None:
    given = values(20, 4, 6)
    given[:, :, 3] = 7.0
    given[:, :, 5] = given[:, :, 0]
    assert components(given, range(20)).shape[-1] == 4
    assert components(torch.ones(20, 4, 6), range(20)).shape[-1] == 0


def test_pictures_that_are_judged_decide_no_component() -> None:
    given = values(20, 4, 6)
    other = given.clone()
    other[15:] *= 50
    assert torch.equal(components(given, range(15))[:15], components(other, range(15))[:15])
    assert not torch.equal(components(given, range(20))[:15], components(other, range(20))[:15])


def test_tokens_keep_the_order_of_their_places() -> None:
    dense = values(8, 6, 3).reshape(8, 2, 3, 3).half()
    features = as_features(values(8, 1, 4)[:, 0], dense, range(8))
    assert features.tokens_PTC.shape == (8, 6, 3)
    assert torch.equal(features.tokens_PTC, components(dense.flatten(1, 2), range(8)))
    assert features.summary_PC.shape == (8, 4)
    x, y = features.place_T5[:, 0], features.place_T5[:, 1]
    assert torch.allclose(x, torch.tensor([-1.0, 0.0, 1.0] * 2))
    assert torch.allclose(y, torch.tensor([-0.75] * 3 + [0.75] * 3))
    assert torch.allclose(places_of(2, 3)[:, 4], x * y / 1.5)
