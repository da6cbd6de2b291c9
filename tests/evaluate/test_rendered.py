"""Real features beat random ones, and these are compared with raw pixels, on every task with rendered truth."""

from dataclasses import replace
from pathlib import Path

import pytest

from eupe.evaluate.correspond import correspond
from eupe.evaluate.dense_probe import Training
from eupe.evaluate.depth import depth
from eupe.evaluate.feature_cache import open_features
from eupe.evaluate.knn import knn
from eupe.evaluate.linear import linear
from eupe.evaluate.segment import segment
from eupe.evaluate.subject import open_subjects
from eupe.evaluate.vqa import FITTING, vqa
from scenes.layouts import LAYOUTS, Request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SIZE = 112
FAST = Training(steps=100, lr=3e-3, warmup=0.1)
FEW_STEPS = replace(FITTING, steps=300)
SCENES = Request(pictures=72, size=112, seed=0)
QUESTIONS = Request(pictures=120, size=168, seed=0)
"""More pictures, and larger ones, than all else needs."""
Scores = dict[str, float]


def drawn(folder: Path, layout: str, request: Request) -> None:
    """One layout alone: `make_scenes` makes all."""
    draw, finish = LAYOUTS[layout].draw, LAYOUTS[layout].finish
    finish(folder, request, [draw(folder, request, number) for number in range(request.pictures)])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    for layout in ("classification", "segmentation and depth", "correspondence"):
        drawn(folder, layout, SCENES)
    drawn(folder, "questions", QUESTIONS)
    return folder


@pytest.fixture(scope="module")
def scores(scenes: Path, assets: Path) -> dict[str, list[Scores]]:
    """Return the scores by task, of three subjects: DINOv2-S, the same with random weights, and raw pixels."""
    weights = {"dinov2-s": assets / "weights" / "dinov2-small"}
    found: dict[str, list[Scores]] = {}
    kept = open_features(scenes / "features", on_note=print)
    for subject in open_subjects(["dinov2-s", "pixels"], weights, untrained=True, features=kept):
        for result in (
            knn(subject, data=scenes / "classification", size=SIZE),
            linear(subject, data=scenes / "classification", size=SIZE, penalties=(1.0,)),
            segment(subject, data=scenes / "segmentation", size=SIZE, training=FAST),
            depth(subject, data=scenes / "depth", size=SIZE, training=FAST),
            correspond(subject, data=scenes / "correspondence", size=SIZE),
            vqa(subject, data=scenes / "questions", size=QUESTIONS.size, fitting=FEW_STEPS, dropouts=(0.5,)),
        ):
            found.setdefault(result.task, []).append(result.scores)
    for task, each in found.items():
        measure = next(iter(each[0]))
        print(task, measure, [round(scores[measure], 3) for scores in each])
    print("vqa", found["vqa"])
    return found


@pytest.mark.parametrize(
    ("task", "measure", "margin"),
    [
        ("knn", "accuracy", 0.2),
        ("linear", "accuracy", 0.2),
        ("segment", "miou", 0.1),
        ("correspond", "pck", 0.1),
        ("vqa", "accuracy", 0.06),
        ("vqa", "count", 0.1),
    ],
)
def test_real_features_lead_by_a_clear_margin(
    scores: dict[str, list[Scores]], task: str, measure: str, margin: float
) -> None:
    real, random, pixels = (each[measure] for each in scores[task])
    assert real > max(random, pixels) + margin


def test_real_features_see_depth_better(scores: dict[str, list[Scores]]) -> None:
    real, random, pixels = (each["rmse"] for each in scores["depth"])
    assert real < 0.9 * min(random, pixels)
