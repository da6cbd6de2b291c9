"""The plan of a recipe: the key, output path, command and state of each step."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eupe.common.option import indifferent
from eupe.corpus.index import index_root
from eupe.corpus.sources import corpus_root
from eupe.errors import EupeError
from eupe.extract.config import ExtractConfig
from eupe.pipeline.inputs import Inputs
from eupe.pipeline.steps import MAKES, RUN, STORE, Ref, Step
from eupe.store.reader import ROOT_DOCUMENT
from eupe.train.config import TrainConfig
from eupe.train.run_spec import CONFIG_FILE

REPORTS = "reports"
FEATURES = "features"
"""Folder of the tokens that evaluations share."""
KEY_LENGTH = 8
READ_PICTURES = ("train", "eval agreement")
"""Verbs that read the pictures of a store without an option that says where they are."""
PICTURES = ("corpus", "images", "data", "calibrate")
"""Options that name pictures; `data` also names their labels and other ground truth."""

INDIFFERENT: Mapping[str, Mapping[str, str]] = {
    "": {
        "out": "named after the key",
        "results": "one more file for the results",
        "scratch": "where features are stored during an evaluation",
        "features": "tokens of another evaluation are those that a pass would give, bit for bit",
        "features-gb": "how many of them are kept",
    },
    "extract": indifferent(ExtractConfig),
    "train": indifferent(TrainConfig),
    "eval agreement": {"corpus": "current location of the pictures; the stores say which pictures they are"},
}
"""Options that do not affect a step's result and are left out of its key, by verb ("" for all verbs), with the reason.
Any other option counts."""

JUDGED_BEFORE = ("eval report",)
"""Verbs that report on all evaluations before them."""

State = Literal["done", "to go on", "to do"]


@dataclass(frozen=True)
class PlannedStep:
    """A step with everything that is known before it runs."""

    step: Step
    key: str
    """sha256 of the verb, the decisive options, the input files and the needed steps' contents; it names the output."""
    content: str
    """The key; for an extraction, a hash that includes the present pictures, because new ones extend the same store."""
    output: Path | None
    """Path of a store, run, export or page; None for a step that leaves only a report."""
    report: Path
    words: tuple[str, ...]
    """Words of the command after `eupe`, without `--resume` and `--json`."""
    state: State
    missing: tuple[str, ...]
    """Reasons why the step cannot start now: pictures and weights that do not exist."""

    def command(self) -> list[str]:
        """Return the command's words after `eupe`; a run that was already started is resumed."""
        begun = self.step.makes == RUN and self.output is not None and (self.output / CONFIG_FILE).exists()
        return [*self.words, *(["--resume"] if begun else []), "--json"]

    def line(self) -> str:
        """Return the command as one would type it."""
        return shlex.join(["eupe", *self.command()])


def plan_steps(steps: tuple[Step, ...], out: Path, inputs: Inputs) -> tuple[PlannedStep, ...]:
    """Plan all steps, in order."""
    planned: dict[str, PlannedStep] = {}
    for step in steps:
        planned[step.name] = _plan(step, out, inputs, planned)
    return tuple(planned.values())


def key_of(step: Step, contents: Mapping[str, str], stamps: Mapping[str, str], *, judged: Sequence[str] = ()) -> str:
    """Return the sha256 of everything that decides a step's result.

    Args:
        contents: contents of the steps that it needs, by name.
        stamps: hashes of files and pictures, by their words in the recipe.
        judged: contents of the evaluations that it reports on.
    """
    left_out = {*INDIFFERENT[""], *INDIFFERENT.get(step.verb.name, {})}
    decisive = {
        name: [_decisive(word, name, contents, stamps) for word in words]
        for name, words in sorted(step.options.items())
        if name not in left_out
    }
    return hashlib.sha256(json.dumps([step.verb.name, decisive, *judged]).encode()).hexdigest()


def _decisive(word: str | Ref, option: str, contents: Mapping[str, str], stamps: Mapping[str, str]) -> Any:
    if isinstance(word, Ref):
        return {"step": contents[word.step]}
    if word not in stamps:
        return word
    named = word.partition("=")[0] if "=" in word else ""
    return {"pictures": word, "stamp": stamps[word]} if option in PICTURES else {"file": stamps[word], "of": named}


def _plan(step: Step, out: Path, inputs: Inputs, before: Mapping[str, PlannedStep]) -> PlannedStep:
    extends = MAKES.get(step.verb.name) == STORE
    files, pictures, missing = _stamps(step, inputs)
    contents = {name: before[name].content for name in step.needs}
    judged = _evaluations(before) if step.verb.name in JUDGED_BEFORE else []
    # an extraction's key leaves the pictures out: new pictures must extend its store, not name another
    key = key_of(step, contents, files if extends else files | pictures, judged=judged)
    content = key_of(step, contents, files | pictures, judged=judged)
    stem = f"{step.name}-{key[:KEY_LENGTH]}"
    output = _output(step, out, stem)
    words = [*step.verb.name.split(), *step.words({name: str(before[name].output) for name in step.needs})]
    if step.verb.name in READ_PICTURES and "corpus" not in step.options and (bucket := _bucket(step, before)):
        words += ["--corpus", bucket]
    if FEATURES in step.verb.options and FEATURES not in step.options:
        words += [f"--{FEATURES}", str(out / FEATURES)]
    if output is not None:
        words = [*_without_out(words, step), "--out", str(output)]
    report = out / REPORTS / f"{stem}.json"
    state = _state(step, output, report, content)
    return PlannedStep(step, key, content, output, report, tuple(words), state, tuple(missing))


def _bucket(step: Step, before: Mapping[str, PlannedStep]) -> str | None:
    """Return where the pictures of a step's stores are if that is a bucket; otherwise None.

    A reader must name such a bucket itself, because it does not trust the store's note. The recipe named the bucket, or
    an index that leads to it, for the extraction.
    """
    for needed in (before[name].step for name in step.needs):
        corpus = next((word for word in needed.options.get("corpus", ()) if isinstance(word, str)), None)
        if corpus is None and (found := _bucket(needed, before)):
            return found
        if corpus is not None and not (root := index_root(corpus) or corpus_root(corpus)).is_local:
            return str(root)
    return None


def _evaluations(before: Mapping[str, PlannedStep]) -> list[str]:
    return [planned.content for planned in before.values() if planned.step.verb.name.startswith("eval ")]


def _stamps(step: Step, inputs: Inputs) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Return the hashes of files and of pictures, by word, and messages about those that are missing."""
    files: dict[str, str] = {}
    pictures: dict[str, str] = {}
    missing = []
    for name, words in step.options.items():
        # what does not decide a result is not read: a folder of features may hold many gigabytes
        for word in (word for word in words if isinstance(word, str) and name not in INDIFFERENT[""]):
            if name in PICTURES:
                try:
                    whole = name == "data" and Path(word).is_dir()
                    stamp = inputs.folder(word) if whole else inputs.pictures(word).stamp
                except EupeError as error:
                    missing.append(str(error))
                    continue
                pictures |= {} if stamp is None else {word: stamp}
            elif (digest := inputs.content(word)) is not None:
                files[word] = digest
            elif name in ("weights", "init") and word != "hub":
                missing.append(f"weights {word.rpartition('=')[2]} do not exist")
    return files, pictures, missing


def _output(step: Step, out: Path, stem: str) -> Path | None:
    if step.makes is not None:
        return out / (f"{stem}.zarr" if step.makes == STORE else stem)
    named = step.options.get("out")
    return None if named is None else out / f"{stem}{Path(str(named[0])).suffix}"


def _without_out(words: list[str], step: Step) -> list[str]:
    if "out" not in step.options:
        return words
    place = words.index("--out")
    return words[:place] + words[place + 2 :]


def _state(step: Step, output: Path | None, report: Path, content: str) -> State:
    there = output is None or output.exists()
    if there and (kept := read_report(report)) is not None and kept["content"] == content:
        return "done"
    begun = {STORE: ROOT_DOCUMENT, RUN: CONFIG_FILE}.get(step.makes or "")
    return "to go on" if begun and output is not None and (output / begun).exists() else "to do"


def read_report(path: Path) -> dict[str, Any] | None:
    """Return the record of a finished step (`command`, `content`, `seconds`, `report`); None if there is none."""
    try:
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept if {"command", "content", "seconds", "report"} <= kept.keys() else None
    except (OSError, ValueError):
        return None
