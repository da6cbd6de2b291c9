"""The README of an export: its content, use, origin, licences and measured quality."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import yaml

import eupe
from eupe.common.reading import read_json
from eupe.errors import RunError
from eupe.evaluate.licences import Origin
from eupe.evaluate.result import Result, newest, read_results
from eupe.export.config import HF, INT8, ExportConfig
from eupe.export.proof import LEAST, Proof
from eupe.export.snippets import snippet
from eupe.export.source import Source, Written
from eupe.finetune.config import CLASSIFY, DEPTH, SEGMENT
from eupe.train.run_spec import REPORT_FILE, RunSpec, target_names

RECIPE = (
    *("size", "batch_size", "lr", "lr_scaling", "weight_decay", "clip", "rope_rescale", "ema", "normalise", "drop"),
    *("views", "photometric", "seed"),
)
"""Options that a reader looks for first; the run's options.yaml has all of them."""
FEATURES = "image-feature-extraction"
PIPELINES = {CLASSIFY: "image-classification", SEGMENT: "image-segmentation", DEPTH: "depth-estimation"}
"""The hub's words for the tasks of fine-tuned models."""
MOST_NAMES = 200
"""Number of classes that the card names."""
LONGEST_VALUE = 60
"""Maximum number of characters of a value in a table."""


def front_matter(config: ExportConfig, arch: str, pipeline: str) -> str:
    """Return the YAML header that the hub reads.

    Args:
        pipeline: the hub's word for what the model does.
    """
    library = "transformers" if config.format == HF else config.format
    plain = {
        "license": "other",
        "license_name": "licences-of-the-teachers",
        "library_name": library,
        "pipeline_tag": pipeline,
        "tags": ["eupe", "distillation", pipeline.removeprefix("image-"), library, arch],
    }
    return f"---\n{yaml.safe_dump(plain, sort_keys=False)}---\n"


def write_card(source: Source, config: ExportConfig, written: Written, proof: Proof) -> str:
    """Return the whole README.

    Raises: RunError if the run's own reports cannot be read.
    """
    parts = [
        front_matter(config, source.encoder.spec.arch, PIPELINES[source.facts.task] if source.facts else FEATURES),
        f"# {config.out.absolute().name}\n",
        _about(source, written.kind),
        "## Use\n",
        "`DIR` is this directory, `PICTURE` the path of a picture.\n",
        f"```python\n{snippet(source, config)}```\n",
        _preparation(source),
        *(f"{note}\n" for note in written.notes),
        "## Verification\n",
        _proof(proof, config.precision),
        "## Teachers and licences\n",
        _licences(source.learned_from),
        "## Training\n",
        _training(source.spec) if source.spec else _tuning(source),
        "## Results\n",
        _scores(source) if source.facts else _measured(source.run),
        "## Versions\n",
        _versions(source),
    ]
    return "\n".join(parts)


def _about(source: Source, kind: str) -> str:
    spec, facts = source.encoder.spec, source.facts
    heads = f"; with the heads of {', '.join(source.heads)}" if source.heads and facts is None else ""
    made = "distilled from the cached features of vision foundation models"
    if facts is not None:
        what = f"{len(facts.classes)} classes" if facts.classes else f"metres up to {facts.max_m:g}"
        made = f"fine-tuned to {facts.task} ({what}; output `{next(iter(source.heads))}`)"
    return (
        f"`{spec.arch}` for pictures of {spec.size} px, {made} by [eupe](https://arxiv.org/abs/2603.22387) "
        f"{eupe.__version__}. This directory: {kind}{heads}.\n\n"
        f"It gives a summary of {spec.summary_dim} numbers ({spec.summary}) and one token of {spec.dense_dim} numbers "
        f"({spec.dense}) for every {spec.patch} x {spec.patch} pixels.\n"
    )


def _preparation(source: Source) -> str:
    spec = source.encoder.spec
    mean, std = (", ".join(f"{x:g}" for x in values) for values in (spec.mean, spec.std))
    return (
        f"Input: RGB, the square in the middle, resized to {spec.size} px (bicubic, antialiased), divided by 255, "
        f"minus ({mean}), divided by ({std}); float32, channels first.\n"
    )


def _proof(proof: Proof, precision: str) -> str:
    if proof.exported_ms is None:
        return "The export was not run: its runtime does not exist for the system that exported it.\n"
    wanted = "reported, not guaranteed" if precision == INT8 else f"at least {LEAST[precision]:g}"
    rows = [
        (f"`{name}`", f"{found.least:.6f}", f"{found.mean:.6f}", f"{found.stretched:.2%}")
        for name, found in proof.outputs.items()
    ]
    sizes = ", ".join(f"{height} x {width}" for height, width in proof.sizes)
    return (
        f"The export was reloaded after it was written and run, as was the trained student, on {proof.num_pictures} "
        f"varied pictures ({sizes} px) in batches of several sizes. Cosine of every token, {wanted}:\n\n"
        + _table(("output", "least cosine", "mean cosine", "length off by"), rows)
        + f"\nOne picture takes {proof.exported_ms:.1f} ms, and {proof.torch_ms:.1f} ms in PyTorch (median, on the CPU "
        "of the machine that exported it).\n"
    )


def _licences(origins: Sequence[Origin]) -> str:
    if not origins:
        return "The weights were random before the training on labels.\n"
    rows = [(origin.name, origin.licence, origin.way) for origin in origins]
    return (
        "The weights come from these models or their features; their licences bind anyone who uses the weights.\n\n"
        + _table(("learned from", "licence", "through"), rows)
    )


def _tuning(source: Source) -> str:
    assert source.facts is not None
    chosen = {"start": source.facts.start, **source.facts.data, **source.facts.settings}
    rows = [(name, json.dumps(value)) for name, value in chosen.items() if value is not None and value is not False]
    return _table(("option", "value"), rows)


def _scores(source: Source) -> str:
    assert source.facts is not None
    rows = [(name, _number(value)) for name, value in source.facts.scores.items()]
    text = f"On {source.facts.data['judged']:,} pictures that it did not learn from:\n\n"
    text += _table(("score", "value"), rows)
    names = ", ".join(f"{i} {name}" for i, name in enumerate(source.classes[:MOST_NAMES]))
    more = ", ..." if len(source.classes) > MOST_NAMES else ""
    return text + (f"\nClasses, in the order of the logits (`labels.txt`): {names}{more}.\n" if names else "")


def _training(spec: RunSpec) -> str:
    chosen = [(name, json.dumps(spec.config[name])) for name in RECIPE if spec.config.get(name) is not None]
    targets = [
        (name, f"`{target['fingerprint']}`", str(target["summary_dim"]), str(target["dense_dim"]))
        for name, target in zip(target_names(spec.targets), spec.targets, strict=True)
    ]
    pictures = ", ".join(f"`{digest}`" for digest in spec.pictures)
    return (
        _table(("option", "value"), [("steps", f"{spec.total_steps:,}"), *chosen])
        + "\n"
        + _table(("target", "fingerprint of its store", "summary", "dense"), targets)
        + f"\nDigest of the pictures' names: {pictures}.\n"
    )


def _measured(run: Path) -> str:
    held_out = _held_out(run / REPORT_FILE)
    text = "On held-out pictures, between the outputs of the heads and the teachers' features:\n\n" + _table(
        ("target", "cosine", "of the mean feature", "in the loss's space"), held_out
    )
    rows = [_evaluation(result) for result in newest(read_results(run))]
    return text + ("\n" + _table(("task", "of", "scores", "protocol"), rows) if rows else "")


def _evaluation(result: Result) -> tuple[str, str, str, str]:
    scores = ", ".join(f"{name} {_number(value)}" for name, value in result.scores.items())
    protocol = ", ".join(f"{name} {_number(value)}" for name, value in result.protocol.items())
    return result.task, "untrained weights" if result.untrained else "the student", scores, protocol


def _number(value: Any) -> str:
    """Return a value as text for a table cell; long values, such as lists of prompts, are cut."""
    words = f"{value:.4g}" if isinstance(value, float) else str(value)
    return words if len(words) <= LONGEST_VALUE else f"{words[:LONGEST_VALUE]}..."


def _held_out(report: Path) -> list[tuple[str, str, str, str]]:
    """Return a row for each target and token kind with its held-out cosines.

    Raises: RunError if the report cannot be read.
    """
    try:
        return [
            (f"{name} {kind}", f"{scores['raw']:.4f}", f"{scores['mean_raw']:.4f}", f"{scores['normalised']:.4f}")
            for name, kinds in read_json(report).get("validation", {}).items()
            for kind, scores in kinds.items()
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{report} is not a report of a training run: {type(error).__name__}: {error}") from error


def _versions(source: Source) -> str:
    of = source.spec or source.facts
    trained: Mapping[str, str] = {} if of is None else of.versions
    said = ", ".join(f"{name} {version}" for name, version in trained.items()) or "unknown versions"
    return f"Trained with {said}; exported with eupe {eupe.__version__}, timm {timm.__version__}.\n"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
