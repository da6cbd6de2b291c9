"""One part of one array as the bytes of its Zarr object, and the checksums in it.

A shard is its chunks one after the other, then an index of (offset, length) for each chunk of the grid in C order, then
the index's CRC-32C. Each chunk ends in a CRC-32C of its own. An array that is not sharded has one chunk for a part.
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
"""Of a Blosc frame: two versions, flags, the element's size, then uncompressed, block and compressed bytes."""
CRC_OF_CHECKED = 0x48674BC7
"""CRC-32C of any bytes that end in their own CRC-32C."""
ABSENT = 2**64 - 1
COMPRESSOR, LEVEL = "lz4", 9
"""Chosen in docs/decisions/0003-codec.md."""
SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


def shuffle_of(layout: ArrayLayout) -> str:
    """Features lie bit by bit; boxes and digests byte by byte."""
    return "bitshuffle" if layout.sharded else "shuffle"


def typesize_of(layout: ArrayLayout, *, pairs: bool = True) -> int:
    """Bytes of what is shuffled: an element, or a pair of int8, of which the shuffle is undone a quarter faster."""
    itemsize = np.dtype(layout.dtype).itemsize
    return 2 if pairs and layout.dtype == "int8" and math.prod(layout.chunk) % 2 == 0 else itemsize


def zarr_codec(layout: ArrayLayout, *, pairs: bool = True) -> BloscCodec:
    """What an array's metadata says of its compression.

    Args:
        pairs: see `typesize_of`; the first stores shuffled int8 byte by byte.
    """
    return BloscCodec(
        typesize=typesize_of(layout, pairs=pairs),
        cname=COMPRESSOR,
        clevel=LEVEL,
        shuffle=shuffle_of(layout),
    )


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli), as Zarr's codec of that name."""
    return int(google_crc32c.value(data if isinstance(data, bytes) else bytes(data)))


def crc32(block: bytes, crc: int = 0) -> int:
    """CRC-32 (zlib's) of a whole object, or of what `crc` is of followed by a block.

    Not CRC-32C: that of bytes which end in their own CRC-32C is the same whatever they say.
    """
    return zlib.crc32(block, crc)


def encode_chunk(values: NDArray, layout: ArrayLayout) -> bytes:  # type: ignore[type-arg]
    """One chunk, compressed and with its checksum; a short one is filled up along the first axis."""
    if len(values) < layout.chunk[0]:
        whole = np.full(layout.chunk, layout.fill, layout.dtype)
        whole[: len(values)] = values
        values = whole
    ordered = values if layout.order is None else values.transpose(layout.order)
    contiguous = np.ascontiguousarray(ordered, np.dtype(layout.dtype).newbyteorder("<"))
    units = contiguous.reshape(-1).view(f"V{typesize_of(layout)}")
    compressed: bytes = blosc.compress(units, COMPRESSOR.encode(), LEVEL, SHUFFLES[shuffle_of(layout)], 0)
    return compressed + _crc_bytes(compressed)


def decode_chunk(data: bytes, layout: ArrayLayout) -> NDArray:  # type: ignore[type-arg]
    """The reverse of `encode_chunk` for a chunk of an array that is not sharded, whose checksum holds.

    Raises: ValueError if it is no frame of this array's.
    """
    if not is_frame_of(data[:-CRC_BYTES], math.prod(layout.chunk) * np.dtype(layout.dtype).itemsize):
        raise ValueError(f"a chunk of {layout.path} is no frame of its shape")
    values = np.frombuffer(blosc.decompress(data[:-CRC_BYTES]), np.dtype(layout.dtype).newbyteorder("<"))
    return values.reshape(layout.chunk)


def crc_holds(data: bytes | memoryview) -> bool:
    """Whether the last four bytes are the CRC-32C of those before them."""
    return len(data) > CRC_BYTES and crc32c(data) == CRC_OF_CHECKED


def is_frame_of(data: bytes | memoryview, num_bytes: int) -> bool:
    """Tell whether bytes are a Blosc frame that says of itself the length that it has, and `num_bytes` uncompressed.

    The library reads as far as the frame says, so a frame of a stranger's must be asked before.
    """
    says = len(data) >= FRAME_HEAD_BYTES and [int.from_bytes(data[i : i + 4], "little") for i in (4, 12)]
    return says == [num_bytes, len(data)]


def most_bytes(layout: ArrayLayout) -> int:
    """Return how long a chunk can be: Blosc stores what it cannot compress, and a checksum follows."""
    return math.prod(layout.chunk) * np.dtype(layout.dtype).itemsize + FRAME_HEAD_BYTES + CRC_BYTES


def chunks_of(values: NDArray, layout: ArrayLayout) -> list[NDArray]:  # type: ignore[type-arg]
    """The chunks of [samples, views, ...] values, in the order of the grid."""
    rows, views = layout.chunk[0], layout.chunk[1]
    starts = itertools.product(range(0, len(values), rows), range(0, layout.shape[1], views))
    return [values[i : i + rows, k : k + views] for i, k in starts]


def num_places(layout: ArrayLayout) -> int:
    """Chunks of a whole shard."""
    return (layout.shard[0] // layout.chunk[0]) * (layout.shard[1] // layout.chunk[1])


def bytes_of_index(layout: ArrayLayout) -> int:
    """At a shard's end, the checksum counted in."""
    return 16 * num_places(layout) + CRC_BYTES


def shard_blocks(chunks: Iterable[bytes], layout: ArrayLayout) -> Iterator[bytes]:
    """The object of a sharded array block by block: its encoded chunks as they come, then the index of them.

    The grid's places behind the chunks stay absent.
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
    """Name of a part's object, below the store."""
    return f"{layout.path}/c/{part}" + "/0" * (len(layout.shape) - 1)


@dataclass(frozen=True)
class Damage:
    """What is wrong with an object."""

    reason: str
    first_row: int | None = None
    """Of the first chunk that fails, counted within the part; None where the whole object is concerned."""


def inspect_object(data: bytes, layout: ArrayLayout, num_samples: int) -> Damage | None:
    """Check every byte of a part's object by the checksums in it; None if all is well.

    Args:
        num_samples: of the part, which says how many chunks there must be.
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
        if offset != end or not crc_holds(view[offset : offset + length]):
            return Damage("holds a chunk that fails its checksum", place // views * rows)
        end = offset + length
    return None if end == len(data) - index_bytes else Damage("holds bytes that belong to no chunk")


def _crc_bytes(data: bytes) -> bytes:
    return crc32c(data).to_bytes(CRC_BYTES, "little")
