"""The options of an extraction, and the checks that need nothing but the options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from eupe.common.option import PARTS, about, option, wrong_values
from eupe.corpus.choice import AS_FOUND, Choice
from eupe.errors import ConfigError

if TYPE_CHECKING:
    from eupe.common.storage import AnyPath
    from eupe.corpus.views import ViewSpec

STORES = Path("store")
"""The directory for stores without an explicit place."""
WEIGHTS_KEY = (
    "Key of the weights in a file of several models (teacher, ema). Default: found automatically if only one fits."
)


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """The options that say which views to draw, as on the command line; see `parse_views`."""

    views: str = option("center", "center, squash, or rrc:K for K random resized crops per picture.")
    scale: str | None = option(None, "MIN,MAX: a random crop's share of the picture's area.", unset="0.08,1")
    ratio: str | None = option(None, "MIN,MAX: a random crop's width over its height.", unset="3/4 to 4/3")
    photometric: str = option(
        "none", "eupe: random colour jitter, greyscale, blur and solarisation of each view; or none."
    )
    seed: int = option(0, "Seed of the random views and of the order of pictures.")

    def spec(self) -> ViewSpec:
        """Return the rules by which views are drawn.

        Raises: ConfigError if an option is invalid.
        """
        from eupe.corpus.views import parse_views

        return parse_views(self.views, seed=self.seed, scale=self.scale, ratio=self.ratio, photometric=self.photometric)


def _centre() -> ViewSpec:
    return ViewOptions().spec()


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """The options of one extraction; everything about one is defined only here."""

    teacher: str = field(
        metadata=about(
            "Registry name, timm:ARCH, hf:REPO_OR_DIR, open_clip:ARCH or open_clip:ARCH@TAG, or a run's directory. May "
            "be repeated: several teachers in one pass, each picture decoded once.",
            each=True,
            may_differ=True,
        )
    )
    corpus: AnyPath = field(
        metadata=about(
            "Folder of pictures (class subfolders become labels), WebDataset tars ('shards/{000..099}.tar'), Parquet "
            "with images, or an index; also s3:// or gs://."
        )
    )
    out: AnyPath | None = option(
        None,
        "The store, also s3:// or gs://; one per teacher.",
        unset="store/TEACHER.zarr",
        each=True,
        may_differ=True,
        indifferent="named after the key",
    )
    """By default the store in `store/` with the same specification, whatever its name, or else `store/TEACHER.zarr`."""
    weights: Path | None = option(
        None,
        "Local weights instead of the hub's. One per teacher; 'hub' for a teacher without.",
        each=True,
        may_differ=True,
        typed=str,
    )
    weights_key: str | None = option(
        None,
        f"{WEIGHTS_KEY} One per teacher; 'auto' for a teacher without.",
        each=True,
        may_differ=True,
    )
    sizes: tuple[int, ...] = option(
        (), "Side of the teacher's input in pixels. May be repeated.", flag="size", may_differ=True
    )
    """By default the teacher's native size."""
    views: ViewSpec = field(default_factory=_centre, metadata={PARTS: ViewOptions})
    tokens: tuple[str, ...] = option(("summary", "dense"), "summary, dense, or both.", typed=str)
    layers: tuple[int, ...] = option(
        (),
        "Also store the dense maps of these layers, as 6,9: blocks of a ViT, stages of others, counted from 1. One per "
        "teacher; 'none' for a teacher without.",
        typed=str,
        unset="the last map only",
        each=True,
        may_differ=True,
    )
    """Beside the last map, which `tokens` asks for."""
    precision: str = option(
        "fp16", "Stored precision: fp16, bitround:B, int8, or one per kind: dense=int8,summary=fp16."
    )
    fidelity: float | None = option(
        None,
        "Instead of --precision: the cheapest one that keeps 95% of tokens at this cosine or above.",
        above=0,
        below=1,
    )
    """Lower bound for the 5th percentile of the cosines of standardised tokens before and after storage."""
    grid: int | None = option(None, "G: pool dense maps to G x G cells.")
    """By default the teacher's own grid."""
    pixels: bool = option(False, "Also store the views' pixels, to train without the corpus.")
    dtype: str = option("auto", "The teacher's dtype: auto, fp32, bf16 or fp16.")
    batch_size: int | None = option(
        None,
        "Views per forward pass.",
        unset="the fastest, found by trial",
        least=1,
        indifferent="changes rounding only; stores ignore it as well",
    )
    workers: int | None = option(
        None,
        "Number of Ray actors, each with all teachers.",
        unset="one per GPU",
        least=1,
        indifferent="how the work is divided",
    )
    """Without GPUs, one by default."""
    gpus_per_worker: float | None = option(
        None, "GPUs per worker.", unset="an even share", least=0, indifferent="how the work is divided"
    )
    """By default at most one GPU."""
    ray_address: str | None = option(
        None,
        "A Ray cluster (auto, ray://...).",
        unset="this machine",
        envvar="RAY_ADDRESS",
        indifferent="where the work is done",
    )
    limit: int | None = option(None, "Number of pictures to take, the first ones of the corpus.", least=1)
    include: tuple[str, ...] = option((), "Take only pictures whose key matches, such as 'train/*'. May be repeated.")
    """Patterns of keys; see `Corpus.pick`."""
    exclude: tuple[str, ...] = option((), "Leave out pictures whose key matches, such as '*.gif'. May be repeated.")
    choice: Choice = field(default=AS_FOUND, metadata={PARTS: Choice})
    shuffle: bool = option(False, "Take the pictures in random order; with --limit, a random sample.")
    """The order is drawn with the views' seed."""
    retry_failed: bool = option(
        False,
        "Recompute the parts that hold pictures without features.",
        indifferent="repairs the existing store",
    )


def parse_layers(words: str) -> tuple[int, ...]:
    """Return the numbers of layers in `6,9`; none for `none`.

    Raises: ConfigError.
    """
    if words == "none":
        return ()
    try:
        numbers = tuple(int(word) for word in words.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise ConfigError(f"--layers takes numbers of layers from 1, as 6,9, or none; got {words!r}")
    return numbers


def require_in_range(config: ExtractConfig) -> None:
    """Raise ConfigError if an option has a value that no job can have."""
    if wrong := wrong_values(config):
        raise ConfigError("; ".join(wrong))
