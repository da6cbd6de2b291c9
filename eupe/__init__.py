"""Cache the features of vision foundation models once; distil small encoders from the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eupe.store import Store, StoreDataset, open_store

__version__ = "0.2.0"
__all__ = ["Store", "StoreDataset", "__version__", "open_store"]


def __getattr__(name: str) -> Any:
    """Load the store's names when they are first used."""
    if name not in __all__:
        raise AttributeError(f"module 'eupe' has no attribute {name!r}")
    import eupe.store

    return getattr(eupe.store, name)
