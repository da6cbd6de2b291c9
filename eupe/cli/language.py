"""`eupe eval text|zeroshot|retrieval|vqa`: tasks that need language."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eupe.cli.console import err, finish
from eupe.cli.evaluate import (
    Features,
    FeaturesGb,
    OnStep,
    Results,
    Subjects,
    Untrained,
    eval_app,
    judge_each,
)
from eupe.cli.options import (
    ImageColumn,
    ImageKey,
    Json,
    LabelColumn,
    LocalKeys,
    LocalWeights,
    Overwrite,
    Size,
)

if TYPE_CHECKING:
    from eupe.evaluate.result import Result
    from eupe.evaluate.subject import Subject

TextWeights = Annotated[
    Path | None,
    typer.Option(help="open_clip checkpoint of the whole model, or its directory. Default: from the hub."),
]
Text = Annotated[
    str | None,
    typer.Option(
        help="A file from `eupe eval text`, or the teacher whose text tower to run. Default: the teacher that "
        "subjects lead to."
    ),
]
Space = Annotated[
    str | None,
    typer.Option(
        "--space",
        help="The teacher whose text space to use if a run's heads lead to several; or the targets on the way to it.",
    ),
]
ClassNames = Annotated[
    Path | None,
    typer.Option(
        help="File with one name per line, in the folders' order (by number if all are integers), or FOLDER<TAB>NAME."
    ),
]
Templates = Annotated[
    Path | None, typer.Option(help="File with one template per line, `{}` for the name. Default: `a photo of a {}.`")
]


@eval_app.command("text")
def eval_text(
    tower: Annotated[str, typer.Argument(help="A teacher with a text space: clip-*-proj, pe-core-*-proj, siglip*.")],
    output: Annotated[Path, typer.Option("--out", help="The file of embeddings to write (.safetensors).")],
    classes: ClassNames = None,
    captions: Annotated[
        Path | None, typer.Option(help="COCO's folder: embed its captions instead of class names.")
    ] = None,
    templates: Templates = None,
    text_weights: TextWeights = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Embed class names or captions once, so that evaluation needs no text tower."""
    from eupe.common.progress import report_progress
    from eupe.evaluate.text import cache_texts

    with report_progress(err, "prompts", quiet=as_json) as progress:
        texts = cache_texts(
            tower,
            output,
            classes=classes,
            captions=captions,
            templates=templates,
            weights=text_weights,
            overwrite=overwrite,
            on_step=partial(progress.update, tower),
        )
    count, width = texts.embeddings.shape
    report = {"texts": str(output), "teacher": texts.teacher, "embeddings": count, "width": width}
    finish({**report, "templates": list(texts.templates)}, as_json)


@eval_app.command("zeroshot")
def eval_zeroshot(
    subjects: Subjects,
    data: Annotated[str, typer.Option(help="Labelled pictures: val/CLASS next to train/CLASS, or one corpus.")],
    classes: Annotated[
        Path | None,
        typer.Option(
            help="File with one name per line, in the folders' order (by number if all are integers), or "
            "FOLDER<TAB>NAME. Default: the folders' names."
        ),
    ] = None,
    templates: Templates = None,
    text: Text = None,
    text_weights: TextWeights = None,
    space: Space = None,
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
    """Measure zero-shot accuracy in a teacher's text space, through a run's heads."""
    from eupe.corpus.choice import Choice
    from eupe.evaluate.text import open_source
    from eupe.evaluate.zeroshot import zeroshot

    texts = open_source(text, classes=classes, templates=templates, weights=text_weights)

    choice = Choice(image_key, image_column, label_column)

    def judge(subject: Subject, on_step: OnStep) -> Result:
        return zeroshot(subject, data=data, texts=texts, teacher=space, size=size, choice=choice, on_step=on_step)

    judge_each(subjects, weights, weights_key, untrained, features, features_gb, results, as_json, judge)


@eval_app.command("retrieval")
def eval_retrieval(
    subjects: Subjects,
    data: Annotated[
        Path, typer.Option(help="Folder with captions_val2017.json, also in annotations/, and val2017/ (COCO).")
    ],
    text: Text = None,
    text_weights: TextWeights = None,
    space: Space = None,
    size: Size = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of pictures to take, the first ones.")] = None,
    weights: LocalWeights = None,
    weights_key: LocalKeys = None,
    untrained: Untrained = False,
    features: Features = None,
    features_gb: FeaturesGb = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Measure recall of captions by pictures and of pictures by captions, in a teacher's text space."""
    from eupe.evaluate.prompts import AS_IT_IS
    from eupe.evaluate.retrieval import retrieval
    from eupe.evaluate.text import open_source

    texts = open_source(text, weights=text_weights, usual=AS_IT_IS)

    def judge(subject: Subject, on_step: OnStep) -> Result:
        return retrieval(subject, data=data, texts=texts, teacher=space, size=size, limit=limit, on_step=on_step)

    judge_each(subjects, weights, weights_key, untrained, features, features_gb, results, as_json, judge)


@eval_app.command("vqa")
def eval_vqa(
    subjects: Subjects,
    data: Annotated[
        Path, typer.Option(help="Folder with questions.json (image, split, kind, question, answer) and the pictures.")
    ],
    steps: Annotated[int | None, typer.Option(help="Number of updates of the readout. Default: 600.")] = None,
    dropout: Annotated[
        list[float] | None,
        typer.Option(
            help="Dropout of the readout; the best of several is used. May be repeated. Default: 0.3 and 0.5."
        ),
    ] = None,
    size: Size = None,
    weights: LocalWeights = None,
    weights_key: LocalKeys = None,
    untrained: Untrained = False,
    features: Features = None,
    features_gb: FeaturesGb = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """Measure how well a small attention readout of frozen features answers questions.

    It is a probe, not a language model.
    """
    from eupe.evaluate.vqa import DROPOUTS, FITTING, vqa

    fitting = FITTING if steps is None else dataclasses.replace(FITTING, steps=steps)

    def judge(subject: Subject, on_step: OnStep) -> Result:
        return vqa(subject, data=data, fitting=fitting, dropouts=tuple(dropout or DROPOUTS), size=size, on_step=on_step)

    judge_each(subjects, weights, weights_key, untrained, features, features_gb, results, as_json, judge)
