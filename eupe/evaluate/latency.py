"""Cost of an encoder: parameters, FLOPs, and the time of a forward pass on this machine's CPU.

Weights are random, because cost does not depend on them, and pixels are zeros. Time and FLOPs cover the encoder from
normalised pixels to summary and dense tokens, in float32, without adapter heads and without decoding.

A FLOP is one multiplication or one addition, so a multiply-add counts as two. Matrix products, convolutions and
attention are counted; norms, activations and other element-wise operations are not. Papers often report multiply-adds
(MACs), which are half as many, as FLOPs.

Source: EUPE, arXiv 2603.22387, reports parameters, FLOPs and the latency on a CPU at 256 and 512 px.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eupe.common.cores import cpu_name
from eupe.errors import ConfigError
from eupe.evaluate.result import Result
from eupe.evaluate.subject import EncoderSubject, StoreSubject, Subject
from eupe.teachers.teacher import build_teacher

TASK = "latency"
SIZES = (256, 512)
WARMUP = 3
"""Untimed passes before the timed ones."""

Forward = Callable[[Tensor], object]
"""Function of normalised pixels [B, 3, S, S]."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Settings for timing forward passes."""

    batch_size: int = 1
    threads: int | None = None
    """Threads that torch computes with; torch's own number if None."""
    repeats: int = 30

    def __post_init__(self) -> None:
        """Raise ConfigError if a setting is out of range."""
        if self.batch_size < 1 or self.repeats < 1:
            raise ConfigError(
                f"--batch-size and --repeats must be at least 1, got {self.batch_size} and {self.repeats}"
            )
        cores = os.cpu_count() or 1
        if self.threads is not None and not 1 <= self.threads <= cores:
            raise ConfigError(f"--threads must be between 1 and the {cores} cores of this machine, got {self.threads}")


def latency(
    subject: Subject,
    *,
    sizes: Sequence[int] = SIZES,
    timing: Timing = Timing(),
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> list[Result]:
    """Return a result for each size, rounded down to a multiple of the patch.

    Raises: ConfigError if the subject is not an encoder or a size is below 1; TeacherError, RunError if it cannot be
        built.
    """
    if isinstance(subject, StoreSubject):
        teacher = subject.store.spec.teacher["name"]
        raise ConfigError(f"{subject.name} is a store, which has no model to time; give its teacher, {teacher}")
    if not isinstance(subject, EncoderSubject):
        raise ConfigError(f"{subject.name} is not an encoder, so it has no latency; give a run, a teacher or timm:ARCH")
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--size must be at least 1 px, got {', '.join(map(str, sizes)) or 'none'}")
    results = []
    for done, size in enumerate(sizes, start=1):
        results.append(_judge(subject, size, timing))
        on_step(done, len(sizes))
    return results


def _judge(subject: EncoderSubject, asked: int, timing: Timing) -> Result:
    size = subject.size(asked)
    teacher = build_teacher(subject.spec, size=size)
    flops = count_flops(teacher.encode, torch.zeros(1, 3, size, size))
    with _threads(timing.threads):
        threads = torch.get_num_threads()
        seconds = time_passes(teacher.encode, torch.zeros(timing.batch_size, 3, size, size), timing.repeats)
    per_picture = [1000 * each / timing.batch_size for each in seconds]
    low, middle, high = quartiles(per_picture)
    return Result(
        task=TASK,
        subject=subject.name,
        kind=subject.kind,
        scores={
            "ms": middle,
            "ms_p25": low,
            "ms_p75": high,
            "parameters": float(sum(parameter.numel() for parameter in teacher.module.parameters())),
            "gflops": flops / 1e9,
            "gmacs": flops / 2e9,
        },
        lower_is_better=True,
        protocol={
            "asked_size": asked,
            "size": size,
            "batch_size": timing.batch_size,
            "threads": threads,
            "repeats": timing.repeats,
            "dtype": "fp32",
            "device": "cpu",
            "cpu": cpu_name(),
            "torch": torch.__version__,
        },
        data={},
    )


def count_flops(forward: Forward, pixels: Tensor) -> int:
    """Return the FLOPs of one pass."""
    # FlopCounterMode does not count the CPU's fused attention; the MATH backend runs it as matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        forward(pixels)
    return int(counter.get_total_flops())


@torch.inference_mode()
def time_passes(forward: Forward, pixels: Tensor, repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` passes on a CPU, after `WARMUP` passes that do not count."""
    seconds = []
    for number in range(WARMUP + repeats):
        began = time.perf_counter()
        forward(pixels)
        if number >= WARMUP:
            seconds.append(time.perf_counter() - began)
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 25th percentile, the median and the 75th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Make torch compute with this number of threads while the context is open; None changes nothing."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
