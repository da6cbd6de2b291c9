"""`eupe students`: the list, and one in detail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from eupe.cli.console import out, show
from eupe.cli.options import Json

if TYPE_CHECKING:
    from eupe.models.students import StudentFacts


def students(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Any student: a timm model, torchvision:NAME, hf:DIR_OR_REPO or PACKAGE.MODULE:FUNCTION. Default: a "
            "list of small ones."
        ),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of its input in pixels. Default: its own.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """List models that can be students; with NAME, show one: parameters, strides, sizes, pretrained weights."""
    import json

    from eupe.models.students import KNOWN, student_facts

    facts = [student_facts(each, size) for each in ([name] if name else KNOWN)]
    if as_json:
        print(json.dumps([_plain(each) for each in facts]))
        return
    if name is not None:
        out.print_json(data=_plain(facts[0]))
        return
    table = Table("name", "parameters", "strides", "own size", "takes", "dense", "summary", "weights", box=None)
    for each in facts:
        spec = each.spec
        licences = sorted(set(each.weights.values()))
        weights = f"{len(each.weights)}: {', '.join(licences)}" if each.weights else "none"
        cells = (f"{each.num_parameters / 1e6:.1f}M", each.strides, spec.size, each.sizes, spec.dense_dim)
        table.add_row(spec.arch, *map(str, cells), f"{spec.summary_dim} {spec.summary}", weights)
    show(table)
    out.print(
        "Any other model of timm that has a feature map or patch tokens works as well, and torchvision:NAME, "
        "hf:DIR_OR_REPO, PACKAGE.MODULE:FUNCTION.",
        soft_wrap=True,
    )


def _plain(facts: StudentFacts) -> dict[str, Any]:
    spec = facts.spec.to_json()
    spec.pop("origin", None)
    layers = [{"layer": i, "stride": each.patch, "dim": each.dim} for i, each in enumerate(facts.layers, 1)]
    return spec | {
        "num_parameters": facts.num_parameters,
        "sizes": facts.sizes,
        "layers": layers,
        "weights": facts.weights,
    }
