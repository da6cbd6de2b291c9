"""What a fine-tuning begins with: a run's student, a library's weights, or random ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from eupe.errors import ConfigError
from eupe.evaluate.licences import UNKNOWN, Origin, origins
from eupe.finetune.config import FinetuneConfig
from eupe.models.checkpoints import weights_digest
from eupe.models.encoder import Encoder, build_encoder, check_student, load_encoder
from eupe.models.encoder_spec import EncoderSpec
from eupe.models.pretrained import has_tag
from eupe.train.init import init_from_library, laid_out
from eupe.train.run_spec import finished_run_spec

WEIGHTS, SCRATCH = "weights", "scratch"
USUAL_SIZE = 224


@dataclass(frozen=True)
class Start:
    """A network, and where its weights come from."""

    name: str
    """`weights` or `scratch`."""
    words: str
    make: Callable[[int], Encoder]
    """Function from a seed to the encoder; with weights, it is the same for all seeds."""
    digest: str
    """sha256 of its weights; the network's name if they are random."""
    learned_from: tuple[Origin, ...] = ()


def open_starts(config: FinetuneConfig) -> list[Start]:
    """Return what is fine-tuned: the subject, and random weights of its network if they are asked for.

    Raises: ConfigError if there is no such student, it has no weights, or does not take the size; RunError if the run
        is not finished, or damaged.
    """
    place = Path(config.subject)
    if place.is_dir():
        if config.pretrained:
            raise ConfigError(f"--pretrained is for a student's name; {place} is a run, which has weights of its own")
        first = _of_run(place, config.size)
    elif config.pretrained or has_tag(config.subject):
        first = _of_library(config.subject, config.size or USUAL_SIZE)
    else:
        if config.from_scratch:
            raise ConfigError(
                f"--from-scratch compares weights with random ones, and {config.subject} has none; give a run, "
                "NAME.TAG or --pretrained, or leave --from-scratch out"
            )
        size = config.size or USUAL_SIZE
        return [_random(config.subject, size, None)]
    spec = first.make(0).spec
    check_student(spec.arch, [spec.size], views=config.batch_size)
    return [first, *([_random(spec.arch, spec.size, spec)] if config.from_scratch else [])]


def _of_run(run: Path, size: int | None) -> Start:
    spec = finished_run_spec(run)
    trained = load_encoder(run)
    own = trained.spec.size
    encoder = trained if size in (None, own) else laid_out(trained, size or own, source=str(run))
    digest = weights_digest(encoder.model)
    return Start(WEIGHTS, f"the student of {run}", _copies(encoder), digest, tuple(origins(run, spec)))


def _of_library(name: str, size: int) -> Start:
    with torch.random.fork_rng(devices=[]):
        encoder = build_encoder(name, size=size)
    found = init_from_library(encoder)
    origin = Origin(found.source, found.licence or UNKNOWN)
    return Start(WEIGHTS, found.source, _copies(encoder), weights_digest(encoder.model), (origin,))


def _copies(encoder: Encoder) -> Callable[[int], Encoder]:
    return lambda seed: copy.deepcopy(encoder)


def _random(arch: str, size: int, known: EncoderSpec | None) -> Start:
    check_student(arch, [size], views=2)

    def make(seed: int) -> Encoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_encoder(arch, size=size, known=known)

    return Start(SCRATCH, "random weights", make, f"{arch} {size}")
