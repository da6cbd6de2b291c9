"""Verdicts on what measurements of two teachers may mean for a student of both, by hand-chosen thresholds.

The thresholds are for orientation: no experiment here shows at which value a pair starts to harm a student.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eupe.evaluate.ridge import Predicted

PREDICTABLE = 0.9
"""R² from which one space counts as contained in the other."""
UNPREDICTABLE = 0.3
"""R² below which, in both directions, two spaces say little about each other."""
UNLIKE = 0.3
"""CKA below which two spaces count as arranged differently."""
SAMPLES_PER_CHANNEL, PICTURES = 5, 200
"""Fewest training samples per channel, and fewest pictures; with less, a low R² may only reflect the lack of data."""
CLIP_LIKE = ("clip", "siglip", "pe-core", "pe_core")
"""Words in the names and models of teachers that were trained to match pictures with texts."""

MEASURED = (
    "Measured: linear CKA (unbiased; 1 is the same space up to a rotation and a scale, 0 is nothing in common), R² of "
    "ridge regression on pictures that it was not fitted to, and neighbours that summaries have in common."
)
JUDGED = (
    f"Judged: redundant is R² of at least {PREDICTABLE:g} both ways, contained one way; unclear is fewer than "
    f"{PICTURES} pictures, or {SAMPLES_PER_CHANNEL} training samples per channel; may fight is CKA below {UNLIKE:g} "
    f"with R² below {UNPREDICTABLE:g} both ways; complementary is everything else. These thresholds are for "
    "orientation. That two CLIP-like teachers fight is the finding of the EUPE paper (arXiv 2603.22387), and is not "
    "measured here."
)


@dataclass(frozen=True)
class Verdict:
    """A verdict in a word, with its reason."""

    word: str
    """redundant, contained, unclear, may fight, or complementary."""
    why: str


def judge(
    names: tuple[str, str],
    *,
    kind: str,
    cka: float | None,
    forward: Predicted | None,
    backward: Predicted | None,
    num_pictures: int,
    width: int,
    specs: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> Verdict:
    """Judge two teachers by one kind of token.

    Args:
        forward: prediction of the second teacher from the first.
        backward: prediction of the first from the second.
        width: the larger of the two widths.
        specs: the teachers' specs, as stores hold them.
    """
    if forward is None or backward is None or cka is None:
        return Verdict("unclear", f"the {kind} tokens of {names[0]} or {names[1]} do not vary: nothing to compare")
    few = _too_few(forward.samples, width, num_pictures)
    word, meaning = _meaning(names, cka, forward, backward, few)
    said = f"R² of {kind} tokens is {forward.r2:.2f} to {names[1]}, {backward.r2:.2f} to {names[0]}, CKA {cka:.2f}"
    fight = word != "redundant" and all(is_clip_like(spec) for spec in specs)
    note = "; both are CLIP-like, and the paper found such a pair to fight" if fight else ""
    return Verdict(word, f"{meaning} ({said}){note}")


def _meaning(
    names: tuple[str, str], cka: float, forward: Predicted, backward: Predicted, too_few: str
) -> tuple[str, str]:
    ways = (forward.r2, backward.r2)
    if min(ways) >= PREDICTABLE:
        return "redundant", "each can be read off the other, so that one of them is nearly enough"
    if max(ways) >= PREDICTABLE:
        larger, smaller = names if forward.r2 >= PREDICTABLE else names[::-1]
        return "contained", f"{smaller} can be read off {larger} and adds little to it, {larger} says more"
    if too_few:
        return "unclear", f"{too_few} are too few to tell"
    if cka < UNLIKE and max(ways) < UNPREDICTABLE:
        return (
            "may fight",
            "hardly anything of either can be read off the other: a small student must have room for both",
        )
    return "complementary", "they share a part, and each has one of its own"


def _too_few(samples: int, width: int, num_pictures: int) -> str:
    """Return what there is too little of, in words; empty if there is enough."""
    if num_pictures < PICTURES:
        return f"{num_pictures} pictures"
    return f"{samples} training samples for {width} channels" if samples < SAMPLES_PER_CHANNEL * width else ""


def is_clip_like(spec: Mapping[str, Any]) -> bool:
    """Return whether a teacher was trained to match pictures with texts, judging by its name and model.

    A run's name says nothing, so a run never counts.
    """
    named = f"{spec['name']} {spec['model']}".lower()
    return spec["backend"] != "run" and any(word in named for word in CLIP_LIKE)
