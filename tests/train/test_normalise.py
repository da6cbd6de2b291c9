"""Normalisation of targets against NumPy in float64, on stores and on covariances made up here."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import make_store
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from eupe.errors import ConfigError
from eupe.store import Store
from eupe.teachers.registry import REGISTRY
from eupe.train.normalise import LEAST_STD, NORMALISATIONS, hadamard, normalisers, phi_s
from eupe.train.targets import Request, TargetTokens, open_targets

CPU = torch.device("cpu")
SIZES = (64, 32)
KINDS = ("summary", "dense")
WIDTHS = sorted({width for teacher in REGISTRY.values() for width in (teacher.dense_dim, teacher.summary_dim)} - {0})


@pytest.fixture(scope="module", params=["fp16", "bitround:4", "int8"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Every precision, two sizes."""
    folder = tmp_path_factory.mktemp("normalised")
    corpus, weights = (request.getfixturevalue(name) for name in ("tiny_corpus", "tiny_weights"))
    yield make_store(folder / "s.zarr", corpus, weights, sizes=SIZES, precision=request.param)


def everything(store: Store, size: int, kind: str) -> tuple[TargetTokens, NDArray[np.float64]]:
    """All tokens of a store, as the trainer is given them and as the reader decodes them."""
    rows = [row for row in range(24) for _ in range(2)]
    numbers = [0, 1] * 24
    stored = getattr(store.read_async(rows, numbers, size=size).stored(), kind)
    return TargetTokens.of(stored), getattr(store.read(rows, numbers, size=size), kind).astype(np.float64)


def flat(values: torch.Tensor | NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(values, np.float64).reshape(-1, values.shape[-1])


def sylvester(order: int) -> NDArray[np.float64]:
    """Return Sylvester's matrix by its closed form: the sign at (i, j) is the parity of the bits that i and j share."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)])


def slow_phi_s(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """alpha H U^T (x - mu), one step after another."""
    mean = values.mean(axis=0)
    eigenvalues, eigenvectors = np.linalg.eigh(np.cov(values.T, bias=True))
    order = np.argsort(-eigenvalues)
    columns = []
    for vector in eigenvectors.T[order]:
        longest = max(abs(vector))
        first = next(x for x in vector if abs(x) > longest * 0.999999)
        columns.append(vector if first > 0 else -vector)
    size = len(mean)
    rotation = sylvester(size) / np.sqrt(size) @ np.stack(columns)
    return (values - mean) @ rotation.T / np.sqrt(eigenvalues.mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_phi_s_is_the_papers_formula_and_balances_all_channels(store: Store, size: int, kind: str) -> None:
    tokens, values = everything(store, size, kind)
    norm = normalisers(store, size, CPU, "phi-s")[kind]
    for given_tokens in (tokens, tokens.decode()):
        got = norm(given_tokens)
        assert got.dtype == torch.float32 and got.shape == values.shape
        np.testing.assert_allclose(flat(got), slow_phi_s(flat(values)), atol=2e-4)
    covariance = np.cov(flat(got).T, bias=True)
    np.testing.assert_allclose(np.diagonal(covariance), 1, atol=1e-4)
    np.testing.assert_allclose(flat(got).mean(axis=0), 0, atol=1e-4)
    assert np.ptp(flat(values).std(axis=0)) > 0.1, "the teacher's own channels differ"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_standard_is_zero_mean_and_unit_variance_per_channel(store: Store, size: int, kind: str) -> None:
    tokens, values = everything(store, size, kind)
    norm = normalisers(store, size, CPU, "standard")[kind]
    expected = (flat(values) - flat(values).mean(axis=0)) / flat(values).std(axis=0)
    for given_tokens in (tokens, tokens.decode()):
        np.testing.assert_allclose(flat(norm(given_tokens)), expected, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_none_is_the_identity_and_still_knows_the_mean(store: Store, kind: str) -> None:
    tokens, values = everything(store, 32, kind)
    norm = normalisers(store, 32, CPU, "none")[kind]
    decoded = tokens.decode()
    for same in (norm(tokens), norm(decoded), norm.inverse(decoded)):
        assert same.dtype == torch.float32 and torch.equal(same, decoded)
    np.testing.assert_allclose(norm.mean, flat(values).mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("how", NORMALISATIONS)
def test_the_inverse_gives_back_what_the_teacher_said(store: Store, how: str) -> None:
    for kind, norm in normalisers(store, 64, CPU, how).items():
        tokens, values = everything(store, 64, kind)
        np.testing.assert_allclose(norm.inverse(norm(tokens)), values, atol=1e-4)
        np.testing.assert_allclose(norm(norm.inverse(norm(tokens))), norm(tokens), atol=1e-4)
        np.testing.assert_allclose(norm.mean, flat(values).mean(axis=0), atol=1e-5)


def test_rotations_are_float32_within_autocast(store: Store) -> None:
    """A student in bfloat16 does not round its targets."""
    norm = normalisers(store, 64, CPU, "phi-s")["dense"]
    tokens, _ = everything(store, 64, "dense")
    plain = norm(tokens), norm.inverse(norm(tokens))
    with torch.autocast("cpu", torch.bfloat16):
        within = norm(tokens), norm.inverse(norm(tokens))
    assert all(torch.equal(a, b) for a, b in zip(plain, within, strict=True))


def test_batches_are_normalised_as_the_trainer_reads_them(store: Store) -> None:
    """Through the stream's own reading, whose maps lie channel by channel."""
    targets = open_targets([store.path], corpus=None, holdout=0.2)
    with ThreadPoolExecutor(1) as pool:
        batch = targets.load(Request(views=np.array([[3, 1], [0, 0]]), size=64), pool=pool)
    dense = batch.targets[0].dense
    assert dense is not None
    norm = normalisers(store, 64, CPU, "phi-s")["dense"]
    np.testing.assert_allclose(norm(dense), norm(dense.decode()), atol=1e-5)


def spread_covariance(width: int, seed: int, decades: float) -> NDArray[np.float64]:
    """Eigenvalues over some decades, in directions of no channel's own."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))
    return (basis * np.logspace(0, -decades, width)) @ basis.T


@given(seed=st.integers(0, 2**31), decades=st.floats(0.5, 6), log2_width=st.integers(2, 5))
def test_phi_s_scales_all_directions_alike(seed: int, decades: float, log2_width: int) -> None:
    width = 2**log2_width
    covariance = spread_covariance(width, seed, decades)
    alpha, rotation = phi_s(covariance)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(width), atol=1e-10)
    np.testing.assert_allclose(np.diagonal(alpha**2 * rotation @ covariance @ rotation.T), 1, atol=1e-10)
    tokens = np.random.default_rng(seed).normal(size=(5, width))
    before, after = (np.linalg.norm(x[:, None] - x, axis=-1) for x in (tokens, alpha * tokens @ rotation.T))
    np.testing.assert_allclose(after, alpha * before, atol=1e-9 * alpha)


def test_the_same_statistics_give_the_same_rotation() -> None:
    """Bit for bit again; to float32's precision on other threads, or where the statistics' last bits differ."""
    covariance = spread_covariance(192, seed=3, decades=4)
    _, rotation = phi_s(covariance)
    assert np.array_equal(phi_s(covariance.copy())[1], rotation)
    with threadpool_limits(1):
        np.testing.assert_allclose(phi_s(covariance)[1], rotation, atol=1e-7)
    noise = np.random.default_rng(0).normal(size=covariance.shape) * 1e-15
    np.testing.assert_allclose(phi_s(covariance + noise + noise.T)[1], rotation, atol=1e-7)


def test_signs_hold_where_components_of_an_eigenvector_are_equally_long() -> None:
    """(1, 1) and (1, -1) are eigenvectors whatever the last bits are, which decide the longer component."""
    rotations = []
    for nudge in (0.0, 1e-15, -1e-15):
        rotations.append(phi_s(np.array([[2 + nudge, 1], [1, 2 - nudge]]))[1])
    for rotation in rotations:
        np.testing.assert_allclose(rotation, [[1, 0], [0, 1]], atol=1e-9)


def test_dead_channels_do_no_harm() -> None:
    covariance = spread_covariance(16, seed=0, decades=2)
    covariance[[3, 7]] = covariance[:, [3, 7]] = 0
    alpha, rotation = phi_s(covariance)
    np.testing.assert_allclose(np.diagonal(alpha**2 * rotation @ covariance @ rotation.T), 1, atol=1e-12)
    alpha, rotation = phi_s(np.zeros((8, 8)))
    assert alpha == 1 and np.isfinite(rotation).all()


def test_a_channel_that_never_changes_is_only_centred(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = store.stats(64, "summary")
    stats.std[5] = 0
    monkeypatch.setattr(Store, "stats", lambda *_: stats)
    norm = normalisers(store, 64, CPU, "standard")["summary"]
    tokens, values = everything(store, 64, "summary")
    np.testing.assert_allclose(norm(tokens)[:, 5], values[:, 5] - stats.mean[5], atol=1e-5)


def test_a_channel_that_hardly_changes_is_no_target_like_any_other(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = store.stats(64, "summary")
    stats.std[5] = 1e-6 * np.median(stats.std)
    monkeypatch.setattr(Store, "stats", lambda *_: stats)
    plain, floored = (normalisers(store, 64, CPU, "standard", floored=how)["summary"].scale for how in (False, True))
    least = LEAST_STD * np.median(stats.std)
    assert plain[5] < floored[5] == pytest.approx(least, rel=1e-6)
    assert torch.equal(np.delete(plain, 5), np.delete(floored, 5))


@pytest.mark.parametrize("width", WIDTHS)
def test_every_teachers_width_has_a_hadamard_matrix(width: int) -> None:
    """H H^T v = v for random v, which any pair of rows that are not orthogonal would break."""
    matrix = hadamard(width)
    assert matrix.shape == (width, width)
    np.testing.assert_allclose(np.abs(matrix), width**-0.5, rtol=1e-12)
    vectors = np.random.default_rng(width).normal(size=(width, 3))
    np.testing.assert_allclose(matrix @ (matrix.T @ vectors), vectors, atol=1e-9)


def test_every_order_is_either_orthogonal_or_refused() -> None:
    refused = []
    for order in range(1, 201):
        try:
            matrix = hadamard(order)
        except ConfigError:
            refused.append(order)
            continue
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(order), atol=1e-12)
        np.testing.assert_allclose(np.abs(matrix), order**-0.5)
    fours = [order for order in refused if order % 4 == 0]
    assert fours == [52, 92, 100, 116, 156, 172, 184, 188], "28 and 36 need Paley's second, 52 a field of 25"
    assert set(refused) - set(fours) == {order for order in range(3, 201) if order % 4}


def test_powers_of_two_are_sylvesters() -> None:
    for order in (1, 2, 4, 64, 256):
        np.testing.assert_allclose(hadamard(order) * np.sqrt(order), sylvester(order), rtol=1e-12)


def test_a_width_without_a_hadamard_matrix_names_the_other_ways() -> None:
    with pytest.raises(ConfigError, match=r"width of 52: no Hadamard matrix .* known; use standard or none"):
        phi_s(np.eye(52))


def test_an_unknown_word_is_refused(tiny_store: Store) -> None:
    with pytest.raises(ConfigError, match="normalisation 'whiten' is unknown; use standard, phi-s, none"):
        normalisers(tiny_store, 64, CPU, "whiten")
