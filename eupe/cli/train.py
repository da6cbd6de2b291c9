"""`eupe train`."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eupe.cli.console import err, escaped, finish, out
from eupe.cli.options import (
    Json,
    PicturesPath,
)

if TYPE_CHECKING:
    from eupe.train.log import TrainStatus


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
