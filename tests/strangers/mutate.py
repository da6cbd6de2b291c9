"""Mutations of strangers' files, tried in a process with little memory: refused in a sentence, or read as they were.

Run as a program with `tests` on PYTHONPATH: `mutate.py FOLDER SEED COUNT` prints, as JSON, how many mutations of each
kind were refused, how many were read, and whatever else came of one.
"""

from __future__ import annotations

import io
import json
import random
import resource
import shutil
import struct
import sys
import tarfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eupe.corpus.index import index_bytes, index_folder, index_from_bytes, open_corpus
from eupe.errors import EupeError
from eupe.store import open_store
from eupe.store.layout import ArrayLayout, arrays
from eupe.store.reader import Store
from eupe.store.shard import bytes_of_index, crc32c
from eupe.store.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden" / "format1"
MEMORY = 4 * 2**30
"""Of addresses, that a mutation may ask for: libraries ask for what a frame says, up to 2 GB, and touch none of it."""
SECONDS = 20.0
"""That one may take."""
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 10**12, 2**63, 10**30, 0.5, float("nan"), float("inf"), "", "x", "0", [], [0]),
    *([10**12], [-1], ["a"], [[]], [None], {}, {"a": 1}, "\x1b]52;c;eA==\x07", "..", "/dev/zero", "a\0b", "\udc80"),
)
Try = Callable[[random.Random], bool]
"""Makes one mutation and reads it; whether it was refused. Raises AssertionError for what was read otherwise."""


def main(folder: Path, seed: int, count: int) -> None:
    kinds: dict[str, Try] = {}
    for name in ("fp16", "int8"):
        store = _StoreTries(Path(shutil.copytree(GOLDEN / f"{name}.zarr", folder / f"{name}.zarr")))
        kinds |= {f"{name} {kind}": function for kind, function in store.tries().items()}
    kinds |= _corpus_tries(folder)
    chosen = random.Random(seed)
    soft = _memory_in_use() + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (soft, soft))
    first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = 0.0
    shares = [0.2 if "verify" in kind else 1.0 for kind in kinds]  # which reads all of a store
    for i in range(count):
        (kind,) = chosen.choices(list(kinds), shares)
        began = time.monotonic()
        print(f"mutation {i}: {kind}", file=sys.stderr, flush=True)  # the last of them tells what a crash is of
        try:
            counts[f"{kind}: {'refused' if kinds[kind](chosen) else 'read'}"] += 1
        except BaseException:
            wrong.append(f"{kind}, mutation {i}: {traceback.format_exc()[-1500:]}")
        slowest = max(slowest, time.monotonic() - began)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first
    print(json.dumps({"counts": counts, "wrong": wrong[:5], "slowest": slowest, "grown_kib": grown}))


def _memory_in_use() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def refused(read: Callable[[], object]) -> bool:
    """Return whether reading ends in a sentence of ours; any other error is raised."""
    try:
        read()
    except EupeError as error:
        assert "\n" not in str(error) or len(str(error)) < 2000
        return True
    return False


class _StoreTries:
    """Mutations of a golden store's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        store = open_store(path)
        self.layouts = arrays(store.spec)
        self.rows = store.valid["row"].to_pylist()
        self.told = self._told(store)
        self.values = self._values(store)

    def tries(self) -> dict[str, Try]:
        return {
            "zarr.json": self.document,
            "an array's zarr.json": self.array_document,
            "commit": self.commit,
            "statistics": self.statistics,
            "chunk, its checksum made good": self.frame,
            "index of a shard, its checksum made good": self.shard_index,
            "bytes of an object": self.object_bytes,
            "bytes seen by verify": self.verified,
        }

    def _told(self, store: Store) -> list[object]:
        return [store.samples.to_pylist(), store.failures, store.stored_bytes, store.num_not_finite, store.totals]

    def _values(self, store: Store, rows: list[int] | None = None) -> list[bytes]:
        rows = self.rows if rows is None else rows
        read = []
        for size in store.spec.sizes:
            features = store.read(rows, [0] * len(rows), size=size)
            values = (features.boxes, features.flips, features.summary, features.dense)
            read += [value.tobytes() for value in values if value is not None]
        return [*read, store.read_digests(rows, [0] * len(rows)).tobytes()]

    def _changed(self, file: Path, data: bytes, read: Callable[[], object]) -> bool:
        before = file.read_bytes()
        file.write_bytes(data)
        try:
            return refused(read)
        finally:
            file.write_bytes(before)

    def _is_read_the_same(self) -> None:
        store = open_store(self.path)
        assert self._values(store) == self.values

    def document(self, rng: random.Random) -> bool:
        def read() -> None:
            store = open_store(self.path)
            self._told(store)
            store.missing_parts()
            store.corpus_root()
            self._values(store, store.valid["row"].to_pylist())

        file = self.path / "zarr.json"
        return self._changed(file, _odd_json(file.read_bytes(), rng), read)

    def array_document(self, rng: random.Random) -> bool:
        file = self.path / rng.choice(self.layouts).path / "zarr.json"
        return self._changed(file, _odd_json(file.read_bytes(), rng), self._is_read_the_same)

    def commit(self, rng: random.Random) -> bool:
        file = rng.choice(sorted(self.path.glob("parts/*.parquet")))

        def read() -> None:
            assert self._told(open_store(self.path))[0] == self.told[0]

        return self._changed(file, _flipped(file.read_bytes(), rng), read)

    def statistics(self, rng: random.Random) -> bool:
        files = [file for file in sorted(self.path.rglob("stats/**/*")) if file.is_file()]
        file = rng.choice(files)
        is_json = file.name == "zarr.json"
        data = _odd_json(file.read_bytes(), rng) if is_json else _flipped(file.read_bytes(), rng)

        def read() -> None:
            store = open_store(self.path)
            for path in store.spec.feature_paths:
                size, kind = path.split("/")
                store.full_stats(int(size), kind)

        return self._changed(file, data, read)

    def _object(self, rng: random.Random, *, sharded: bool) -> tuple[ArrayLayout, Path]:
        layout = rng.choice([layout for layout in self.layouts if layout.sharded or not sharded])
        return layout, rng.choice(
            [file for file in sorted((self.path / layout.path / "c").rglob("*")) if file.is_file()]
        )

    def frame(self, rng: random.Random) -> bool:
        """A chunk whose frame lies, under checksums that hold: read as anything of its shape, and never beyond it."""
        layout, file = self._object(rng, sharded=True)
        data = bytearray(file.read_bytes())
        index = np.frombuffer(bytes(data[-bytes_of_index(layout) : -4]), "<u8").reshape(-1, 2)
        offset, length = rng.choice([pair for pair in index.tolist() if pair[0] != 2**64 - 1])
        chunk = data[offset : offset + length - 4]
        place = rng.choice([*range(16), *(rng.randrange(len(chunk)) for _ in range(16))])
        word = rng.choice(
            [struct.pack("<I", rng.choice([0, 1, 15, 2**31 - 1, 2**32 - 1, len(chunk) * 2])), rng.randbytes(1)]
        )
        chunk[place : place + len(word)] = word[: len(chunk) - place]
        data[offset : offset + length] = bytes(chunk) + crc32c(bytes(chunk)).to_bytes(4, "little")

        def read() -> None:
            store = open_store(self.path)
            assert [len(value) for value in self._values(store)] == [len(value) for value in self.values]

        return self._changed(file, bytes(data), read)

    def shard_index(self, rng: random.Random) -> bool:
        layout, file = self._object(rng, sharded=True)
        data = bytearray(file.read_bytes())
        size = bytes_of_index(layout)
        index = data[-size:-4]
        place = rng.randrange(len(index) // 8) * 8
        index[place : place + 8] = struct.pack(
            "<Q", rng.choice([0, 1, 7, 19, 2**31, 2**62, 2**63, 2**64 - 2, len(data)])
        )
        data[-size:] = bytes(index) + crc32c(bytes(index)).to_bytes(4, "little")
        return self._changed(file, bytes(data), self._is_read_the_same)

    def object_bytes(self, rng: random.Random) -> bool:
        _, file = self._object(rng, sharded=False)
        return self._changed(file, _flipped(file.read_bytes(), rng), self._is_read_the_same)

    def verified(self, rng: random.Random) -> bool:
        """`verify` sees every byte that is another, but for headers of Parquet that another version of Arrow wrote."""
        every = [file for file in sorted(self.path.rglob("*")) if file.is_file()]
        files = [file for file in every if file.suffix not in (".json", ".parquet")]
        file = rng.choice(files)
        data = _flipped(file.read_bytes(), rng)
        same = data == file.read_bytes()

        def read() -> None:
            found = verify(self.path)
            assert found.whole == same, f"{file} has other bytes, and verify says nothing"

        return self._changed(file, data, read)


def _corpus_tries(folder: Path) -> dict[str, Try]:
    from making import make_corpus

    corpus = make_corpus(folder / "photos", count=6)
    index = index_bytes(index_folder(corpus))
    rows = index_from_bytes(index, "index").samples
    tar = folder / "photos.tar"
    with tarfile.open(tar, "w") as file:
        for i, picture in enumerate(sorted(corpus.rglob("*.png"))):
            notes = json.dumps({"label": i, "caption": "a picture"}).encode()
            for name, data in ((f"{i:03d}.png", picture.read_bytes()), (f"{i:03d}.json", notes)):
                about = tarfile.TarInfo(name)
                about.size = len(data)
                file.addfile(about, io.BytesIO(data))
    packed = tar.read_bytes()
    whole = open_corpus(tar).samples

    def index_bytes_flipped(rng: random.Random) -> bool:
        def read() -> None:
            assert index_from_bytes(data, "index").samples.equals(rows)

        data = _flipped(index, rng)
        return refused(read)

    def tar_header(rng: random.Random) -> bool:
        data = bytearray(packed)
        member = rng.randrange(12) * 512
        starts = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]
        start = starts[member // 512 % len(starts)]
        place = start + rng.randrange(512)
        data[place : place + 12] = rng.choice([rng.randbytes(12), b"77777777777\0", b"\xff" * 12, bytes(12)])
        tar.write_bytes(data)
        return refused(lambda: open_corpus(tar))

    def tar_sidecar(rng: random.Random) -> bool:
        data = packed.replace(
            b'{"label": 3', rng.choice([b'{"label": [', b"[[[[[[[[[[[", b'{"label": \xff', b'{"laXel": 3'])
        )
        tar.write_bytes(data)

        def read() -> None:
            found = open_corpus(tar).samples
            assert found["sha256"].equals(whole["sha256"])

        return refused(read)

    return {"index": index_bytes_flipped, "tar header": tar_header, "tar json": tar_sidecar}


def _flipped(data: bytes, rng: random.Random) -> bytes:
    """Other bytes somewhere, or an end that is cut off or drawn out."""
    changed = bytearray(data)
    match rng.randrange(4):
        case 0:
            return data[: rng.randrange(len(data))]
        case 1:
            return data + rng.randbytes(rng.choice([1, 8, 1000]))
        case 2:
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case _:
            place = rng.randrange(len(data))
            changed[place : place + 8] = rng.choice([rng.randbytes(8), b"\xff" * 8, bytes(8)])
    return bytes(changed)


def _odd_json(data: bytes, rng: random.Random) -> bytes:
    """One value, at whatever depth, replaced or gone; or text that is no JSON."""
    if rng.random() < 0.1:
        return rng.choice(
            [b"", b"[" * 100_000, b"{", b"null", b"[]", b'"x"', data[: len(data) // 2], b"\xff\xfe", b"{}"]
        )
    document = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                collect(value[key])

    collect(document)
    holder, key = rng.choice(places)
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(ODD)
    return json.dumps(document, ensure_ascii=True).encode()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
