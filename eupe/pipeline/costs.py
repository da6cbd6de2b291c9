"""Estimated costs of steps: bytes of stores from teachers' specs, and the views and bytes that training reads.

Nothing is measured and no weights are read. Shares of raw fp16 are nominal, as in `eupe plan --num-images`. For a
teacher that an earlier step trains, the spec of its student's architecture is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eupe.common.kinds import LayerShape
from eupe.corpus.views import parse_views
from eupe.errors import EupeError
from eupe.evaluate.licences import UNKNOWN, Origin, origins_behind
from eupe.evaluate.open_run import is_run
from eupe.extract.config import parse_layers
from eupe.extract.parts import converted_spec, paper_spec
from eupe.extract.plan_on_paper import NOMINAL_SHARES, stored_bytes_per_view
from eupe.models.encoder import encoder_layers, encoder_spec
from eupe.models.encoder_spec import EncoderSpec, load_encoder_spec
from eupe.models.outside import require_trust
from eupe.models.pretrained import has_tag, pretrained_licence
from eupe.pipeline.inputs import Inputs
from eupe.pipeline.planned_steps import PlannedStep
from eupe.pipeline.recipe import Problems
from eupe.pipeline.steps import RUN, TUNED, Ref, Word
from eupe.store import open_store
from eupe.store.layout import StoreSpec
from eupe.store.precision import FP16
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.run_adapter import OWN_LICENCE, as_teacher
from eupe.teachers.spec import TeacherSpec
from eupe.train.advice import passes
from eupe.train.config import TrainConfig
from eupe.train.option_files import configs_given
from eupe.train.run_spec import is_pretrained


@dataclass(frozen=True, kw_only=True)
class StoreCost:
    """The estimated cost of a store."""

    num_images: int | None
    """Number of pictures; None if unknown."""
    views_per_image: int
    bytes_per_view: float
    """Bytes of one view over all sizes."""
    sizes: tuple[int, ...]
    at_most: bool
    """The bytes are an upper bound: pixels are kept, which count uncompressed, or the precision counts as fp16, because
    it is chosen by measurement or has no nominal share."""

    @property
    def num_views(self) -> int | None:
        return None if self.num_images is None else self.num_images * self.views_per_image

    @property
    def num_bytes(self) -> float | None:
        return None if self.num_views is None else self.num_views * self.bytes_per_view


@dataclass(frozen=True, kw_only=True)
class TrainCost:
    """The estimated cost of a training run; None for a value that is unknown."""

    steps: int | None
    batch_size: int | None
    bytes_per_view: float
    """Bytes read per view over all targets, each at one of its sizes."""
    num_stored: int | None
    """Number of views in the first target, including those held out."""

    @property
    def passes(self) -> float | None:
        """Return the mean number of times that training sees a stored view."""
        if self.num_views is None or self.num_stored is None:
            return None
        return passes(self.num_views, self.num_stored)

    @property
    def num_views(self) -> int | None:
        return None if self.steps is None or self.batch_size is None else self.steps * self.batch_size

    @property
    def num_bytes(self) -> float | None:
        return None if self.num_views is None else self.num_views * self.bytes_per_view


Cost = StoreCost | TrainCost


def _cost(spec: StoreSpec, num_images: int | None) -> StoreCost:
    """Return the estimated cost of a store; the corpus in its spec is not used."""
    at_most = "asked" in spec.fidelity or bool(set(spec.precision.values()) - set(NOMINAL_SHARES))
    precision = dict.fromkeys(spec.tokens, FP16) if at_most else spec.precision
    pixels = sum(3 * size * size for size in spec.sizes) if spec.pixels else 0
    return StoreCost(
        num_images=num_images,
        views_per_image=spec.num_views,
        bytes_per_view=stored_bytes_per_view(spec, precision)[1] + pixels,
        sizes=spec.sizes,
        at_most=at_most or bool(pixels),
    )


class Costs:
    """Estimates of the steps, made in order; errors from teachers and students become problems of the recipe."""

    def __init__(self, inputs: Inputs, num_images: int | None, problems: Problems) -> None:
        self._inputs = inputs
        self._num_images = num_images
        self._problems = problems
        self._students: dict[str, EncoderSpec] = {}
        self._stores: dict[str, StoreCost] = {}
        self._specs: dict[str, StoreSpec] = {}
        self._failed: set[str] = set()
        self.origins: list[Origin] = []
        """What the students come from besides one another: teachers and weights, in the order of the steps."""

    def of(self, planned: PlannedStep) -> Cost | None:
        """Return the cost of a step; None if it makes neither a store nor a run, or cannot be estimated."""
        step = planned.step
        # a step that needs a failed one is skipped, so that only the cause is reported
        if step.makes is None or self._failed & set(step.needs):
            self._failed |= {step.name} if step.makes else set()
            return None
        params = step.verb.parsed(planned.words[len(step.verb.name.split()) :])
        try:
            if step.makes == TUNED:
                self._start(params)
                return None
            if step.makes == RUN:
                self._students[step.name] = self._student(planned, params)
                return self._run(planned, params)
            make = self._extracted if step.verb.name == "extract" else self._converted
            self._specs[step.name], num_images = make(planned, params)
            self._stores[step.name] = _cost(self._specs[step.name], num_images)
            return self._stores[step.name]
        except EupeError as error:
            self._problems.add(f"steps.{step.name}.{step.verb.name}", str(error))
            self._failed.add(step.name)
            return None

    def _extracted(self, planned: PlannedStep, params: Mapping[str, Any]) -> tuple[StoreSpec, int | None]:
        """Return the spec of an extraction's store, without a corpus, and the number of its pictures if known."""
        teacher = self._teacher(planned, params["teacher"][0])
        if not isinstance(planned.step.options["teacher"][0], Ref):
            self._note(teacher.name, teacher.licence)
        sizes = tuple(sorted(set(params["sizes"] or ())))
        tokens = tuple(params["tokens"].split(","))
        layers = [number for words in params["layers"] or () for number in parse_layers(words)]
        views = parse_views(
            params["views"],
            seed=params["seed"],
            scale=params["scale"],
            ratio=params["ratio"],
            photometric=params["photometric"],
        )
        spec = paper_spec(
            teacher,
            views=views,
            sizes=sizes,
            tokens=tokens,
            precision=params["precision"],
            grid=params["grid"],
            layers=layers,
            shapes=self._layers(planned) if layers else [],
            pixels=params["pixels"],
        )
        fidelity = {} if params["fidelity"] is None else {"asked": params["fidelity"]}
        return replace(spec, fidelity=fidelity), self._count(planned, params)

    def _layers(self, planned: PlannedStep) -> list[LayerShape]:
        """Return the shapes of a teacher's layers if an earlier step trains it; its run may not be there yet."""
        word = planned.step.options["teacher"][0]
        if not isinstance(word, Ref):
            return []
        student = self._students[word.step]
        return encoder_layers(student.arch, student.size)

    def _converted(self, planned: PlannedStep, params: Mapping[str, Any]) -> tuple[StoreSpec, int | None]:
        """Return the same of a store that is converted from an earlier step's, or from one outside the pipeline.

        Raises: ConfigError if that store has less than what is requested.
        """
        (word,) = planned.step.options["path"]
        if isinstance(word, Ref):
            before, num_images, where = self._specs[word.step], self._stores[word.step].num_images, f"step {word.step}"
        else:
            before = open_store(word).spec
            num_images, where = before.num_samples, word
        return converted_spec(before, params["precision"], params["grid"], where=where), num_images

    def _teacher(self, planned: PlannedStep, words: str) -> TeacherSpec:
        (word,) = planned.step.options["teacher"]
        return as_teacher(self._students[word.step], words) if isinstance(word, Ref) else resolve_teacher(words)

    def _start(self, params: Mapping[str, Any]) -> None:
        """Note the library's weights that a fine-tuning starts from, if any."""
        subject = params["subject"]
        if params["pretrained"] or has_tag(subject):
            self._note(subject, pretrained_licence(subject))

    def _note(self, name: str, licence: str) -> None:
        """Note a teacher or other weights; in place of a run, what is behind it."""
        self.origins += origins_behind(name, Path(name)) if licence == OWN_LICENCE else [Origin(name, licence)]

    def _count(self, planned: PlannedStep, params: Mapping[str, Any]) -> int | None:
        limit = params["limit"]
        counted = None
        if not planned.missing:
            pictures = self._inputs.pictures(params["corpus"])
            counted = pictures.count(include=params["include"] or (), exclude=params["exclude"] or (), limit=limit)
        if counted is None and self._num_images is not None:
            return min(self._num_images, limit or self._num_images)
        return counted

    def _run(self, planned: PlannedStep, params: Mapping[str, Any]) -> TrainCost:
        config, targets = self._config(planned, params)
        if config.init is not None and not isinstance(planned.step.options.get("init", (None,))[0], Ref):
            self._note(str(config.init), OWN_LICENCE if is_run(config.init) else f"{UNKNOWN}: a file does not say")
        elif is_pretrained(config):
            self._note(config.student, pretrained_licence(config.student))
        steps = config.steps or self._steps(targets[0], config.epochs or 1.0, config.holdout, config.batch_size)
        bytes_per_view = sum(self._bytes_read(word) for word in targets)
        stored = self._stored_views(targets[0])
        return TrainCost(steps=steps, batch_size=config.batch_size, bytes_per_view=bytes_per_view, num_stored=stored)

    def _config(self, planned: PlannedStep, params: Mapping[str, Any]) -> tuple[TrainConfig, Sequence[Word]]:
        """Return the configuration and the targets of a run.

        Raises: ConfigError for options that exclude each other.
        """
        (config,) = configs_given(recipe=params["recipe"], config=params["config"], given=params)
        return config, planned.step.options.get("targets") or [str(path) for path in config.targets]

    def _student(self, planned: PlannedStep, params: Mapping[str, Any]) -> EncoderSpec:
        """Return the spec of the given architecture, or of the run that the student starts from."""
        config, targets = self._config(planned, params)
        (first,) = planned.step.options.get("init", (None,))
        arch = config.student
        if not arch:
            assert first is not None
            arch = (self._students[first.step] if isinstance(first, Ref) else load_encoder_spec(Path(first))).arch
        require_trust(arch, "this recipe")
        return encoder_spec(arch, (config.size or self._sizes(targets[0]))[0])

    def _sizes(self, target: Word) -> tuple[int, ...]:
        return self._stores[target.step].sizes if isinstance(target, Ref) else open_store(target).spec.sizes

    def _bytes_read(self, target: Word) -> float:
        """Return the bytes of one view at one of the store's sizes."""
        if isinstance(target, Ref):
            cost = self._stores[target.step]
            return cost.bytes_per_view / len(cost.sizes)
        store = open_store(target)
        return store.stored_bytes / (store.spec.num_samples * store.spec.num_views * len(store.spec.sizes))

    def _steps(self, target: Word, epochs: float, holdout: float, batch_size: int) -> int | None:
        """Return about how many steps the passes over the training views take; None if unknown."""
        num_views = self._stored_views(target)
        return None if num_views is None else max(1, round(epochs * (num_views * (1 - holdout) // batch_size)))

    def _stored_views(self, target: Word) -> int | None:
        if isinstance(target, Ref):
            return self._stores[target.step].num_views
        spec = open_store(target).spec
        return spec.num_samples * spec.num_views
