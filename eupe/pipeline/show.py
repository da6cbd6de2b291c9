"""The printed output of a pipeline: the dry run, and the results of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eupe.common.printing import print_table
from eupe.common.progress import amount
from eupe.evaluate.licences import Origin
from eupe.pipeline.costs import Cost, StoreCost, TrainCost
from eupe.pipeline.execute import Result
from eupe.pipeline.planned_steps import PlannedStep
from eupe.pipeline.prepare import Prepared
from eupe.teachers.spec import is_permissive
from eupe.train.advice import MOST_PASSES, passes_note

HEADLINES: Mapping[str, Sequence[str]] = {
    "extract": ("num_views", "stored_bytes", "num_failed"),
    "store convert": ("num_views", "stored_bytes"),
    "train": ("steps", "normalised"),
    "finetune": ("mean",),
    "eval report": (),
    "export": ("least", "num_bytes"),
}
"""Fields of reports that are shown, at any depth, by verb; other verbs show the first float of each part."""
UNSAID = ("kinds", "validation", "outputs")
"""Keys of reports whose names are left out of the printed text."""


def show_plan(prepared: Prepared, console: Console) -> None:
    """Print the state, cost and command of each step."""
    if prepared.recipe.about:
        console.print(prepared.recipe.about, soft_wrap=True, markup=False)
    table = Table("step", "state", "estimate", box=None)
    for one, cost in zip(prepared.steps, prepared.costs, strict=True):
        table.add_row(escape(one.step.name), one.state, cost_words(cost))
    print_table(console, table)
    for one in prepared.steps:
        console.print("\n" + step_words(one, prompt=""), soft_wrap=True, markup=False)
    console.print()
    stored = [cost.num_bytes for cost in prepared.costs if isinstance(cost, StoreCost)]
    if stored:
        known = sum(number for number in stored if number is not None)
        unknown = f" and {stored.count(None)} of unknown size" if None in stored else ""
        console.print(f"all stores: {amount(known)}{unknown}, estimated: nothing was measured", soft_wrap=True)
    if prepared.origins:
        console.print(licence_words(prepared.origins), soft_wrap=True, markup=False)
    for one, cost in zip(prepared.steps, prepared.costs, strict=True):
        if isinstance(cost, TrainCost) and cost.passes is not None and cost.passes > MOST_PASSES:
            note = passes_note(f"{one.step.name}: each stored view", cost.passes)
            console.print(note, soft_wrap=True, markup=False)
    missing: dict[str, list[str]] = {}
    for one in prepared.steps:
        for words in one.missing:
            missing.setdefault(words, []).append(one.step.name)
    for words, steps in missing.items():
        console.print(f"missing, but needed by {', '.join(steps)}: {words}", soft_wrap=True, markup=False)


def licence_words(origins: Sequence[Origin]) -> str:
    """Return the licences of all weights that the students come from, and whether all of them are permissive."""
    closed = [origin.name for origin in origins if not is_permissive(origin.licence)]
    verdict = f"not Apache, MIT or BSD: {', '.join(closed)}" if closed else "all are Apache, MIT or BSD"
    return f"licences: {', '.join(f'{origin.name} {origin.licence}' for origin in origins)}; {verdict}"


def step_words(one: PlannedStep, *, prompt: str = "$ ") -> str:
    """Return a step's name, what it is for, and its command, in two lines."""
    name = f"{one.step.name}: {one.step.why}" if one.step.why else one.step.name
    return f"# {name}\n{prompt}{one.line()}"


def cost_words(cost: Cost | None) -> str:
    """Return a cost as text for a table cell."""
    if cost is None:
        return ""
    if isinstance(cost, StoreCost):
        most = "at most " if cost.at_most else ""
        per_view = f"{most}{amount(cost.bytes_per_view)} per view"
        if cost.num_images is None or cost.num_bytes is None:
            return f"{per_view}; pictures not counted: give --set num-images=N"
        views = f"{cost.views_per_image} view{'s' * (cost.views_per_image > 1)}"
        return f"{cost.num_images:,} pictures x {views}, {per_view}, {amount(cost.num_bytes)}"
    if cost.num_bytes is None:
        return f"{amount(cost.bytes_per_view)} per view; number of steps or batch size unknown"
    words = f"{cost.steps:,} steps x {cost.batch_size:,} = {cost.num_views:,} views, {amount(cost.num_bytes)} read"
    return words if cost.passes is None else f"{words}, each stored view seen about {cost.passes:,.0f} times"


def show_results(results: Sequence[Result], console: Console, *, reports: Path) -> None:
    """Print each step's duration (or `cached`), main numbers and output.

    Args:
        reports: the folder of the steps' reports.
    """
    table = Table("step", "took", "result", "output", box=None)
    steps = {Path(result.output).name: result.step for result in results if result.output}
    for result in results:
        took = "cached" if result.cached else f"{result.seconds:.0f} s"
        said = ", ".join(headline(result, steps))
        table.add_row(escape(result.step), took, escape(said), escape(result.output or ""))
    print_table(console, table)
    console.print(f"full reports of all steps: {reports}", soft_wrap=True, markup=False)


def headline(result: Result, steps: Mapping[str, str]) -> list[str]:
    """Return the most important numbers of a report, each with its name.

    Args:
        steps: names of steps by the name of their output, which name the subjects of evaluations.
    """
    if "results" in result.report:
        return [_first_score(judged, steps) for judged in result.report["results"]]
    wanted = HEADLINES.get(result.verb)
    numbers = list(_numbers(result.report, ""))
    if wanted is None:
        first = {name.rpartition(" ")[0]: (name, v) for name, v in reversed(numbers) if isinstance(v, float)}
        chosen = list(reversed(first.values()))
    else:
        chosen = [(name, value) for name, value in numbers if name.rpartition(" ")[2] in wanted]
    return [_words(name, value) for name, value in chosen]


def _first_score(judged: Mapping[str, Any], steps: Mapping[str, str]) -> str:
    """Return the first score of one subject of an evaluation."""
    subject = steps.get(Path(judged["subject"]).name, judged["subject"])
    measure, score = next(iter(judged["scores"].items()))
    return f"{subject}{' untrained' if judged['untrained'] else ''} {measure.replace('_', ' ')} {score:.4g}"


def _words(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return amount(value)
    path, _, last = name.rpartition(" ")
    if isinstance(value, float):
        return f"{path} {last.replace('_', ' ')} {value:.4g}".strip()
    return f"{value:,} {last.removeprefix('num_')}"


def _numbers(plain: Any, name: str) -> Iterator[tuple[str, float]]:
    """Yield all numbers of a report, named by the keys on the way; a list's members are named by their first string."""
    if isinstance(plain, dict):
        for key, value in plain.items():
            yield from _numbers(value, name if key in UNSAID else f"{name} {key}".strip())
    elif isinstance(plain, list):
        for item in plain:
            words = next((w for w in item.values() if isinstance(w, str)), "") if isinstance(item, dict) else ""
            yield from _numbers(item, words)
    elif isinstance(plain, int | float) and not isinstance(plain, bool):
        yield name, plain
