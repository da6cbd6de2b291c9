"""`eupe store`: look into a store, check it, repair it, convert it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from eupe.cli.console import err, escaped, finish, out, show
from eupe.cli.extract import warn_of_clipping
from eupe.cli.options import (
    Grid,
    Json,
    Overwrite,
    PicturesPath,
    Precision,
    StoredTeacher,
    StoredWeights,
    WeightsKey,
    require_weights_of_key,
)
from eupe.errors import ConfigError, IncompleteError

if TYPE_CHECKING:
    from eupe.store.summary import StoreSummary


store_app = typer.Typer(no_args_is_help=True, help="Inspect, check, repair and convert stores.")


@store_app.command("ls")
def store_ls(directory: Annotated[str, typer.Argument(help="A directory of stores.")], as_json: Json = False) -> None:
    """List the stores of a directory: teacher, views, precision, size, completeness, licence."""
    from eupe.store.catalogue import describe, stores_in

    entries = [describe(store) for store in stores_in(directory)]
    if as_json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries]))
        return
    table = Table(
        "store", "teacher", "views", "size", "grid", "precision", "samples", "MB", "complete", "licence", box=None
    )
    for e in entries:
        sizes, grids = ("+".join(map(str, numbers)) for numbers in (e.sizes, e.grids))
        grids += f", layers {'+'.join(e.layers)}" if e.layers else ""
        cells = (e.name, e.teacher, e.views, sizes, grids, e.precision, e.num_samples)
        table.add_row(*map(str, cells), f"{e.stored_bytes / 1e6:.1f}", f"{e.complete:.1%}", e.licence)
    show(table)


@store_app.command("info")
def store_info(path: str, as_json: Json = False) -> None:
    """Show what a store holds, how complete it is, and which pictures failed."""
    from eupe.corpus.index import some_keys
    from eupe.corpus.left_out import told
    from eupe.store import open_store
    from eupe.store.places import left_out

    store = open_store(path)
    ledger = store.failures
    missed = left_out(store)
    reasons = dict(zip(*(store.failed[name].to_pylist() for name in ("key", "error")), strict=True))
    finish(
        {
            **{k: v for k, v in store.spec.to_json().items() if k not in ("versions", "calibration")},
            "num_found": store.spec.num_samples + sum(missed.values()),
            "left_out": missed if as_json else told(missed) if missed else "nothing noted",
            "finished": store.finished,
            "missing_parts": len(store.missing_parts()),
            "num_parts": store.spec.num_parts,
            "clipped_values": store.clipped.count,
            "clipped_arrays": list(store.clipped.paths),
            "failures": ledger if as_json else {reason: some_keys(keys) for reason, keys in ledger.items()},
            "not_finite": store.num_not_finite,
            **({"failed": reasons} if as_json else {}),
        },
        as_json,
    )
    if not as_json:
        warn_of_clipping(path, store.clipped.count, store.clipped.paths)


@store_app.command("stats")
def store_stats(
    path: str,
    out_path: Annotated[
        Path | None, typer.Option("--out", help="Also draw the statistics on this page (.html).")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Describe the features of a finished store: norms, channels, directions, outliers."""
    from eupe.report.stats_page import require_page_name, write_stats_page
    from eupe.store import open_store
    from eupe.store.summary import summarise

    if out_path is not None:
        require_page_name(out_path)
    summary = summarise(open_store(path))
    if out_path is not None:
        write_stats_page(summary, out_path, overwrite=overwrite)
    page = None if out_path is None else str(out_path)
    if as_json:
        finish({**summary.to_json(), "page": page}, as_json)
        return
    _print_statistics(summary)
    if page is not None:
        out.print(f"page: {escaped(page)}", soft_wrap=True)


def _print_statistics(summary: StoreSummary) -> None:
    from eupe.report.stats_page import NOTES, identity, token_facts, token_title

    finish({"store": summary.path, **dict(identity(summary))}, False)
    for token in summary.tokens:
        table = Table(f"\n{token_title(token)}", "", box=None)
        for name, value in token_facts(token):
            table.add_row(name, value)
        show(table)
    out.print("\n" + "\n".join(NOTES), soft_wrap=True)


@store_app.command("verify")
def store_verify(path: str, as_json: Json = False) -> None:
    """Read every byte of a store and compare it with what was written; exit with code 1 if it is not whole."""
    from eupe.common.progress import report_progress
    from eupe.store.verify import verify

    with report_progress(err, "objects", quiet=as_json) as progress:
        report = verify(path, progress=lambda done, of: progress.update("verifying", done, of))
    if as_json:
        print(json.dumps({**dataclasses.asdict(report), "whole": report.whole}))
    else:
        for part in report.missing:
            out.print(f"part {part} is missing", soft_wrap=True)
        for damage in report.damages:
            out.print(escaped(str(damage)), soft_wrap=True)
        for name in report.strays:
            out.print(f"{escaped(name)} belongs to no part of the store, and does no harm", soft_wrap=True)
        out.print(f"{report.num_objects} objects, {report.num_bytes / 1e6:.1f} MB read", soft_wrap=True)
    if not report.whole:
        raise IncompleteError(
            f"{report.store} is not whole: {len(report.missing)} of {report.num_parts} parts are missing, "
            f"{len(report.damages)} objects are damaged; `eupe store repair {report.store}` recomputes them"
        )
    if not as_json:
        out.print(f"{report.store} is whole", soft_wrap=True)


@store_app.command("repair")
def store_repair(
    path: str,
    corpus: PicturesPath = None,
    weights: StoredWeights = None,
    weights_key: WeightsKey = None,
    teacher: StoredTeacher = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Views per forward pass. Default: the fastest, found by trial.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of Ray actors, each with the teacher. Default: one per GPU.")
    ] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(help="GPUs per worker. Default: an even share.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster (auto, ray://...). Default: this machine.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Recompute what is damaged or missing in a store, and nothing else."""
    from eupe.common.progress import report_progress
    from eupe.extract.repair import RepairConfig, repair

    require_weights_of_key(weights, weights_key)
    config = RepairConfig(
        store=path,
        corpus=corpus,
        weights=weights,
        weights_key=weights_key,
        teacher=teacher,
        batch_size=batch_size,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        ray_address=ray_address,
    )
    with report_progress(err, "steps", quiet=as_json) as progress:
        report = repair(config, on_status=lambda s: progress.update(s.stage, s.done, s.total, failed=s.failed))
    finish(dataclasses.asdict(report), as_json)
    if not (as_json or report.parts or report.documents or report.statistics):
        out.print("nothing to repair: the store is whole")


@store_app.command("convert")
def store_convert(
    path: str,
    precision: Precision,
    out_path: Annotated[str, typer.Option("--out", help="The new store, also s3:// or gs://.")],
    grid: Grid = None,
    as_json: Json = False,
) -> None:
    """Store the features of a finished store at another precision or grid, in a new store; no teacher is run."""
    from eupe.common.progress import amount, report_progress
    from eupe.extract.convert import convert

    with report_progress(err, "views", quiet=as_json) as progress:
        report = convert(path, out_path, precision=precision, grid=grid, progress=progress.update)
    finish(dataclasses.asdict(report), as_json)
    if not as_json:
        what = "nothing to do: the store holds all of this already" if report.cached else "done"
        sizes = f"{amount(report.source_bytes)} before, {amount(report.stored_bytes)} after"
        kept = [
            f"{path} keeps a cosine of {each['mean']:.6f}, at least {each['p5']:.6f} for 95% of its tokens"
            for path, each in report.fidelity.items()
        ]
        out.print(escaped("; ".join([what, f"{report.num_views:,} views", sizes, *kept])), soft_wrap=True)


@store_app.command("audit")
def store_audit(
    path: str,
    samples: Annotated[int, typer.Option(help="Number of pictures to recompute.")] = 32,
    corpus: PicturesPath = None,
    weights: StoredWeights = None,
    weights_key: WeightsKey = None,
    teacher: StoredTeacher = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16 or fp16. Default: the dtype that the store was made in.")
    ] = None,
    least: Annotated[float, typer.Option(help="Least 5th percentile of the cosines that is accepted.")] = 0.999,
    as_json: Json = False,
) -> None:
    """Recompute some pictures with the store's teacher and compare; exit with code 1 if features have drifted."""
    from eupe.common.progress import report_progress
    from eupe.extract.audit import AuditConfig, audit, require_agreement

    if not 0 < least <= 1:
        raise ConfigError(f"--least must lie between 0 and 1, got {least:g}")
    require_weights_of_key(weights, weights_key)
    config = AuditConfig(
        store=path,
        samples=samples,
        corpus=corpus,
        weights=weights,
        weights_key=weights_key,
        teacher=teacher,
        dtype=dtype,
    )
    with report_progress(err, "views", quiet=as_json) as progress:
        report = audit(config, progress=lambda done, of: progress.update("computing", done, of))
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        table = Table("tokens", "precision", "count", "cosine", "mean", "5%", "least", box=None)
        for d in report.drifts:
            for name, c in (("standardised", d.standardised), ("plain", d.plain)):
                numbers = (f"{x:.6f}" for x in (c.mean, c.p5, c.least))
                table.add_row(d.path, d.precision, str(d.num_tokens), name, *numbers)
        show(table)
        out.print(
            f"{report.num_views} views of {report.num_samples} pictures, {report.changed_views} with changed pixels; "
            f"stored in {report.stored_dtype}, computed in {report.computed_dtype}",
            soft_wrap=True,
        )
    require_agreement(report, least)
