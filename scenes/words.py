"""Captions of scenes, and questions about them that only the picture can answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scenes.compose import Spot, beside
from scenes.scene import Scene, Thing

MOST_PAIRS = 3
"""Largest number of pairs of things that a picture's questions are about."""
NUMBERS = ("no", "one", "two", "three", "four", "five")


class Question(NamedTuple):
    """One question about a picture."""

    kind: str
    """colour, count, position or text."""
    question: str
    answer: str


def captions(scene: Scene, spots: Sequence[Spot], rng: np.random.Generator) -> list[str]:
    """Write five captions about a scene's things, their colours, their positions and the floor."""
    order = sorted(range(len(scene.things)), key=lambda i: spots[i].x)
    things = [scene.things[i] for i in order]
    left, right = things[0], things[-1]
    shuffled = [things[i] for i in rng.permutation(len(things))]
    near = min(range(len(scene.things)), key=lambda i: spots[i].depth)
    return [
        f"{_listed(things)} on {scene.floor_name}.",
        f"{_described(left)} to the left of {_described(right)}.",
        f"{_described(right)} to the right of {_described(left)}.",
        f"{NUMBERS[len(things)]} things, {_listed(shuffled)}, the {scene.things[near].kind} nearest.",
        f"a picture of {_listed(shuffled)}.",
    ]


def _listed(things: Sequence[Thing]) -> str:
    *before, last = (_described(thing) for thing in things)
    return f"{', '.join(before)} and {last}" if before else last


def _described(thing: Thing) -> str:
    colour = thing.instance.colour
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {thing.kind}"


def questions(scene: Scene, spots: Sequence[Spot], rng: np.random.Generator) -> list[Question]:
    """Write questions on each thing's colour, the number of things, the sides of some pairs, and the sign's word.

    The last thing of the scene is the sign.
    """
    *things, sign = scene.things
    found = [Question("colour", f"What colour is the {t.kind}?", t.instance.colour) for t in things]
    found.append(Question("count", "How many objects are there besides the sign?", NUMBERS[len(things)]))
    found.append(Question("text", "What does the sign say?", sign.instance.says))
    for left, right in rng.permutation(beside(spots[:-1]))[:MOST_PAIRS]:
        first, second, answer = (right, left, "right") if rng.random() < 0.5 else (left, right, "left")
        question = f"Is the {things[first].kind} to the left or to the right of the {things[second].kind}?"
        found.append(Question("position", question, answer))
    return found
