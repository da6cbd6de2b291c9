"""Random batches of dense features from the formats that a user would otherwise choose, with a warm page cache.

python -m benchmarks.peers --features dense.npy --folder SCRATCH
"""

from __future__ import annotations

import argparse
import gzip
import io
import multiprocessing
import os
import shutil
import statistics
import tarfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module as use
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.making import write_store
from eupe.store import open_store
from eupe.store.shard import COMPRESSOR, LEVEL

Array = NDArray[np.float16]
Indices = NDArray[np.int64]
Read = Callable[[Indices], Array]
Batches = Iterator[tuple[Indices, Array]]

VIEW, BATCH = (16, 16, 384), 64
SHARD_BYTES, TAR_VIEWS, SHUFFLE_BUFFER = 1 << 26, 128, 512
JOBS, PREFETCH = 2, 2
IN_FLIGHT = 6
CONTENDER = 0.75
"""A mode slower than this share of its peer's best is measured once, the others `repeats` times."""


@dataclass(frozen=True)
class Peer:
    """A format, written and read as in its documentation."""

    needs: tuple[str, ...]
    """Distributions that it needs; the version of the first is reported."""
    note: str = ""
    modes: tuple[str, ...] = ("in process", "2 threads", "2 workers")
    variant: str = ""
    checked: bool = False
    """A flipped byte raises an error; otherwise it is read as a wrong value."""
    inherited: ClassVar[bool] = False
    """Workers are forked with the opened format; otherwise each worker opens it itself."""

    def write(self, folder: Path, features: Array) -> None:
        raise NotImplementedError

    def open(self, folder: Path) -> Read:
        raise NotImplementedError

    def stream(self, folder: Path, workers: int) -> Batches:
        """Yield batches from the format's own shuffling loader."""
        raise NotImplementedError

    def batches(self, mode: str, folder: Path, num_views: int) -> Batches:
        """Yield batches without end: the indices of the views, and their values."""
        if mode.startswith("own"):
            return self.stream(folder, JOBS if "workers" in mode else 0)
        access = {"in process": _in_process, "2 threads": _in_threads, "2 workers": _in_workers}
        return access[mode](self, folder, _order(num_views))


@dataclass(frozen=True)
class Result:
    """The measurements of one format."""

    views_per_second: float
    mode: str
    stored: float
    """Stored bytes as a share of the raw features."""
    read: float
    """The same after reading, because some formats expand their files on disk."""
    rates: dict[str, list[float]]


def _order(num_views: int) -> Iterator[Indices]:
    rng = np.random.default_rng()
    while True:
        order = rng.permutation(num_views)
        yield from (order[k : k + BATCH] for k in range(0, num_views - BATCH + 1, BATCH))


def _in_process(peer: Peer, folder: Path, order: Iterator[Indices]) -> Batches:
    read = peer.open(folder)
    return ((indices, read(indices)) for indices in order)


def _in_threads(peer: Peer, folder: Path, order: Iterator[Indices]) -> Batches:
    read = peer.open(folder)
    pending: deque[Any] = deque()
    with ThreadPoolExecutor(JOBS) as pool:
        for indices in order:
            pending.append((indices, pool.submit(read, indices)))
            if len(pending) > JOBS * PREFETCH:
                indices, values = pending.popleft()
                yield indices, values.result()


def _in_workers(peer: Peer, folder: Path, order: Iterator[Indices]) -> Batches:
    read, context = (peer.open(folder), "fork") if peer.inherited else (None, "forkserver")
    return _loader(_Reads(peer, folder, read), JOBS, sampler=order, batch_size=None, multiprocessing_context=context)


@dataclass
class _Reads:
    """A dataset of whole batches."""

    peer: Peer
    folder: Path
    read: Read | None = None

    def __getitem__(self, indices: Indices) -> dict[str, Any]:
        self.read = self.read or self.peer.open(self.folder)
        return {"row": indices, "dense": self.read(indices)}


def _loader(dataset: Any, workers: int, kind: Any = None, **options: Any) -> Batches:
    """Yield the batches of a DataLoader, epoch after epoch."""
    options |= {"prefetch_factor": PREFETCH} if workers else {}
    loader = (kind or use("torch.utils.data").DataLoader)(dataset, num_workers=workers, **options)
    while True:
        for batch in loader:
            yield np.asarray(batch["row"], np.int64), np.asarray(batch["dense"])


def _one_by_one(get: Callable[[int], Any]) -> Read:
    def read(indices: Indices) -> Array:
        out = np.empty((len(indices), *VIEW), np.float16)
        for place, index in enumerate(indices):
            out[place] = get(int(index))
        return out

    return read


class Zarr(Peer):
    def write(self, folder: Path, features: Array) -> None:
        c = use("zarr.codecs")
        blosc = c.BloscCodec(typesize=2, cname=COMPRESSOR, clevel=LEVEL, shuffle="bitshuffle")
        codecs = {"filters": [c.TransposeCodec(order=(0, 3, 1, 2))], "compressors": [blosc, c.Crc32cCodec()]}
        use("zarr").create_array(folder, data=features, chunks=(1, *VIEW), shards=(512, *VIEW), **codecs)

    def open(self, folder: Path) -> Read:
        kind = (
            "zarrs.ZarrsCodecPipeline" if self.variant == "zarrs" else "zarr.core.codec_pipeline.BatchedCodecPipeline"
        )
        use("zarr").config.set({"codec_pipeline.path": kind})
        array = use("zarr").open_array(folder, mode="r")
        if self.variant == "oindex":
            return lambda indices: array.oindex[np.sort(indices)][np.argsort(np.argsort(indices))]
        return _one_by_one(lambda index: array[index])


class MDS(Peer):
    inherited = True

    def write(self, folder: Path, features: Array) -> None:
        columns = {"row": "int", "dense": "ndarray:float16:" + ",".join(map(str, VIEW))}
        options = {"columns": columns, "compression": self.variant or None, "size_limit": SHARD_BYTES}
        with use("streaming").MDSWriter(out=str(folder), **options) as writer:
            for row, dense in enumerate(features):
                writer.write({"row": row, "dense": dense})

    def open(self, folder: Path) -> Read:
        dataset = use("streaming").StreamingDataset(local=str(folder), batch_size=BATCH)
        return _one_by_one(lambda index: dataset[index]["dense"])

    def stream(self, folder: Path, workers: int) -> Batches:
        dataset = use("streaming").StreamingDataset(local=str(folder), batch_size=BATCH, shuffle=True)
        return _loader(dataset, workers, batch_size=BATCH, drop_last=True)


class LitData(Peer):
    def write(self, folder: Path, features: Array) -> None:
        def sample(row: int) -> dict[str, Any]:
            return {"row": row, "dense": use("torch").from_numpy(np.array(features[row]))}

        options = {"compression": self.variant, "compression_level": "sample"} if self.variant else {}
        options |= {"num_workers": 1, "start_method": "fork", "keep_data_ordered": True, "verbose": False}
        use("litdata").optimize(sample, list(range(len(features))), str(folder), chunk_bytes=SHARD_BYTES, **options)

    def open(self, folder: Path) -> Read:
        dataset = use("litdata").StreamingDataset(str(folder), batch_decode=0)
        return _one_by_one(lambda index: dataset[index]["dense"].numpy())

    def stream(self, folder: Path, workers: int) -> Batches:
        dataset = use("litdata").StreamingDataset(str(folder), shuffle=True, drop_last=True, batch_decode=0)
        return _loader(dataset, workers, use("litdata").StreamingDataLoader, batch_size=BATCH)


class WebDataset(Peer):
    def write(self, folder: Path, features: Array) -> None:
        folder.mkdir()
        for start in range(0, len(features), TAR_VIEWS):
            with tarfile.open(folder / f"{start:06d}.tar", "w") as tar:
                for row, dense in enumerate(features[start : start + TAR_VIEWS], start):
                    np.save(buffer := io.BytesIO(), dense)
                    content = gzip.compress(buffer.getvalue(), 6) if self.variant == "npy.gz" else buffer.getvalue()
                    entry = tarfile.TarInfo(f"{row:06d}.{self.variant}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))

    def stream(self, folder: Path, workers: int) -> Batches:
        urls, wds = sorted(map(str, folder.glob("*.tar"))), use("webdataset")
        samples = wds.WebDataset(urls, shardshuffle=len(urls)).shuffle(SHUFFLE_BUFFER).decode()
        batches = samples.to_tuple("__key__", self.variant).batched(BATCH, partial=False).repeat()
        batches = batches.map(lambda batch: {"row": np.array(batch[0], np.int64), "dense": batch[1]})
        return _loader(batches, workers, wds.WebLoader, batch_size=None)


class Lance(Peer):
    def write(self, folder: Path, features: Array) -> None:
        pa = use("pyarrow")
        kind = pa.binary(features[0].nbytes) if self.variant == "fixed" else pa.large_binary()
        table = pa.table({"dense": pa.array([dense.tobytes() for dense in features], kind)})
        use("lance").write_dataset(table, folder)

    def open(self, folder: Path) -> Read:
        dataset = use("lance").dataset(folder)

        def read(indices: Indices) -> Array:
            column = dataset.take(indices, columns=["dense"])["dense"].combine_chunks()
            return np.frombuffer(column.buffers()[-1], np.float16).reshape(len(indices), *VIEW)

        return read


class HDF5(Peer):
    def write(self, folder: Path, features: Array) -> None:
        options: dict[str, Any] = {"shuffle": True, "compression": "gzip"} if self.variant == "gzip" else {}
        if self.variant == "blosc2":
            options = {**use("hdf5plugin").Blosc2(cname="zstd", clevel=3, filters=1), "fletcher32": self.checked}
        folder.mkdir()
        with use("h5py").File(folder / "features.h5", "w") as file:
            file.create_dataset("dense", data=features, chunks=(1, *VIEW), **options)

    def open(self, folder: Path) -> Read:
        for name in self.needs:
            use(name)
        dense = use("h5py").File(folder / "features.h5")["dense"]
        return _one_by_one(lambda index: dense[index])


class Npy(Peer):
    def write(self, folder: Path, features: Array) -> None:
        folder.mkdir()
        for row, dense in enumerate(features if self.variant == "each" else [features]):
            np.save(folder / f"{row}.npy", dense)

    def open(self, folder: Path) -> Read:
        if self.variant == "each":
            return _one_by_one(lambda index: np.load(folder / f"{index}.npy"))
        features = np.load(folder / "0.npy", mmap_mode="r")
        return lambda indices: np.asarray(features[indices])


class Eupe(Peer):
    def write(self, folder: Path, features: Array) -> None:
        write_store(folder, features)

    def open(self, folder: Path) -> Read:
        store = open_store(folder)
        return lambda indices: _dense(store.read_async(indices.tolist(), [0] * len(indices)))

    def stream(self, folder: Path, workers: int) -> Batches:
        store, pending = open_store(folder), deque[Any]()
        for indices in _order(store.spec.num_samples):
            pending.append((indices, store.read_async(indices.tolist(), [0] * len(indices))))
            if len(pending) > IN_FLIGHT:
                indices, read = pending.popleft()
                yield indices, _dense(read)


def _dense(read: Any) -> Array:
    return read.result().dense


RANDOM, OWN = Peer.modes, ("own loader", "own loader, 2 workers")
UNSAFE = ("in process", "2 workers", *OWN)
"""Modes of LitData, without threads: two threads on one dataset get each other's values."""
_MDS, _LIT, _WEB = ("mosaicml-streaming", "torch"), ("litdata", "torch"), ("webdataset", "torch")
_TARS = f"no random access: tars in random order, buffer of {SHUFFLE_BUFFER} views"
PEERS: dict[str, Peer] = {
    "eupe, fp16": Eupe(("eupe",), "compressed, checksums checked", ("in process", "own loader"), checked=True),
    "zarr-python, oindex": Zarr(("zarr",), "eupe's codecs", variant="oindex", checked=True),
    "zarr-python, view by view": Zarr(("zarr",), "eupe's codecs", checked=True),
    "zarrs, view by view": Zarr(("zarrs", "zarr"), "eupe's codecs, CRC-32C ignored", variant="zarrs"),
    "MDS": MDS(_MDS, "", RANDOM + OWN),
    "MDS, zstd": MDS(_MDS, "a shard is expanded on disk once touched", RANDOM + OWN, "zstd"),
    "LitData": LitData(_LIT, "", UNSAFE),
    "LitData, zstd": LitData(_LIT, "each sample by itself", UNSAFE, "zstd"),
    "WebDataset": WebDataset(_WEB, _TARS, OWN, "npy"),
    "WebDataset, gzip": WebDataset(_WEB, _TARS, OWN, "npy.gz", checked=True),
    "Lance, fixed-size binary": Lance(("pylance",), "its default: no compression", variant="fixed"),
    "Lance, binary": Lance(("pylance",), "its default compression"),
    "HDF5": HDF5(("h5py",)),
    "HDF5, gzip": HDF5(("h5py",), "byte shuffle", variant="gzip", checked=True),
    "HDF5, Blosc2": HDF5(("hdf5plugin", "h5py"), "zstd 3, byte shuffle", variant="blosc2"),
    "HDF5, Blosc2, Fletcher-32": HDF5(("hdf5plugin", "h5py"), "the same", variant="blosc2", checked=True),
    "npy, one per view": Npy(("numpy",), variant="each"),
    "memmap": Npy(("numpy",), "no checksum, no compression: for context"),
}


def measure(peer: Peer, features: Array, folder: Path, *, batches: int, repeats: int) -> Result:
    return measure_all({"peer": peer}, features, folder, batches=batches, repeats=repeats)["peer"]


def measure_all(
    peers: Mapping[str, Peer], features: Array, folder: Path, *, batches: int, repeats: int
) -> dict[str, Result]:
    """Write all formats, run every mode once, then run the best modes in `repeats` rounds, peer after peer."""
    homes = {name: folder / f"peer{number}" for number, name in enumerate(peers)}
    for name, peer in peers.items():
        shutil.rmtree(homes[name], ignore_errors=True)
        peer.write(homes[name], features)
    stored = {name: _share(home, features) for name, home in homes.items()}
    os.sync()
    rates: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in peers[name].modes} for name in peers}
    for round in range(1 + repeats):
        for name, peer in peers.items():
            for mode, done in rates[name].items():
                if round == 0 or done[0] > CONTENDER * max(first for first, *_ in rates[name].values()):
                    _warm(homes[name])
                    done.append(_views_per_second(peer.batches(mode, homes[name], len(features)), features, batches))
    results = {}
    for name, home in homes.items():
        medians = {mode: statistics.median(done[1:]) for mode, done in rates[name].items() if len(done) > 1}
        best = max(medians, key=medians.__getitem__)
        results[name] = Result(medians[best], best, stored[name], _share(home, features), rates[name])
    return results


def _views_per_second(stream: Batches, features: Array, batches: int) -> float:
    """Return the rate over `batches` batches.

    The batches before them empty the queues that were filled ahead, and are compared with the source afterwards.
    """
    first = list(islice(stream, JOBS * PREFETCH + 1))
    start = time.perf_counter()
    for _ in islice(stream, batches):
        pass
    rate = batches * BATCH / (time.perf_counter() - start)
    if not all(np.array_equal(values.view(np.uint16), features[rows].view(np.uint16)) for rows, values in first):
        raise ValueError("the values read are not those written")
    return rate


def _warm(folder: Path) -> None:
    """Read all files into the page cache; some machines drop pages that were not used for seconds."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def _share(folder: Path, features: Array) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / features.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, required=True, help="A .npy file of float16 [N, 16, 16, 384].")
    parser.add_argument("--folder", type=Path, required=True, help="Scratch space for 18 copies of the features.")
    parser.add_argument("--batches", type=int, default=16, help="Number of batches that are timed in each round.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(PEERS), default=list(PEERS))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    multiprocessing.set_forkserver_preload(["torch"])
    versions = {found.name.lower(): found.version for found in distributions()}
    missing = {name: [need for need in PEERS[name].needs if need not in versions] for name in args.only}
    for name in filter(missing.get, missing):
        print(f"{name}: skipped, not installed: {', '.join(missing[name])}")
    peers = {name: PEERS[name] for name in args.only if not missing[name]}
    args.folder.mkdir(parents=True, exist_ok=True)
    results = measure_all(peers, np.load(args.features), args.folder, batches=args.batches, repeats=args.repeats)
    print("| peer | version | views/s | best mode | stored | once read | checked | |")
    print("|---|---|---:|---|---:|---:|---|---|")
    for name, result in results.items():
        first = f"{peers[name].needs[0]} {versions[peers[name].needs[0]]}"
        best = f"{result.views_per_second:,.0f} | {result.mode} | {result.stored:.2f} | {result.read:.2f}"
        print(f"| {name} | {first} | {best} | {'yes' if peers[name].checked else 'no'} | {peers[name].note} |")


if __name__ == "__main__":
    main()
