"""`eupe plan`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from eupe.cli.console import err, finish, out, show
from eupe.cli.extract import _of_each
from eupe.cli.options import (
    PRECISIONS,
    Exclude,
    FidelityWanted,
    Grid,
    ImageColumn,
    ImageKey,
    Include,
    Json,
    KeyOfEach,
    LabelColumn,
    Limit,
    Pixels,
    Ratio,
    Scale,
    Shuffle,
    Sizes,
    TokenKinds,
    Views,
    WeightsOfEach,
)
from eupe.errors import ConfigError

if TYPE_CHECKING:
    from eupe.extract.plan import Choice, Estimate, JointEstimate
    from eupe.extract.plan_on_paper import PaperEstimate


def plan(
    teacher: Annotated[list[str], typer.Option(help="Same as for extract. May be repeated: several in one pass.")],
    corpus: Annotated[
        str | None, typer.Option(help="Measure on some pictures of this corpus, given as for extract.")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(help="Instead of --corpus: estimate for this many pictures on paper, without weights.")
    ] = None,
    out_path: Annotated[
        list[str] | None,
        typer.Option(
            "--out",
            help="Where the store will be; its disk must have enough space. One per teacher; on paper, only one.",
        ),
    ] = None,
    weights: WeightsOfEach = None,
    weights_key: KeyOfEach = None,
    size: Sizes = None,
    views: Views = "center",
    scale: Scale = None,
    ratio: Ratio = None,
    photometric: Annotated[str | None, typer.Option(help="Same as for extract. Default: none.")] = None,
    tokens: TokenKinds = "summary,dense",
    precision: Annotated[str, typer.Option(help="Same as for extract.")] = "fp16",
    fidelity: FidelityWanted = None,
    grid: Grid = None,
    pixels: Pixels = False,
    dtype: Annotated[str | None, typer.Option(help="The teacher's dtype. Default: auto.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Views per forward pass. Default: the fastest, found by trial.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of workers like this process that share the work. Default: 1.")
    ] = None,
    limit: Limit = None,
    include: Include = None,
    exclude: Exclude = None,
    image_key: ImageKey = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    shuffle: Shuffle = False,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the random crops and of the order of pictures. Default: 0.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate an extraction's bytes, hours, bandwidth and precisions: measured on a few pictures, or on paper."""
    from eupe.corpus.choice import Choice
    from eupe.corpus.views import parse_views
    from eupe.extract.config import ExtractConfig
    from eupe.extract.plan import JointEstimate, estimate
    from eupe.extract.plan_on_paper import PaperConfig, estimate_on_paper
    from eupe.progress import report_progress

    if (corpus is None) == (num_images is None):
        raise ConfigError("give --corpus to measure on its pictures, or --num-images for an estimate on paper")
    only_measured = {
        "--photometric": photometric,
        "--weights": weights,
        "--weights-key": weights_key,
        "--scale": scale,
        "--ratio": ratio,
        "--fidelity": fidelity,
        "--pixels": pixels or None,
        "--dtype": dtype,
        "--batch-size": batch_size,
        "--workers": workers,
        "--limit": limit,
        "--include": include,
        "--exclude": exclude,
        "--image-key": image_key,
        "--image-column": image_column,
        "--label-column": label_column,
        "--shuffle": shuffle or None,
        "--seed": seed,
    }
    if num_images is not None and (idle := [name for name, value in only_measured.items() if value is not None]):
        raise ConfigError(
            f"{idle[0]} has no effect with --num-images; leave it out, or give --corpus instead of --num-images"
        )
    wanted: dict[str, Any] = {
        "sizes": tuple(sorted(set(size or []))),
        "views": parse_views(views, seed=seed or 0, scale=scale, ratio=ratio, photometric=photometric or "none"),
        "tokens": tuple(tokens.split(",")),
        "precision": precision,
        "grid": grid,
    }
    if num_images is not None:
        if len(out_path or ()) > 1:
            raise ConfigError("with --num-images, --out says where all the stores will be; give it once")
        place = out_path[0] if out_path else None
        on_paper = estimate_on_paper(PaperConfig(teachers=tuple(teacher), num_images=num_images, out=place, **wanted))
        if as_json:
            finish(dataclasses.asdict(on_paper), as_json)
        else:
            _print_paper(on_paper)
        return
    shared = ExtractConfig(
        teacher="",
        corpus=corpus or "",
        fidelity=fidelity,
        pixels=pixels,
        limit=limit,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        choice=Choice(image_key, image_column, label_column),
        shuffle=shuffle,
        dtype=dtype or "auto",
        workers=workers,
        batch_size=batch_size,
        **wanted,
    )
    configs = _of_each(shared, teacher, out_path, weights, weights_key)
    with report_progress(err, "views", quiet=as_json) as progress:
        together = estimate(configs, on_stage=lambda stage: progress.update(stage, 0, 0))
    measured = together if len(teacher) > 1 else together.teachers[0]
    if as_json:
        finish(dataclasses.asdict(measured), as_json)
    elif isinstance(measured, JointEstimate):
        _print_plans(measured, given=bool(out_path))
    else:
        _print_plan(measured, given=bool(out_path))


def _print_plan(plan: Estimate, *, given: bool) -> None:
    """Print what was measured of one teacher.

    Args:
        given: whether --out named the store's path.
    """
    from eupe.progress import amount

    precision = ", ".join(f"{kind} {word}" for kind, word in plan.precision.items())
    facts = {
        "measured": f"{plan.teacher} on {plan.sampled_views} views, {plan.dtype} on {plan.device}, this machine alone",
        "work": f"{plan.num_images:,} pictures, {plan.num_views:,} views",
        "mean and std are those of": plan.normalised_by,
        "bytes per view": f"{amount(plan.bytes_per_view)} ({precision}; raw fp16 {amount(plan.raw_bytes_per_view)})",
        "bytes in all": f"{amount(plan.need.stored)}, and at most {amount(plan.need.peak)} while it runs",
        **_room_of(plan, given=given),
        **({"already stored": amount(plan.held_bytes)} if plan.held_bytes else {}),
        **_times_of(plan),
    }
    table = Table("array", "precision", "share of fp16", "in all", "cosine p5", "mean", box=None)
    for c in plan.choices:
        table.add_row(*_choice_words(c))
    finish(facts, False)
    show(table)
    out.print(PRECISIONS)


def _print_plans(plan: JointEstimate, *, given: bool) -> None:
    """Print what was measured of several teachers in one pass.

    Args:
        given: whether --out named the stores' paths.
    """
    from eupe.progress import amount, duration

    first = plan.teachers[0]
    facts = {
        "measured": f"{len(plan.teachers)} teachers, {first.dtype} on {first.device}, this machine alone; in one pass, "
        "each picture decoded once",
        "work": f"{plan.num_images:,} pictures, {plan.num_views:,} views of each teacher",
        "bytes per view": f"{amount(plan.bytes_per_view)} of all teachers",
        "bytes in all": f"{amount(plan.need.stored)}, and at most {amount(plan.need.peak)} while it runs",
    }
    for t in plan.teachers:
        facts |= _room_of(t, given=given)
    facts |= {"already stored": amount(plan.held_bytes)} if plan.held_bytes else {}
    finish(facts | _times_of(plan), False)
    each = Table("teacher", "views measured", "bytes per view", "in all", "forward/s", "time alone", box=None)
    choices = Table("teacher", "array", "precision", "share of fp16", "in all", "cosine p5", "mean", box=None)
    for t in plan.teachers:
        sizes = (amount(t.bytes_per_view), amount(t.need.stored))
        each.add_row(t.teacher, str(t.sampled_views), *sizes, f"{t.rates.forward:.4g}", duration(3600 * t.hours))
        for c in t.choices:
            choices.add_row(t.teacher, *_choice_words(c))
    show(each)
    for t in plan.teachers:
        out.print(f"mean and std of {t.teacher} are those of {t.normalised_by}", markup=False, soft_wrap=True)
    show(choices)
    out.print(PRECISIONS)


def _room_of(plan: Estimate, *, given: bool) -> dict[str, str]:
    from eupe.progress import amount

    free = "not known (not a local disk)" if plan.free_bytes is None else amount(plan.free_bytes)
    return {f"free at {plan.out}{'' if given else ', where the store will be without --out'}": free}


def _times_of(plan: Estimate | JointEstimate) -> dict[str, str]:
    from eupe.extract.plan import STUDENT_IMAGES_PER_S
    from eupe.progress import amount, duration

    r = plan.rates
    even = "never: reading is not faster" if plan.break_even_epochs is None else f"{plan.break_even_epochs:.2f} epochs"
    return {
        "views/s, each alone": f"decode {r.decode:.4g}, forward {r.forward:.4g}, encode {r.encode:.4g}, "
        f"read {r.read:.4g}",
        "views/s of a worker": f"{plan.views_per_s:.4g}",
        f"time, {plan.workers} worker{'s' * (plan.workers > 1)} like this": duration(3600 * plan.hours),
        f"student of {STUDENT_IMAGES_PER_S} images/s reads": f"{amount(plan.read_bytes_per_s)}/s",
        "targets of one epoch": f"{duration(3600 * plan.epoch_hours_cached)} from the cache, "
        f"{duration(3600 * plan.epoch_hours_online)} from the teacher",
        "the cache pays off after": even,
    }


def _choice_words(choice: Choice) -> tuple[str, ...]:
    from eupe.progress import amount

    cosines = (f"{choice.cosine_p5:.6f}", f"{choice.cosine_mean:.6f}")
    return (choice.path, choice.precision, f"{choice.share:.3f}", amount(choice.total_bytes), *cosines)


def _print_paper(plan: PaperEstimate) -> None:
    from eupe.progress import amount

    facts = {
        "on paper": "nothing was measured; bytes are those of raw fp16 times nominal shares",
        "work": f"{plan.num_images:,} pictures, {plan.num_views:,} views of each teacher",
        f"bytes in all, {plan.precision}": f"{amount(plan.need.stored)}, and at most {amount(plan.need.peak)} while it "
        "runs",
    }
    if plan.free_bytes is not None:
        facts["free"] = amount(plan.free_bytes)
    finish(facts, False)
    table = Table("on paper", "size", "grid", "precision", "share of fp16", "per view", "in all", box=None)
    for t in plan.teachers:
        sizes, grids = ("+".join(map(str, numbers)) for numbers in (t.sizes, t.grids))
        for precision, total in t.choices.items():
            share = plan.nominal_shares[precision]
            amounts = (amount(total / plan.num_views), amount(total))
            table.add_row(t.teacher, sizes, grids, precision, f"{share:g}", *amounts)
    show(table)
    out.print(PRECISIONS)
