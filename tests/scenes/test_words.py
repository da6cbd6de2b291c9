"""Captions and questions: what they say is what the masks show, and no answer can be guessed from the question."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from numpy.typing import NDArray

from scenes.catalogue import CATEGORIES, CLASSES, SIGN
from scenes.compose import caption_scene, question_plan, question_scene, rng_of, spots_of
from scenes.materials import COLOURS, WORDS
from scenes.render import Truth, look_up
from scenes.scene import Scene
from scenes.words import NUMBERS, Question, captions, questions

SIZE = 96


Asked = list[tuple[Scene, Truth, dict[str, list[Question]]]]
"""Scenes, what they show, and their questions by kind."""


@pytest.fixture(scope="module")
def asked() -> Asked:
    found = []
    for number in range(8):
        scene = question_scene(2, number)
        kinds: dict[str, list[Question]] = defaultdict(list)
        for question in questions(scene, spots_of(scene), rng_of(2, "question words", number)):
            kinds[question.kind].append(question)
        found.append((scene, look_up(scene, SIZE), kinds))
    return found


def mask(truth: Truth, category: str) -> NDArray[np.bool_]:
    return truth.classes == CLASSES.index(category) + 1


def named(question: Question) -> list[str]:
    return [word for word in question.question.rstrip("?").split() if word in CATEGORIES]


def test_the_count_is_that_of_the_things_in_the_mask(asked: Asked) -> None:
    for scene, truth, kinds in asked:
        visible = {int(w) for w in np.unique(truth.what) if w >= 0 and (truth.what == w).sum() > 0.005 * SIZE**2}
        things = [i for i in visible if scene.things[i].kind != SIGN]
        assert [question.answer for question in kinds["count"]] == [NUMBERS[len(things)]]
        assert len(visible) == len(scene.things) == len(things) + 1


def test_left_and_right_are_those_of_the_masks(asked: Asked) -> None:
    for scene, truth, kinds in asked:
        assert bool(kinds["position"]) == (len(scene.things) > 2)
        assert len({frozenset(named(question)) for question in kinds["position"]}) == len(kinds["position"]) <= 3
        for question in kinds["position"]:
            first, second = (np.nonzero(mask(truth, category))[1].mean() for category in named(question))
            assert question.answer == ("left" if first < second else "right")
    assert sum(len(kinds["position"]) for _, _, kinds in asked) >= 8


def test_colour_and_word_are_those_of_the_scene(asked: Asked) -> None:
    for scene, truth, kinds in asked:
        *things, sign = scene.things
        assert [named(question) for question in kinds["colour"]] == [[thing.kind] for thing in things]
        assert [question.answer for question in kinds["colour"]] == [thing.instance.colour for thing in things]
        assert all(mask(truth, thing.kind).any() for thing in things)
        assert sign.kind == SIGN
        assert [question.answer for question in kinds["text"]] == [sign.instance.says]


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
    sides: Counter[str] = Counter()
    for seed in range(300):
        those = questions(scene, spots, np.random.default_rng(seed))
        sides.update(question.answer for question in those if question.kind == "position")
    assert set(sides) == {"left", "right"}
    assert 0.4 < sides["left"] / sides.total() < 0.6


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
