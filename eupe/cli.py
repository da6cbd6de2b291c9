"""The command line: each verb builds a config and makes one call.

Heavy imports stay inside the verbs, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table
from typer.core import TyperGroup

import eupe
from eupe.cli_eval import eval_app
from eupe.cli_shared import (
    WEIGHTS_KEY,
    ImageColumn,
    ImageKey,
    Json,
    LabelColumn,
    LocalKeys,
    LocalWeights,
    Overwrite,
    PicturesPath,
    err,
    escaped,
    finish,
    local_keys,
    local_weights,
    out,
    require_weights_of_key,
    show,
)
from eupe.errors import ConfigError, EupeError, IncompleteError

if TYPE_CHECKING:
    from eupe.extract.config import ExtractConfig
    from eupe.extract.dispatch import Status
    from eupe.extract.job import ExtractReport
    from eupe.extract.plan import Choice, Estimate, JointEstimate, PaperEstimate
    from eupe.progress import Reporter
    from eupe.store.summary import StoreSummary
    from eupe.train.log import TrainStatus


class _NameOrVerb(TyperGroup):
    """A group where a word that is not a verb names a teacher: `eupe teachers NAME` beside `eupe teachers verify`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.get_command(ctx, args[0]) is not None
        return super().resolve_command(ctx, args if known else ["show", *args])


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=eupe.__doc__)
teachers_app = typer.Typer(cls=_NameOrVerb, subcommand_metavar="[NAME] | COMMAND [ARGS]...")
store_app = typer.Typer(no_args_is_help=True, help="Inspect, check and repair stores.")
app.add_typer(teachers_app, name="teachers")
app.add_typer(eval_app, name="eval")
app.add_typer(store_app, name="store")

NAMED_DUPLICATES = 5
PRECISIONS = "bitround:B is fp16 rounded to B bits of mantissa, which compresses better; int8 is one byte per channel"
NEAR_FP32 = 0.999
"""Least cosine between tokens in another dtype and in fp32 that needs no warning."""

CorpusPath = Annotated[
    str,
    typer.Option(
        "--corpus",
        help="Folder of pictures (class subfolders become labels), WebDataset tars ('shards/{000..099}.tar'), Parquet "
        "with images, or an index; also s3:// or gs://.",
    ),
]
WeightsKey = Annotated[str | None, typer.Option(help=WEIGHTS_KEY)]
WeightsOfEach = Annotated[
    list[str] | None,
    typer.Option("--weights", help="Local weights instead of the hub's. One per teacher; 'hub' for a teacher without."),
]
KeyOfEach = Annotated[
    list[str] | None,
    typer.Option("--weights-key", help=f"{WEIGHTS_KEY} One per teacher; 'auto' for a teacher without."),
]
Sizes = Annotated[list[int] | None, typer.Option(help="Side of the teacher's input in pixels. May be repeated.")]
Views = Annotated[str, typer.Option(help="center, squash, or rrc:K for K random resized crops per picture.")]
PhotometricKind = Annotated[
    str,
    typer.Option(
        "--photometric", help="eupe: random colour jitter, greyscale, blur and solarisation of each view; or none."
    ),
]
TokenKinds = Annotated[str, typer.Option(help="summary, dense, or both.")]
Grid = Annotated[int | None, typer.Option(help="G: pool dense maps to G x G cells.")]
Scale = Annotated[
    str | None, typer.Option(help="MIN,MAX: a random crop's share of the picture's area. Default: 0.08,1.")
]
Ratio = Annotated[str | None, typer.Option(help="MIN,MAX: a random crop's width over its height. Default: 3/4 to 4/3.")]
FidelityWanted = Annotated[
    float | None,
    typer.Option(help="Instead of --precision: the cheapest one that keeps 95% of tokens at this cosine or above."),
]
Pixels = Annotated[bool, typer.Option("--pixels", help="Also store the views' pixels, to train without the corpus.")]
Limit = Annotated[int | None, typer.Option(help="Number of pictures to take, the first ones of the corpus.")]
Include = Annotated[
    list[str] | None, typer.Option(help="Take only pictures whose key matches, such as 'train/*'. May be repeated.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Leave out pictures whose key matches, such as '*.gif'. May be repeated.")
]
Shuffle = Annotated[
    bool, typer.Option("--shuffle", help="Take the pictures in random order; with --limit, a random sample.")
]
StoredWeights = Annotated[
    Path | None, typer.Option("--weights", help="Local weights: the file that the store was made with.")
]
StoredTeacher = Annotated[
    str | None,
    typer.Option("--teacher", help="The teacher's current name or path. Default: the one recorded in the store."),
]


INTERRUPTED = 130
"""Exit code of typer after Ctrl-C."""


def main() -> None:
    """Run the command line; print one sentence for a user's mistake, never a traceback."""
    try:
        app(standalone_mode=True)
    except EupeError as error:
        err.print(f"[bold red]error:[/] {escaped(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            err.print("[bold red]error:[/] interrupted; run the same command again", soft_wrap=True)
        raise


def _version(asked: bool) -> None:
    if asked:
        out.print(eupe.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@teachers_app.callback(invoke_without_command=True)
def teachers(context: typer.Context) -> None:
    """List the known teachers; with NAME, show its card."""
    from eupe.teachers.registry import REGISTRY

    if context.invoked_subcommand is not None:
        return
    table = Table("name", "backend", "model", "dense", "summary", "patch", "native", "licence", box=None)
    for spec in REGISTRY.values():
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
    """Show the card of one teacher."""
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

    from eupe.device import compute_dtype, dtype_name
    from eupe.progress import report_progress
    from eupe.teachers.verify import LEAST, require_agreement, verify_teachers

    if weights is not None and teacher is None:
        raise ConfigError("--weights belong to one teacher; give its NAME, too")
    require_weights_of_key(weights, weights_key)
    arithmetic = compute_dtype(dtype, torch.device("cpu"))
    with report_progress(err, "teachers", quiet=as_json) as progress:
        comparisons = verify_teachers(
            teacher,
            weights,
            key=weights_key,
            dtype=arithmetic,
            progress=lambda done, of: progress.update("verifying", done, of),
        )
    if as_json:
        rows = [{**dataclasses.asdict(c), "agrees": c.agrees} for c in comparisons]
        print(json.dumps({"least_allowed": LEAST, "teachers": rows}))
    else:
        table = Table(
            "teacher", Column("weights", overflow="fold"), "build", "size", "tokens", "least cosine", "mean", box=None
        )
        rounded = dtype_name(arithmetic)
        for c in comparisons:
            in_rounded = {f"{kind} {rounded}": cosine for kind, cosine in c.rounding.items()}
            for kind, cosine in {**c.cosines, **in_rounded}.items():
                cells = (c.teacher, escaped(c.weights), c.build, str(c.size), kind)
                table.add_row(*cells, f"{cosine.least:.7f}", f"{cosine.mean:.7f}")
        show(table)
        if arithmetic != torch.float32:
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
    require_agreement(comparisons)


@app.command()
def index(
    corpus: CorpusPath,
    out_path: Annotated[str, typer.Option("--out", help="The index to write (.parquet).")],
    include: Include = None,
    exclude: Exclude = None,
    image_key: ImageKey = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """List and hash the pictures of a corpus; after an interruption, the same command resumes."""
    from eupe.corpus.choice import Choice
    from eupe.corpus.index import some_keys
    from eupe.corpus.left_out import Patterns, told
    from eupe.corpus.resumable import make_index
    from eupe.progress import report_progress

    if not out_path.endswith(".parquet"):
        raise ConfigError(f"--out {out_path} must end in .parquet")
    with report_progress(err, "pictures", quiet=as_json) as progress:
        found = make_index(
            corpus,
            out_path,
            patterns=Patterns(tuple(include or ()), tuple(exclude or ())),
            progress=lambda done, of: progress.update("indexing", done, of),
            choice=Choice(image_key, image_column, label_column),
            overwrite=overwrite,
        )
    unreadable = found.samples["sha256"].null_count
    duplicates = found.duplicates
    facts = {"index": out_path, "found": found.num_found, "pictures": len(found), "left_out": found.left_out}
    facts |= {"unreadable": unreadable, "fingerprint": found.fingerprint}
    if as_json:
        print(json.dumps({**facts, "notes": list(found.notes), "duplicates": duplicates}))
        return
    facts["left_out"] = told(found.left_out)
    finish({**facts, "duplicates": sum(len(keys) - 1 for keys in duplicates)}, as_json)
    _print_notes(found.notes)
    for keys in duplicates[:NAMED_DUPLICATES]:
        out.print(f"the same picture: {some_keys(keys)}", markup=False)
    if len(duplicates) > NAMED_DUPLICATES:
        out.print(f"... and {len(duplicates) - NAMED_DUPLICATES} more such groups; --json names them all")


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        out.print(f"note: {escaped(note)}", soft_wrap=True)


@app.command()
def scenes(
    out_path: Annotated[Path, typer.Option("--out", help="The folder to create.")],
    pictures: Annotated[int, typer.Option(help="Number of pictures of each task.")] = 300,
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 224,
    seed: Annotated[int, typer.Option(help="Seed of the random scenes.")] = 0,
    as_json: Json = False,
) -> None:
    """Render pictures with exact labels, masks, depth, correspondences, captions and questions."""
    from eupe.progress import report_progress
    from eupe.scenes.make import ScenesConfig, make_scenes

    config = ScenesConfig(out=out_path, pictures=pictures, size=size, seed=seed)
    with report_progress(err, "pictures", quiet=as_json) as progress:
        report = make_scenes(config, progress=lambda done, of: progress.update("rendering", done, of))
    finish(dataclasses.asdict(report), as_json)
    if report.cached and not as_json:
        out.print("nothing to do: these scenes already exist")


@app.command()
def extract(
    teacher: Annotated[
        list[str],
        typer.Option(
            help="Registry name, timm:ARCH, hf:REPO_OR_DIR, open_clip:ARCH or open_clip:ARCH@TAG, or a run's directory."
            " May be repeated: several teachers in one pass, each picture decoded once."
        ),
    ],
    corpus: CorpusPath,
    out_path: Annotated[
        list[str] | None,
        typer.Option("--out", help="The store, also s3:// or gs://; one per teacher. Default: store/TEACHER.zarr."),
    ] = None,
    weights: WeightsOfEach = None,
    weights_key: KeyOfEach = None,
    size: Sizes = None,
    views: Views = "center",
    scale: Scale = None,
    ratio: Ratio = None,
    photometric: PhotometricKind = "none",
    tokens: TokenKinds = "summary,dense",
    precision: Annotated[
        str, typer.Option(help="Stored precision: fp16, bitround:B, int8, or one per kind: dense=int8,summary=fp16.")
    ] = "fp16",
    fidelity: FidelityWanted = None,
    grid: Grid = None,
    pixels: Pixels = False,
    dtype: Annotated[str, typer.Option(help="The teacher's dtype: auto, fp32, bf16 or fp16.")] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="Views per forward pass. Default: the fastest, found by trial.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of Ray actors, each with all teachers. Default: one per GPU.")
    ] = None,
    gpus_per_worker: Annotated[float | None, typer.Option(help="GPUs per worker. Default: an even share.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster (auto, ray://...). Default: this machine.")
    ] = None,
    limit: Limit = None,
    include: Include = None,
    exclude: Exclude = None,
    image_key: ImageKey = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    shuffle: Shuffle = False,
    seed: Annotated[int, typer.Option(help="Seed of the random views and of the order of pictures.")] = 0,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Recompute the parts that hold pictures without features.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run teachers once over a corpus and cache their features."""
    from eupe.corpus.choice import Choice
    from eupe.corpus.left_out import told
    from eupe.corpus.views import parse_views
    from eupe.extract.config import ExtractConfig
    from eupe.extract.job import extract_together
    from eupe.progress import report_progress

    shared = ExtractConfig(
        teacher="",
        corpus=corpus,
        sizes=tuple(sorted(set(size or []))),
        views=parse_views(views, seed=seed, scale=scale, ratio=ratio, photometric=photometric),
        tokens=tuple(tokens.split(",")),
        precision=precision,
        fidelity=fidelity,
        grid=grid,
        pixels=pixels,
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        ray_address=ray_address,
        limit=limit,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        choice=Choice(image_key, image_column, label_column),
        shuffle=shuffle,
        retry_failed=retry_failed,
    )
    configs = _of_each(shared, teacher, out_path, weights, weights_key)
    with report_progress(err, "views", quiet=as_json) as progress:
        reports = extract_together(configs, on_status=lambda s: _show_status(progress, s))
    if as_json and len(reports) > 1:
        print(json.dumps({"stores": [dataclasses.asdict(report) for report in reports]}))
        for report in reports:
            _warn_of_values(report)
    for report in reports if not as_json or len(reports) == 1 else ():
        facts = dataclasses.asdict(report)
        notes = facts["notes"] if as_json else facts.pop("notes")
        finish(facts | ({} if as_json else {"left_out": told(report.left_out)}), as_json)
        if not as_json:
            _print_notes(notes)
        if report.failures and not as_json:
            kinds = "; ".join(f"{count} x {reason}" for reason, count in report.failures.items())
            mend = "; once they can be read, the same command with --retry-failed computes them"
            err.print(
                f"{report.num_failed} pictures have no features: {escaped(kinds)}. `eupe store info {report.store} "
                f"--json` names them{mend if report.num_failed > report.num_not_finite else ''}",
                soft_wrap=True,
            )
        _warn_of_values(report)
        if not as_json:
            what = "nothing to do: the store holds all of this already" if report.cached else "done"
            out.print(f"{what}; train from it with: eupe train --targets {report.store} --student ARCH --out runs/NAME")
    require_finite_features(reports)


def _warn_of_values(report: ExtractReport) -> None:
    _warn_of_rounding(report)
    warn_of_clipping(report.store, report.clipped_values, report.clipped_arrays)


def warn_of_clipping(store: str, count: int, arrays: Sequence[str]) -> None:
    """Warn on standard error that values were too large for a store, and explain what that means."""
    if count:
        err.print(
            f"[yellow]warning:[/] {escaped(store)}: {count:,} values of {' and '.join(arrays)} are beyond 65,504, the "
            "largest value of fp16, and stored as that, in every precision and with every --dtype; a student learns "
            "the smaller value. A few such tokens do little harm; many (see `eupe store stats`) mean a damaged "
            "checkpoint or another normalisation of the pictures",
            soft_wrap=True,
        )


def require_finite_features(reports: Sequence[ExtractReport]) -> None:
    """Raise IncompleteError if pictures have no features because the teacher's output is not finite."""
    from eupe.store import open_store
    from eupe.store.writer import what_to_do

    if bad := [report for report in reports if report.num_not_finite]:
        stores = ", ".join(f"{report.num_not_finite} in {report.store}" for report in bad)
        raise IncompleteError(
            f"the teacher's features are not finite (NaN, or beyond the range of its dtype) for some pictures: "
            f"{stores}; these have no features there, `eupe store info --json` names them; "
            f"{what_to_do(open_store(bad[0].store).spec)}"
        )


def _warn_of_rounding(report: ExtractReport) -> None:
    cosines = report.forward.get("cosine_to_fp32", {})
    if rough := {kind: cosine for kind, cosine in cosines.items() if cosine < NEAR_FP32}:
        words = ", ".join(f"{kind} {cosine:.4f}" for kind, cosine in rough.items())
        err.print(
            f"[yellow]warning:[/] {escaped(report.store)}: this teacher's tokens differ from those in fp32 (least "
            f"cosine over a few pictures: {words}); --dtype fp32 is exact, but slower",
            soft_wrap=True,
        )


def _of_each(
    shared: ExtractConfig,
    teachers: list[str],
    out_path: list[str] | None,
    weights: list[str] | None,
    weights_key: list[str] | None,
) -> list[ExtractConfig]:
    """Return one configuration per teacher.

    Raises: ConfigError unless an option was given once per teacher, or not at all.
    """
    outs = _one_each("--out", out_path, teachers)
    files = [None if file in (None, "hub") else Path(file) for file in _one_each("--weights", weights, teachers)]
    keys = [None if key in (None, "auto") else key for key in _one_each("--weights-key", weights_key, teachers)]
    return [
        dataclasses.replace(shared, teacher=name, out=place, weights=file, weights_key=key)
        for name, place, file, key in zip(teachers, outs, files, keys, strict=True)
    ]


def _one_each(option: str, given: list[str] | None, teachers: list[str]) -> list[str | None]:
    """Return an option's values, one per teacher; None for each if it was not given.

    Raises: ConfigError unless it was given once per teacher, or not at all.
    """
    if not given:
        return [None] * len(teachers)
    if len(given) != len(teachers):
        raise ConfigError(f"{option} was given {len(given)} times for {len(teachers)} teachers; give it once for each")
    return list(given)


def _show_status(progress: Reporter, status: Status) -> None:
    nodes = [
        f"{node.host}: {node.workers} workers, {node.views_per_s:.1f} views/s, {node.failed} failed"
        for node in status.nodes
    ]
    lines = nodes if len(nodes) > 1 else []
    progress.update(status.stage, status.done, status.total, failed=status.failed, lines=lines)


@app.command()
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
    from eupe.extract.plan import JointEstimate, PaperConfig, estimate, estimate_on_paper
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
    from eupe.pages.stats_page import require_page_name, write_stats_page
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
    from eupe.pages.stats_words import NOTES, identity, token_facts, token_title

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
    from eupe.errors import IncompleteError
    from eupe.progress import report_progress
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
    from eupe.extract.repair import RepairConfig, repair
    from eupe.progress import report_progress

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
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(report).items()}
    finish(plain, as_json)
    if not (as_json or report.parts or report.documents or report.statistics):
        out.print("nothing to repair: the store is whole")


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
    from eupe.extract.audit import AuditConfig, audit, require_agreement
    from eupe.progress import report_progress

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


@app.command()
def train(
    targets: Annotated[
        list[str] | None, typer.Option(help="A store to learn from, also s3:// or gs://. May be repeated.")
    ] = None,
    student: Annotated[
        list[str] | None,
        typer.Option(
            help="Any timm ViT or CNN, named without a pretrained tag. May be repeated: several students on "
            "the same stream, with one --out for each."
        ),
    ] = None,
    out_path: Annotated[list[Path] | None, typer.Option("--out", help="The run's directory; one per student.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="stage1, stage2 or stage3: the paper's settings, which flags override.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of options, such as the options.yaml of a run.")
    ] = None,
    init: Annotated[
        list[Path] | None,
        typer.Option(help="A finished run to start from, or a weights file of such a model; one per student."),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(help="SHARE:STORE[,STORE...]: another corpus, and the share of the steps that train on it."),
    ] = None,
    corpus: PicturesPath = None,
    size: Annotated[
        list[int] | None,
        typer.Option(
            help="Side of the student's input in pixels; of several, one is drawn per step. Default: the first store's."
        ),
    ] = None,
    target_size: Annotated[
        list[int] | None,
        typer.Option(
            help="Size of the targets; of several, one is drawn per step. Default: each store's nearest to --size."
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over all training views. Default: 1, unless --steps is given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of updates, instead of --epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Views per update, over all workers. Default: 128.")] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Number of pieces into which a worker splits its share of a batch. Default: 1.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of AdamW. Default: 1e-3.")] = None,
    lr_scaling: Annotated[
        str | None, typer.Option(help="sqrt: the peak learning rate is --lr times 4 sqrt(batch size / 1024).")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay of AdamW. Default: 1e-4.")] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the steps in which the learning rate rises. Default: 0.05.")
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Maximum norm of the gradient. Default: no clipping.")] = None,
    ema: Annotated[
        float | None,
        typer.Option(help="Decay of a moving average of the weights, which is validated and exported instead of them."),
    ] = None,
    head_width: Annotated[int | None, typer.Option(help="Hidden width of the adapter heads. Default: 3072.")] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="TARGET=W or TARGET/KIND=W (dinov2-s/dense=2): factor of a loss. Default: 1."),
    ] = None,
    normalise: Annotated[
        str | None, typer.Option(help="Normalisation of the targets: standard, phi-s or none. Default: standard.")
    ] = None,
    drop: Annotated[
        float | None,
        typer.Option(
            help="Probability of dropping a target's loss for a view; the largest is never dropped. Default: 0."
        ),
    ] = None,
    views: Annotated[
        str | None,
        typer.Option(
            help="Views of a picture in an epoch: all, or one, in turn (cycle) or at random (draw). Default: all."
        ),
    ] = None,
    photometric: Annotated[
        str | None, typer.Option(help="eupe: recolour the student's views, differently at each step. Default: none.")
    ] = None,
    holdout: Annotated[
        float | None, typer.Option(help="Share of the pictures kept for validation. Default: 0.1.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the training: auto, fp32 or bf16. Default: auto.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the training. Default: 0.")] = None,
    num_workers: Annotated[
        int | None,
        typer.Option(help="Number of processes that share each batch, one per GPU if there are any. Default: 1."),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="The Ray cluster of --num-workers. Default: this machine.")
    ] = None,
    shard: Annotated[
        bool | None,
        typer.Option("--shard/--no-shard", help="Shard weights and optimiser state over the workers (FSDP2)."),
    ] = None,
    sync_batch_norm: Annotated[
        bool | None,
        typer.Option(
            "--sync-batch-norm/--no-sync-batch-norm", help="Compute batch norms over all workers' views (GPUs only)."
        ),
    ] = None,
    rope_rescale: Annotated[
        float | None,
        typer.Option(
            help="R: in training, scale rotary coordinates by a random factor from 1/R to R; DINOv3 and EUPE use 2."
        ),
    ] = None,
    compile: Annotated[bool | None, typer.Option("--compile/--no-compile", help="torch.compile the student.")] = None,
    recompute: Annotated[
        bool | None,
        typer.Option(
            "--recompute/--no-recompute", help="Recompute activations in the backward pass, which saves memory."
        ),
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: 500.")] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations. Default: 500.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between entries of the log. Default: 10.")] = None,
    keep: Annotated[int | None, typer.Option(help="Number of newest checkpoints to keep. Default: 2.")] = None,
    keep_every: Annotated[int | None, typer.Option(help="N: also keep the checkpoint of every N-th step.")] = None,
    wandb: Annotated[str | None, typer.Option(help="Weights & Biases project to log to.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Distil cached targets into students; no teacher is loaded."""
    from eupe.progress import report_progress
    from eupe.train.loop import train_together
    from eupe.train.options import origins_told, train_configs

    flags = {
        "targets": targets,
        "mix": mix,
        "corpus": corpus,
        "size": size,
        "target_size": target_size,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "lr": lr,
        "lr_scaling": lr_scaling,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "clip": clip,
        "ema": ema,
        "head_width": head_width,
        "weight": weight,
        "normalise": normalise,
        "drop": drop,
        "views": views,
        "photometric": photometric,
        "holdout": holdout,
        "dtype": dtype,
        "seed": seed,
        "num_workers": num_workers,
        "ray_address": ray_address,
        "shard": shard,
        "sync_batch_norm": sync_batch_norm,
        "rope_rescale": rope_rescale,
        "compile": compile,
        "recompute": recompute,
        "checkpoint_every": checkpoint_every,
        "validate_every": validate_every,
        "log_every": log_every,
        "keep": keep,
        "keep_every": keep_every,
        "wandb": wandb,
    }
    origins = partial(origins_told, recipe=recipe, config=config, flags={**flags, "student": student, "init": init})
    with origins():
        configs = train_configs(
            recipe=recipe,
            config=config,
            flags=flags,
            students=student or [],
            inits=init or [],
            outs=out_path or [],
            resume=resume,
        )
    notes: dict[int, str] = {}

    def tell(place: int, status: TrainStatus) -> None:
        notes[place] = status.words()
        if len(configs) > 1:
            notes[place] = f"{configs[place].out.name}: {notes[place]}"
        progress.update("training", status.step, status.total_steps, note="  ".join(notes[i] for i in sorted(notes)))

    def note(words: str) -> None:
        if not as_json:
            err.print(f"note: {escaped(words)}", soft_wrap=True)

    with origins(), report_progress(err, "steps", quiet=as_json) as progress:
        reports = train_together(configs, on_status=tell, on_note=note)
    for report in reports:
        finish(dataclasses.asdict(report), as_json)
        if not as_json and report.cached:
            out.print("nothing to do: this run is already finished")


@app.command("export")
def export_run(
    run: Annotated[Path, typer.Argument(help="A finished training run.")],
    form: Annotated[str, typer.Option("--format", help="timm, hf (the Transformers library), onnx or executorch.")],
    out_path: Annotated[Path, typer.Option("--out", help="The directory to create.")],
    size: Annotated[int | None, typer.Option(help="Side of the input in pixels. Default: the run's.")] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(help="all, or a target: also export the features that its head predicts. May be repeated."),
    ] = None,
    precision: Annotated[str, typer.Option(help="Precision of an ONNX graph: fp32, fp16 or int8.")] = "fp32",
    calibrate: Annotated[
        str | None, typer.Option(help="Pictures from which the ranges of int8 are taken. Default: made-up ones.")
    ] = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Make an ONNX graph for any size that is a multiple of the patch.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Export a run's student so that other programs can load it, with proof that it is the same model."""
    from eupe.export.config import ExportConfig
    from eupe.export.job import export

    config = ExportConfig(
        run=run,
        out=out_path,
        format=form,
        size=size,
        heads=tuple(heads or ()),
        precision=precision,
        calibrate=calibrate,
        dynamic_size=dynamic_size,
    )
    finish(dataclasses.asdict(export(config)), as_json)


@app.command("run")
def run_recipe(
    recipe: Annotated[str, typer.Argument(help="A recipe file (.yaml), or the name of a recipe that comes with eupe.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE: override a setting of the recipe; out=DIR is the folder of all outputs. May be repeated.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what is wrong, what is already done, and what the rest costs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a whole pipeline from one file; skip the steps that are already done."""
    from eupe.pipeline.plan import REPORTS
    from eupe.pipeline.prepare import prepare, run
    from eupe.pipeline.recipe import parse_settings
    from eupe.pipeline.show import show_plan, show_results
    from eupe.pipeline.verbs import read_verbs

    verbs = read_verbs(typer.main.get_command(app))
    prepared = prepare(recipe, parse_settings(settings or []), verbs)
    if dry_run:
        if as_json:
            print(json.dumps(prepared.to_json()))
        else:
            show_plan(prepared, out)
        return
    told = err if as_json else out  # with --json, standard output holds nothing but JSON
    results = list(run(prepared, on_command=lambda command: told.print(f"$ {escaped(command)}", soft_wrap=True)))
    if as_json:
        print(json.dumps({"out": str(prepared.recipe.out), "steps": [dataclasses.asdict(r) for r in results]}))
    else:
        show_results(results, out, reports=prepared.recipe.out / REPORTS)


@app.command()
def viz(
    items: Annotated[list[str], typer.Argument(help="Stores, training runs, teachers, or `pixels`: one column each.")],
    images: Annotated[str, typer.Option(help="Folder of pictures, or an index.")],
    out_path: Annotated[Path, typer.Option("--out", help="The page (.html) or figure (.png) to write.")],
    limit: Annotated[int, typer.Option(help="Number of pictures.")] = 8,
    weights: LocalWeights = None,
    weights_key: LocalKeys = None,
    foreground: Annotated[
        bool,
        typer.Option("--foreground", help="Colour only the foreground, which is found by a model's first component."),
    ] = False,
    cell: Annotated[int | None, typer.Option(help="Side of a figure's cells in pixels. Default: 224.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw dense features as PCA maps side by side: a self-contained page with runs' loss curves, or a PNG figure."""
    from eupe.pages.viz import write_maps

    report = write_maps(
        items,
        images=images,
        out=out_path,
        limit=limit,
        weights=local_weights(weights, items),
        weights_keys=local_keys(weights_key),
        foreground=foreground,
        cell_px=cell,
        overwrite=overwrite,
    )
    finish(dataclasses.asdict(report), as_json)
