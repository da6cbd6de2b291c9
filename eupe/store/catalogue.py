"""Catalogue of the stores in a directory, and lookup of a store by its specification."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from eupe.common.storage import StoragePath
from eupe.errors import StoreError
from eupe.store.layout import StoreSpec, differences
from eupe.store.reader import ROOT_DOCUMENT, Store, open_store


@dataclass(frozen=True)
class StoreEntry:
    """One line of `eupe store ls`."""

    name: str
    teacher: str
    licence: str
    views: str
    sizes: tuple[int, ...]
    grids: tuple[int, ...]
    layers: tuple[str, ...]
    """Numbers of the earlier layers whose dense maps are stored, too."""
    precision: str
    num_samples: int
    stored_bytes: int
    complete: float
    """Share of the parts that are committed; 1 only once their statistics are written, too."""


def stores_in(directory: str | Path | StoragePath) -> list[Store]:
    """Return the stores directly in a directory, sorted by name; ignore everything else there.

    Raises: StoreError if the directory does not exist; StorageError.
    """
    place = StoragePath.of(directory)
    if place.is_local:
        if not place.local.is_dir():
            raise StoreError(f"directory {place} does not exist; give one that holds stores")
        names = sorted(path.parent.name for path in place.local.glob(f"*/{ROOT_DOCUMENT}"))
    else:
        ends = [name.split("/") for name in place.list() if name.endswith(f"/{ROOT_DOCUMENT}")]
        names = [parts[0] for parts in ends if len(parts) == 2]
    return [store for name in names if (store := _store_or_none(place / name)) is not None]


def _store_or_none(place: StoragePath) -> Store | None:
    try:
        return open_store(place)
    except StoreError:
        return None


def find_store(directory: Path, spec: StoreSpec, *, fidelity: float | None) -> Store | None:
    """Return a store of the same specification, whatever its name; None if there is none.

    Args:
        fidelity: requested fidelity, compared in place of the spec's precision; None to compare the precision.
    """
    if not directory.is_dir():
        return None
    for store in stores_in(directory):
        same_fidelity = fidelity is not None and store.spec.fidelity.get("asked") == fidelity
        wanted = replace(spec, precision=store.spec.precision) if same_fidelity else spec
        if not differences(store.spec, wanted) and same_fidelity == (fidelity is not None):
            return store
    return None


def describe(store: Store) -> StoreEntry:
    """Build the catalogue entry of a store.

    Raises: PartCorruptError if a commit file is damaged.
    """
    spec = store.spec
    views = spec.views
    colours = f" photometric {views['photometric']}" if spec.photometric else ""
    seed = f" seed {views['seed']}" if "seed" in views else ""
    share = len(store.committed_parts()) / spec.num_parts
    return StoreEntry(
        name=store.path.name,
        teacher=str(spec.teacher["name"]),
        licence=str(spec.teacher["licence"]),
        views=f"{views['policy']}:{views['num_views']}{colours}{seed}",
        sizes=spec.sizes,
        grids=spec.grids,
        layers=tuple(spec.layers),
        precision=",".join(f"{kind}={spec.precision[kind]}" for kind in spec.tokens),
        num_samples=spec.num_samples,
        stored_bytes=store.stored_bytes,
        complete=1.0 if store.finished else min(share, 0.999),
    )
