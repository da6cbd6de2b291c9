"""Which maps of a student learn from which layers of its teachers: parsed, matched, and their heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eupe.common.kinds import LayerShape
from eupe.errors import ConfigError
from eupe.store import Store
from eupe.store.layout import DENSE, feature_path, layer_kind

NONE, LAST = "none", "last"
LAYERS = "layers"
"""Key of the pairs in a run's config and in its targets, and the kind of their loss for `--weight`."""


@dataclass(frozen=True)
class Pair:
    """A map of the student that learns from a map of a teacher."""

    layer: str
    """Number of the teacher's layer; `last` for its last map."""
    student: int
    """Number of the student's layer, from 1."""
    dim: int
    """Channels of the teacher's map."""
    width: int
    """Channels of the student's map."""

    @property
    def kind(self) -> str:
        """Return the kind of token that the teacher's map is in its store."""
        return DENSE if self.layer == LAST else layer_kind(self.layer)

    @property
    def name(self) -> str:
        """Return the pair as `--layers` takes it, with the name of its loss: `6=3`."""
        return f"{self.layer}={self.student}"


def pairs_of(target: Mapping[str, Any]) -> list[Pair]:
    """Return the pairs of a target of a run's spec."""
    return [Pair(**pair) for pair in target.get(LAYERS, ())]


def chosen_pairs(
    words: Sequence[str],
    stores: Sequence[Store],
    names: Sequence[str],
    sizes: Sequence[int],
    *,
    student: str,
    size: int,
    shapes: Callable[[], Sequence[LayerShape]],
) -> list[list[dict[str, Any]]]:
    """Return, per target, the pairs that `--layers` asks for; without it, all layers that its store has, matched.

    Args:
        words: each a list with commas of `LAYER`, `LAYER=STUDENT_LAYER`, or one of these behind `TARGET/`; or `none`.
        names: the targets' names.
        sizes: per target, the size in pixels of the features by which maps are matched.
        student, size: the student's name and the side of its input in pixels.
        shapes: returns the shapes of the student's layers, first to last; called only if there are pairs.
    Raises: ConfigError if a word is malformed, or names a target, a layer of it or a layer of the student that is not
        there.
    """
    asked: list[list[tuple[str, int | None]]] = [[(layer, None) for layer in store.spec.layers] for store in stores]
    if words:
        asked = [[] for _ in stores]
    for word in (one for several in words if several != NONE for one in several.split(",")):
        name, _, pair = word.rpartition("/")
        layer, _, at = pair.partition("=")
        if (layer != LAST and not layer.isdigit()) or (at and not at.isdigit()) or pair.endswith("="):
            raise ConfigError(
                f"--layers takes LAYER or LAYER=STUDENT_LAYER, perhaps behind TARGET/, as 6,9=3 or {names[0]}/last=4; "
                f"got {word!r}"
            )
        places = [i for i, known in enumerate(names) if name in ("", known)]
        having = [i for i in places if _has(stores[i], layer)]
        if not having or (name and having != places):
            raise ConfigError(f"--layers {word!r}: {_whats_there(stores, names)}; give one of these")
        for i in having:
            asked[i].append((layer, int(at) if at else None))
    if not any(asked):
        return [[] for _ in stores]
    known = list(shapes())
    return [
        _paired(store, wanted, target_size, known, student=student, size=size)
        for store, wanted, target_size in zip(stores, asked, sizes, strict=True)
    ]


def _paired(
    store: Store,
    wanted: Sequence[tuple[str, int | None]],
    target_size: int,
    shapes: Sequence[LayerShape],
    *,
    student: str,
    size: int,
) -> list[dict[str, Any]]:
    found = []
    for layer, at in wanted:
        kind = DENSE if layer == LAST else layer_kind(layer)
        grid, _, dim = store.spec.shape(feature_path(target_size, kind))
        number = matched(layer, grid, store, shapes, size) if at is None else at
        if not 1 <= number <= len(shapes):
            strides = ", ".join(f"{i} of stride {shape.patch}" for i, shape in enumerate(shapes, 1))
            raise ConfigError(f"--layers {layer}={at}: {student} has layers {strides}; give one of these")
        pair = asdict(Pair(layer, number, dim, shapes[number - 1].dim))
        if pair in found:
            raise ConfigError(f"--layers names {layer}={number} twice; name it once")
        found.append(pair)
    return found


def matched(layer: str, grid: int, store: Store, shapes: Sequence[LayerShape], size: int) -> int:
    """Return the number of the student's layer whose cells are nearest in size to those of a teacher's map.

    Of several such layers, as the blocks of a ViT are, it is the one at the same share of the depth.

    Args:
        grid: cells along one side of the teacher's map.
        size: side of the student's input in pixels.
    """
    distances = [abs(math.log2(size / shape.patch / grid)) for shape in shapes]
    nearest = [i for i, distance in enumerate(distances, 1) if distance < min(distances) + 1e-6]
    number, of = (1, 1) if layer == LAST else (int(layer), store.spec.layers[layer]["of"])
    return min(nearest, key=lambda i: abs(i * of - number * len(shapes)))  # in whole numbers, so that ties are ties


def require_same_layers(stores: Sequence[Store], first: Sequence[Store], targets: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError unless mixed-in stores have the layers that are learned from, with equal maps."""
    for store, other, target in zip(stores, first, targets, strict=True):
        for pair in pairs_of(target):
            if pair.layer != LAST and store.spec.layers.get(pair.layer) != other.spec.layers[pair.layer]:
                raise ConfigError(
                    f"--mix: {store.path} does not hold layer {pair.layer} as {other.path} does; extract it with the "
                    "same --layers, or leave the layer out with --layers"
                )


def _has(store: Store, layer: str) -> bool:
    return DENSE in store.spec.tokens if layer == LAST else layer in store.spec.layers


def _whats_there(stores: Sequence[Store], names: Sequence[str]) -> str:
    each = []
    for store, name in zip(stores, names, strict=True):
        there = [*store.spec.layers, *([LAST] if DENSE in store.spec.tokens else [])]
        each.append(f"{name} has {', '.join(there) or 'none'}")
    return "; ".join(each)
