"""What an extraction is asked for, and what can be wrong with it by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from eupe.corpus.choice import AS_FOUND, Choice
from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError
from eupe.place import Where
from eupe.store.layout import KINDS

STORES = Path("store")
"""The directory of stores that have not been given a place."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """One extraction, as asked for on the command line."""

    teacher: str
    """Registry name, `timm:ARCH`, `hf:REPO_OR_DIR`, `open_clip:ARCH[@TAG]`, or a training run's directory."""
    corpus: Where
    """A folder of pictures or an index; also `s3://...` or `gs://...`."""
    out: Where | None = None
    """The store: a folder, `s3://...` or `gs://...`. Where not given: the one in `store/` that was made to the same
    specification under whatever name, or `store/TEACHER.zarr`."""
    weights: Path | None = None
    """Local weights in place of the hub's."""
    weights_key: str | None = None
    """Where among others in the weights file the teacher's tensors are; found by itself if only one place fits."""
    sizes: tuple[int, ...] = ()
    """Sides of the square input in pixels; the teacher's native size where none is given."""
    views: ViewSpec = field(default_factory=ViewSpec)
    tokens: tuple[str, ...] = KINDS
    precision: str = "fp16"
    """`fp16`, `bitround:B`, `int8`, or one for each kind: `dense=int8,summary=fp16`."""
    fidelity: float | None = None
    """In place of a precision: the cheapest one whose tokens' cosines, standardised, have this 5th percentile."""
    grid: int | None = None
    """Cells along one side to which dense maps are pooled; the teacher's own where not given."""
    pixels: bool = False
    """Keep the views themselves as well, so that the store trains without the corpus."""
    dtype: str = "auto"
    """`auto`, `fp32`, `bf16` or `fp16`: the teacher's arithmetic."""
    batch_size: int | None = None
    """Views per forward pass; the fastest, found when the store is made, where not given."""
    workers: int | None = None
    """Ray actors with one teacher each; one per GPU, or one, where not given."""
    gpus_per_worker: float | None = None
    """The GPUs shared evenly, one per worker at most, where not given."""
    ray_address: str | None = None
    """`auto` or `ray://...`; a Ray of its own on this machine where not given."""
    limit: int | None = None
    """Only the first pictures of the corpus."""
    include: tuple[str, ...] = ()
    """Patterns of keys; only pictures that match one of them, see `Corpus.pick`."""
    exclude: tuple[str, ...] = ()
    """Patterns of keys; no picture that matches one of them."""
    choice: Choice = AS_FOUND
    """Which pictures and labels to take where tars and tables hold several."""
    shuffle: bool = False
    """Take the pictures in an order drawn by the views' seed; with a limit, a random sample."""
    retry_failed: bool = False
    """Make the parts again that hold pictures without features."""


def require_counts(config: ExtractConfig) -> None:
    """Raises: ConfigError for a number that no job can have."""
    for name, value in (
        ("--batch-size", config.batch_size),
        ("--workers", config.workers),
        ("--limit", config.limit),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if config.gpus_per_worker is not None and config.gpus_per_worker < 0:
        raise ConfigError(f"--gpus-per-worker must be at least 0, got {config.gpus_per_worker:g}")
