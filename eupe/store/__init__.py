"""The feature store on disk, specified by `FORMAT.md` in this folder; nothing here needs torch."""

from eupe.store.dataset import StoreDataset
from eupe.store.features import Features
from eupe.store.reader import Store, open_store

__all__ = ["Features", "Store", "StoreDataset", "open_store"]
