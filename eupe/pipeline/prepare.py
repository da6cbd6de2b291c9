"""Preparation of a recipe: from its name to a plan that can be shown or run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from eupe.evaluate.licences import Origin
from eupe.pipeline.costs import Cost, Costs
from eupe.pipeline.execute import Result, run_steps
from eupe.pipeline.inputs import Inputs
from eupe.pipeline.planned_steps import PlannedStep, plan_steps
from eupe.pipeline.recipe import Problems, Recipe, parse_recipe, read_recipe
from eupe.pipeline.steps import check_steps
from eupe.pipeline.verbs import Verb
from eupe.teachers.spec import is_permissive


@dataclass(frozen=True)
class Prepared:
    """A recipe without mistakes, with its plan and costs."""

    recipe: Recipe
    inputs: Inputs
    steps: tuple[PlannedStep, ...]
    costs: tuple[Cost | None, ...]
    origins: tuple[Origin, ...]
    """The teachers and weights that the students come from, each once."""

    def to_json(self) -> dict[str, Any]:
        """Return the result of a dry run as plain JSON data."""
        return {
            "recipe": self.recipe.path,
            "out": str(self.recipe.out),
            "steps": [_plain(*pair) for pair in zip(self.steps, self.costs, strict=True)],
            "licences": [
                {"name": each.name, "licence": each.licence, "permissive": is_permissive(each.licence)}
                for each in self.origins
            ],
        }


def prepare(name: str, settings: Mapping[str, Any], verbs: Mapping[str, Verb]) -> Prepared:
    """Read a recipe, check it against the command line, and find out which steps are done.

    Args:
        name: a file, or the name of a shipped recipe.
        settings: values that replace the recipe's named values.
    Raises: ConfigError with all mistakes.
    """
    problems = Problems()
    recipe = parse_recipe(name, read_recipe(name), settings, problems)
    steps = check_steps(recipe, verbs, problems)
    problems.require_none(name)
    inputs = Inputs(recipe.out)
    planned = plan_steps(steps, recipe.out, inputs)
    costs = Costs(inputs, recipe.num_images, problems)
    reckoned = tuple(costs.of(one) for one in planned)
    problems.require_none(name)
    return Prepared(recipe, inputs, planned, reckoned, tuple(dict.fromkeys(costs.origins)))


def run(prepared: Prepared, *, on_step: Callable[[PlannedStep], None] = lambda step: None) -> Iterator[Result]:
    """Run the steps that are not done; see `run_steps`.

    Raises: as `run_steps`; also ConfigError if pictures or weights are missing.
    """
    problems = Problems()
    for one in prepared.steps:
        for words in one.missing:
            problems.add(f"steps.{one.step.name}.{one.step.verb.name}", words)
    problems.require_none(prepared.recipe.path)
    for result in run_steps(prepared.steps, prepared.recipe.out, on_step=on_step):
        prepared.inputs.keep()
        yield result


def _plain(one: PlannedStep, cost: Cost | None) -> dict[str, Any]:
    reckoned = None
    if cost is not None:
        reckoned = {**asdict(cost), "num_views": cost.num_views, "num_bytes": cost.num_bytes}
    return {
        "step": one.step.name,
        "verb": one.step.verb.name,
        "needs": list(one.step.needs),
        "key": one.key,
        "state": one.state,
        "missing": list(one.missing),
        "output": None if one.output is None else str(one.output),
        "report": str(one.report),
        "command": one.line(),
        "cost": reckoned,
    }
