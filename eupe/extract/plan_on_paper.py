"""Cost of an extraction on paper: bytes from the teachers' specs and nominal compression ratios, nothing measured."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from eupe.common.storage import AnyPath, StoragePath
from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError
from eupe.extract.parts import paper_spec, require_common_sizes
from eupe.store.layout import KINDS, StoreSpec, kind_of, samples_per_part
from eupe.store.precision import FP16, INT8
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec

NOMINAL_SHARES = {FP16: 0.82, "bitround:7": 0.63, "bitround:5": 0.51, "bitround:3": 0.385, INT8: 0.43}
"""Compressed bytes over raw fp16, measured on dense tokens of DINOv2-S (benchmarks/results); other teachers differ."""


@dataclass(frozen=True)
class Need:
    """Size in bytes of one store, or of several."""

    stored: int
    """Size of the finished store."""
    peak: int
    """Largest size while it is made: it also holds the parts' moments until they are merged."""


@dataclass(frozen=True, kw_only=True)
class PaperConfig:
    """The options of a plan on paper, as on the command line."""

    teachers: tuple[str, ...]
    num_images: int
    sizes: tuple[int, ...] = ()
    views: ViewSpec = field(default_factory=ViewSpec)
    tokens: tuple[str, ...] = KINDS
    precision: str = FP16
    grid: int | None = None
    layers: tuple[tuple[int, ...], ...] = ()
    """Layers of each teacher; empty if none of them stores any."""
    out: AnyPath | None = None
    """Folder for all the stores; None to skip the check for free space."""


@dataclass(frozen=True)
class PaperTeacher:
    """One teacher of a plan on paper."""

    teacher: str
    sizes: tuple[int, ...]
    grids: tuple[int, ...]
    raw_bytes_per_view: int
    raw_bytes: int
    need: Need
    """Size at the requested precision."""
    choices: dict[str, int]
    """Precision, the same for all kinds of token, to total bytes."""


@dataclass(frozen=True)
class PaperEstimate:
    """A plan on paper: nothing in it was measured."""

    num_images: int
    num_views: int
    precision: str
    teachers: tuple[PaperTeacher, ...]
    need: Need
    """Size of all stores together."""
    free_bytes: int | None
    nominal_shares: dict[str, float] = field(default_factory=lambda: dict(NOMINAL_SHARES))
    on_paper: bool = True


def estimate_on_paper(config: PaperConfig) -> PaperEstimate:
    """Estimate the bytes from the teachers' specs alone.

    Raises: TeacherError; ConfigError for an option that cannot work, or if the stores do not fit at `out`.
    """
    if config.num_images < 1:
        raise ConfigError(f"--num-images must be at least 1, got {config.num_images}")
    teachers = [resolve_teacher(name) for name in config.teachers]
    require_common_sizes(teachers, config.sizes)
    layers = config.layers or [()] * len(teachers)
    plans = tuple(_paper_teacher(config, *each) for each in zip(teachers, layers, strict=True))
    need = Need(sum(plan.need.stored for plan in plans), sum(plan.need.peak for plan in plans))
    free = None if config.out is None else free_bytes(StoragePath.of(config.out))
    require_room(need, free, str(config.out))
    num_views = config.num_images * config.views.num_views
    return PaperEstimate(config.num_images, num_views, config.precision, plans, need, free)


def stored_bytes_per_view(spec: StoreSpec, precision: Mapping[str, str]) -> tuple[int, float]:
    """Return the bytes of one view at all sizes, on paper: as raw fp16, and as stored with nominal shares.

    Args:
        spec: of the store; its corpus is not used.
        precision: kind of token to precision, which may be others than the spec's.
    Raises: ConfigError for a precision without a nominal share.
    """
    if unknown := set(precision.values()) - set(NOMINAL_SHARES):
        raise ConfigError(
            f"--precision {sorted(unknown)[0]} has no nominal share for a plan on paper; give one of "
            f"{', '.join(NOMINAL_SHARES)}, or --corpus to measure it"
        )
    as_if = replace(spec, precision=precision)
    raw = {path: 2 * math.prod(spec.shape(path)) for path in spec.feature_paths}
    return sum(raw.values()), sum(num * NOMINAL_SHARES[as_if.precision_of(path)] for path, num in raw.items())


def _paper_teacher(config: PaperConfig, teacher: TeacherSpec, layers: Sequence[int]) -> PaperTeacher:
    spec = paper_spec(
        teacher,
        views=config.views,
        sizes=config.sizes,
        tokens=config.tokens,
        precision=config.precision,
        grid=config.grid,
        layers=layers,
    )
    per_view, stored = stored_bytes_per_view(spec, spec.precision)
    num_views = config.num_images * config.views.num_views
    per_part = samples_per_part(config.num_images, config.views.num_views * per_view)
    return PaperTeacher(
        teacher=teacher.name,
        sizes=spec.sizes,
        grids=spec.grids,
        raw_bytes_per_view=per_view,
        raw_bytes=num_views * per_view,
        need=need_of(
            num_views * stored,
            num_samples=config.num_images,
            per_part=per_part,
            dims=[spec.dim(kind_of(path)) for path in spec.feature_paths],
        ),
        choices={p: round(num_views * per_view * share) for p, share in NOMINAL_SHARES.items()},
    )


def free_bytes(place: StoragePath) -> int | None:
    """Return the free bytes on the disk of a place; None for an object store."""
    if not place.is_local:
        return None
    return shutil.disk_usage(nearest_folder(place)).free


def nearest_folder(place: StoragePath) -> Path:
    """Return a local place if it exists, otherwise the nearest folder above it that does."""
    return next(path for path in (place.local, *place.local.parents) if path.exists())


def need_of(stored: float, *, num_samples: int, per_part: int, dims: list[int]) -> Need:
    """Return the stored bytes together with the peak while the store is made.

    Args:
        dims: number of channels of each feature array.
    """
    return Need(round(stored), round(stored) + -(-num_samples // per_part) * moments_bytes(dims))


def moments_bytes(dims: list[int]) -> int:
    """Return the bytes of one part's moments: count, mean and half a scatter matrix, in float64, for each array."""
    return sum(8 * (1 + dim + dim * (dim + 1) // 2) for dim in dims)


def require_room(need: Need, free: int | None, where: str, *, held: int = 0) -> None:
    """Raise ConfigError if a local disk cannot hold what is still to be made.

    Args:
        held: bytes of `need` that are on the disk already.
    """
    if free is not None and need.peak - held > free:
        there = f", of which {held / 1e9:,.4g} GB are already there" if held else ""
        raise ConfigError(
            f"--out {where} has {free / 1e9:,.4g} GB free, and the features take {need.peak / 1e9:,.4g} GB while they "
            f"are made ({need.stored / 1e9:,.4g} GB when finished{there}); give another --out, a cheaper --precision, "
            "a smaller --grid, or fewer --views"
        )
