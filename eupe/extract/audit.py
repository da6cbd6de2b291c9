"""Audit of a store: computes some samples again and compares them with the stored features.

Both sides are coded alike: features computed now are encoded and decoded in the store's precision. The same teacher
then gives a cosine of one at any precision, and any difference is due to the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from eupe.common.compute import compute_dtype, dtype_name, pick_device
from eupe.common.cores import num_cores
from eupe.common.storage import AnyPath
from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError, CorpusError, DriftError
from eupe.extract.load import PartTask
from eupe.extract.parts import samples_of
from eupe.extract.provenance import (
    require_dtype,
    require_same_teacher,
    require_unchanged,
    stored_pictures,
    stored_teacher,
    weights_file,
)
from eupe.extract.worker import PartExtractor
from eupe.store import Store, open_store
from eupe.store.places import with_places
from eupe.store.precision import decode, encode
from eupe.store.stats import ChannelStats
from eupe.store.writer import Part
from eupe.teachers.teacher import Teacher, file_digest, load_teacher, weights_digest

COMPARED_AT_ONCE = 16
"""Views compared at once; on more cores, one per core."""
SEED = 0

Progress = Callable[[int, int], None]
"""Function called with (done, total)."""


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """The options of one audit, as on the command line."""

    store: AnyPath
    samples: int = 32
    corpus: AnyPath | None = None
    """Current folder of the pictures; by default the one recorded in the store."""
    weights: Path | None = None
    """Local weights in place of the hub's; must be the file that the store was made with."""
    weights_key: str | None = None
    """Key of the teacher's tensors among others in the weights file; found automatically if only one fits."""
    teacher: str | None = None
    """Current name or folder of the teacher; by default the one recorded in the store."""
    dtype: str | None = None
    """`auto`, `fp32`, `bf16` or `fp16`; by default the dtype that the store was computed in."""


@dataclass(frozen=True)
class Cosines:
    """Cosines between stored tokens and the same tokens computed now."""

    mean: float
    p5: float
    """5th percentile: 95% of the tokens are at least this near."""
    least: float

    @classmethod
    def of(cls, cosines: NDArray[np.float64]) -> Cosines:
        return cls(float(cosines.mean()), float(np.percentile(cosines, 5)), float(cosines.min()))


@dataclass(frozen=True)
class Drift:
    """The drift of one kind of token at one size."""

    path: str
    precision: str
    num_tokens: int
    standardised: Cosines
    """Cosines of tokens standardised per channel by the store's mean and standard deviation, as in the loss."""
    plain: Cosines


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit."""

    store: str
    num_samples: int
    num_views: int
    stored_dtype: str
    computed_dtype: str
    changed_views: int
    """Views whose pixels differ from those that the stored features were computed from."""
    drifts: tuple[Drift, ...]


def audit(config: AuditConfig, *, progress: Progress = lambda done, of: None) -> AuditReport:
    """Compute some samples of a store again on this machine, and compare all their views.

    Args:
        progress: called with (views computed, total views).
    Raises: an EupeError if something that is needed is not available.
    """
    if config.samples < 1:
        raise ConfigError(f"--samples must be at least 1, got {config.samples}")
    store = open_store(config.store)
    stats = {path: _stats(store, path) for path in store.spec.feature_paths}
    picked = with_places(store, pick_samples(store, config.samples))
    pictures = stored_pictures(store, config.corpus)
    require_unchanged(pictures, samples_of(picked))
    teacher = _load(config, store)
    views = ViewSpec.from_json(store.spec.views)
    cores = num_cores()
    at_once = max(COMPARED_AT_ONCE, cores)
    # on a CPU there is a batch on each core
    batch_size = at_once if teacher.device.type == "cuda" else -(-at_once // cores)
    extractor = PartExtractor(
        teacher, store.spec, corpus_root=pictures, views=views, batch_size=batch_size, cores=cores
    )
    batches: list[Compared] = []
    done = 0
    for rows in _batches(store, picked, at_once):
        batches.append(_compare(store, stats, extractor, rows))
        done += len(rows)
        progress(done * store.spec.num_views, len(picked) * store.spec.num_views)
    return AuditReport(
        store=str(store.path),
        num_samples=len(picked),
        num_views=len(picked) * store.spec.num_views,
        stored_dtype=store.spec.teacher["dtype"],
        computed_dtype=dtype_name(teacher.dtype),
        changed_views=sum(batch.changed_views for batch in batches),
        drifts=tuple(_drift(store, path, batches) for path in store.spec.feature_paths),
    )


def require_agreement(report: AuditReport, least: float) -> None:
    """Raise DriftError if more than 5% of any kind of token, standardised, have a cosine below `least`."""
    # `not >=` rather than `<`, so that NaN counts as drift
    drifted = [drift for drift in report.drifts if not drift.standardised.p5 >= least]
    if drifted:
        worst = min(drifted, key=lambda drift: drift.standardised.p5)
        raise DriftError(
            f"{report.store} differs from what its teacher computes here: the 5th percentile of the cosines of "
            f"{worst.path} is {worst.standardised.p5:.6f}, but at least {least:g} is required (stored in "
            f"{report.stored_dtype}, computed in {report.computed_dtype}, {report.changed_views} of "
            f"{report.num_views} views have different pixels)"
        )


def pick_samples(store: Store, count: int) -> pa.Table:
    """Return up to `count` random rows of `store.samples` that have features; the same rows each time.

    Raises: CorpusError if there is none.
    """
    valid = store.samples.filter(pc.equal(store.samples["status"], "ok"))
    if not len(valid):
        raise CorpusError(f"no sample of {store.path} has features; see `eupe store info {store.path}`")
    chosen = np.random.default_rng(SEED).permutation(len(valid))[:count]
    return valid.take(np.sort(chosen))


def _stats(store: Store, path: str) -> ChannelStats:
    size, _, kind = path.partition("/")
    return store.stats(int(size), kind)


def _load(config: AuditConfig, store: Store) -> Teacher:
    """Load the teacher that made the store.

    Raises: TeacherError; SpecMismatchError; ConfigError for a dtype that this machine cannot compute in.
    """
    spec = stored_teacher(store, config.teacher, config.weights)
    weights = weights_file(spec, config.weights)
    if weights is not None:
        require_same_teacher(store, spec, file_digest(weights, config.weights_key))
    if config.dtype is None:
        require_dtype(store)
    device = pick_device()
    dtype = compute_dtype(config.dtype or store.spec.teacher["dtype"], device)
    teacher = load_teacher(
        spec, weights=config.weights, key=config.weights_key, device=device, dtype=dtype, sizes=store.spec.sizes
    )
    if weights is None:
        require_same_teacher(store, spec, weights_digest(teacher.module))
    return teacher


def _batches(store: Store, picked: pa.Table, at_once: int) -> list[pa.Table]:
    """Split rows into batches of `at_once` views each."""
    count = max(1, at_once // store.spec.num_views)
    return [picked.slice(start, count) for start in range(0, len(picked), count)]


@dataclass(frozen=True)
class Compared:
    """Cosines of some samples' tokens, by path."""

    changed_views: int
    standardised: Mapping[str, NDArray[np.float64]]
    """Array path to the cosines [tokens]."""
    plain: Mapping[str, NDArray[np.float64]]
    """Array path to the cosines [tokens]."""


def _compare(
    store: Store,
    stats: Mapping[str, ChannelStats],
    extractor: PartExtractor,
    picked: pa.Table,
) -> Compared:
    """Compute some samples again and compare all their tokens with the stored ones."""
    part = extractor.compute(PartTask(0, tuple(samples_of(picked))))
    _require_features(store, part)
    k = store.spec.num_views
    rows, views = np.repeat(picked["row"].to_numpy(), k).tolist(), np.tile(np.arange(k), len(picked)).tolist()
    digests = store.read_digests(rows, views)
    standardised, plain = {}, {}
    for path, values in part.features.items():
        stored = store.read_tokens(path, rows, views)
        then = _vectors(stored.decode())
        now = _vectors(
            decode(encode(values, stored.precision, stored.calibration), stored.precision, stored.calibration)
        )
        std = np.where(stats[path].std > 0, stats[path].std, 1.0)
        standardised[path] = _cosines((then - stats[path].mean) / std, (now - stats[path].mean) / std)
        plain[path] = _cosines(then, now)
    return Compared(int((digests != part.digests.reshape(-1)).sum()), standardised, plain)


def _require_features(store: Store, part: Part) -> None:
    """Raise CorpusError if a sample that has features in the store failed now."""
    failed = [row for row in part.rows if row.error is not None]
    if failed:
        raise CorpusError(f"{failed[0].key} has features in {store.path}, but fails now: {failed[0].error}")


def _vectors(tokens: NDArray[Any]) -> NDArray[np.float64]:
    """Return tokens [..., D] as float64 vectors [T, D]."""
    return np.ascontiguousarray(tokens).reshape(-1, tokens.shape[-1]).astype(np.float64)


def _cosines(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosines of two matrices row by row: 1 for equal rows, also of zeros; 0 if one of them is zero."""
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    product = norms[0] * norms[1]
    same = (a == b).all(axis=1)
    return np.where(same, 1.0, np.einsum("td,td->t", a, b) / np.where(product > 0, product, 1.0))


def _drift(store: Store, path: str, batches: list[Compared]) -> Drift:
    standardised, plain = (
        np.concatenate([by_path[path] for by_path in sides])
        for sides in ([b.standardised for b in batches], [b.plain for b in batches])
    )
    return Drift(path, store.spec.precision_of(path), len(plain), Cosines.of(standardised), Cosines.of(plain))
