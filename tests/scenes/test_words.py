"""Captions and questions: what they say is what the masks show, and no answer can be guessed from the question."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from numpy.typing import NDArray

from eupe.scenes.catalogue import CATEGORIES, CLASSES, SIGN
from eupe.scenes.compose import caption_scene, question_plan, question_scene, rng_of, spots_of
from eupe.scenes.materials import COLOURS, WORDS
from eupe.scenes.render import Truth, look_up
from eupe.scenes.scene import Scene
from eupe.scenes.words import NUMBERS, captions, questions

SIZE = 96


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, Truth, dict[str, tuple[str, str]]]]:
    found = []
    for number in range(8):
        scene = question_scene(2, number)
        those = questions(scene, spots_of(scene), rng_of(2, "question words", number))
        found.append((scene, look_up(scene, SIZE), {q.kind: (q.question, q.answer) for q in those}))
    return found


def mask(truth: Truth, category: str) -> NDArray[np.bool_]:
    return truth.classes == CLASSES.index(category) + 1


def test_the_count_is_that_of_the_things_in_the_mask(
    asked: list[tuple[Scene, Truth, dict[str, tuple[str, str]]]],
) -> None:
    for scene, truth, those in asked:
        visible = {int(w) for w in np.unique(truth.what) if w >= 0 and (truth.what == w).sum() > 0.005 * SIZE**2}
        named = [i for i in visible if scene.things[i].kind != SIGN]
        assert NUMBERS[len(named)] == those["count"][1]
        assert len(visible) == len(scene.things) == len(named) + 1


def test_left_and_right_are_those_of_the_masks(asked: list[tuple[Scene, Truth, dict[str, tuple[str, str]]]]) -> None:
    positions = 0
    for _, truth, those in asked:
        if "position" not in those:
            continue
        question, answer = those["position"]
        first, second = (word for word in question.rstrip("?").split() if word in CATEGORIES)
        middle = [np.nonzero(mask(truth, category))[1].mean() for category in (first, second)]
        assert answer == ("left" if middle[0] < middle[1] else "right")
        positions += 1
    assert positions >= 4


def test_colour_and_word_are_those_of_the_scene(asked: list[tuple[Scene, Truth, dict[str, tuple[str, str]]]]) -> None:
    for scene, truth, those in asked:
        question, colour = those["colour"]
        (category,) = (word for word in question.rstrip("?").split() if word in CATEGORIES)
        (thing,) = (thing for thing in scene.things if thing.kind == category)
        assert colour == thing.instance.colour
        assert mask(truth, category).any()
        assert those["text"][1] == scene.things[-1].instance.says
        assert scene.things[-1].kind == SIGN


def test_answers_are_spread_evenly_and_the_question_does_not_tell_them() -> None:
    plans = [question_plan(0, number) for number in range(400)]
    counts = Counter(plan.count for plan in plans)
    words = Counter(plan.word for plan in plans)
    colours = Counter(colour for plan in plans for colour in plan.colours)
    assert set(words) == set(WORDS)
    assert set(colours) == set(COLOURS)
    assert sorted(counts) == [1, 2, 3, 4, 5]
    for found in (counts, words, colours):
        assert max(found.values()) / found.total() < 1.5 / len(found)


def test_sides_are_spread_evenly() -> None:
    scene = next(scene for scene in (question_scene(2, n) for n in range(20)) if len(scene.things) > 2)
    spots = spots_of(scene)
    sides: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in range(300):
        for question in questions(scene, spots, np.random.default_rng(seed)):
            if question.kind == "position":
                sides["all"][question.answer] += 1
    assert 0.4 < sides["all"]["left"] / 300 < 0.6


def test_captions_name_what_the_mask_shows_and_where() -> None:
    for number in range(5):
        scene = caption_scene(4, number)
        truth = look_up(scene, SIZE)
        listed, left_of, right_of, nearest, plain = captions(scene, spots_of(scene), rng_of(4, "w", number))
        kinds = {thing.kind for thing in scene.things}
        middles = {kind: np.nonzero(mask(truth, kind))[1].mean() for kind in kinds}
        for caption in (listed, nearest, plain):
            assert {word.strip(".,") for word in caption.split()} & set(CATEGORIES) == kinds
        for thing in scene.things:
            article = "an" if thing.instance.colour == "orange" else "a"
            assert f"{article} {thing.instance.colour} {thing.kind}" in listed
        assert listed.endswith(f" on {scene.floor_name}.")
        for caption, ordered in ((left_of, 1), (right_of, -1)):
            first, second = (word.strip(".") for word in caption.split() if word.strip(".") in CATEGORIES)
            assert (middles[second] - middles[first]) * ordered > 0.1 * SIZE
        depths = {kind: np.median(truth.depth[mask(truth, kind)]) for kind in kinds}
        assert nearest.endswith(f"the {min(depths, key=lambda kind: depths[kind])} nearest.")
