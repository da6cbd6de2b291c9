"""The stream: batches of views with the features that their teachers gave, joined by key.

A step's content is a pure function of (stores, seed, step). Reads and decoding run ahead of the trainer in threads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eupe.ahead import map_ahead
from eupe.corpus.decode import decode_image
from eupe.corpus.pictures import Inside, insides, read_picture
from eupe.corpus.sources import corpus_root
from eupe.corpus.views import render_view, view_digest
from eupe.errors import ConfigError, CorpusError
from eupe.place import Place, Where
from eupe.store import Store, open_store
from eupe.store.places import with_places
from eupe.store.reader import PendingPixels, StoredFeatures, Tokens

PREFETCH_BATCHES = 3
CHECKED_VIEWS = 16

Views = NDArray[np.int64]
"""[B, 2]: place of a sample in the join, and number of the view."""


@dataclass(frozen=True)
class TargetTokens:
    """Features of B views as they are stored; decoded on the device that uses them."""

    stored: Tensor
    """float16 [B, ..., D], or int8 [B, ..., D + 2] with the token's float16 scale in the last two."""
    mean: Tensor | None = None
    std: Tensor | None = None
    """float32 [D], the calibration of int8; None for float16."""

    @classmethod
    def of(cls, tokens: Tokens) -> TargetTokens:
        stored, calibration = torch.from_numpy(tokens.stored), tokens.calibration
        if calibration is None:
            return cls(stored)
        return cls(stored, torch.from_numpy(calibration.mean), torch.from_numpy(calibration.std))

    def to(self, device: torch.device) -> TargetTokens:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> TargetTokens:
        return self._each(Tensor.pin_memory)

    def _each(self, move: Callable[[Tensor], Tensor]) -> TargetTokens:
        mean, std = (None if x is None else move(x) for x in (self.mean, self.std))
        return TargetTokens(move(self.stored), mean, std)

    def decode(self) -> Tensor:
        """As the teacher gave them, float32 [B, ..., D]."""
        if self.mean is None or self.std is None:
            return self.stored.float()
        return self._scaled().mul_(self.std).add_(self.mean)

    def standardised(self, mean: Tensor, std: Tensor) -> Tensor:
        """(tokens - mean) / std, float32 [B, ..., D], with as few passes over them as the precision allows.

        Args:
            mean, std: float32 [D].
        """
        if self.mean is None or self.std is None:
            return _float_like(self.stored).sub_(mean).div_(std)
        return self._scaled().mul_(self.std / std).add_((self.mean - mean) / std)

    def _scaled(self) -> Tensor:
        """int8 times its scale: tokens standardised by the calibration, float32 [B, ..., D]."""
        scale = self.stored[..., -2:].contiguous().view(torch.float16).float()
        return _float_like(self.stored[..., :-2]).mul_(scale)


def _float_like(tokens: Tensor) -> Tensor:
    """A float32 copy of [B, ..., D], channels before cells as they are stored.

    On a CPU in memory of NumPy's, which the system backs with large pages; torch's is faulted in anew for every batch.
    """
    channels_first = tokens.movedim(-1, 1)
    if tokens.device.type != "cpu":
        return channels_first.to(torch.float32, memory_format=torch.contiguous_format).movedim(1, -1)
    floats = torch.from_numpy(np.empty(channels_first.shape, np.float32))
    return floats.copy_(channels_first).movedim(1, -1)


@dataclass(frozen=True)
class TargetBatch:
    """One target's features for B views, as stored: not normalised."""

    summary: TargetTokens | None
    """Of width Ds, [B, Ds] once decoded."""
    dense: TargetTokens | None
    """[B, h, w, D] once decoded."""

    def to(self, device: torch.device) -> TargetBatch:
        return self._each(lambda tokens: tokens.to(device))

    def pinned(self) -> TargetBatch:
        return self._each(TargetTokens.pinned)

    def _each(self, move: Callable[[TargetTokens], TargetTokens]) -> TargetBatch:
        return TargetBatch(*(None if tokens is None else move(tokens) for tokens in (self.summary, self.dense)))


@dataclass(frozen=True)
class Batch:
    """B views and their targets."""

    pixels: Tensor
    """uint8 [B, S, S, 3]: the views themselves."""
    targets: tuple[TargetBatch, ...]
    """One per store, in the order given."""
    keys: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """Copied to a device without waiting, where the memory is pinned."""
        if device.type == "cpu":
            return self
        pixels = self.pixels.to(device, non_blocking=True)
        return Batch(pixels, tuple(target.to(device) for target in self.targets), self.keys)

    def pinned(self) -> Batch:
        """In page-locked memory, from which a GPU copies by itself."""
        return Batch(self.pixels.pin_memory(), tuple(target.pinned() for target in self.targets), self.keys)


class TargetSet:
    """Stores of the same views of the same pictures, joined by key, with the pictures beside them."""

    def __init__(
        self, stores: Sequence[Store], corpus_root: Place, *, holdout: float, corpus_given: bool = False
    ) -> None:
        self.stores = tuple(stores)
        self.corpus_root = corpus_root
        self.corpus_given = corpus_given
        """The pictures are decoded even where a store keeps the views."""
        self.num_views = stores[0].spec.num_views
        self._joined = _join(stores)
        self.held_out = np.array([is_held_out(key, holdout) for key in self._joined["key"].to_pylist()])
        """bool [samples]: never trained on."""

    @property
    def num_joined(self) -> int:
        """Samples that every store has valid features of."""
        return int(self._joined.num_rows)

    @cached_property
    def keys(self) -> list[str]:
        keys: list[str] = self._joined["key"].to_pylist()
        return keys

    @cached_property
    def labels(self) -> list[str | None]:
        labels: list[str | None] = self._joined["label"].to_pylist()
        return labels

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        """[stores, samples]: each sample's row in each store."""
        return np.stack([self._joined[f"row{i}"].to_numpy() for i in range(len(self.stores))])

    @cached_property
    def _places(self) -> pa.Table:
        return with_places(self.stores[0], self._joined.select(["key"]))

    def _inside(self, sample: int) -> Inside | None:
        return insides(self._places.slice(sample, 1))[0]

    def views_of(self, samples: NDArray[np.bool_]) -> Views:
        """All views of the samples that a mask picks, in order."""
        picked = np.flatnonzero(samples)
        return np.stack([np.repeat(picked, self.num_views), np.tile(np.arange(self.num_views), len(picked))], axis=1)

    def read_image(self, sample: int) -> Image.Image:
        """The upright picture of a sample.

        Raises: CorpusError if it is gone or no longer readable; StorageError if an object store does not serve it.
        """
        key = self.keys[sample]
        try:
            return decode_image(read_picture(self.corpus_root, key, self._inside(sample)))
        except CorpusError as error:
            raise CorpusError(
                f"picture {key} of corpus {self.corpus_root} had features made but cannot be read now: {error}; "
                "put it back, or give the corpus's new place with --corpus"
            ) from error

    def load(self, views: Views, *, size: int, pool: ThreadPoolExecutor) -> Batch:
        """Read features and render the views, at `size` pixels a side.

        Raises: CorpusError, PartCorruptError, and ConfigError if two stores disagree on a view's crop.
        """
        samples, numbers = views[:, 0], views[:, 1]
        pending = [
            store.read_async(rows[samples].tolist(), numbers.tolist())
            for store, rows in zip(self.stores, self._rows, strict=True)
        ]
        kept = self._begin_pixels(views, size)
        images = None if kept is not None else pool.map(self.read_image, samples.tolist())
        features = [reads.stored() for reads in pending]
        self._require_same_views(features, samples)
        if images is None:
            assert kept is not None
            pixels = torch.from_numpy(kept.result())
        else:
            rendered = pool.map(lambda image, params: render_view(image, params, size), images, features[0].params)
            pixels = torch.from_numpy(np.stack(list(rendered)))
        targets = tuple(TargetBatch(_target(f.summary), _target(f.dense)) for f in features)
        return Batch(pixels, targets, tuple(self.keys[i] for i in samples))

    def _pixel_store(self, size: int) -> int | None:
        """Which store keeps the views at a size; None where they come from the pictures."""
        if self.corpus_given:
            return None
        keeping = (i for i, s in enumerate(self.stores) if s.spec.pixels and size in s.spec.sizes)
        return next(keeping, None)

    def _begin_pixels(self, views: Views, size: int) -> PendingPixels | None:
        if (i := self._pixel_store(size)) is None:
            return None
        return self.stores[i].read_pixels_async(self._rows[i, views[:, 0]].tolist(), views[:, 1].tolist(), size=size)

    def require_pictures(self, size: int) -> None:
        """Raises: CorpusError if views of a size can be had neither from a store nor from the pictures."""
        root = self.corpus_root
        if self._pixel_store(size) is not None or not root.is_local or root.local.is_dir():
            return
        kept = sorted({side for store in self.stores if store.spec.pixels for side in store.spec.sizes})
        words = f"the stores keep pixels at {', '.join(map(str, kept))} px, not at {size}, and " if kept else ""
        advice = f"; give --size {kept[0]}, or its place with --corpus" if kept else "; give its place with --corpus"
        raise CorpusError(f"{words}the corpus folder {root} does not exist{advice}")

    def _require_same_views(self, features: list[StoredFeatures], samples: NDArray[np.int64]) -> None:
        for store, other in zip(self.stores[1:], features[1:], strict=True):
            if (i := features[0].first_difference(other)) is not None:
                key = self.keys[int(samples[i])]
                raise ConfigError(
                    f"{self.stores[0].path} and {store.path} hold different views of {key}; extract one of them again"
                )

    def check_views(self) -> None:
        """Replay a sample of views and compare them, pixel for pixel, with what the teachers saw.

        Raises: CorpusError if one differs: another picture under the same name, or another decoder.
        """
        picked = np.linspace(0, self.num_joined - 1, min(CHECKED_VIEWS, self.num_joined)).astype(np.int64)
        numbers = np.arange(len(picked)) % self.num_views
        for store, rows in zip(self.stores, self._rows, strict=True):
            places = rows[picked].tolist(), numbers.tolist()
            stored, digests = store.read_async(*places).stored(), store.read_digests(*places)
            size = store.spec.sizes[0]
            kept = self._begin_pixels(np.stack([picked, numbers], axis=1), size)
            views = None if kept is None else kept.result()
            for i, (sample, params, digest) in enumerate(zip(picked, stored.params, digests, strict=True)):
                view = render_view(self.read_image(int(sample)), params, size) if views is None else views[i]
                if view_digest(view) != int(digest):
                    raise CorpusError(
                        f"a view of {self.keys[int(sample)]} is not the one that the teacher of {store.path} saw: the "
                        "picture has changed, or another Pillow decodes it (the store was made with "
                        f"{store.spec.versions.get('pillow')}, this is {PIL.__version__}); restore it, or extract again"
                    )


def _target(tokens: Tokens | None) -> TargetTokens | None:
    return None if tokens is None else TargetTokens.of(tokens)


def open_targets(paths: Sequence[Where], *, corpus: Where | None, holdout: float) -> TargetSet:
    """Open stores for training.

    Args:
        corpus: where the pictures are now; the place noted in the first store where not given.
        holdout: share of the pictures kept out of training, by a hash of their keys.
    Raises: StoreError, ConfigError, CorpusError.
    """
    stores = [open_store(path) for path in paths]
    for store in stores:
        for kind in store.spec.tokens:
            store.stats(store.spec.sizes[0], kind)
        if store.spec.views != stores[0].spec.views:
            raise ConfigError(
                f"{stores[0].path} and {store.path} hold different views ({_views_words(stores[0])} against "
                f"{_views_words(store)}); extract both with the same --views, --photometric and --seed"
            )
    root = Place.of(stores[0].spec.corpus["root"]) if corpus is None else corpus_root(corpus)
    targets = TargetSet(stores, root, holdout=holdout, corpus_given=corpus is not None)
    for store in stores:
        targets.require_pictures(store.spec.sizes[0])
    return targets


def _views_words(store: Store) -> str:
    views = store.spec.views
    colours = f" photometric {views['photometric']}" if store.spec.photometric else ""
    return f"{views['policy']}:{views['num_views']}{colours} seed {views.get('seed', '-')}"


def _join(stores: Sequence[Store]) -> pa.Table:
    """`key`, `sha256`, `label` and `row0`, `row1`, ... of the samples that are valid in every store.

    Raises: ConfigError if the stores share no sample, or hold different pictures under one key.
    """
    first = stores[0].valid
    joined = first.select(["key", "sha256", "label"]).append_column("row0", first["row"])
    for i, store in enumerate(stores[1:], 1):
        other = store.valid
        place = pc.index_in(joined["key"], value_set=other["key"].combine_chunks())
        joined = joined.filter(pc.is_valid(place))
        other = other.take(place.drop_null())
        if joined.num_rows == 0:
            raise ConfigError(
                f"{stores[0].path} and {store.path} are targets of different corpora: they share no picture's key"
            )
        same = pc.equal(joined["sha256"], other["sha256"])
        if not pc.all(same).as_py():
            key = joined.filter(pc.invert(same))["key"][0].as_py()
            raise ConfigError(
                f"{stores[0].path} and {store.path} are targets of different corpora: {key} is another picture in each"
            )
        joined = joined.append_column(f"row{i}", other["row"])
    if joined.num_rows == 0:
        raise ConfigError(f"{stores[0].path} holds no valid sample to train on")
    return joined


def is_held_out(key: str, share: float) -> bool:
    """Whether a picture is kept out of training: decided by its key alone, so every run keeps out the same."""
    digest = hashlib.blake2b(b"held out\0" + key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def batch_at(views: Views, step: int, *, batch_size: int, seed: int) -> Views:
    """The views of a training step: each epoch is a permutation of its own, its last partial batch left out."""
    epoch, place = divmod(step, len(views) // batch_size)
    order = _epoch_order(len(views), seed, epoch)
    return views[order[place * batch_size : (place + 1) * batch_size]]


@lru_cache(maxsize=2)
def _epoch_order(num_views: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_views)


def stream(targets: TargetSet, batches: Iterator[Views], *, size: int, device: torch.device) -> Iterator[Batch]:
    """Batches in order, loaded ahead of their use."""
    threads = targets.corpus_root.threads(os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as decoders, ThreadPoolExecutor(PREFETCH_BATCHES) as loaders:

        def load(views: Views) -> Batch:
            batch = targets.load(views, size=size, pool=decoders)
            return batch.pinned() if device.type == "cuda" else batch

        yield from map_ahead(loaders, load, batches, ahead=PREFETCH_BATCHES - 1)
