"""`eupe plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

from eupe.cli.console import err, finish, out, show
from eupe.cli.extract import configs_given
from eupe.cli.flags import takes
from eupe.cli.options import Json
from eupe.common.option import about, option
from eupe.errors import ConfigError
from eupe.extract.config import ExtractConfig

if TYPE_CHECKING:
    from eupe.extract.plan import Choice, Estimate, JointEstimate
    from eupe.extract.plan_on_paper import PaperEstimate

PRECISIONS = "bitround:B is fp16 rounded to B bits of mantissa, which compresses better; int8 is one byte per channel"
ON_PAPER = ("teacher", "num_images", "out", "sizes", "views", "tokens", "precision", "grid", "layers")
"""Options that have an effect on a plan on paper."""


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """The flags that are not those of `eupe extract`; where it matters whether one was given, None is the default."""

    teacher: str = field(metadata=about("Same as for extract. May be repeated: several in one pass.", each=True))
    corpus: str | None = option(None, "Measure on some pictures of this corpus, given as for extract.")
    num_images: int | None = option(
        None, "Instead of --corpus: estimate for this many pictures on paper, without weights."
    )
    out: str | None = option(
        None,
        "Where the store will be; its disk must have enough space. One per teacher; on paper, only one.",
        each=True,
    )
    photometric: str | None = option(None, "Same as for extract.", unset="none")
    precision: str = option("fp16", "Same as for extract.")
    dtype: str | None = option(None, "The teacher's dtype.", unset="auto")
    workers: int | None = option(None, "Number of workers like this process that share the work.", unset="1")
    seed: int | None = option(None, "Seed of the random crops and of the order of pictures.", unset="0")


@takes(
    ExtractConfig,
    PlanFlags,
    without=("gpus_per_worker", "ray_address", "retry_failed"),
    after={"num_images": "corpus", "seed": "shuffle"},
)
def plan(as_json: Json = False, **given: Any) -> None:
    """Estimate an extraction's bytes, hours, bandwidth and precisions: measured on a few pictures, or on paper."""
    if (given["corpus"] is None) == (given["num_images"] is None):
        raise ConfigError("give --corpus to measure on its pictures, or --num-images for an estimate on paper")
    if given["num_images"] is None:
        _measure(given, as_json)
    else:
        _reckon(given, as_json)


def _measure(given: Mapping[str, Any], as_json: bool) -> None:
    """Print a plan from measurements on pictures of a corpus."""
    from eupe.common.progress import report_progress
    from eupe.extract.plan import JointEstimate, estimate

    configs = configs_given(given)
    with report_progress(err, "views", quiet=as_json) as progress:
        together = estimate(configs, on_stage=lambda stage: progress.update(stage, 0, 0))
    measured = together if len(configs) > 1 else together.teachers[0]
    if as_json:
        finish(dataclasses.asdict(measured), as_json)
    elif isinstance(measured, JointEstimate):
        _print_plans(measured, given=bool(given["out"]))
    else:
        _print_plan(measured, given=bool(given["out"]))


def _reckon(given: Mapping[str, Any], as_json: bool) -> None:
    """Print a plan on paper.

    Raises: ConfigError for an option that only a measurement has an effect on.
    """
    from eupe.extract.plan_on_paper import PaperConfig, estimate_on_paper

    _require_effect(given)
    places = given["out"] or []
    if len(places) > 1:
        raise ConfigError("with --num-images, --out says where all the stores will be; give it once")
    configs = configs_given({**given, "out": None})
    config = configs[0]
    on_paper = estimate_on_paper(
        PaperConfig(
            teachers=tuple(given["teacher"]),
            num_images=given["num_images"],
            sizes=config.sizes,
            views=config.views,
            tokens=config.tokens,
            precision=config.precision,
            grid=config.grid,
            layers=tuple(each.layers for each in configs),
            out=places[0] if places else None,
        )
    )
    if as_json:
        finish(dataclasses.asdict(on_paper), as_json)
    else:
        _print_paper(on_paper)


def _require_effect(given: Mapping[str, Any]) -> None:
    """Raise ConfigError if an option was given that has no effect on paper."""
    # by identity: 0 is a seed that was given
    idle = [name for name, value in given.items() if name not in ON_PAPER and value is not None and value is not False]
    if idle:
        raise ConfigError(
            f"--{idle[0].replace('_', '-')} has no effect with --num-images; leave it out, or give --corpus instead of "
            "--num-images"
        )


def _print_plan(plan: Estimate, *, given: bool) -> None:
    """Print what was measured of one teacher.

    Args:
        given: whether --out named the store's path.
    """
    from eupe.common.progress import amount

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
    from eupe.common.progress import amount, duration

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
    from eupe.common.progress import amount

    free = "not known (not a local disk)" if plan.free_bytes is None else amount(plan.free_bytes)
    return {f"free at {plan.out}{'' if given else ', where the store will be without --out'}": free}


def _times_of(plan: Estimate | JointEstimate) -> dict[str, str]:
    from eupe.common.progress import amount, duration
    from eupe.extract.plan import STUDENT_IMAGES_PER_S

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
    from eupe.common.progress import amount

    cosines = (f"{choice.cosine_p5:.6f}", f"{choice.cosine_mean:.6f}")
    return (choice.path, choice.precision, f"{choice.share:.3f}", amount(choice.total_bytes), *cosines)


def _print_paper(plan: PaperEstimate) -> None:
    from eupe.common.progress import amount

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
