"""The batches of a run, loaded ahead of their use: each is a pure function of (spec, step, worker)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from eupe.common.prefetch import map_ahead
from eupe.train.config import TrainConfig, parse_mix
from eupe.train.layers import LAST, pairs_of
from eupe.train.log import Rates
from eupe.train.parallel import World
from eupe.train.run_spec import RunSpec, begun_method, holdout_by, method_of
from eupe.train.sampling import Mix, Sampler
from eupe.train.targets import Batch, Request, TargetSet, open_targets

PREFETCH_BATCHES = 3
SIZES = 0x512E5
"""Constant that sets the draws of sizes apart from other draws with the same seed."""


def open_corpora(config: TrainConfig) -> list[TargetSet]:
    """Open the targets, then the mixed-in corpora.

    Raises: StoreError, ConfigError, CorpusError.
    """
    mixes = parse_mix(config.mix, num_targets=len(config.targets))
    # a run that was begun under an older method keeps that method's held-out pictures
    by = holdout_by(begun_method(config.out))
    named = [*config.targets, *(() if config.corpus is None else (config.corpus,))]
    return [
        open_targets(config.targets, corpus=config.corpus, holdout=config.holdout, holdout_by=by),
        *(
            open_targets(mixed.stores, corpus=None, holdout=config.holdout, holdout_by=by, named=named)
            for mixed in mixes
        ),
    ]


def mix_of(spec: RunSpec, corpora: Sequence[TargetSet]) -> Mix:
    """Build the mix that decides which corpus, and which of its views, each step takes."""
    shares = [float(mixed["share"]) for mixed in spec.mix]
    seed = spec.config["seed"]
    samplers = tuple(
        Sampler(
            samples=corpus.training,
            num_views=corpus.num_views,
            seed=seed,
            views=spec.config["views"],
            parts=corpus.training_parts,
        )
        for corpus in corpora
    )
    return Mix(samplers=samplers, shares=(1 - sum(shares), *shares), seed=seed)


def training_requests(
    spec: RunSpec, corpora: Sequence[TargetSet], world: World, *, first_step: int, num_microbatches: int
) -> Iterator[Request]:
    """Yield what one worker trains on from a step to the end, each step in `num_microbatches` microbatches."""
    mix, config = mix_of(spec, corpora), spec.config
    layers = tuple(tuple(sorted({p.layer for p in pairs_of(target)} - {LAST})) for target in spec.targets)
    choices, colours_by_view = [config["size"], *spec.target_sizes], method_of(spec) > 1
    for step in range(first_step, spec.total_steps):
        corpus, views = mix.batch(step, batch_size=config["batch_size"], rank=world.rank, world=world.size)
        size, *target_sizes = draw_sizes(config["seed"], step, choices)
        length = len(views) // num_microbatches
        for start in range(0, len(views), length):
            yield Request(
                views=views[start : start + length],
                size=size,
                target_sizes=tuple(target_sizes),
                layers=layers,
                corpus=corpus,
                step=step,
                first=world.rank * len(views) + start,
                colours_seed=config["seed"] if config["photometric"] == "eupe" else None,
                colours_by_view=colours_by_view,
            )


def draw_sizes(seed: int, step: int, choices: Sequence[Sequence[int]]) -> list[int]:
    """Draw one of each choice, independently of each other and the same on every worker."""
    generator = np.random.Generator(np.random.Philox(key=[seed ^ SIZES, step]))
    return [sizes[int(generator.integers(len(sizes)))] for sizes in choices]


def stream(corpora: Sequence[TargetSet], requests: Iterable[Request], device: torch.device) -> Iterator[Batch]:
    """Yield batches in order, on a device, loaded and copied ahead of their use.

    Raises (while iterating): as `TargetSet.load` does.
    """
    threads = max(corpus.corpus_root.threads(os.cpu_count() or 1) for corpus in corpora)
    # a stream of its own, so that copies overlap with training
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    # two pools, because loaders wait for decoders: in a single one they could take all threads
    with ThreadPoolExecutor(threads) as decoders, ThreadPoolExecutor(PREFETCH_BATCHES) as loaders:

        def load(request: Request) -> tuple[Batch, torch.cuda.Event | None]:
            batch = corpora[request.corpus].load(request, pool=decoders)
            if copies is None:
                return batch, None
            with torch.cuda.stream(copies):
                return batch.pinned().to(device), copies.record_event()

        # one less ahead, because the batch in use is one of PREFETCH_BATCHES
        for batch, copied in map_ahead(loaders, load, requests, ahead=PREFETCH_BATCHES - 1):
            if copied is not None:
                _hand_over(batch, copied, torch.cuda.current_stream(device))
            yield batch


def _hand_over(batch: Batch, copied: torch.cuda.Event, user: torch.cuda.Stream) -> None:
    """Make a stream wait for a copy, and keep the copy's memory until that stream has used it."""
    user.wait_event(copied)
    for tensor in batch.tensors():
        # it belongs to the copy stream, which could reuse its memory while `user` still reads it
        tensor.record_stream(user)


class Meter:
    """A clock for training: time spent on steps, and the share of it spent waiting for data."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._began = self._last = time.monotonic()
        self._waited = self._waited_before = 0.0
        self._images = self._images_before = 0

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the same batches, and measure how long each is waited for."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - asked
            if batch is None:
                return
            self._images += len(batch.keys) * self._world_size
            yield batch

    def rates(self) -> Rates:
        """Return the rates since the last call; to be called at the end of a step."""
        now = time.monotonic()
        elapsed = now - self._last
        rates = Rates((self._images - self._images_before) / elapsed, (self._waited - self._waited_before) / elapsed)
        self._last, self._waited_before, self._images_before = now, self._waited, self._images
        return rates

    def totals(self) -> tuple[float, Rates]:
        """Return the seconds and the rates since the start."""
        seconds = time.monotonic() - self._began
        return seconds, Rates(self._images / seconds, self._waited / seconds)
