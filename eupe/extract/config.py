"""The options of an extraction, and the checks that need nothing but the options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from eupe.corpus.choice import AS_FOUND, Choice
from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError
from eupe.place import Where
from eupe.store.layout import KINDS

STORES = Path("store")
"""The directory for stores without an explicit place."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """The options of one extraction, as on the command line."""

    teacher: str
    """Registry name, `timm:ARCH`, `hf:REPO_OR_DIR`, `open_clip:ARCH[@TAG]`, or a training run's directory."""
    corpus: Where
    """A folder of pictures or an index; also `s3://...` or `gs://...`."""
    out: Where | None = None
    """The store: a folder, `s3://...` or `gs://...`. By default the store in `store/` with the same specification,
    whatever its name, or else `store/TEACHER.zarr`."""
    weights: Path | None = None
    """Local weights in place of the hub's."""
    weights_key: str | None = None
    """Key of the teacher's tensors among others in the weights file; found automatically if only one fits."""
    sizes: tuple[int, ...] = ()
    """Sides of the square inputs in pixels; by default the teacher's native size."""
    views: ViewSpec = field(default_factory=ViewSpec)
    tokens: tuple[str, ...] = KINDS
    precision: str = "fp16"
    """`fp16`, `bitround:B`, `int8`, or one for each kind of token: `dense=int8,summary=fp16`."""
    fidelity: float | None = None
    """Lower bound for the 5th percentile of the cosines of standardised tokens before and after storage; the cheapest
    precision that keeps it replaces `precision`."""
    grid: int | None = None
    """Cells along one side to which dense maps are pooled; by default the teacher's own grid."""
    pixels: bool = False
    """Keep the views themselves as well, so that the store trains without the corpus."""
    dtype: str = "auto"
    """The dtype that the teacher computes in: `auto`, `fp32`, `bf16` or `fp16`."""
    batch_size: int | None = None
    """Views per forward pass; by default the fastest, measured when the store is made."""
    workers: int | None = None
    """Number of Ray actors, each with all teachers; by default one per GPU, or one without GPUs."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; by default an even share of at most one GPU."""
    ray_address: str | None = None
    """Ray cluster to join, `auto` or `ray://...`; by default a new Ray on this machine."""
    limit: int | None = None
    """Take only this many pictures, the first ones of the corpus."""
    include: tuple[str, ...] = ()
    """Patterns of keys: take only pictures that match one of them; see `Corpus.pick`."""
    exclude: tuple[str, ...] = ()
    """Patterns of keys: take no picture that matches one of them."""
    choice: Choice = AS_FOUND
    """Which pictures and labels to take if tars or tables hold several."""
    shuffle: bool = False
    """Take the pictures in an order drawn with the views' seed; with a limit, a random sample."""
    retry_failed: bool = False
    """Make the parts again that hold pictures without features."""


def require_counts(config: ExtractConfig) -> None:
    """Raise ConfigError for a count that no job can have."""
    for name, value in (
        ("--batch-size", config.batch_size),
        ("--workers", config.workers),
        ("--limit", config.limit),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if config.gpus_per_worker is not None and config.gpus_per_worker < 0:
        raise ConfigError(f"--gpus-per-worker must be at least 0, got {config.gpus_per_worker:g}")
