"""The stream: batches of views with the features that their teachers gave, joined by key.

A step's content is a pure function of (stores, seed, step). Reads and decoding run ahead of the trainer in threads.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eupe.corpus.decode import decode_image
from eupe.corpus.views import render_view, view_digest
from eupe.errors import ConfigError, CorpusError
from eupe.store import Features, Store, open_store

PREFETCH_BATCHES = 3
CHECKED_VIEWS = 16

Views = NDArray[np.int64]
"""[B, 2]: place of a sample in the join, and number of the view."""


@dataclass(frozen=True)
class TargetBatch:
    """One target's features for B views, as stored: not normalised."""

    summary: Tensor | None
    """float16 [B, Ds]"""
    dense: Tensor | None
    """float16 [B, h, w, D]"""


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
        targets = tuple(TargetBatch(_moved(t.summary, device), _moved(t.dense, device)) for t in self.targets)
        return Batch(self.pixels.to(device, non_blocking=True), targets, self.keys)

    def pinned(self) -> Batch:
        """In page-locked memory, from which a GPU copies by itself."""
        targets = tuple(TargetBatch(_pinned(t.summary), _pinned(t.dense)) for t in self.targets)
        return Batch(self.pixels.pin_memory(), targets, self.keys)


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def _pinned(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.pin_memory()


class TargetSet:
    """Stores of the same views of the same pictures, joined by key, with the pictures beside them."""

    def __init__(self, stores: Sequence[Store], corpus_root: Path, *, holdout: float) -> None:
        self.stores = tuple(stores)
        self.corpus_root = corpus_root
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

    def views_of(self, samples: NDArray[np.bool_]) -> Views:
        """All views of the samples that a mask picks, in order."""
        picked = np.flatnonzero(samples)
        return np.stack([np.repeat(picked, self.num_views), np.tile(np.arange(self.num_views), len(picked))], axis=1)

    def read_image(self, sample: int) -> Image.Image:
        """The upright picture of a sample.

        Raises: CorpusError if it is gone or no longer readable.
        """
        key = self.keys[sample]
        try:
            return decode_image((self.corpus_root / key).read_bytes())
        except (OSError, CorpusError) as error:
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
        images = pool.map(self.read_image, samples.tolist())
        features = [reads.result() for reads in pending]
        self._require_same_views(features, samples)
        rendered = pool.map(
            lambda image, box, flip: render_view(image, box, flip, size),
            images,
            map(tuple, features[0].boxes.tolist()),
            features[0].flips.tolist(),
        )
        pixels = torch.from_numpy(np.stack(list(rendered)))
        targets = tuple(TargetBatch(_tensor(f.summary), _tensor(f.dense)) for f in features)
        return Batch(pixels, targets, tuple(self.keys[i] for i in samples))

    def _require_same_views(self, features: list[Features], samples: NDArray[np.int64]) -> None:
        for store, other in zip(self.stores[1:], features[1:], strict=True):
            same = (other.boxes == features[0].boxes).all(axis=1) & (other.flips == features[0].flips)
            if not same.all():
                key = self.keys[int(samples[np.flatnonzero(~same)[0]])]
                raise ConfigError(
                    f"{self.stores[0].path} and {store.path} hold different crops of {key}; extract one of them again"
                )

    def check_views(self) -> None:
        """Replay a sample of views and compare them, pixel for pixel, with what the teachers saw.

        Raises: CorpusError if one differs: another picture under the same name, or another decoder.
        """
        picked = np.linspace(0, self.num_joined - 1, min(CHECKED_VIEWS, self.num_joined)).astype(np.int64)
        numbers = np.arange(len(picked)) % self.num_views
        for store, rows in zip(self.stores, self._rows, strict=True):
            stored = store.read(rows[picked].tolist(), numbers.tolist())
            for sample, box, flip, digest in zip(picked, stored.boxes, stored.flips, stored.digests, strict=True):
                view = render_view(self.read_image(int(sample)), tuple(box.tolist()), bool(flip), store.spec.sizes[0])
                if view_digest(view) != int(digest):
                    raise CorpusError(
                        f"a view of {self.keys[int(sample)]} is not the one that the teacher of {store.path} saw: the "
                        "picture has changed, or another Pillow decodes it (the store was made with "
                        f"{store.spec.versions.get('pillow')}, this is {PIL.__version__}); restore it, or extract again"
                    )


def _tensor(values: NDArray[Any] | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)


def open_targets(paths: Sequence[Path], *, corpus: Path | None, holdout: float) -> TargetSet:
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
                f"{_views_words(store)}); extract both with the same --views and --seed"
            )
    root = corpus or Path(stores[0].spec.corpus["root"])
    if not root.is_dir():
        raise CorpusError(f"the corpus folder {root} does not exist; give its place with --corpus")
    return TargetSet(stores, root, holdout=holdout)


def _views_words(store: Store) -> str:
    views = store.spec.views
    return f"{views['policy']}:{views['num_views']} seed {views.get('seed', '-')}"


def _join(stores: Sequence[Store]) -> pa.Table:
    """`key`, `sha256`, `label` and `row0`, `row1`, ... of the samples that are valid in every store.

    Raises: ConfigError if the stores share no sample, or hold different pictures under one key.
    """
    first = _valid(stores[0])
    joined = first.select(["key", "sha256", "label"]).append_column("row0", first["row"])
    for i, store in enumerate(stores[1:], 1):
        other = _valid(store)
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


def _valid(store: Store) -> pa.Table:
    samples = store.samples
    return samples.filter(pc.equal(samples["status"], "ok"))


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
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as decoders, ThreadPoolExecutor(PREFETCH_BATCHES) as loaders:

        def load(views: Views) -> Batch:
            batch = targets.load(views, size=size, pool=decoders)
            return batch.pinned() if device.type == "cuda" else batch

        pending: deque[Future[Batch]] = deque()
        for views in batches:
            pending.append(loaders.submit(load, views))
            if len(pending) == PREFETCH_BATCHES:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
