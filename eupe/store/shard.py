"""Coding of one part of one array as the bytes of its Zarr object, with the checksums in it.

A shard is its chunks one after the other, then an index of (offset, length) for each chunk of the grid in C order, then
the index's CRC-32C. Each chunk ends in its own CRC-32C. An array that is not sharded has one chunk per part.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from eupe.store.layout import ArrayLayout

CRC_BYTES = 4
FRAME_HEAD_BYTES = 16
"""Header of a Blosc frame: two versions, flags, element size, then uncompressed, block and compressed bytes."""
CRC_OF_CHECKED = 0x48674BC7
"""CRC-32C of any bytes that end in their own CRC-32C."""
ABSENT = 2**64 - 1
"""Offset and length of an absent chunk in a shard's index."""
COMPRESSOR, LEVEL = "lz4", 9
"""Codec of every array; docs/decisions/0003-codec.md says why."""
SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


def shuffle_of(layout: ArrayLayout) -> str:
    """Return Blosc's shuffle: features and pixels by bits, the small arrays (boxes, digests) by bytes."""
    return "bitshuffle" if layout.sharded else "shuffle"


def typesize_of(layout: ArrayLayout, *, pairs: bool = True) -> int:
    """Return the bytes of a shuffled unit: an element, or a pair of int8.

    Pairs are decoded a quarter faster (docs/decisions/0004-local-reads-and-writes.md).

    Args:
        pairs: False as in the first stores, which shuffled int8 byte by byte.
    """
    itemsize = np.dtype(layout.dtype).itemsize
    return 2 if pairs and layout.dtype == "int8" and math.prod(layout.chunk) % 2 == 0 else itemsize


def zarr_codec(layout: ArrayLayout, *, pairs: bool = True) -> BloscCodec:
    """Return an array's compression as its metadata describes it.

    Args:
        pairs: see `typesize_of`.
    """
    return BloscCodec(
        typesize=typesize_of(layout, pairs=pairs),
        cname=COMPRESSOR,
        clevel=LEVEL,
        shuffle=shuffle_of(layout),
    )


def crc32c(data: bytes | memoryview) -> int:
    """Compute the CRC-32C (Castagnoli), as Zarr's codec of that name does."""
    return int(google_crc32c.value(data if isinstance(data, bytes) else bytes(data)))


def crc32(block: bytes, crc: int = 0) -> int:
    """Compute zlib's CRC-32 of a block, or continue with a block after the bytes whose CRC-32 is `crc`.

    A CRC-32C would not do for whole objects: it is the same for all bytes that end in their own CRC-32C.
    """
    return zlib.crc32(block, crc)


def encode_chunk(values: NDArray, layout: ArrayLayout) -> bytes:  # type: ignore[type-arg]
    """Compress a chunk and append its checksum; a short chunk is padded with the fill value along the first axis."""
    if len(values) < layout.chunk[0]:
        whole = np.full(layout.chunk, layout.fill, layout.dtype)
        whole[: len(values)] = values
        values = whole
    ordered = values if layout.order is None else values.transpose(layout.order)
    contiguous = np.ascontiguousarray(ordered, np.dtype(layout.dtype).newbyteorder("<"))
    # Blosc takes the size of a shuffled unit from the dtype
    units = contiguous.reshape(-1).view(f"V{typesize_of(layout)}")
    compressed: bytes = blosc.compress(units, COMPRESSOR.encode(), LEVEL, SHUFFLES[shuffle_of(layout)], 0)
    return compressed + _crc_bytes(compressed)


def decode_chunk(data: bytes, layout: ArrayLayout) -> NDArray:  # type: ignore[type-arg]
    """Decode a chunk of an array that is not sharded, whose checksum was checked before.

    Raises: ValueError if it is not a Blosc frame of this array's shape.
    """
    if not is_frame_of(data[:-CRC_BYTES], math.prod(layout.chunk) * np.dtype(layout.dtype).itemsize):
        raise ValueError(f"a chunk of {layout.path} is not a frame of its shape")
    values = np.frombuffer(blosc.decompress(data[:-CRC_BYTES]), np.dtype(layout.dtype).newbyteorder("<"))
    return values.reshape(layout.chunk)


def crc_holds(data: bytes | memoryview) -> bool:
    """Return whether the last four bytes are the CRC-32C of those before them."""
    return len(data) > CRC_BYTES and crc32c(data) == CRC_OF_CHECKED


def is_frame_of(data: bytes | memoryview, num_bytes: int) -> bool:
    """Return whether bytes are a Blosc frame whose header has their length, and `num_bytes` uncompressed.

    The library reads as far as the header says, so an untrusted frame must be checked first.
    """
    says = len(data) >= FRAME_HEAD_BYTES and [int.from_bytes(data[i : i + 4], "little") for i in (4, 12)]
    return says == [num_bytes, len(data)]


def most_bytes(layout: ArrayLayout) -> int:
    """Return the largest size of a chunk: Blosc stores what it cannot compress as it is, and a checksum follows."""
    return math.prod(layout.chunk) * np.dtype(layout.dtype).itemsize + FRAME_HEAD_BYTES + CRC_BYTES


def chunks_of(values: NDArray, layout: ArrayLayout) -> list[NDArray]:  # type: ignore[type-arg]
    """Split [samples, views, ...] values into chunks, in the order of the grid."""
    rows, views = layout.chunk[0], layout.chunk[1]
    starts = itertools.product(range(0, len(values), rows), range(0, layout.shape[1], views))
    return [values[i : i + rows, k : k + views] for i, k in starts]


def num_places(layout: ArrayLayout) -> int:
    """Return the number of chunks of a whole shard."""
    return (layout.shard[0] // layout.chunk[0]) * (layout.shard[1] // layout.chunk[1])


def bytes_of_index(layout: ArrayLayout) -> int:
    """Return the bytes of the index at a shard's end, including its checksum."""
    return 16 * num_places(layout) + CRC_BYTES


def shard_blocks(chunks: Iterable[bytes], layout: ArrayLayout) -> Iterator[bytes]:
    """Yield the object of a sharded array block by block: its encoded chunks as they come, then their index.

    Places of the grid after the last chunk are absent from the index.
    """
    index = np.full((num_places(layout), 2), ABSENT, "<u8")
    offset = 0
    for place, chunk in enumerate(chunks):
        index[place] = offset, len(chunk)
        offset += len(chunk)
        yield chunk
    encoded = index.tobytes()
    yield encoded + _crc_bytes(encoded)


def object_key(layout: ArrayLayout, part: int) -> str:
    """Return the name of a part's object, below the store."""
    return f"{layout.path}/c/{part}" + "/0" * (len(layout.shape) - 1)


@dataclass(frozen=True)
class Damage:
    """Damage of an object."""

    reason: str
    first_row: int | None = None
    """First row of the first chunk that fails, counted within the part; None if the whole object is damaged."""


def inspect_object(data: bytes, layout: ArrayLayout, num_samples: int) -> Damage | None:
    """Check every byte of a part's object against the checksums in it; return None if all is well.

    Args:
        num_samples: number of samples in the part, which decides how many chunks there must be.
    """
    if not layout.sharded:
        return None if crc_holds(memoryview(data)) else Damage("fails its checksum")
    rows, views = layout.chunk[0], layout.shard[1] // layout.chunk[1]
    index_bytes = bytes_of_index(layout)
    if len(data) < index_bytes or not crc_holds(memoryview(data)[-index_bytes:]):
        return Damage("has a damaged index, or is cut short")
    index = np.frombuffer(data, "<u8", 2 * num_places(layout), len(data) - index_bytes).reshape(-1, 2)
    num_chunks = -(-num_samples // rows) * views
    end = 0
    view = memoryview(data)
    for place, (offset, length) in enumerate(index.tolist()):
        if place >= num_chunks:
            if (offset, length) != (ABSENT, ABSENT):
                return Damage("holds chunks beyond its samples", place // views * rows)
            continue
        # without gaps, so that every byte is under a checksum
        if offset != end or not crc_holds(view[offset : offset + length]):
            return Damage("holds a chunk that fails its checksum", place // views * rows)
        end = offset + length
    return None if end == len(data) - index_bytes else Damage("holds bytes that belong to no chunk")


def _crc_bytes(data: bytes) -> bytes:
    return crc32c(data).to_bytes(CRC_BYTES, "little")
