"""A store as a map-style dataset for `torch.utils.data.DataLoader`; nothing here needs torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from eupe.errors import StoreError
from eupe.store.features import Features
from eupe.store.layout import layer_kind
from eupe.store.reader import Store


class StoreDataset:
    """Map-style dataset of every view of every sample that has features, sample by sample.

    An item is a dictionary of `key`, `view` and `label`, whichever the store holds of `boxes` [4], `flips`,
    `photometric` [8], `summary` [Ds] and `dense` [h, w, D], and `dense-6` [h, w, D] for a layer 6 that is asked for, as
    NumPy values. A DataLoader requests whole batches, and a batch is one read of many chunks at once, so
    `num_workers=0` is already parallel. With workers, pass `multiprocessing_context="spawn"`.
    """

    def __init__(self, store: Store, *, size: int | None = None, layers: Sequence[str] = ()) -> None:
        """Set up the dataset.

        Args:
            size: one of the store's sizes; the first by default.
            layers: numbers of the layers to read as well, of `store.spec.layers`.
        Raises: StoreError for a layer that the store does not have.
        """
        store.require_layers(layers)
        self.store = store
        self.size = size
        self.layers = tuple(layers)
        self._rows = store.valid["row"].to_numpy()
        self._keys = store.valid["key"]
        self._labels = store.valid["label"]
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self._rows) * self.store.spec.num_views

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"the data set has {len(self)} views; got {index}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the items of a batch, from one read.

        Raises: PartCorruptError; StoreError in a process that was forked from the one that opened the store.
        """
        # a forked process lacks the threads that read, so it would wait forever
        if os.getpid() != self._process:
            raise StoreError(
                f"{self.store.path} cannot be read in a forked process; give the DataLoader num_workers=0, or "
                'multiprocessing_context="spawn"'
            )
        samples, views = np.divmod(np.asarray(indices), self.store.spec.num_views)
        features = self.store.read(self._rows[samples].tolist(), views.tolist(), size=self.size, layers=self.layers)
        return [self._item(features, i, int(s), int(k)) for i, (s, k) in enumerate(zip(samples, views, strict=True))]

    def _item(self, features: Features, i: int, sample: int, view: int) -> dict[str, Any]:
        held = {name: values[i] for name, values in vars(features).items() if name != "layers" and values is not None}
        held |= {layer_kind(number): maps[i] for number, maps in features.layers.items()}
        return {"key": self._keys[sample].as_py(), "view": view, "label": self._labels[sample].as_py() or "", **held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # the unpickled store opens its files itself (`Store.__setstate__`), so this process may read
        self.__dict__.update(state, _process=os.getpid())
