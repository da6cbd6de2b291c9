"""What is on disk. `FORMAT.md` beside this file is its specification; nothing here needs torch."""

from eupe.store.dataset import StoreDataset
from eupe.store.reader import Features, Store, open_store

__all__ = ["Features", "Store", "StoreDataset", "open_store"]
