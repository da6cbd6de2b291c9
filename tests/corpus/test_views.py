import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import picture
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tvf

from eupe.corpus.views import NEUTRAL, ViewParams, ViewSpec, draw_view, parse_views, render_view, view_digest
from eupe.errors import ConfigError

RRC = ViewSpec(policy="rrc", num_views=4)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000), key=st.text(max_size=8), k=st.integers(0, 9))
def test_boxes_lie_in_the_picture_and_have_area(width: int, height: int, key: str, k: int) -> None:
    for spec in (RRC, ViewSpec(), ViewSpec(policy="squash")):
        x0, y0, x1, y1 = draw_view(spec, key, k, width, height).box
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height


@pytest.mark.parametrize(("width", "height"), [(100, 60), (60, 100), (61, 100), (50, 50), (1, 9)])
def test_center_is_the_largest_centred_square(width: int, height: int) -> None:
    (x0, y0, x1, y1), flip, _ = draw_view(ViewSpec(), "key", 0, width, height)
    side = min(width, height)
    assert (x1 - x0, y1 - y0) == (side, side)
    assert abs((x0 + x1) - width) <= 1
    assert abs((y0 + y1) - height) <= 1
    assert not flip


@pytest.mark.parametrize(("width", "height"), [(100, 60), (61, 100), (1, 9)])
def test_squash_is_the_whole_picture(width: int, height: int) -> None:
    """A squashed view is the picture as torchvision resizes it to a square, without keeping its aspect ratio."""
    image = picture(3, width, height)
    params = draw_view(ViewSpec(policy="squash"), "key", 0, width, height)
    assert params == ((0, 0, width, height), False, NEUTRAL)
    expected = tvf.resize(image, [32, 32], interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert np.array_equal(render_view(image, params, 32), np.asarray(expected))


def test_crops_are_distributed_as_torchvisions() -> None:
    """Quantiles of area, aspect and position over many keys agree with RandomResizedCrop's own draws."""
    n, width, height = 6000, 640, 480
    torch.manual_seed(0)
    blank = Image.new("RGB", (width, height))
    theirs = [RandomResizedCrop.get_params(blank, list(RRC.scale), list(RRC.ratio)) for _ in range(n)]
    top, left, h, w = np.array(theirs).T
    boxes, flips, _ = zip(*(draw_view(RRC, str(i), 0, width, height) for i in range(n)), strict=True)
    x0, y0, x1, y1 = np.array(boxes).T
    quantiles = np.linspace(0.05, 0.95, 7)
    pairs = [
        (w * h / (width * height), (x1 - x0) * (y1 - y0) / (width * height), 0.04),
        (np.log(w / h), np.log((x1 - x0) / (y1 - y0)), 0.04),
        (left / width, x0 / width, 0.03),
        (top / height, y0 / height, 0.03),
    ]
    for expected, got, tolerance in pairs:
        assert np.abs(np.quantile(expected, quantiles) - np.quantile(got, quantiles)).max() < tolerance
    assert abs(np.mean(flips) - 0.5) < 0.03


def test_a_view_depends_on_seed_key_and_number_alone() -> None:
    def draw(seed: int, key: str, k: int) -> object:
        return draw_view(ViewSpec(policy="rrc", num_views=4, seed=seed), key, k, 640, 480)

    assert draw(0, "a", 1) == draw(0, "a", 1)
    assert len({draw(0, "a", 1), draw(1, "a", 1), draw(0, "b", 1), draw(0, "a", 2)}) == 4
    assert draw_view(RRC, "animals/cat.png", 3, 640, 480) == ((66, 16, 527, 437), True, NEUTRAL)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), k=st.integers(0, 9), size=st.sampled_from([16, 56, 112]))
def test_rendering_equals_torchvisions_crop_and_resize(seed: int, k: int, size: int) -> None:
    image = picture(seed, 97, 61)
    params = draw_view(RRC, str(seed), k, *image.size)
    x0, y0, x1, y1 = params.box
    expected = tvf.resized_crop(
        image, y0, x0, y1 - y0, x1 - x0, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    if params.flip:
        expected = tvf.hflip(expected)
    assert np.array_equal(render_view(image, params, size), np.asarray(expected))


def test_corners_stay_where_they_are() -> None:
    """A picture with four coloured corners, wide: the centre view loses its sides and keeps its top and bottom."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:20, :40], pixels[:20, 40:] = (255, 0, 0), (0, 255, 0)
    pixels[20:, :40], pixels[20:, 40:] = (0, 0, 255), (255, 255, 255)
    image = Image.fromarray(pixels)
    params = draw_view(ViewSpec(), "k", 0, *image.size)
    view = torch.from_numpy(render_view(image, params, 32).copy())
    corners = [view[0, 0], view[0, -1], view[-1, 0], view[-1, -1]]
    assert [c.tolist() for c in corners] == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    mirrored = render_view(image, params._replace(flip=True), 32)
    assert mirrored[0, 0].tolist() == [0, 255, 0]


def test_the_digest_sees_one_level_of_one_pixel() -> None:
    view = render_view(picture(1), ViewParams((0, 0, 64, 64), False, NEUTRAL), 32).copy()
    before = view_digest(view)
    assert before == view_digest(view.copy())
    view[3, 4, 1] ^= 1
    assert view_digest(view) != before


@pytest.mark.parametrize("text", ["rrc", "rrc:0", "rrc:-1", "rrc:x", "centre", ""])
def test_unknown_policies_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="rrc:K"):
        parse_views(text, seed=0)


def test_views_from_the_command_line() -> None:
    assert parse_views("center", seed=3).num_views == 1
    assert parse_views("rrc:5", seed=3) == ViewSpec(policy="rrc", num_views=5, seed=3)
    assert parse_views("squash", seed=3) == ViewSpec(policy="squash", seed=3)
    ranged = parse_views("rrc:2", seed=0, scale="0.25,0.5", ratio="1,2.5")
    assert ranged == ViewSpec(policy="rrc", num_views=2, scale=(0.25, 0.5), ratio=(1.0, 2.5))


def test_the_ranges_bound_the_crops() -> None:
    spec = parse_views("rrc:1", seed=0, scale="0.25,0.5", ratio="1,2.5")
    boxes = np.array([draw_view(spec, str(i), 0, 4000, 3000)[0] for i in range(400)])
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    area, ratio = w * h / 12e6, w / h
    assert 0.249 < area.min() < 0.27 and 0.47 < area.max() < 0.501
    assert 0.99 < ratio.min() < 1.05 and 2.3 < ratio.max() < 2.51


@pytest.mark.parametrize("words", ["0.5", "0,1", "0.6,0.5", "0.5,1.1", "a,b", "0.1,0.2,0.3", "nan,1", ""])
def test_a_range_that_cannot_be_is_one_sentence(words: str) -> None:
    with pytest.raises(ConfigError, match=r"^--scale takes MIN,MAX .* got '"):
        parse_views("rrc:2", seed=0, scale=words)


@pytest.mark.parametrize("views", ["center", "squash"])
def test_ranges_without_random_crops_are_refused(views: str) -> None:
    with pytest.raises(ConfigError, match=f"--ratio is for random crops only; --views {views} draws none"):
        parse_views(views, seed=0, ratio="1,2")


@pytest.mark.parametrize(
    "spec",
    [
        ViewSpec(),
        ViewSpec(policy="squash"),
        ViewSpec(policy="rrc", num_views=3, seed=7, scale=(0.2, 0.9), flip=0.25),
        ViewSpec(photometric="eupe", seed=3),
        ViewSpec(policy="rrc", num_views=2, seed=3, photometric="eupe"),
    ],
)
def test_stored_views_are_drawn_again_and_unknown_ones_refused(spec: ViewSpec) -> None:
    plain = json.loads(json.dumps(spec.to_json()))
    assert ViewSpec.from_json(plain) == spec
    for change in ({"kernel": "lanczos"}, {"policy": "grid"}, {"jitter": 0.1}, {"photometric": "loud"}):
        with pytest.raises(ConfigError, match="cannot be drawn by this version"):
            ViewSpec.from_json({**plain, **change})


def test_views_that_are_not_recoloured_are_written_as_they_were_before() -> None:
    """An old store and a new request for the same are the same."""
    assert ViewSpec(seed=5).to_json() == {"policy": "center", "num_views": 1, "kernel": "pillow-crop-bicubic"}
    assert parse_views("rrc:2", seed=1, photometric="none").to_json() == {
        "policy": "rrc",
        "num_views": 2,
        "seed": 1,
        "scale": [0.08, 1.0],
        "ratio": [0.75, 4 / 3],
        "flip": 0.5,
        "kernel": "pillow-crop-bicubic",
    }
    recoloured = parse_views("center", seed=1, photometric="eupe").to_json()
    assert recoloured["photometric"] == "eupe" and recoloured["seed"] == 1
    assert recoloured["kernel"].startswith("pillow-crop-bicubic+")
