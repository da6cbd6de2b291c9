"""`eupe teachers`: the list, one in detail, and the comparison with the libraries."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table
from typer.core import TyperGroup

from eupe.cli.console import err, escaped, out, show
from eupe.cli.options import Json, WeightsKey, require_weights_of_key
from eupe.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from eupe.teachers.library_check import Comparison


class _NameOrVerb(TyperGroup):
    """A group where a word that is not a verb names a teacher: `eupe teachers NAME` beside `eupe teachers verify`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.get_command(ctx, args[0]) is not None
        return super().resolve_command(ctx, args if known else ["show", *args])


teachers_app = typer.Typer(cls=_NameOrVerb, subcommand_metavar="[NAME] | COMMAND [ARGS]...")
NEAR_FP32 = 0.999
"""Least cosine between tokens in another dtype and in fp32 that needs no warning."""


@teachers_app.callback(invoke_without_command=True)
def teachers(
    context: typer.Context,
    licence: Annotated[
        str | None, typer.Option(help="`permissive`: only teachers whose weights are under Apache-2.0, MIT or BSD.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the known teachers; with NAME, show its spec and a note on it."""
    from eupe.teachers.registry import REGISTRY
    from eupe.teachers.spec import is_permissive

    if licence not in (None, "permissive"):
        raise ConfigError(f"--licence {licence} is unknown; give permissive (Apache-2.0, MIT and BSD), or leave it out")
    if context.invoked_subcommand is not None:
        if licence is not None or as_json:
            raise ConfigError("--licence and --json before a NAME or a command are for the list; leave them out")
        return
    rows = [spec for spec in REGISTRY.values() if licence is None or is_permissive(spec.licence)]
    if as_json:
        print(json.dumps({"teachers": [spec.to_json() for spec in rows]}))
        return
    table = Table("name", "backend", "model", "dense", "summary", "patch", "native", "licence", box=None)
    for spec in rows:
        summary = f"{spec.summary_dim} {spec.summary}" if spec.summary_dim else "none"
        cells = (
            spec.name,
            spec.backend,
            spec.model,
            spec.dense_dim,
            summary,
            spec.patch,
            spec.native_size,
            spec.licence,
        )
        table.add_row(*map(str, cells))
    show(table)


@teachers_app.command("show", hidden=True)
def teachers_show(
    name: Annotated[str, typer.Argument(help="The teacher.")],
    weights: Annotated[
        Path | None, typer.Option(help="Local weights; files next to them may give the mean and std.")
    ] = None,
) -> None:
    """Show the spec of one teacher."""
    from eupe.teachers.preprocess import where_from
    from eupe.teachers.resolve import resolve_teacher

    spec = resolve_teacher(name, weights)
    out.print_json(data={**spec.to_json(), "normalised_by": where_from(spec, weights)})


@teachers_app.command("verify")
def teachers_verify(
    teacher: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A teacher. Default: every row of the registry.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Local weights. Default: random ones.")] = None,
    weights_key: WeightsKey = None,
    dtype: Annotated[
        str, typer.Option(help="Another dtype, such as bf16, whose tokens are compared with those in fp32.")
    ] = "fp32",
    as_json: Json = False,
) -> None:
    """Compare adapters with their library's own forward pass on awkward pictures; exit with code 1 if one differs."""
    import torch

    from eupe.common.compute import compute_dtype
    from eupe.common.progress import report_progress
    from eupe.teachers.library_check import LEAST, require_agreement, verify_teachers

    if weights is not None and teacher is None:
        raise ConfigError("--weights belong to one teacher; give its NAME, too")
    require_weights_of_key(weights, weights_key)
    torch_dtype = compute_dtype(dtype, torch.device("cpu"))
    with report_progress(err, "teachers", quiet=as_json) as progress:
        comparisons = verify_teachers(
            teacher,
            weights,
            key=weights_key,
            dtype=torch_dtype,
            progress=lambda done, of: progress.update("verifying", done, of),
        )
    if as_json:
        rows = [{**dataclasses.asdict(c), "agrees": c.agrees} for c in comparisons]
        print(json.dumps({"least_allowed": LEAST, "teachers": rows}))
    else:
        _print_comparisons(comparisons, torch_dtype)
    require_agreement(comparisons)


def _print_comparisons(comparisons: list[Comparison], dtype: torch.dtype) -> None:
    """Print a table of cosines, then the adapters that failed and what was compared."""
    import torch

    from eupe.common.compute import dtype_name

    table = Table(
        "teacher", Column("weights", overflow="fold"), "build", "size", "tokens", "least cosine", "mean", box=None
    )
    rounded = dtype_name(dtype)
    for c in comparisons:
        in_rounded = {f"{kind} {rounded}": cosine for kind, cosine in c.rounding.items()}
        for kind, cosine in {**c.cosines, **in_rounded}.items():
            cells = (c.teacher, escaped(c.weights), c.build, str(c.size), kind)
            table.add_row(*cells, f"{cosine.least:.7f}", f"{cosine.mean:.7f}")
    show(table)
    if dtype != torch.float32:
        out.print(
            f"{rounded}: the adapter's own tokens in {rounded} compared with those in fp32, on the CPU",
            soft_wrap=True,
        )
    for c in comparisons:
        if c.failure is not None:
            out.print(f"[red]{escaped(c.teacher)} failed[/]: {escaped(c.failure)}", soft_wrap=True)
    builds = Counter(c.build for c in comparisons if c.failure is None)
    failed = f", {len(comparisons) - builds.total()} failed" if builds.total() < len(comparisons) else ""
    pictures = max(c.num_pictures for c in comparisons)
    out.print(
        f"{len(comparisons)} teachers ({builds['full']} full, {builds['narrow']} narrow{failed}) on "
        f"{pictures} awkward pictures each; full is the whole model, narrow has the same architecture with two "
        "thin blocks: large models are checked in this way unless requested by NAME",
        soft_wrap=True,
    )
