"""Photometric changes against other people's code; what is neutral changes nothing; draws follow their constants."""

import colorsys
import itertools
import math

import numpy as np
import pytest
from making import picture
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from scipy.ndimage import gaussian_filter1d
from torchvision.transforms.v2 import ColorJitter
from torchvision.transforms.v2 import functional as tvf

from eupe.corpus.views import (
    NEUTRAL,
    Photometric,
    ViewSpec,
    apply_photometric,
    are_possible,
    draw_view,
    render_view,
    view_digest,
)

SPEC = ViewSpec(policy="rrc", num_views=2, photometric="eupe")
Pixels = NDArray[np.uint8]


def noise(size: int = 48, seed: int = 0) -> Pixels:
    """Every level and hue there is; greys, black and white among them."""
    view = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    view[0] = np.linspace(0, 255, size).astype(np.uint8)[:, None]
    view[1, :, 1:] = 0
    return view


def smooth(size: int = 48) -> Pixels:
    return np.asarray(picture(5).resize((size, size)))


VIEWS = pytest.mark.parametrize(
    "view", [noise(), smooth(), noise(seed=1), smooth(33)], ids=["noise", "smooth", "1", "33"]
)


def changed(view: Pixels, **params: float) -> NDArray[np.int64]:
    return apply_photometric(view, NEUTRAL._replace(**params)).astype(int)


@VIEWS
def test_neutral_is_no_change(view: Pixels) -> None:
    assert np.array_equal(apply_photometric(view, NEUTRAL), view)
    for order in range(24):
        assert np.array_equal(changed(view, order=order), view)


@VIEWS
@pytest.mark.parametrize("factor", [0.0, 0.6, 0.8123, 1.1, 1.4, 3.0])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_the_jitters_factors_do_what_torchvisions_do(view: Pixels, name: str, factor: float) -> None:
    """Within one level: Pillow, which torchvision asks, cuts off where this rounds."""
    theirs = getattr(tvf, f"adjust_{name}")(Image.fromarray(view), factor)
    difference = changed(view, **{name: factor}) - np.asarray(theirs)
    assert np.isin(difference, (0, 1)).all()


@VIEWS
@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.03, 0.0777, 0.1, 0.5])
def test_hue_turns_as_in_the_standard_librarys_hsv(view: Pixels, turn: float) -> None:
    """Within half a level, which is rounding, and float32's last bits."""
    ours = changed(view, hue=turn)
    for (r, g, b), got in zip(view.reshape(-1, 3).tolist(), ours.reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
        expected = 255 * np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
        assert np.abs(got - expected).max() < 0.5001


@VIEWS
def test_greyscale_and_solarisation_are_pillows(view: Pixels) -> None:
    image = Image.fromarray(view)
    assert np.array_equal(changed(view, grey=1), np.asarray(tvf.rgb_to_grayscale(image, num_output_channels=3)))
    for threshold in (0, 1, 128, 255):
        assert np.array_equal(changed(view, solarise=threshold), np.asarray(ImageOps.solarize(image, threshold)))
    assert np.array_equal(changed(view, solarise=256), view)


@VIEWS
@pytest.mark.parametrize("sigma_px", [0.1, 0.4, 1.0, 2.0, 4.6])
def test_blur_is_scipys(view: Pixels, sigma_px: float) -> None:
    """Within half a level, which is rounding, and the weights' 16 bits."""
    reach = math.ceil(3 * sigma_px)
    expected = view.astype(float)
    for axis in (0, 1):
        expected = gaussian_filter1d(expected, sigma_px, axis=axis, mode="nearest", radius=reach)
    assert np.abs(changed(view, blur=sigma_px / len(view)) - expected).max() < 0.52


@pytest.mark.parametrize("sigma_px", [0.5, 1.0, 2.0])
def test_blur_is_near_pillows_which_the_sources_use(sigma_px: float) -> None:
    """Pillow makes its Gaussian of three boxes, so they agree on the whole and not to the level."""
    view = noise(64)
    theirs = np.asarray(Image.fromarray(view).filter(ImageFilter.GaussianBlur(sigma_px))).astype(int)
    difference = np.abs(changed(view, blur=sigma_px / 64) - theirs).mean()
    assert difference < 0.05 * np.abs(view - theirs).mean()


def test_blur_loses_the_same_detail_at_every_size() -> None:
    """A wave of four periods across the view keeps the same share of its height at 64, 112 and 224 px."""
    kept = []
    for size in (64, 112, 224):
        wave = 127.5 + 100 * np.sin(2 * np.pi * 4 * (np.arange(size) + 0.5) / size)
        view = np.repeat(np.tile(np.rint(wave).astype(np.uint8), (size, 1))[..., None], 3, axis=-1)
        inner = slice(size // 4, -size // 4)
        kept.append(np.ptp(changed(view, blur=8 / 224)[size // 2, inner, 0]) / np.ptp(view[size // 2, inner, 0]))
    assert np.ptp(kept) < 0.02
    assert 0.6 < np.mean(kept) < 0.7  # exp(-(2π · 4 · 8/224)² / 2) = 0.67


@pytest.mark.parametrize(
    ("order", "names"),
    [
        (0, "brightness contrast saturation hue"),
        (6, "contrast brightness saturation hue"),
        (16, "saturation hue brightness contrast"),
        (23, "hue saturation contrast brightness"),
    ],
)
def test_the_order_is_that_of_the_permutations(order: int, names: str) -> None:
    params = {"brightness": 1.4, "contrast": 0.6, "saturation": 1.2, "hue": 0.1}
    expected = noise()
    for name in names.split():
        expected = apply_photometric(expected, NEUTRAL._replace(**{name: params[name]}))
    assert np.array_equal(changed(noise(), order=order, **params), expected)


def test_all_orders_differ_and_the_filters_follow_the_jitter() -> None:
    jitter = {"brightness": 1.4, "contrast": 0.6, "saturation": 1.2, "hue": 0.1}
    assert len({view_digest(changed(noise(), order=o, **jitter).astype(np.uint8)) for o in range(24)}) == 24
    steps = [jitter, {"grey": 1.0}, {"blur": 0.02}, {"solarise": 128.0}]
    expected = noise()
    for step in steps:
        expected = apply_photometric(expected, NEUTRAL._replace(**step))
    assert np.array_equal(changed(noise(), **{k: v for step in steps for k, v in step.items()}), expected)


def test_a_recoloured_view_has_the_same_bytes_on_every_machine() -> None:
    """Pinned: another processor or library that rounds in another way is found here."""
    view = (np.arange(64 * 64 * 3, dtype=np.uint32) * 2654435761 >> 24).astype(np.uint8).reshape(64, 64, 3)
    params = NEUTRAL._replace(brightness=1.3, contrast=0.7, saturation=1.1, hue=-0.07, order=17)
    jittered = apply_photometric(view, params)
    filtered = apply_photometric(view, params._replace(blur=2 / 224, solarise=128))
    assert [f"{view_digest(pixels):x}" for pixels in (jittered, filtered)] == ["107fe74d05974575", "aa7698ebff641437"]


def draws(n: int = 2000, seed: int = 0) -> NDArray[np.float64]:
    spec = ViewSpec(photometric="eupe", seed=seed)
    return np.array([draw_view(spec, f"{i}.png", 0, 64, 64).photometric for i in range(n)])


def test_draws_follow_the_published_constants() -> None:
    """2,000 draws; a share is off by 0.04 once in 10,000 such tests."""
    brightness, contrast, saturation, hue, order, grey, blur, solarise = draws().T
    jittered = brightness != 1
    for values, neutral in ((contrast, 1), (saturation, 1), (hue, 0)):
        assert np.array_equal(values != neutral, jittered)
    shares = [jittered, grey == 1, blur > 0, solarise == 128]
    for share, probability in zip(shares, (0.8, 0.2, 0.5, 0.2), strict=True):
        assert abs(share.mean() - probability) < 0.04
    assert (solarise[solarise != 128] == 256).all()
    assert np.isin(grey, (0, 1)).all()
    ranges = [
        (brightness[jittered], 0.6, 1.4),
        (contrast[jittered], 0.6, 1.4),
        (saturation[jittered], 0.8, 1.2),
        (hue[jittered], -0.1, 0.1),
        (blur[blur > 0] * 224, 0.1, 2.0),
    ]
    quantiles = np.linspace(0, 1, 9)
    for values, low, high in ranges:
        places = (np.quantile(values, quantiles) - low) / (high - low)
        assert places.min() > -1e-6 and places.max() < 1 + 1e-6
        assert np.abs(places - quantiles).max() < 0.06
    counts = np.bincount(order[jittered].astype(int), minlength=24)
    assert counts.min() > 30 and (order[~jittered] == 0).all()
    together = np.corrcoef(
        np.stack([*(values for values in draws()[jittered][:, :5].T), *np.array(shares)[1:, jittered]])
    )
    assert np.abs(together - np.eye(8)).max() < 0.1


def test_ranges_are_those_of_torchvisions_jitter() -> None:
    theirs = ColorJitter(0.4, 0.4, 0.2, 0.1)
    drawn = draws()
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        low, high = getattr(theirs, name)
        assert low - 1e-6 <= drawn[:, i].min() < low + 0.01 and high - 0.01 < drawn[:, i].max() <= high + 1e-6


def test_draws_depend_on_seed_key_and_number_alone_and_leave_the_crop_as_it_is() -> None:
    def draw(key: str, k: int, seed: int = 0) -> Photometric:
        view = draw_view(ViewSpec(policy="rrc", num_views=2, photometric="eupe", seed=seed), key, k, 640, 480)
        plain = draw_view(ViewSpec(policy="rrc", num_views=2, seed=seed), key, k, 640, 480)
        assert view[:2] == plain[:2] and plain.photometric == NEUTRAL
        return view.photometric

    assert draw("a", 1) == draw("a", 1)
    assert len({draw("a", 1), draw("b", 1), draw("a", 0), draw("a", 1, seed=1)}) == 4
    assert np.array_equal(draws(50), draws(50)) and not np.array_equal(draws(50), draws(50, seed=1))


def test_parameters_survive_float32() -> None:
    drawn = draws(200)
    assert np.array_equal(drawn.astype(np.float32).astype(float), drawn)
    assert are_possible(drawn.astype(np.float32)).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(Photometric._fields, [math.nan, math.inf, -1.0]),
        ("order", 24.0),
        ("order", 1.5),
        ("grey", 0.5),
        ("hue", 0.6),
        ("solarise", 257.0),
    ],
)
def test_impossible_parameters_are_told(name: str, value: float) -> None:
    params = np.array([NEUTRAL, NEUTRAL._replace(**{name: value})], np.float32)
    assert are_possible(params).tolist() == [True, False]


def test_rendering_recolours_after_the_flip() -> None:
    image = picture(3, 80, 60)
    view = draw_view(SPEC, "key", 1, 80, 60)._replace(
        flip=True, photometric=Photometric(0.7, 1.2, 0.9, 0.05, 9, 0, 0.01)
    )
    plain = render_view(image, view._replace(photometric=NEUTRAL), 56)
    assert np.array_equal(render_view(image, view, 56), apply_photometric(plain, view.photometric))
    assert not np.array_equal(render_view(image, view, 56), plain)


def by_the_specification(view: Pixels, params: Photometric) -> Pixels:
    """Apply the changes as FORMAT.md describes them, pixel by pixel, in Python's integers (and float32 for hue)."""
    now = [[[int(v) for v in pixel] for pixel in row] for row in view]
    side = len(now)

    def grey(pixel: list[int]) -> int:
        return (19595 * pixel[0] + 38470 * pixel[1] + 7471 * pixel[2] + 32768) >> 16

    def blend(o: int, v: int, factor: float) -> int:
        fixed = round(factor * 65536)
        return max(0, min(255, (v * fixed + o * (65536 - fixed) + 32768) >> 16))

    def turned(pixel: list[int]) -> list[int]:
        r, g, b = (np.float32(v) for v in pixel)
        high, chroma = max(r, g, b), max(r, g, b) - min(r, g, b)
        c = max(chroma, np.float32(1))
        h = (g - b) / c if r == high else (b - r) / c + 2 if g == high else (r - g) / c + 4
        h = h + np.float32(6 * (params.hue % 1))
        h = h - 6 if h > 5 else h
        return [int(np.rint(high - chroma * min(max(2 - abs(abs(h - 2 * i) - 3), 0), 1))) for i in range(3)]

    for change in list(itertools.permutations(range(4)))[int(params.order)]:
        levels = [grey(pixel) for row in now for pixel in row]
        mean = math.floor(sum(levels) / len(levels) + 0.5)
        do = [
            lambda p: [blend(0, v, params.brightness) for v in p],
            lambda p, mean=mean: [blend(mean, v, params.contrast) for v in p],
            lambda p: [blend(grey(p), v, params.saturation) for v in p],
            turned,
        ][change]
        now = [[do(pixel) for pixel in row] for row in now]
    if params.grey:
        now = [[[grey(pixel)] * 3 for pixel in row] for row in now]
    if params.blur:
        sigma = params.blur * side
        reach = math.ceil(3 * sigma)
        bells = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-reach, reach + 1)]
        weights = [round(bell / sum(bells) * 65536) for bell in bells]
        weights[reach] += 65536 - sum(weights)
        places = [[max(0, min(side - 1, i + d)) for d in range(-reach, reach + 1)] for i in range(side)]

        def total(values: list[int]) -> int:
            return sum(w * v for w, v in zip(weights, values, strict=True))

        everywhere = list(itertools.product(range(side), range(side), range(3)))
        down = {(y, x, i): (total([now[at][x][i] for at in places[y]]) + 512) >> 10 for y, x, i in everywhere}
        for y, x, i in everywhere:
            now[y][x][i] = (total([down[y, at, i] for at in places[x]]) + (1 << 21)) >> 22
    now = [[[v if v < params.solarise else 255 - v for v in pixel] for pixel in row] for row in now]
    return np.array(now, np.uint8)


@pytest.mark.parametrize("key", range(12))
def test_the_specification_is_the_code(key: int) -> None:
    params = draw_view(ViewSpec(photometric="eupe"), str(key), 0, 8, 8).photometric
    params = params._replace(blur=20 * params.blur)  # so that it has an extent at this size
    view = noise(36, seed=key)
    assert np.array_equal(apply_photometric(view, params), by_the_specification(view, params))


def test_it_makes_no_difference_how_the_view_is_cut_into_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    params = Photometric(1.2, 0.8, 1.1, 0.06, 13, 0, 2 / 224, 128)
    whole = apply_photometric(noise(64), params)
    for pixels in (1, 64 * 7, 64 * 63):
        monkeypatch.setattr("eupe.corpus.views.STRIP_PIXELS", pixels)
        assert np.array_equal(apply_photometric(noise(64), params), whole)
