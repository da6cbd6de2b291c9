"""Correspondence: against a naive resize of whole maps, and on pictures that are shifted copies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from making import make_store
from planted import spair

from eupe.corpus.views import NEUTRAL, ViewParams
from eupe.errors import ConfigError, CorpusError, StoreError
from eupe.evaluate.correspond import ALPHA, SIZE, SIZES, correspond, from_view, nearest_points, resized_norms, to_view
from eupe.evaluate.subject import open_subjects


def pixels_subject() -> Any:
    (subject,) = open_subjects(["pixels"], {})
    return subject


def test_the_correspondence_protocol_is_the_papers() -> None:
    assert (ALPHA, SIZE, SIZES) == (0.1, 512, {14: 448})


@pytest.mark.parametrize("size", [40, 64])
def test_the_nearest_place_is_that_of_a_map_resized_as_a_whole(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(5, 5, 7, generator=generator) for _ in range(2))
    points = np.array([[0.0, 0.0], [size - 1.0, 3.0], [17.4, 20.6]])
    resized = [
        F.interpolate(x.permute(2, 0, 1)[None], size=(size, size), mode="bilinear", align_corners=False)[0]
        for x in (source, target)
    ]
    got = nearest_points(source, points, target, size=size)
    for point, place in zip(points, got, strict=True):
        x, y = (round(float(v)) for v in point)
        cosine = F.cosine_similarity(resized[0][:, y, x, None, None], resized[1], dim=0)
        assert float(cosine[int(place[1]), int(place[0])]) == pytest.approx(float(cosine.max()), abs=1e-5)


@pytest.mark.parametrize(("side", "size"), [(5, 40), (4, 4), (1, 8), (7, 30)])
def test_norms_are_those_of_a_resized_map(side: int, size: int) -> None:
    tokens = torch.randn(side, side, 6, generator=torch.Generator().manual_seed(0))
    tokens[0, 0] = 0
    resized = F.interpolate(tokens.permute(2, 0, 1)[None], size=(size, size), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(resized_norms(tokens, size), resized.norm(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
def test_points_go_to_a_view_and_back(flip: bool) -> None:
    params = ViewParams((10, 20, 110, 70), flip, NEUTRAL)
    points = np.array([[10.0, 20.0], [60.0, 44.5], [109.0, 69.0]])
    there = to_view(points, params, 200)
    assert np.allclose(from_view(there, params, 200), points)
    left, right = (199, 0) if flip else (0, 199)
    corners = to_view(np.array([[9.75 - 0.25 + 0.5, 19.5 + 0.5 - 0.375], [109.25, 69.375]]), params, 200)
    assert abs(corners[0, 0] - left) < 1 and abs(corners[1, 0] - right) < 1


def test_points_of_a_shifted_picture_are_found(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    data = spair(tmp_path)
    result = correspond(pixels_subject(), data=data, size=64)
    assert result.scores["pck"] == result.scores["pck_by_category"] == result.scores["pck/cat"] == 1.0
    assert result.data == {"path": str(data), "pairs": 2, "points": 6}
    annotation = data / "PairAnnotation" / "test" / "000000-a-b:cat.json"
    wrong = json.loads(annotation.read_text())
    wrong["trg_kps"][0] = [60.0, 60.0]
    annotation.write_text(json.dumps(wrong))
    words = ["eval", "correspond", "pixels", "--data", data, "--size", 64, "--json"]
    (result,) = json.loads(run_eupe(*words).out)["results"]
    assert result["scores"]["pck"] == pytest.approx(5 / 6)
    assert result["scores"]["pck/cat"] == pytest.approx(2 / 3)
    assert result["scores"]["pck_by_category"] == pytest.approx(5 / 6)
    (wide,) = json.loads(run_eupe(*words, "--alpha", 2).out)["results"]
    assert wide["scores"]["pck"] == 1.0
    (one,) = json.loads(run_eupe(*words, "--limit", 1).out)["results"]
    assert one["data"]["pairs"] == 1
    (coarse,) = json.loads(run_eupe(*words, "--size", 16).out)["results"]
    assert coarse["scores"]["pck"] < result["scores"]["pck"], "one patch knows no places"
    assert run_eupe(*words, "--alpha", "inf").code == run_eupe(*words, "--limit", 0).code == 2


def test_what_is_no_spair_gets_a_sentence(tmp_path: Path, tiny_weights: Path) -> None:
    subject = pixels_subject()
    with pytest.raises(CorpusError, match="no correspondences in SPair-71k's layout"):
        correspond(subject, data=tmp_path)
    data = spair(tmp_path / "s")
    with pytest.raises(ConfigError, match="--alpha"):
        correspond(subject, data=data, alpha=0)
    store = make_store(tmp_path / "two.zarr", data / "JPEGImages", tiny_weights)
    with pytest.raises(StoreError, match="several views"):
        correspond(open_subjects([str(store.path)], {})[0], data=data)
    (data / "JPEGImages" / "cat" / "b.png").unlink()
    with pytest.raises(CorpusError, match="names 1 files that are missing"):
        correspond(subject, data=data)
    annotation = data / "PairAnnotation" / "test" / "000001-a-b:dog.json"
    plain = json.loads(annotation.read_text())
    annotation.write_text(json.dumps({**plain, "src_kps": plain["src_kps"][:1]}))
    with pytest.raises(CorpusError, match="1 source and 3 target points"):
        correspond(subject, data=data)
    annotation.write_text("{}")
    with pytest.raises(CorpusError, match="not an annotation of SPair-71k"):
        correspond(subject, data=data)
    (data / "Layout" / "large" / "test.txt").write_text("\n")
    with pytest.raises(CorpusError, match="lists no pairs"):
        correspond(subject, data=data)
