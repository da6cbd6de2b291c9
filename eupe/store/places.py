"""Facts from a store's index: where pictures are inside tars and tables, and what the store leaves out."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eupe.corpus.index import index_from_bytes
from eupe.corpus.left_out import LeftOut
from eupe.corpus.pictures import PLACE_COLUMNS
from eupe.errors import CorpusError, StorageError
from eupe.store.layout import segment_name
from eupe.store.reader import Store


def with_places(store: Store, samples: pa.Table) -> pa.Table:
    """Return samples with the columns `PLACE_COLUMNS` of the store's index; unchanged if all pictures are files.

    Args:
        samples: a table with a column `key`.
    Raises: CorpusError if the index is damaged; StorageError.
    """
    segments = [_places(store, segment_name(i)) for i in range(len(store.spec.corpus["segments"]))]
    places = [segment for segment in segments if segment is not None]
    if not places:
        return samples
    index = pa.concat_tables(places)
    rows = index.take(pc.index_in(samples["key"], value_set=index["key"]))
    for name in PLACE_COLUMNS:
        samples = samples.append_column(name, rows[name])
    return samples


def left_out(store: Store) -> LeftOut:
    """Return what the store leaves out of the corpus, as of its last extension; empty if that is not noted."""
    name = segment_name(len(store.spec.corpus["segments"]) - 1)
    try:
        return index_from_bytes(store.path.read(name), str(store.path / name)).left_out
    except (FileNotFoundError, CorpusError, StorageError):
        return {}


def _places(store: Store, name: str) -> pa.Table | None:
    try:
        file = pq.ParquetFile(pa.BufferReader(store.path.read(name)), page_checksum_verification=True)
        if not set(PLACE_COLUMNS) <= set(file.schema_arrow.names):
            return None
        return file.read(["key", *PLACE_COLUMNS])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorpusError(
            f"{store.path / name}, which records where the pictures are, cannot be read: {error}; "
            f"run `eupe store repair {store.path}` to make it again"
        ) from error
