"""Parts and work units of a job: pure functions of the teacher, the corpus and the parts already committed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from eupe.common.kinds import LayerShape
from eupe.corpus.index import Corpus
from eupe.corpus.pictures import insides
from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError, TeacherError
from eupe.extract.load import PartTask, Sample, WorkUnit
from eupe.store.layout import DENSE, KINDS, SUMMARY, StoreSpec, samples_per_part
from eupe.store.precision import parse_precision, require_convertible
from eupe.store.writer import installed_versions
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import teacher_layers


def store_spec(
    teacher: TeacherSpec,
    corpus: Corpus,
    *,
    views: ViewSpec,
    sizes: tuple[int, ...],
    tokens: tuple[str, ...],
    weights_sha256: str,
    dtype: str,
    precision: str = "fp16",
    grid: int | None = None,
    pixels: bool = False,
    layers: Sequence[int] = (),
    weights: Path | None = None,
) -> StoreSpec:
    """Return the spec of a store of this teacher over this corpus.

    Args:
        sizes: sides in pixels; empty for the teacher's native size.
        tokens: kinds of token; summary is dropped for a teacher without one.
        precision: as `--precision` takes it.
        pixels: keep the views themselves as well.
        grid: cells along one side to which dense maps are pooled; None for the teacher's own grid.
        layers, weights: earlier layers whose maps are stored as well; see `layers_of`.
    Raises: TeacherError for a size that the patch does not divide; ConfigError if nothing is left to store, or for a
        grid to which a map cannot be pooled.
    """
    on_paper = paper_spec(
        teacher,
        views=views,
        sizes=sizes,
        tokens=tokens,
        precision=precision,
        grid=grid,
        layers=layers,
        weights=weights,
        pixels=pixels,
    )
    spec = replace(
        on_paper,
        teacher={
            **on_paper.teacher,
            "architecture": teacher.architecture,
            "weights_sha256": weights_sha256,
            "dtype": dtype,
        },
        corpus={"fingerprint": corpus.fingerprint, "segments": [len(corpus)], "root": str(corpus.root)},
        versions=installed_versions(),
    )
    return replace(spec, samples_per_part=samples_per_part(len(corpus), spec.bytes_per_sample))


def paper_spec(
    teacher: TeacherSpec,
    *,
    views: ViewSpec,
    sizes: tuple[int, ...],
    tokens: tuple[str, ...],
    precision: str,
    grid: int | None,
    layers: Sequence[int],
    weights: Path | None = None,
    shapes: Sequence[LayerShape] = (),
    pixels: bool = False,
) -> StoreSpec:
    """Return the spec of a store without its corpus; the arguments are those of `store_spec`.

    Args:
        layers, weights, shapes: see `layers_of`.
    Raises: as `shape_of`, `parse_precision`, `layers_of`.
    """
    sizes, grids, kept = shape_of(teacher, sizes=sizes, tokens=tokens, grid=grid)
    return StoreSpec(
        teacher=teacher.to_json(),
        corpus={},
        views=views.to_json(),
        sizes=sizes,
        grids=grids,
        tokens=kept,
        samples_per_part=1,
        precision=parse_precision(precision, kept),
        pixels=pixels,
        layers=layers_of(teacher, layers, sizes=sizes, tokens=kept, grid=grid, weights=weights, shapes=shapes),
    )


def converted_spec(before: StoreSpec, precision: str, grid: int | None, *, where: str) -> StoreSpec:
    """Return the spec of a conversion of a store, before its precision is measured.

    Args:
        precision, grid: as `store_spec`.
        where: the store to convert, for error messages.
    Raises: ConfigError if that store has less than what is requested, or has exactly that already.
    """
    wanted = parse_precision(precision, before.tokens)
    require_convertible(before.precision, wanted, where=where)
    if grid is not None and DENSE not in before.tokens:
        raise ConfigError(f"--grid {grid} pools dense maps, of which {where} has none; leave it out")
    sides = zip(before.sizes, before.grids, strict=True)
    grids = tuple(_pooled_grid(own, grid, of=f"{where} at {size} px") for size, own in sides)
    layers = {
        number: {
            **layer,
            "grids": [
                _pooled_grid(own, grid, of=f"layer {number} of {where} at {size} px")
                for size, own in zip(before.sizes, layer["grids"], strict=True)
            ],
        }
        for number, layer in before.layers.items()
    }
    if (wanted, grids, layers) == (before.precision, before.grids, before.layers):
        raise ConfigError(
            f"{where} has this precision and grid already ({precision}, {'+'.join(map(str, grids))}); give another "
            "--precision or --grid"
        )
    return replace(before, precision=wanted, grids=grids, layers=layers, calibration={}, fidelity={})


def layers_of(
    teacher: TeacherSpec,
    numbers: Sequence[int],
    *,
    sizes: tuple[int, ...],
    tokens: Sequence[str],
    grid: int | None,
    weights: Path | None = None,
    shapes: Sequence[LayerShape] = (),
) -> dict[str, dict[str, Any]]:
    """Return the layers to store beside the last map, as `StoreSpec.layers`; the last layer is that map itself.

    Args:
        numbers: of the layers, from 1.
        sizes, tokens, grid: as `store_spec`.
        weights: local weights of the teacher.
        shapes: of all of the teacher's layers, if they are known.
    Raises: TeacherError for a teacher that gives no layers, or lacks one; ConfigError if the last map is not stored,
        for a grid to which a map cannot be pooled, or a size that a layer's cells do not tile.
    """
    if not numbers:
        return {}
    if DENSE not in tokens:
        raise ConfigError("--layers stores dense maps beside the last one; give --tokens summary,dense or dense")
    shapes = shapes or teacher_layers(teacher, weights=weights)
    if lacking := sorted(set(numbers) - set(range(1, len(shapes) + 1))):
        raise TeacherError(
            f"teacher {teacher.name} has layers 1 to {len(shapes)}, not {', '.join(map(str, lacking))}; give others "
            "with --layers"
        )
    layers = {}
    for number in sorted({*numbers} - {len(shapes)}):
        shape, grids = shapes[number - 1], []
        for size in sizes or (teacher.native_size,):
            of = f"layer {number} of {teacher.name} at {size} px"
            if size % shape.patch:
                raise ConfigError(f"{of} has cells of {shape.patch} px, which do not tile it; give another --size")
            grids.append(_pooled_grid(size // shape.patch, grid, of=of))
        # a list, as JSON gives it back: `differences` compares the two
        layers[str(number)] = {"of": len(shapes), "dim": shape.dim, "grids": grids}
    return layers


def shape_of(
    teacher: TeacherSpec, *, sizes: tuple[int, ...], tokens: tuple[str, ...], grid: int | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]:
    """Return the sizes, the grids stored at them, and the kinds of token; the arguments are those of `store_spec`.

    Raises: as `store_spec`; ConfigError for an unknown kind of token.
    """
    sizes = sizes or (teacher.native_size,)
    grids = tuple(_pooled_grid(teacher.grid(size), grid, of=f"{teacher.name} at {size} px") for size in sizes)
    if not tokens or set(tokens) - set(KINDS):
        raise ConfigError(f"--tokens takes summary, dense, or both; got {','.join(tokens) or 'nothing'}")
    kept = tuple(k for k in KINDS if k in tokens and not (k == SUMMARY and teacher.summary == "none"))
    if not kept:
        raise ConfigError(f"teacher {teacher.name} has no summary; give --tokens dense")
    return sizes, grids, kept


def require_common_sizes(teachers: Sequence[TeacherSpec], sizes: Sequence[int]) -> None:
    """Raise ConfigError for a common size that not all of the teachers can take."""
    patches = {teacher.name: teacher.patch for teacher in teachers}
    common = math.lcm(*patches.values())
    for size in sizes:
        if len(set(patches.values())) > 1 and any(size % patch for patch in patches.values()):
            below = size // common * common
            good = " or ".join(f"--size {s}" for s in (below, below + common) if s)
            raise ConfigError(
                f"--size {size} does not work for all of these teachers, which take multiples of "
                f"{', '.join(f'{patch} px ({name})' for name, patch in patches.items())}; give {good}, or extract them "
                "separately, each at its own size"
            )


def _pooled_grid(own: int, grid: int | None, *, of: str) -> int:
    """Return the number of cells along one side of the stored map.

    Args:
        own: the same of the map before it is pooled.
        grid: the requested number; None to leave the map as it is.
        of: whose map it is, for the error message.
    Raises: ConfigError if the grid does not divide the map.
    """
    if grid is None:
        return own
    if grid < 1 or own % grid:
        raise ConfigError(
            f"--grid {grid} does not divide the {own}x{own} map of {of}; give one of "
            f"{', '.join(str(g) for g in range(1, own + 1) if own % g == 0)}"
        )
    return grid


def plan_parts(spec: StoreSpec, samples: pa.Table, done: Iterable[int]) -> list[PartTask]:
    """Return the parts still to be made, in order.

    Args:
        samples: the store's index, with its segments one after the other.
        done: parts whose commit file exists.
    """
    finished = set(done)
    return [part_task(spec, samples, part) for part in range(spec.num_parts) if part not in finished]


def part_task(spec: StoreSpec, samples: pa.Table, part: int) -> PartTask:
    """Return the task of one part of a store; the arguments are those of `plan_parts`."""
    rows = spec.part_samples(part)
    return PartTask(part, tuple(samples_of(samples.slice(rows.start, rows.stop - rows.start))), rows.start)


def plan_work_units(specs: Sequence[StoreSpec], samples: pa.Table, done: Sequence[Iterable[int]]) -> Iterator[WorkUnit]:
    """Yield the missing parts of several stores of the same samples, in order; parts that share samples go together.

    If stores were extended at different times, their parts overlap like shingles. A work unit then ends once it is as
    long as the largest part, and a few samples are in two work units.

    Args:
        samples: the index of all samples.
        done: for each store, the parts whose commit file exists.
    """
    missing = [
        (spec.part_samples(part), store, part)
        for store, (spec, finished) in enumerate(zip(specs, map(set, done), strict=True))
        for part in range(spec.num_parts)
        if part not in finished
    ]
    missing.sort(key=lambda item: (item[0].start, item[1]))
    longest = max(spec.samples_per_part for spec in specs)
    group: list[tuple[int, int]] = []
    start = end = 0
    for rows, store, part in missing:
        # `end`: no overlap; `start + longest`: overlaps must not chain all parts into one work unit
        if group and rows.start >= min(end, start + longest):
            yield _work_unit(specs, samples, group)
            group = []
        if not group:
            start = rows.start
        group.append((store, part))
        end = max(end, rows.stop)
    if group:
        yield _work_unit(specs, samples, group)


def _work_unit(specs: Sequence[StoreSpec], samples: pa.Table, parts: Sequence[tuple[int, int]]) -> WorkUnit:
    return WorkUnit(tuple((store, part_task(specs[store], samples, part)) for store, part in parts))


def samples_of(rows: pa.Table) -> list[Sample]:
    """Return the samples in rows of an index."""
    columns = (rows[name].to_pylist() for name in ("key", "sha256", "label"))
    return [Sample(*fields) for fields in zip(*columns, insides(rows), strict=True)]
