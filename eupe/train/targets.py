"""Stores of the same views of the same pictures, joined by key, and the batches that training loads from them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from eupe.common.storage import AnyPath, StoragePath
from eupe.corpus.pictures import Inside, decode_image, insides, read_picture
from eupe.corpus.sources import corpus_root
from eupe.corpus.views import Photometric, apply_photometric, draw_colours, render_view, view_digest
from eupe.errors import ConfigError, CorpusError
from eupe.store import Store, open_store
from eupe.store.features import StoredFeatures
from eupe.store.places import with_places
from eupe.store.precision import Tokens
from eupe.store.reader import PendingPixels
from eupe.train.sampling import Views


@dataclass(frozen=True)
class TargetTokens:
    """Target tokens of B views as they are stored; they are decoded on the device that uses them."""

    stored: Tensor
    """float16 [B, ..., D]; or int8 [B, ..., D + 2], whose last two values are the token's float16 scale."""
    mean: Tensor | None = None
    std: Tensor | None = None
    """`mean` and `std`: float32 [D], the calibration of int8 tokens; None for float16."""

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

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.stored, self.mean, self.std) if tensor is not None]

    def _each(self, move: Callable[[Tensor], Tensor]) -> TargetTokens:
        mean, std = (None if x is None else move(x) for x in (self.mean, self.std))
        return TargetTokens(move(self.stored), mean, std)

    def decode(self) -> Tensor:
        """Return the tokens as the teacher gave them, float32 [B, ..., D]."""
        if self.mean is None or self.std is None:
            return self.stored.float()
        return self._scaled().mul_(self.std).add_(self.mean)

    def standardised(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return (tokens - mean) / std as float32 [B, ..., D], in as few passes over memory as the precision allows.

        Args:
            mean, std: float32 [D].
        """
        if self.mean is None or self.std is None:
            return _float_like(self.stored).sub_(mean).div_(std)
        # calibration and normalisation are folded into one factor and one offset, to save two passes
        return self._scaled().mul_(self.std / std).add_((self.mean - mean) / std)

    def _scaled(self) -> Tensor:
        """Return the int8 values times their scale: tokens standardised by the calibration, float32 [B, ..., D]."""
        # view() needs a contiguous last axis, which channel-first tokens do not have
        scale = self.stored[..., -2:].contiguous().view(torch.float16).float()
        return _float_like(self.stored[..., :-2]).mul_(scale)


def _float_like(tokens: Tensor) -> Tensor:
    """Return a float32 copy of [B, ..., D] that keeps the channel-first memory layout of the stored tokens.

    On a CPU its memory comes from NumPy, which the system backs with huge pages; torch's memory would be page-faulted
    again for every batch.
    """
    channels_first = tokens.movedim(-1, 1)
    if tokens.device.type != "cpu":
        return channels_first.to(torch.float32, memory_format=torch.contiguous_format).movedim(1, -1)
    floats = torch.from_numpy(np.empty(channels_first.shape, np.float32))
    return floats.copy_(channels_first).movedim(1, -1)


@dataclass(frozen=True)
class TargetBatch:
    """One target's features for B views as they are stored, not normalised."""

    size: int
    """Side of the teacher's input in pixels."""
    summary: TargetTokens | None
    """[B, Ds] once decoded; Ds is the summary's width."""
    dense: TargetTokens | None
    """[B, h, w, D] once decoded."""
    layers: Mapping[str, TargetTokens] = field(default_factory=dict)
    """[B, h, w, D] once decoded, of each layer that was asked for, by its number."""

    def to(self, device: torch.device) -> TargetBatch:
        return self._each(lambda tokens: tokens.to(device))

    def pinned(self) -> TargetBatch:
        return self._each(TargetTokens.pinned)

    def tensors(self) -> list[Tensor]:
        each = (self.summary, self.dense, *self.layers.values())
        return [x for tokens in each if tokens is not None for x in tokens.tensors()]

    def _each(self, move: Callable[[TargetTokens], TargetTokens]) -> TargetBatch:
        layers = {number: move(tokens) for number, tokens in self.layers.items()}
        summary, dense = (None if tokens is None else move(tokens) for tokens in (self.summary, self.dense))
        return TargetBatch(self.size, summary, dense, layers)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for B views of one corpus."""

    views: Views
    size: int
    """Side of the student's input in pixels."""
    target_sizes: tuple[int, ...] = ()
    """Size of each store's features; each store's first size if empty."""
    layers: tuple[tuple[str, ...], ...] = ()
    """Numbers of the layers to read from each store; none if empty."""
    corpus: int = 0
    step: int = 0
    first: int = 0
    """Position of the first of these views in the step's global batch."""
    colours_seed: int | None = None
    """Seed for recolouring the student's views, together with the step; None leaves their colours."""
    colours_by_view: bool = True
    """Whether the views of one picture get different colours; False in runs of method 1."""


@dataclass(frozen=True)
class Batch:
    """B views and their targets."""

    request: Request
    pixels: Tensor
    """uint8 [B, S, S, 3]: the rendered views."""
    targets: tuple[TargetBatch, ...]
    """One per store, in the order in which the stores were given."""
    keys: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device; from pinned memory, without waiting for the copy."""
        if device.type == "cpu":
            return self
        pixels = self.pixels.to(device, non_blocking=True)
        return replace(self, pixels=pixels, targets=tuple(target.to(device) for target in self.targets))

    def pinned(self) -> Batch:
        """Return a copy in page-locked memory, from which a GPU copies asynchronously."""
        targets = tuple(target.pinned() for target in self.targets)
        return replace(self, pixels=self.pixels.pin_memory(), targets=targets)

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch, whatever device they are on."""
        return [self.pixels, *(tensor for target in self.targets for tensor in target.tensors())]


CHECKED_VIEWS = 16

HoldoutBy = Literal["content", "key"]
"""The basis for holding out a picture: its content, under whatever key, or its key, as in runs of method 1."""


class TargetSet:
    """The samples that every store has features of."""

    def __init__(
        self,
        stores: Sequence[Store],
        corpus_root: StoragePath,
        *,
        holdout: float,
        holdout_by: HoldoutBy = "content",
        corpus_given: bool = False,
    ) -> None:
        self.stores = tuple(stores)
        self.corpus_root = corpus_root
        self.corpus_given = corpus_given
        """Whether pictures are decoded even if a store keeps the views' pixels."""
        self.num_views = stores[0].spec.num_views
        self._joined = _join(stores)
        words = holdout_words(self._joined.select(["key", "sha256"]).to_pylist(), holdout_by)
        self.held_out = np.array([is_held_out(word, holdout) for word in words])
        """bool [samples]: never trained on."""
        self.left_out = {str(store.path): store.samples.num_rows - self.num_joined for store in stores}
        """Per store, the number of samples that are not used: they failed in it, or another store lacks them."""

    @property
    def num_joined(self) -> int:
        """Return the number of samples that every store has valid features of."""
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
        """Return each sample's row in each store, [stores, samples]."""
        return np.stack([self._joined[f"row{i}"].to_numpy() for i in range(len(self.stores))])

    @cached_property
    def _places(self) -> pa.Table:
        return with_places(self.stores[0], self._joined.select(["key"]))

    def _inside(self, sample: int) -> Inside | None:
        return insides(self._places.slice(sample, 1))[0]

    @cached_property
    def training(self) -> NDArray[np.int64]:
        """Return the indices of the training samples."""
        return np.flatnonzero(~self.held_out)

    @cached_property
    def training_parts(self) -> NDArray[np.int64] | None:
        """Return the first store's part of each training sample; None on a local disk, where any order reads well."""
        store = self.stores[0]
        return None if store.path.is_local else self._rows[0][self.training] // store.spec.samples_per_part

    def views_of(self, samples: NDArray[np.bool_]) -> Views:
        """Return all views of the samples that a mask selects, in order."""
        picked = np.flatnonzero(samples)
        return np.stack([np.repeat(picked, self.num_views), np.tile(np.arange(self.num_views), len(picked))], axis=1)

    def read_image(self, sample: int) -> Image.Image:
        """Read the upright picture of a sample.

        Raises: CorpusError if it is gone or no longer readable; StorageError if an object store does not serve it.
        """
        key = self.keys[sample]
        try:
            return decode_image(read_picture(self.corpus_root, key, self._inside(sample)))
        except CorpusError as error:
            raise CorpusError(
                f"picture {key} of corpus {self.corpus_root} has stored features, but cannot be read now: {error}; "
                "put it back, or give the new location of the corpus with --corpus"
            ) from error

    def load(self, request: Request, *, pool: ThreadPoolExecutor) -> Batch:
        """Read the features of a request and render its views.

        Raises: CorpusError, PartCorruptError, and ConfigError if two stores disagree on a view's crop.
        """
        samples, numbers = request.views[:, 0], request.views[:, 1]
        sizes = request.target_sizes or tuple(store.spec.sizes[0] for store in self.stores)
        layers = request.layers or [()] * len(self.stores)
        # begun first, so that features are read while pictures are decoded
        pending = [
            store.read_async(rows[samples].tolist(), numbers.tolist(), size=size, layers=wanted)
            for store, rows, size, wanted in zip(self.stores, self._rows, sizes, layers, strict=True)
        ]
        kept = self._begin_pixels(request.views, request.size)
        images = None if kept is not None else pool.map(self.read_image, samples.tolist())
        features = [reads.stored() for reads in pending]
        self.require_same_views(features, samples)
        if images is None:
            assert kept is not None
            views: Iterable[NDArray[np.uint8]] = kept.result()
        else:
            views = pool.map(lambda image, how: render_view(image, how, request.size), images, features[0].params)
        keys = tuple(self.keys[i] for i in samples)
        if request.colours_seed is not None:
            views = pool.map(apply_photometric, views, map(partial(_student_colours, request), keys, numbers.tolist()))
        pixels = torch.from_numpy(views if isinstance(views, np.ndarray) else np.stack(list(views)))
        targets = tuple(
            TargetBatch(
                size,
                _target(f.summary),
                _target(f.dense),
                {number: TargetTokens.of(tokens) for number, tokens in f.layers.items()},
            )
            for size, f in zip(sizes, features, strict=True)
        )
        return Batch(request, pixels, targets, keys)

    def read_summaries(self, store: int, views: Views, *, size: int) -> NDArray[np.float32]:
        """Read the summaries of views from one store, as its teacher gave them, [B, Ds].

        Raises: PartCorruptError.
        """
        rows = self._rows[store][views[:, 0]].tolist()
        return np.asarray(self.stores[store].read_summaries(rows, views[:, 1].tolist(), size=size), np.float32)

    def _pixel_store(self, size: int) -> int | None:
        """Return the index of a store that keeps the views' pixels at a size; None if pictures are decoded."""
        if self.corpus_given:
            return None
        keeping = (i for i, s in enumerate(self.stores) if s.spec.pixels and size in s.spec.sizes)
        return next(keeping, None)

    def _begin_pixels(self, views: Views, size: int) -> PendingPixels | None:
        if (i := self._pixel_store(size)) is None:
            return None
        return self.stores[i].read_pixels_async(self._rows[i, views[:, 0]].tolist(), views[:, 1].tolist(), size=size)

    def require_pictures(self, *sizes: int) -> None:
        """Raise CorpusError if views of a size are neither in a store nor can be made from the pictures."""
        root = self.corpus_root
        lacking = [size for size in sizes if self._pixel_store(size) is None]
        if not lacking or not root.is_local or root.local.is_dir():
            return
        kept = sorted({side for store in self.stores if store.spec.pixels for side in store.spec.sizes})
        words = f"the stores keep pixels at {', '.join(map(str, kept))} px, not at {lacking[0]}, and " if kept else ""
        advice = (
            f"; give --size {kept[0]}, or its location with --corpus" if kept else "; give its location with --corpus"
        )
        raise CorpusError(f"{words}the corpus folder {root} does not exist{advice}")

    def require_same_views(self, features: Sequence[StoredFeatures], samples: NDArray[np.int64]) -> None:
        """Raise ConfigError if a store holds other views of some samples than the first store does."""
        for store, other in zip(self.stores[1:], features[1:], strict=True):
            if (i := features[0].first_difference(other)) is not None:
                key = self.keys[int(samples[i])]
                raise ConfigError(
                    f"{self.stores[0].path} and {store.path} hold different views of {key}; extract one of them again"
                )

    def check_views(self) -> None:
        """Render some of the views again and compare them, pixel for pixel, with what the teachers saw.

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
                        "picture has changed, or another version of Pillow decodes it (the store was made with "
                        f"{store.spec.versions.get('pillow')}, this is {PIL.__version__}); restore the picture or the "
                        "version, or extract again"
                    )


def _student_colours(request: Request, key: str, view: int) -> Photometric:
    """Draw the student's colours for a view at one step."""
    assert request.colours_seed is not None
    whose = f"student {view} " if request.colours_by_view else "student "
    return draw_colours(request.colours_seed, key, request.step, whose=whose)


def _target(tokens: Tokens | None) -> TargetTokens | None:
    return None if tokens is None else TargetTokens.of(tokens)


def open_targets(
    paths: Sequence[AnyPath],
    *,
    corpus: AnyPath | None,
    holdout: float,
    holdout_by: HoldoutBy = "content",
    named: Sequence[AnyPath] = (),
) -> TargetSet:
    """Open stores for training.

    Args:
        corpus: current location of the pictures; by default the one recorded in the first store.
        named: other locations that the user has named, in whose buckets these pictures may be as well.
        holdout: share of the pictures kept out of training.
        holdout_by: whether a hash of a picture's content or of its key decides.
    Raises: StoreError, ConfigError, CorpusError.
    """
    stores = open_stores(paths)
    root = stores[0].corpus_root(map(StoragePath.of, named)) if corpus is None else corpus_root(corpus)
    targets = TargetSet(stores, root, holdout=holdout, holdout_by=holdout_by, corpus_given=corpus is not None)
    for store in stores:
        targets.require_pictures(store.spec.sizes[0])
    return targets


def open_stores(paths: Sequence[AnyPath]) -> list[Store]:
    """Open finished stores whose views were drawn alike.

    Raises: StoreError; ConfigError if one has other views than the first.
    """
    stores = [open_store(path) for path in paths]
    for store in stores:
        store.require_finished()
        if store.spec.views != stores[0].spec.views:
            raise ConfigError(
                f"{stores[0].path} and {store.path} hold different views ({_views_words(stores[0])} and "
                f"{_views_words(store)}); extract both with the same --views, --photometric and --seed"
            )
    return stores


def _views_words(store: Store) -> str:
    views = store.spec.views
    colours = f" photometric {views['photometric']}" if store.spec.photometric else ""
    return f"{views['policy']}:{views['num_views']}{colours} seed {views.get('seed', '-')}"


def _join(stores: Sequence[Store]) -> pa.Table:
    """Return the samples that are valid in every store: their `key`, `sha256`, `label`, and rows `row0`, `row1`, ...

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
            raise ConfigError(_why_apart(stores[0], store))
        same = pc.equal(joined["sha256"], other["sha256"])
        if not pc.all(same).as_py():
            key = joined.filter(pc.invert(same))["key"][0].as_py()
            moved = moved_keys(stores[0].valid, store.valid)
            raise ConfigError(
                f"{stores[0].path} and {store.path} are targets of different corpora: {key} is a different picture in "
                "each" + (f", and {moved}; extract both from the same --corpus" if moved else "")
            )
        joined = joined.append_column(f"row{i}", other["row"])
    if joined.num_rows == 0:
        raise ConfigError(f"{stores[0].path} holds no valid sample to train on")
    return joined


def _why_apart(first: Store, other: Store) -> str:
    """Return why two stores share no key, with a key of each."""
    roots = f"{first.spec.corpus['root']} and {other.spec.corpus['root']}"
    if moved := moved_keys(first.valid, other.valid):
        return (
            f"{first.path} and {other.path} have no picture key in common: {moved}, because they were extracted with "
            f"different --corpus roots ({roots}); extract one of them again with the other's --corpus"
        )
    keys = [next(iter(store.valid["key"].to_pylist()), "none") for store in (first, other)]
    return (
        f"{first.path} and {other.path} are targets of different corpora: they have no picture key in common (a "
        f"key of the first is {keys[0]}, one of the second is {keys[1]}; {roots}); extract both from the same --corpus"
    )


def moved_keys(first: pa.Table, other: pa.Table) -> str | None:
    """Return by which leading folders the keys of the same pictures differ, as they do if two roots were indexed.

    Args:
        first, other: tables with `key` and `sha256`.
    Returns: None if no picture has the same file name in both, or most of those that do have the same key.
    """
    places = pc.index_in(first["sha256"], value_set=other["sha256"].combine_chunks())
    found = pc.is_valid(places)
    pairs = zip(first.filter(found)["key"].to_pylist(), other.take(places.drop_null())["key"].to_pylist(), strict=True)
    moves = [(leads, pair) for pair in pairs if (leads := _leading_folders(*pair)) is not None]
    most = Counter(leads for leads, _ in moves).most_common(1)
    if not most or most[0][0] == ("", ""):
        return None
    key, twin = next(pair for leads, pair in moves if leads == most[0][0])
    words = " and ".join(folder or "none" for folder in most[0][0])
    return f"the same picture is {key} in the first and {twin} in the second, so the leading folders differ ({words})"


def _leading_folders(key: str, other: str) -> tuple[str, str] | None:
    """Return the folders ahead of the ending that two keys share; None if not even their names are the same."""
    ours, theirs = key.split("/"), other.split("/")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    if len(ours) == len(key.split("/")):
        return None
    return "/".join([*ours, ""]), "/".join([*theirs, ""])


def holdout_words(samples: Iterable[Mapping[str, Any]], by: HoldoutBy) -> list[str]:
    """Return each sample's word for `is_held_out`: its `sha256`, or its `key` if `by` says so or there is no hash."""
    return [str((by == "content" and sample["sha256"]) or sample["key"]) for sample in samples]


def is_held_out(word: str, share: float) -> bool:
    """Return whether a picture is kept out of training; its word alone decides, so every run keeps out the same."""
    digest = hashlib.blake2b(b"held out\0" + word.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64
