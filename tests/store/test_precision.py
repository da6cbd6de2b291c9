"""What a precision keeps, against naive loops written from `FORMAT.md`, and against numpy.

The loops themselves (`naive_bitround`, `naive_int8`) live in `store_cases.py`.
"""

from __future__ import annotations

import base64
import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from store_cases import (
    CODED,
    Case,
    as_arrays,
    assert_same_bits,
    every_view,
    finite_halves,
    make_calibration,
    make_case,
    make_spec,
    naive_bitround,
    naive_int8,
    one_nan,
    representable,
)

from eupe.errors import ConfigError, PartCorruptError
from eupe.store import layout, open_store
from eupe.store.precision import (
    CANDIDATES,
    FP16_MAX,
    Calibration,
    cosines,
    decode,
    encode,
    parse_precision,
    require_convertible,
    require_known,
    stored_channels,
)
from eupe.store.writer import StoreWriter, create_store

EVERY_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16)
FINITE_HALVES = EVERY_HALF[np.isfinite(EVERY_HALF)]
EXTREMES = [0.0, -0.0, FP16_MAX, -FP16_MAX, 2.0**-24, -(2.0**-24), 2.0**-14, 1.0, 1.5, 0.1, 1000.0]

halves = st.sampled_from(EXTREMES) | st.floats(-FP16_MAX, FP16_MAX, width=16)
deviations = st.sampled_from([1.0, 1e-6, 1e-3, 3e4]) | st.floats(2.0**-20, 2.0**15, width=32)


@st.composite
def tokens_and_calibrations(draw: st.DrawFn) -> tuple[NDArray[np.float16], Calibration]:
    """[T, D] tokens: some all zero, some channels constant, some tokens NaN; and any calibration at all."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 6)))
    tokens = draw(hnp.arrays(np.float16, shape, elements=halves))
    if draw(st.booleans()):
        tokens[draw(st.integers(0, shape[0] - 1))] = draw(st.sampled_from([0.0, np.nan]))
    if draw(st.booleans()):
        tokens[:, draw(st.integers(0, shape[1] - 1))] = draw(halves)
    mean = draw(hnp.arrays(np.float32, shape[1], elements=st.floats(-FP16_MAX, FP16_MAX, width=32)))
    std = draw(hnp.arrays(np.float32, shape[1], elements=deviations.map(np.float32)))
    own = np.isfinite(tokens).all() and draw(st.booleans())
    return tokens, Calibration.of(tokens) if own else Calibration(mean, std)


# Fewer mantissa bits


@pytest.mark.parametrize("bits", range(1, 10))
def test_bitround_of_every_float16_is_the_naive_one(bits: int) -> None:
    rounded = encode(EVERY_HALF[None], f"bitround:{bits}", None)[0]
    finite = np.isfinite(EVERY_HALF)
    assert rounded.dtype == np.float16
    assert rounded[finite].tobytes() == naive_bitround(FINITE_HALVES, bits).tobytes()
    assert np.isnan(rounded[np.isnan(EVERY_HALF)]).all()
    assert np.isfinite(rounded[finite]).all(), "the largest values do not round to infinity"


@pytest.mark.parametrize("bits", range(1, 10))
def test_bitround_is_nearest_and_ties_go_to_the_even_one(bits: int) -> None:
    """The result is a nearest representable value; of two equally near ones, that whose last kept bit is zero."""
    grid = np.array(representable(bits))
    step = 1 << (10 - bits)
    for below, above in pairwise(grid.tolist()):
        middle = np.float16((below + above) / 2)
        (got,) = encode(middle[None], f"bitround:{bits}", None)
        assert float(middle) == (below + above) / 2, "there is a float16 half way"
        assert got in (below, above)
        assert got.view(np.uint16) // step % 2 == 0
    values = np.abs(FINITE_HALVES.astype(np.float64))
    error = np.abs(np.abs(encode(FINITE_HALVES, f"bitround:{bits}", None).astype(np.float64)) - values)
    right = np.minimum(np.searchsorted(grid, values), len(grid) - 1)
    nearest = np.minimum(np.abs(grid[right] - values), np.abs(grid[np.maximum(right - 1, 0)] - values))
    np.testing.assert_array_equal(error, nearest)


def test_a_tenth_bit_would_change_nothing() -> None:
    np.testing.assert_array_equal(naive_bitround(FINITE_HALVES, 10), FINITE_HALVES)


@given(hnp.arrays(np.float16, hnp.array_shapes(min_dims=2, max_dims=5), elements=halves), st.integers(1, 9))
def test_bitround_of_any_shape(tokens: NDArray[np.float16], bits: int) -> None:
    rounded = encode(tokens, f"bitround:{bits}", None)
    assert rounded.shape == tokens.shape
    assert rounded.tobytes() == naive_bitround(tokens, bits).tobytes()
    turned = encode(tokens.T, f"bitround:{bits}", None)
    np.testing.assert_array_equal(turned, rounded.T)


def test_coding_leaves_what_it_was_given_alone() -> None:
    tokens = finite_halves(np.random.default_rng(0), (7, 6))
    before = tokens.tobytes()
    for precision in CANDIDATES:
        encode(tokens, precision, make_calibration(6))
        assert tokens.tobytes() == before


# int8


@given(tokens_and_calibrations())
def test_int8_is_the_naive_one(drawn: tuple[NDArray[np.float16], Calibration]) -> None:
    tokens, calibration = drawn
    stored = encode(tokens, "int8", calibration)
    assert (stored.dtype, stored.shape) == (np.int8, (len(tokens), tokens.shape[1] + 2))
    back = decode(stored, "int8", calibration)
    assert_same_bits({"tokens": back}, {"tokens": naive_int8(tokens, calibration)})


@given(tokens_and_calibrations())
def test_int8_reads_as_nan_exactly_where_a_value_was_nan(drawn: tuple[NDArray[np.float16], Calibration]) -> None:
    """Never infinite, and no other token becomes one without a value."""
    tokens, calibration = drawn
    back = decode(encode(tokens, "int8", calibration), "int8", calibration)
    lost = np.isnan(tokens).any(axis=1)
    assert np.isnan(back[lost]).all()
    assert np.isfinite(back[~lost]).all()


@given(
    hnp.arrays(np.float16, st.tuples(st.integers(1, 9), st.integers(1, 6)), elements=halves),
    hnp.arrays(np.float32, 6, elements=st.floats(0.5, 1000, width=32)),
)
def test_int8_is_near_by_half_a_step(tokens: NDArray[np.float16], std: NDArray[np.float32]) -> None:
    """The error is at most half a step of max|z| / 127, plus a little, because the scale has only eleven bits."""
    calibration = Calibration(np.zeros(tokens.shape[1], np.float32), std[: tokens.shape[1]])
    back = decode(encode(tokens, "int8", calibration), "int8", calibration).astype(np.float64)
    z, z_back = (x.astype(np.float64) / calibration.std for x in (tokens, back))
    largest = np.abs(z).max(axis=1, keepdims=True)
    step = np.maximum(largest / 127, 2.0**-14)
    assert (np.abs(z - z_back) <= 0.5 * step * 1.001 + largest * 2.0**-11).all()


def test_every_int8_value_but_the_lowest_is_used() -> None:
    """Symmetric: -128 never occurs among the values."""
    tokens = np.concatenate([np.arange(-127, 128), [63.5]]).astype(np.float16)[None]
    calibration = Calibration(np.zeros(256, np.float32), np.ones(256, np.float32))
    stored = encode(tokens, "int8", calibration)[0]
    assert stored[:255].tolist() == list(range(-127, 128))
    assert stored[255] == 64, "half way goes to the even one"
    assert stored[256:].tobytes() == np.float16(1).tobytes()


def test_the_fill_value_is_a_token_without_a_value() -> None:
    calibration = make_calibration(6)
    unwritten = np.full((3, 8), 127, np.int8)
    assert np.isnan(unwritten[:, -2:].copy().view("<f2")).all()
    assert np.isnan(decode(unwritten, "int8", calibration)).all()
    assert encode(np.full((3, 6), np.nan, np.float16), "int8", calibration).tobytes() == unwritten.tobytes()


def test_a_token_far_beyond_its_calibration_is_clipped_and_not_lost() -> None:
    """Its scale would overflow float16, and an infinite scale decode to NaN."""
    calibration = Calibration(np.zeros(2, np.float32), np.full(2, 1e-6, np.float32))
    back = decode(encode(np.array([[60_000, -1]], np.float16), "int8", calibration), "int8", calibration)
    np.testing.assert_allclose(back, [[127 * 65504 * 1e-6, -15 * 65504 * 1e-6]], rtol=1e-6)


# Calibration


def test_a_calibration_is_numpys_mean_and_deviation() -> None:
    tokens = np.random.default_rng(0).normal(5, 3, (4, 7, 7, 6)).astype(np.float16)
    calibration = Calibration.of(tokens)
    flat = tokens.reshape(-1, 6).astype(np.float64)
    np.testing.assert_array_equal(calibration.mean, flat.mean(axis=0).astype(np.float32))
    np.testing.assert_array_equal(calibration.std, flat.std(axis=0).astype(np.float32))


@given(hnp.arrays(np.float16, 4, elements=halves), st.integers(1, 5000))
def test_a_channel_that_never_changes_has_deviation_one(token: NDArray[np.float16], count: int) -> None:
    calibration = Calibration.of(np.tile(token, (count, 1)))
    np.testing.assert_array_equal(calibration.mean, token.astype(np.float32))
    assert (calibration.std == 1).all()


@given(hnp.arrays(np.float32, st.integers(1, 9)), hnp.arrays(np.float32, st.integers(1, 9)))
def test_a_calibration_is_base64_of_little_endian_float32(mean: NDArray[np.float32], std: NDArray[np.float32]) -> None:
    plain = Calibration(mean, std).to_json()
    assert base64.b64decode(plain["mean"]) == mean.astype("<f4").tobytes()
    again = Calibration.from_json(plain)
    assert (again.mean.tobytes(), again.std.tobytes()) == (mean.tobytes(), std.tobytes())


# Cosines


def naive_cosine(a: list[float], b: list[float]) -> float:
    if not any(a) and not any(b):
        return 1.0
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


@pytest.mark.parametrize("precision", CANDIDATES)
def test_cosines_are_naive_ones_of_standardised_tokens(precision: str) -> None:
    rng = np.random.default_rng(3)
    tokens = (rng.normal(size=(40, 6)) * 10 ** rng.uniform(-2, 3, 6) + 50).astype(np.float16)
    calibration = Calibration.of(tokens)
    back = {"fp16": lambda: tokens, "int8": lambda: naive_int8(tokens, calibration)}.get(
        precision, lambda: naive_bitround(tokens, int(precision[-1]))
    )()
    mean, std = calibration.mean.astype(float), calibration.std.astype(float)
    standard = [((x.astype(float) - mean) / std).tolist() for x in (tokens, back)]
    expected = [naive_cosine(a, b) for a, b in zip(*standard, strict=True)]
    got = cosines(tokens, precision, calibration)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert (got == 1).all() or precision != "fp16" or np.allclose(got, 1, rtol=1e-15)


def test_cosines_of_zero() -> None:
    """The mean itself comes back as it was; a token that comes back as the mean has lost everything."""
    calibration = Calibration(np.zeros(2, np.float32), np.ones(2, np.float32))
    tokens = np.array([[0, 0], [1e-5, 0], [1, 0]], np.float16)
    np.testing.assert_array_equal(cosines(tokens, "int8", calibration), [1, 0, 1])


def test_fewer_bits_keep_less() -> None:
    tokens = np.random.default_rng(4).normal(size=(500, 32)).astype(np.float16)
    kept = [cosines(tokens, f"bitround:{bits}", Calibration.of(tokens)).mean() for bits in range(1, 10)]
    assert kept == sorted(kept) and kept[0] < 0.996 < 0.999999 < kept[-1]


# Words


@pytest.mark.parametrize("word", CANDIDATES)
def test_known_precisions(word: str) -> None:
    assert require_known(word) == word
    assert stored_channels(word, 384) == (386 if word == "int8" else 384)


@pytest.mark.parametrize(
    "word", ["", "int4", "INT8", "bitround", "bitround:", "bitround:0", "bitround:10", "bitround:-1", "fp16 "]
)
def test_unknown_precisions(word: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"precision {word!r} is unknown; give fp16, bitround:B")):
        require_known(word)


@pytest.mark.parametrize(
    ("text", "summary", "dense"),
    [
        ("int8", "int8", "int8"),
        ("dense=int8", "fp16", "int8"),
        ("summary=bitround:7,dense=int8", "bitround:7", "int8"),
    ],
)
def test_precision_for_each_kind(text: str, summary: str, dense: str) -> None:
    assert parse_precision(text, ("summary", "dense")) == {"summary": summary, "dense": dense}
    assert parse_precision(text, ("dense",)) == {"dense": dense}


@pytest.mark.parametrize(
    ("stored", "allowed"),
    [
        ("fp16", {"fp16", "bitround:9", "bitround:7", "bitround:6", "int8"}),
        ("bitround:9", {"bitround:9", "bitround:7", "bitround:6", "int8"}),
        ("bitround:7", {"bitround:7", "bitround:6", "int8"}),
        ("bitround:6", {"bitround:6"}),
        ("int8", {"int8"}),
    ],
)
def test_tokens_are_converted_only_to_what_keeps_no_more_of_them(stored: str, allowed: set[str]) -> None:
    for wanted in ("fp16", "bitround:9", "bitround:7", "bitround:6", "int8"):
        if wanted in allowed:
            require_convertible({"dense": stored}, {"dense": wanted}, where="s.zarr")
        else:
            with pytest.raises(
                ConfigError, match=f"s.zarr has dense tokens in {stored}, and {wanted} would claim more"
            ):
                require_convertible({"dense": stored}, {"dense": wanted}, where="s.zarr")


@pytest.mark.parametrize("text", ["patches=int8", "dense=int4", "dense=", "int8,fp16", "=int8", ""])
def test_precision_mistakes(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_precision(text, ("summary", "dense"))


# In a store


@pytest.mark.parametrize("size", [32, 48])
def test_a_coded_store_reads_as_the_naive_loops_say(coded: Case, coded_store: Path, size: int) -> None:
    store = open_store(coded_store)
    rows, views = every_view(coded.spec, range(11))
    got = store.read(rows, views, size=size)
    assert got.summary is not None and got.summary.dtype == np.float16
    assert got.dense is not None and got.dense.dtype == np.float32
    assert_same_bits(as_arrays(got), coded.expected(rows, views, size))
    assert store.read_summaries(rows, views, size=size).tobytes() == got.summary.tobytes()


def test_a_failed_sample_of_a_coded_store_is_nan(coded_store: Path) -> None:
    features = open_store(coded_store).read([5, 4], [0, 0])
    assert features.summary is not None and features.dense is not None
    for values in (features.summary, features.dense):
        assert np.isnan(values[0]).all() and np.isfinite(values[1]).all()


def test_what_is_stored_travels_undecoded(coded: Case, coded_store: Path) -> None:
    """Tokens as they lie in the array, to be decoded where they are used."""
    pending = open_store(coded_store).read_async([2, 9], [1, 0], size=48)
    stored = pending.stored()
    assert stored.dense is not None and stored.summary is not None
    assert (stored.dense.stored.dtype, stored.dense.stored.shape) == (np.int8, (2, 3, 3, 8))
    assert_same_bits(
        {"dense": stored.dense.decode(), "summary": stored.summary.decode()},
        {kind: coded.expected([2, 9], [1, 0], 48)[kind] for kind in ("dense", "summary")},
    )


@pytest.mark.parametrize("precision", [None, CODED], ids=["fp16", "coded"])
def test_rows_that_were_never_written_raise(tmp_path: Path, precision: dict[str, str] | None) -> None:
    """A part that is missing, and the rows that the last part of a segment leaves empty."""
    case = make_case(make_spec(segments=[5, 4], precision=precision))
    create_store(tmp_path / "s.zarr", case.spec)
    writer = StoreWriter(tmp_path / "s.zarr")
    for part in (0, 1):
        writer.commit(case.part(part))
    store = open_store(tmp_path / "s.zarr")
    assert_same_bits(as_arrays(store.read([0, 4], [0, 1])), case.expected([0, 4], [0, 1], 32))
    for row in (5, 7, 8, 11):
        with pytest.raises(PartCorruptError):
            store.read([row], [0])


PAGE = Path(layout.__file__).with_name("FORMAT.md")


def test_int8_by_hand_as_the_page_says(coded: Case, coded_store: Path) -> None:
    """The page's own example, on zarr-python's own reading, for every token of the store."""
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (example,) = [text for text in examples if "def dequantise" in text]
    names: dict[str, object] = {}
    exec(example, names)
    dequantise = names["dequantise"]
    assert callable(dequantise)
    group = zarr.open_group(coded_store, mode="r")
    store = open_store(coded_store)
    rows, views = every_view(coded.spec, range(11))
    for size in coded.spec.sizes:
        by_hand = dequantise(group[f"{size}/dense"][:], group.attrs["eupe"]["calibration"][f"{size}/dense"])
        read = store.read(rows, views, size=size).dense
        assert read is not None
        np.testing.assert_array_equal(by_hand.reshape(read.shape), read)
        assert one_nan(by_hand).tobytes() == one_nan(coded.kept[f"{size}/dense"]).tobytes()
