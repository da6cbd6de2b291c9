"""`eupe eval`: commands of one shape for all tasks; the encoder stays frozen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from eupe.cli.console import err, escaped, finish, out, show
from eupe.cli.options import (
    ImageColumn,
    ImageKey,
    Json,
    LabelColumn,
    LocalKeys,
    LocalWeights,
    Overwrite,
    PicturesPath,
    Size,
    local_keys,
    local_weights,
)
from eupe.errors import ConfigError
from eupe.extract.config import parse_layers

if TYPE_CHECKING:
    from eupe.evaluate.dense_probe import Training
    from eupe.evaluate.feature_cache import FeatureCache
    from eupe.evaluate.result import Result
    from eupe.evaluate.subject import Subject
    from eupe.report.comparison import Merged

OnStep = Callable[[int, int], None]

eval_app = typer.Typer(no_args_is_help=True, help="Judge stores, runs and teachers; the encoder stays frozen.")

Subjects = Annotated[
    list[str],
    typer.Argument(help="Stores, training runs, teachers, or `pixels`, a baseline without an encoder: one row each."),
]
Untrained = Annotated[bool, typer.Option("--untrained", help="Also judge every run and teacher with random weights.")]
Results = Annotated[
    Path | None, typer.Option(help="Also append the results to this file (.jsonl); a run keeps its own, too.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Number of pictures to take from each split, the first ones.")]
Neighbours = Annotated[
    int | None,
    typer.Option(help="Number of neighbours of the mutual-neighbour measure. Default: 10, or all if there are fewer."),
]
Layers = Annotated[
    str | None,
    typer.Option(
        help="Judge the maps of these layers side by side, on the finest of their grids, as 3,4,5: stages of a CNN, "
        "blocks of a ViT. Default: the last map."
    ),
]
Scratch = Annotated[
    Path | None,
    typer.Option(help="Folder for a temporary file that holds the dense tokens. Default: they are held in memory."),
]
Features = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps the tokens of runs and teachers, so that no later evaluation computes them again. "
        "Default: they are not kept."
    ),
]
FeaturesGb = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Most that --features may hold, in GB; the least recently used tokens are deleted, and 0 keeps none. "
        "Default: 20.",
    ),
]
Steps = Annotated[int | None, typer.Option(help="Number of updates of the head. Default: that of the paper.")]
BatchSize = Annotated[int | None, typer.Option(help="Views per update of the head. Default: 16.")]
Rate = Annotated[float | None, typer.Option(help="Peak learning rate of the head. Default: that of the paper.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="Seed of the head's initial weights and of the order of views.")
]


@eval_app.command("agreement")
def eval_agreement(
    run: Annotated[Path, typer.Argument(help="A finished training run.")],
    corpus: PicturesPath = None,
    k: Neighbours = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Measure cosine, CKA and common neighbours between a run and each of its targets, on held-out pictures."""
    from eupe.evaluate.agreement import agreement, agreement_results
    from eupe.evaluate.result import keep_results, require_place

    require_place(results, [str(run)] if run.is_dir() else [])
    report = agreement(run, corpus=corpus, neighbours=k)
    keep_results(agreement_results(report), results)
    if as_json:
        finish(dataclasses.asdict(report), as_json)
        return
    table = Table("target", "tokens", "cosine", "untrained", "mean feature", "normalised", "untrained", box=None)
    likeness = Table("target", "tokens", "CKA", "untrained", "own CKA", "untrained", box=None)
    for target in report.targets:
        for kind, a in target.kinds.items():
            numbers = (
                a.cosine,
                a.cosine_untrained,
                a.cosine_mean,
                a.normalised_cosine,
                a.normalised_untrained,
            )
            table.add_row(target.target, kind, *(f"{x:.4f}" for x in numbers))
            likeness.add_row(
                target.target, kind, *map(_number, (a.cka, a.cka_untrained, a.cka_own, a.cka_own_untrained))
            )
    show(table)
    show(likeness)
    for target in report.targets:
        if target.mutual_neighbours is not None:
            out.print(
                f"{target.target}: {target.mutual_neighbours:.1%} of {report.neighbours} nearest neighbours in common "
                f"(untrained {target.mutual_neighbours_untrained:.1%}, chance {target.mutual_neighbours_chance:.1%})"
            )


@eval_app.command("conflict")
def eval_conflict(
    stores: Annotated[list[str], typer.Argument(help="Two or more stores of the same views of the same pictures.")],
    limit: Annotated[int, typer.Option(help="Maximum number of views per pair, spread over the pictures.")] = 2000,
    k: Neighbours = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Compare teachers before training, from stores alone: CKA, common neighbours, how well each predicts the other."""
    from eupe.common.progress import report_progress
    from eupe.evaluate.conflict import conflict, conflict_results
    from eupe.evaluate.result import keep_results, require_place
    from eupe.evaluate.verdict import JUDGED, MEASURED

    require_place(results)
    with report_progress(err, "views", quiet=as_json) as progress:
        pairs = conflict(stores, limit=limit, neighbours=k, on_views=progress.update)
    keep_results(conflict_results(pairs, limit=limit), results)
    if as_json:
        print(json.dumps({"pairs": [dataclasses.asdict(pair) for pair in pairs]}))
        return
    numbers = (Column(name, justify="right") for name in ("samples", "CKA", "R² A to B", "R² B to A", "neighbours"))
    table = Table("A ~ B", "tokens", *numbers, box=None)
    for pair in pairs:
        for kind, alike in pair.kinds.items():
            r2 = (None if each is None else each.r2 for each in (alike.forward, alike.backward))
            shared = pair.mutual_neighbours if kind == "summary" else None
            said = (alike.cka, *r2, shared)
            table.add_row(escaped(pair.name), kind, str(alike.samples), *map(_number, said))
    show(table)
    for pair in pairs:
        out.print(f"[bold]{pair.verdict.word}[/]: {escaped(pair.verdict.why)}", soft_wrap=True)
    out.print(MEASURED, soft_wrap=True)
    out.print(JUDGED, soft_wrap=True)


@eval_app.command("latency")
def eval_latency(
    subjects: Annotated[list[str], typer.Argument(help="Runs, teachers, or timm:ARCH; no weights are loaded.")],
    size: Annotated[
        list[int] | None, typer.Option(help="Side of the input in pixels. May be repeated. Default: 256 and 512.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures per pass; the time is given per picture.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Number of cores to compute on. Default: all.")] = None,
    repeats: Annotated[int, typer.Option(help="Number of passes that are timed.")] = 30,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Measure parameters, FLOPs, and milliseconds per picture on this machine's CPU."""
    from eupe.common.progress import report_progress
    from eupe.evaluate.latency import SIZES, Timing, latency
    from eupe.evaluate.result import keep_results, require_place
    from eupe.evaluate.subject import open_subjects

    require_place(results)
    timing = Timing(batch_size=batch_size, threads=threads, repeats=repeats)
    found = []
    with report_progress(err, "sizes", quiet=as_json) as progress:
        for subject in open_subjects(subjects, {}):
            judged = latency(
                subject, sizes=size or SIZES, timing=timing, on_step=partial(progress.update, subject.name)
            )
            keep_results(judged, results)
            found += judged
    if as_json:
        print(json.dumps({"results": [result.to_json() for result in found]}))
        return
    names = ("px", "weights", "GMACs", "GFLOPs", "ms", "middle half")
    table = Table("subject", *(Column(name, justify="right", no_wrap=True) for name in names), box=None)
    for result in found:
        s = result.scores
        cost = (f"{s['parameters'] / 1e6:.2f}M", f"{s['gmacs']:.3f}", f"{s['gflops']:.3f}")
        spread = f"{s['ms_p25']:.4g}–{s['ms_p75']:.4g}"
        table.add_row(escaped(result.name), str(result.protocol["size"]), *cost, f"{s['ms']:.4g}", spread)
    show(table)
    how = found[0].protocol
    out.print(
        f"{escaped(str(how['cpu']))}, {how['threads']} threads, {how['dtype']}, batches of {how['batch_size']}, ms per "
        f"picture as the median of {how['repeats']} passes, torch {how['torch']}; a multiply-add (MAC) is two FLOPs",
        soft_wrap=True,
    )


@eval_app.command("knn")
def eval_knn(
    subjects: Subjects,
    data: Annotated[
        str | None,
        typer.Option(
            help="Labelled pictures: train/CLASS and val/CLASS, or one corpus of any kind, where each picture is "
            "judged by all others. Default: a store's own labels."
        ),
    ] = None,
    k: Annotated[int, typer.Option(help="Number of neighbours that vote.")] = 10,
    metric: Annotated[str, typer.Option(help="l2 or cosine.")] = "l2",
    image_key: ImageKey = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    size: Size = None,
    weights: LocalWeights = None,
    weights_key: LocalKeys = None,
    untrained: Untrained = False,
    features: Features = None,
    features_gb: FeaturesGb = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Measure the k-NN accuracy of summaries."""
    from eupe.corpus.choice import Choice
    from eupe.evaluate.knn import knn

    choice = Choice(image_key, image_column, label_column)

    def judge(subject: Subject, on_step: OnStep) -> Result:
        return knn(subject, data=data, k=k, metric=metric, size=size, choice=choice)  # type: ignore[arg-type]

    judge_each(subjects, weights, weights_key, untrained, features, features_gb, results, as_json, judge)


@eval_app.command("linear")
def eval_linear(
    subjects: Subjects,
    data: Annotated[
        str | None,
        typer.Option(
            help="Labelled pictures: train/CLASS and val/CLASS, or one corpus of any kind, of which a fifth is judged. "
            "Default: a store's own labels."
        ),
    ] = None,
    penalty: Annotated[
        list[float] | None,
        typer.Option(
            help="Penalty on the weights; the best of several is used. May be repeated. Default: 1e-6 to 100."
        ),
    ] = None,
    label_share: Annotated[
        float, typer.Option(help="Share of the labelled pictures of each class to learn from, at least one of each.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of these pictures.")] = 0,
    image_key: ImageKey = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    size: Size = None,
    weights: LocalWeights = None,
    weights_key: LocalKeys = None,
    untrained: Untrained = False,
    features: Features = None,
    features_gb: FeaturesGb = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Measure the accuracy of logistic regression on summaries."""
    from eupe.corpus.choice import Choice
    from eupe.evaluate.linear import PENALTIES, linear

    choice = Choice(image_key, image_column, label_column)

    def judge(subject: Subject, on_step: OnStep) -> Result:
        return linear(
            subject,
            data=data,
            penalties=tuple(penalty or PENALTIES),
            size=size,
            choice=choice,
            label_share=label_share,
            seed=seed,
        )

    judge_each(subjects, weights, weights_key, untrained, features, features_gb, results, as_json, judge)


@eval_app.command("segment")
def eval_segment(
    subjects: Subjects,
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with images/{training,validation} and annotations/ (ADE20K), or images/{train,val} and masks/."
        ),
    ],
    mask_values: Annotated[
        str | None,
        typer.Option(
            help="Mask values of classes 0, 1, ..., such as 0,255, or colours: '#000000,#ff0000'. Default: the class "
            "numbers."
        ),
    ] = None,
    mask_ignore: Annotated[
        str | None,
        typer.Option(help="Mask values or colours that mean no class. Default: 255 with masks/, 0 with annotations/."),
    ] = None,
    size: Size = None,
    layers: Layers = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    seed: Seed = 0,
    limit: Limit = None,
    scratch: Scratch = None,
    weights: LocalWeights = None,
    weights_key: LocalKeys = None,
    untrained: Untrained = False,
    features: Features = None,
    features_gb: FeaturesGb = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Measure the mean IoU of a linear layer on dense tokens."""
    from eupe.evaluate.masks import read_code
    from eupe.evaluate.segment import TRAINING, segment

    how, code = _training(TRAINING, steps, batch_size, lr, seed), read_code(mask_values, mask_ignore)

    def judge(subject: Subject, on_step: OnStep) -> Result:
        return segment(
            subject, data=data, size=size, training=how, code=code, limit=limit, scratch=scratch, on_step=on_step
        )

    judge_each(subjects, weights, weights_key, untrained, features, features_gb, results, as_json, judge, layers=layers)


@eval_app.command("depth")
def eval_depth(
    subjects: Subjects,
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with nyu_train.txt and nyu_test.txt (NYUv2), or images/{train,val} and depth/{train,val}."
        ),
    ],
    max_depth: Annotated[float, typer.Option(help="Greatest depth in metres that is judged.")] = 10.0,
    depth_unit: Annotated[
        str | None,
        typer.Option(
            help="Unit of the depth maps: m, cm, mm, a number of metres (1/256 for KITTI, 10/255), or NUMBER/disparity."
            " Default: mm for 16-bit pictures, m for floats and .npy."
        ),
    ] = None,
    size: Size = None,
    layers: Layers = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    seed: Seed = 0,
    limit: Limit = None,
    scratch: Scratch = None,
    weights: LocalWeights = None,
    weights_key: LocalKeys = None,
    untrained: Untrained = False,
    features: Features = None,
    features_gb: FeaturesGb = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Measure the RMSE of depth from a linear layer on dense tokens."""
    from eupe.evaluate.depth import TRAINING, depth
    from eupe.evaluate.layouts import depth_unit as read_unit

    unit = None if depth_unit is None else read_unit(depth_unit)
    how = _training(TRAINING, steps, batch_size, lr, seed)

    def judge(subject: Subject, on_step: OnStep) -> Result:
        return depth(
            subject,
            data=data,
            size=size,
            training=how,
            max_m=max_depth,
            unit=unit,
            limit=limit,
            scratch=scratch,
            on_step=on_step,
        )

    judge_each(subjects, weights, weights_key, untrained, features, features_gb, results, as_json, judge, layers=layers)


@eval_app.command("correspond")
def eval_correspond(
    subjects: Subjects,
    data: Annotated[
        Path, typer.Option(help="Folder with JPEGImages, PairAnnotation/test and Layout/large/test.txt (SPair-71k).")
    ],
    alpha: Annotated[
        float,
        typer.Option(help="Greatest distance of a correct match, as a share of the longer side of the target's box."),
    ] = 0.1,
    size: Size = None,
    layers: Layers = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of pairs to take, the first ones.")] = None,
    scratch: Scratch = None,
    weights: LocalWeights = None,
    weights_key: LocalKeys = None,
    untrained: Untrained = False,
    features: Features = None,
    features_gb: FeaturesGb = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Measure the PCK of the nearest dense token; nothing is trained."""
    from eupe.evaluate.correspond import correspond

    def judge(subject: Subject, on_step: OnStep) -> Result:
        return correspond(subject, data=data, size=size, alpha=alpha, limit=limit, scratch=scratch, on_step=on_step)

    judge_each(subjects, weights, weights_key, untrained, features, features_gb, results, as_json, judge, layers=layers)


@eval_app.command("report")
def eval_report(
    judged: Annotated[
        list[Path], typer.Argument(help="Training runs that were judged, and files of results (.jsonl).")
    ],
    out_path: Annotated[
        Path | None,
        typer.Option("--out", help="The page (.html) or Markdown file (.md) to write. Default: print the table."),
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Folder of pictures, or an index, for which the page shows the runs' maps.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Number of these pictures to show.")] = 6,
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Models, side by side",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compare models by task on a page, in Markdown or as a table; results of different protocols are kept apart."""
    from eupe.report.report_page import write_report

    report = write_report(judged, out=out_path, images=images, limit=limit, title=title, overwrite=overwrite)
    if as_json:
        print(json.dumps(report.to_json()))
    elif report.out is not None:
        out.print(
            f"{escaped(str(report.out))}: {len(report.merged.models)} models, {len(report.merged.columns)} columns",
            soft_wrap=True,
        )
    else:
        _show_merged(report.merged)


def _show_merged(merged: Merged) -> None:
    """Print models by columns, baselines last, with the marks explained, and then tasks that have their own tables."""
    from eupe.report import comparison_text as words

    models, baselines = words.rows(merged)
    if merged.columns:
        heads = (Column(escaped(head.words), justify="right") for head in words.heads(merged.columns))
        table = Table("model", *heads, box=None)
        for model, cells in [*models, *baselines]:
            shown = (words.marked(cell) + ("*" if cell is not None and cell.best else "") for cell in cells)
            table.add_row(escaped(model.name), *shown)
        show(table)
        out.print(f"* {words.BEST_LEGEND}; {words.AHEAD} {words.AHEAD_LEGEND}", soft_wrap=True)
    for letter, said in merged.marks.items():
        out.print(f"({letter}) {words.MARK_LEGEND}: {escaped(said)}", soft_wrap=True)
    for task, results in merged.apart.items():
        head, *body = words.flat_table(results)
        table = Table(*map(escaped, head), title=words.task_title(task), box=None)
        for row in body:
            table.add_row(*map(escaped, row))
        show(table)


def _training(paper: Training, steps: int | None, batch_size: int | None, lr: float | None, seed: int) -> Training:
    return dataclasses.replace(
        paper,
        steps=paper.steps if steps is None else steps,
        batch_size=paper.batch_size if batch_size is None else batch_size,
        lr=paper.lr if lr is None else lr,
        seed=seed,
    )


def judge_each(
    words: list[str],
    weights: list[str] | None,
    weights_key: list[str] | None,
    untrained: bool,
    features: Path | None,
    features_gb: float | None,
    results: Path | None,
    as_json: bool,
    judge: Callable[[Subject, OnStep], Result],
    *,
    layers: str | None = None,
) -> None:
    """Judge every subject and print a row for each; a result is kept as soon as it is known."""
    from eupe.common.compute import is_out_of_memory
    from eupe.common.progress import report_progress
    from eupe.evaluate.result import keep_results, require_place
    from eupe.evaluate.subject import open_subjects

    require_place(results)
    keys, kept = local_keys(weights_key), _kept_features(features, features_gb)
    numbers = () if layers is None else parse_layers(layers)
    subjects = open_subjects(
        words, local_weights(weights, words), keys=keys, untrained=untrained, features=kept, layers=numbers
    )
    require_place(results, (subject.name for subject in subjects if subject.kind == "run"))
    found = []
    with report_progress(err, "steps", quiet=as_json) as progress:
        while subjects:
            subject = subjects.pop(0)  # popped, so that the previous subject's model is freed
            try:
                found.append(judge(subject, partial(progress.update, subject.name)))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                words_of = str(error).splitlines() or [type(error).__name__]
                raise ConfigError(
                    f"there is not enough memory to judge {subject.name} in this way ({words_of[0]}); give a "
                    "smaller --size, --batch-size or --limit, if the task has them"
                ) from error
            keep_results(found[-1:], results)
    if as_json:
        print(json.dumps({"results": [result.to_json() for result in found]}))
    else:
        show_table(found)


def _kept_features(folder: Path | None, limit_gb: float | None) -> FeatureCache | None:
    """Return the cache that `--features` and `--features-gb` ask for, if they do.

    Raises: ConfigError if the folder holds something else, or there is a limit without a folder.
    """
    from eupe.evaluate.feature_cache import LIMIT_GB, open_features

    if folder is None and limit_gb is not None:
        raise ConfigError(f"--features-gb {limit_gb:g} limits the folder of --features; give --features, too")
    if folder is None or limit_gb == 0:
        return None
    return open_features(
        folder,
        limit_gb=LIMIT_GB if limit_gb is None else limit_gb,
        on_note=lambda note: err.print(escaped(note), soft_wrap=True),
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def show_table(found: list[Result]) -> None:
    """Print a table of subjects by measures, and the notes."""
    measures = list(dict.fromkeys(name for result in found for name in result.scores))
    table = Table("subject", *(Column(name.replace("_", " "), justify="right") for name in measures), box=None)
    for result in found:
        table.add_row(escaped(result.name), *(f"{result.scores[name]:.4f}" for name in measures))
    show(table)
    for note in _notes(found):
        out.print(escaped(note), soft_wrap=True)


def _notes(found: list[Result]) -> list[str]:
    """Return the notes on what was judged by what: once if all subjects share them, else with each subject's name."""
    if all(result.notes == found[0].notes for result in found):
        return found[0].notes
    return [f"{result.name}: {note}" for result in found for note in result.notes]
