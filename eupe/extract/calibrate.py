"""Measurements before a store is made: the fastest batch size, and what each precision keeps of a sample."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eupe.common.compute import is_out_of_memory
from eupe.corpus.index import Corpus
from eupe.errors import ConfigError, TeacherError
from eupe.extract.load import PartTask
from eupe.extract.parts import samples_of
from eupe.extract.worker import single_threads
from eupe.store.layout import DENSE, SUMMARY, StoreSpec, arrays, kind_of, layer_kind, token_of
from eupe.store.precision import CANDIDATES, FP16, INT8, Calibration, Fidelity, cosines, encode
from eupe.store.reader import NOT_FINITE
from eupe.store.shard import chunks_of, encode_chunk
from eupe.store.writer import Part, what_to_do
from eupe.teachers.teacher import Teacher

SAMPLE_VIEWS = 128
"""Views in the sample, at least, unless the corpus has fewer."""
FIRST_BATCH, LARGEST_BATCH = 8, 512
WORTHWHILE = 1.05
"""Speedup in views per second from which a larger batch is taken."""
TRIALS = 3
"""Trials of each batch size; the first one is slower."""
TRIAL_SECONDS = 0.5
"""Expected time beyond which a batch is not tried: the fixed cost of a batch is already small beside it."""


@dataclass(frozen=True)
class Measured:
    """Measurements of the feature arrays on a sample of the corpus, by path."""

    calibrations: Mapping[str, Calibration]
    fidelity: Mapping[str, Mapping[str, Fidelity]]
    """Path to precision to what it keeps."""
    num_views: int


def sample_task(spec: StoreSpec, corpus: Corpus) -> PartTask:
    """Return a task of pictures spread evenly over the corpus, enough for `SAMPLE_VIEWS` views."""
    return PartTask(0, tuple(samples_of(corpus.samples.take(sample_places(len(corpus), spec.num_views)))))


def sample_places(num_samples: int, num_views: int) -> NDArray[np.int64]:
    """Return the places of a sample's pictures in an index; see `sample_task`."""
    count = min(num_samples, -(-SAMPLE_VIEWS // num_views))
    return np.unique(np.linspace(0, num_samples - 1, count).astype(np.int64))


def require_features(spec: StoreSpec, part: Part) -> None:
    """Raise TeacherError or ConfigError, with the reason, if no sample has features."""
    errors = [row.error for row in part.rows if row.error is not None]
    if len(errors) < len(part.rows):
        return
    if any(error.startswith(NOT_FINITE) for error in errors):
        raise TeacherError(
            f"{spec.teacher['name']}: for all pictures that were tried, {NOT_FINITE}; {what_to_do(spec)}"
        )
    raise ConfigError("none of the pictures on which the precision is measured can be read; see `eupe index`")


def measure(
    spec: StoreSpec, features: Mapping[str, NDArray[np.float16]], candidates: Mapping[str, tuple[str, ...]]
) -> Measured:
    """Calibrate each feature array and try precisions on it.

    Args:
        features: path to [samples, views, ...]; NaN for samples that failed.
        candidates: kind of token to the precisions to try.
    """
    calibrations, fidelity = {}, {}
    num_views = 0
    for path, values in features.items():
        valid = values[np.isfinite(values.reshape(len(values), -1)).all(axis=1)]
        assert len(valid), "see require_features"
        num_views = valid.shape[0] * valid.shape[1]
        calibrations[path] = Calibration.of(valid)
        tried = candidates[token_of(kind_of(path))]
        fidelity[path] = {p: _try(spec, path, valid, p, calibrations[path]) for p in tried}
    return Measured(calibrations, fidelity, num_views)


def _try(spec: StoreSpec, path: str, values: NDArray[np.float16], precision: str, calibration: Calibration) -> Fidelity:
    as_if = replace(spec, precision={**spec.precision, token_of(kind_of(path)): precision})
    layout = next(layout for layout in arrays(as_if) if layout.path == path)
    kept = cosines(values.reshape(-1, values.shape[-1]), precision, calibration)
    chunks = chunks_of(encode(values, precision, calibration), layout)
    stored_bytes = sum(len(encode_chunk(chunk, layout)) for chunk in chunks)
    return Fidelity(float(kept.mean()), float(np.percentile(kept, 5)), stored_bytes / values.nbytes)


def candidates(spec: StoreSpec, fidelity: float | None) -> dict[str, tuple[str, ...]]:
    """Return the precisions to try for each kind of token: the requested one, or all if a fidelity is given."""
    return {kind: CANDIDATES if fidelity is not None else (spec.precision[kind],) for kind in spec.tokens}


def settle(spec: StoreSpec, measured: Measured, fidelity: float | None) -> StoreSpec:
    """Return the spec with the chosen precision and the measurements recorded in it.

    Args:
        fidelity: lower bound on the 5th percentile of the tokens' cosines; None to keep the requested precision.
    """
    precision = dict(spec.precision)
    if fidelity is not None:
        precision = {kind: _cheapest(measured, kind, fidelity) for kind in spec.tokens}
    int8 = [path for path in measured.calibrations if precision[token_of(kind_of(path))] == INT8]
    noted: dict[str, Any] = {
        "num_views": measured.num_views,
        "measured": {path: {p: asdict(f) for p, f in tried.items()} for path, tried in measured.fidelity.items()},
    }
    return replace(
        spec,
        precision=precision,
        calibration={path: measured.calibrations[path].to_json() for path in int8},
        fidelity=noted if fidelity is None else {"asked": fidelity, **noted},
    )


def _cheapest(measured: Measured, kind: str, fidelity: float) -> str:
    """Return the precision with the fewest bytes that keeps the fidelity at every size; fp16 always qualifies."""
    tried = [by for path, by in measured.fidelity.items() if token_of(kind_of(path)) == kind]
    kept = [p for p in CANDIDATES if p == FP16 or all(by[p].p5 >= fidelity for by in tried)]
    return min(kept, key=lambda p: sum(by[p].share for by in tried))


def fastest_batch(teacher: Teacher, sizes: Sequence[int], layers: Sequence[int] = ()) -> int:
    """Find the batch size beyond which the device gains little speed, runs out of memory, or takes too long.

    The size is a power of two. The search takes a few seconds, or as long as three passes of a single view.
    """
    if teacher.device.type == "cuda":
        return _fastest_batch(teacher, sizes, layers)
    # on one core, as batches run on a CPU
    with single_threads(1) as core:
        return core.submit(_fastest_batch, teacher, sizes, layers).result()


def _fastest_batch(teacher: Teacher, sizes: Sequence[int], layers: Sequence[int]) -> int:
    best, best_rate, batch = FIRST_BATCH, 0.0, FIRST_BATCH
    try:
        view_s = min(_seconds(teacher, sizes, 1, layers) for _ in range(TRIALS))
        while batch <= LARGEST_BATCH and batch * view_s <= TRIAL_SECONDS:
            view_s = min(_seconds(teacher, sizes, batch, layers) for _ in range(TRIALS)) / batch
            if 1 / view_s < best_rate * WORTHWHILE:
                break
            best, best_rate, batch = batch, 1 / view_s, 2 * batch
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return best


def _seconds(teacher: Teacher, sizes: Sequence[int], batch: int, layers: Sequence[int]) -> float:
    began = time.perf_counter()
    for size in sizes:
        teacher(torch.zeros((batch, size, size, 3), dtype=torch.uint8), layers).dense.sum().item()  # waits for the GPU
    return time.perf_counter() - began


def cosine_to_fp32(teacher: Teacher, pixels: Tensor, layers: Sequence[int] = ()) -> dict[str, float]:
    """Measure how near a teacher's tokens are to its own in float32, view by view over pixels [B, S, S, 3].

    Args:
        layers: numbers of the layers whose maps are stored as well.
    Returns: kind of token to its lowest cosine; empty if there are no views, or no memory for one in float32.
    """
    exactly = replace(teacher, dtype=torch.float32)
    least: dict[str, float] = {}
    try:
        for view in pixels[:, None]:
            exact, fast = exactly(view, layers), teacher(view, layers)
            pairs = {SUMMARY: (exact.summary, fast.summary), DENSE: (exact.dense, fast.dense)}
            pairs |= {layer_kind(number): (exact.layers[number], fast.layers[number]) for number in layers}
            for kind, (a, b) in pairs.items():
                if a is not None and b is not None:
                    # NaN, as after an overflow, must not pass for agreement
                    cosines = torch.nn.functional.cosine_similarity(a, b, dim=-1).nan_to_num(nan=-1.0)
                    least[kind] = min(least.get(kind, 1.0), cosines.min().item())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {}
    return least
