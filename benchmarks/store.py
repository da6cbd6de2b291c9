"""Claims about the store, side by side: random reads, writing, verifying, opening, bytes by precision.

python -m benchmarks.store {read,write,verify,open,precision,codec} --features dense.npy --folder SCRATCH

`read` and `write` compare with zarr-python and with the codec alone; `benchmarks.peers` with other formats.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numcodecs import blosc
from numpy.typing import NDArray

from benchmarks.making import (
    PART_VIEWS,
    PATH,
    calibrated,
    decode_rate,
    dense_spec,
    encoded_chunks,
    interleaved,
    part_of,
    seconds,
    spread,
    write_store,
)
from eupe.extract.process import limit_blas
from eupe.store import Store
from eupe.store.layout import arrays
from eupe.store.precision import CANDIDATES, cosines, encode
from eupe.store.shard import CRC_BYTES, zarr_codec
from eupe.store.stats import Counted
from eupe.store.verify import verify
from eupe.store.writer import StoreWriter, create_store
from eupe.train.targets import TargetTokens

BATCH, IN_FLIGHT, SECONDS, REPEATS = 64, 6, 0.8, 9
THREADS = os.cpu_count() or 1
PARTS_AT_ONCE = 2
"""Number of parts that one writer commits at once, as in extraction's workers."""
Features = NDArray[np.float16]
Read = Callable[[list[int]], object]


def rate(read: Read, num_views: int, seed: int) -> float:
    """Return the views per second of random batches that are read one after the other for `SECONDS`."""
    rng = np.random.default_rng(seed)
    read(rng.integers(0, num_views, BATCH).tolist())
    began, views = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < SECONDS:
        read(rng.integers(0, num_views, BATCH).tolist())
        views += BATCH
    return views / elapsed


def queued(store: Store, finish: Callable[[object], object]) -> Read:
    """Return a function that reads as the trainer does: a few reads are in flight while one is used."""
    pending: deque[object] = deque()

    def read(rows: list[int]) -> None:
        pending.append(store.read_async(rows, [0] * len(rows)))
        if len(pending) > IN_FLIGHT:
            finish(pending.popleft())

    return read


def measure_read(features: Features, folder: Path) -> None:
    """Read random batches of 64 views: our store at fp16 and int8, zarr-python on the same store, the codec alone."""
    pool = ThreadPoolExecutor(THREADS)
    stores = {p: write_store(folder / f"{p}.zarr", features, p) for p in ("fp16", "int8")}
    chunks = {p: encoded_chunks(features[:1024], p) for p in stores}
    stats = stores["fp16"].stats(224, "dense")
    mean, std = (torch.tensor(x, dtype=torch.float32) for x in (stats.mean, stats.std))
    by_zarr = zarr.open_array(stores["fp16"].path.local / PATH, mode="r")
    count = len(features)
    check = stores["fp16"].read([5, count - 1], [0, 0]).dense
    assert check is not None and np.array_equal(check, features[[5, count - 1]])

    def stored(pending: object) -> object:
        return pending.stored()  # type: ignore[attr-defined]

    def for_the_loss(pending: object) -> object:
        tokens = pending.stored().dense  # type: ignore[attr-defined]
        return TargetTokens.of(tokens).standardised(mean, std)

    measures = {"zarr-python oindex, fp16": lambda: rate(lambda rows: by_zarr.oindex[rows], count, 0)}
    for p, store in stores.items():
        measures |= {
            f"eupe, {p}": lambda s=store: rate(queued(s, stored), count, 0),
            f"eupe, {p}, into tensors ready for the loss": lambda s=store: rate(queued(s, for_the_loss), count, 0),
            f"codec limit, {p}": lambda c=chunks[p]: statistics.median(decode_rate(c, pool, THREADS) for _ in range(9)),
        }
    results = interleaved(measures, REPEATS)
    medians = {name: statistics.median(values) for name, values in results.items()}
    print("| random batches of 64 views, warm page cache | views/s, median (range) |\n|---|---|")
    for name, values in results.items():
        print(f"| {name} | {spread(values)} |")
    ready = "eupe, {}, into tensors ready for the loss"
    print("\n| ratio | measured | target |\n|---|---|---|")
    for words, a, b, target in (
        ("eupe fp16 / zarr-python oindex", "eupe, fp16", "zarr-python oindex, fp16", "≥ 25"),
        ("eupe fp16 / codec limit", "eupe, fp16", "codec limit, fp16", "≥ 0.75"),
        ("eupe int8 / codec limit", "eupe, int8", "codec limit, int8", ""),
        ("int8 / fp16, ready for the loss", ready.format("int8"), ready.format("fp16"), "≥ 1.5"),
        ("int8 / fp16, as stored", "eupe, int8", "eupe, fp16", ""),
    ):
        print(f"| {words} | {medians[a] / medians[b]:.2f} | {target} |")


def measure_write(features: Features, folder: Path) -> None:
    """Compress, checksum and commit parts, and compare with zarr-python with the same codecs and shards."""
    spec = dense_spec(features, "fp16")
    layout = next(layout for layout in arrays(spec) if layout.path == PATH)
    whole = len(features) // PART_VIEWS
    megabytes = features[: whole * PART_VIEWS].nbytes / 1e6

    def ours(count: Callable[[NDArray[Any]], Counted]) -> float:
        shutil.rmtree(folder / "ours.zarr", ignore_errors=True)
        create_store(folder / "ours.zarr", spec)
        writer = StoreWriter(folder / "ours.zarr", count=count)
        parts = [part_of(features, i) for i in range(whole)]
        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            return megabytes / seconds(lambda: list(pool.map(writer.commit, parts)))

    nothing = Counted.of(np.ones((1, features.shape[-1]), np.float16))
    nothing = Counted(nothing.moments, nothing.norms, np.zeros(features.shape[1:3], np.int64))

    def theirs() -> float:
        shutil.rmtree(folder / "theirs.zarr", ignore_errors=True)
        array = zarr.create_array(
            folder / "theirs.zarr",
            shape=layout.shape,
            dtype=layout.dtype,
            chunks=layout.chunk,
            shards=layout.shard,
            fill_value=float("nan"),
            filters=[zarr.codecs.TransposeCodec(order=layout.order)],
            compressors=[zarr_codec(layout), zarr.codecs.Crc32cCodec()],
        )

        def write() -> None:
            for i in range(whole):
                rows = slice(i * PART_VIEWS, (i + 1) * PART_VIEWS)
                array[rows] = features[rows][:, None]

        return megabytes / seconds(write)

    ours_bare, ours_counted = "eupe", "eupe, statistics taken on the CPU as well"
    measures = {
        ours_bare: lambda: ours(lambda _: nothing),
        ours_counted: lambda: ours(Counted.of),
        "zarr-python": theirs,
    }
    limit_blas()
    results = interleaved(measures, REPEATS)
    print("| writing, fp16, 4 parts of 512 views | MB/s of raw fp16, median (range) |\n|---|---|")
    for name, values in results.items():
        print(f"| {name} | {spread(values)} |")
    theirs_median = statistics.median(results["zarr-python"])
    for name in (ours_bare, ours_counted):
        print(f"\n{name} / zarr-python: {statistics.median(results[name]) / theirs_median:.2f} (target ≥ 1.8)", end="")
    print("\neupe also flushes each object to the disk, which zarr-python does not.")
    print(f"Most parts in memory at once: {_parts_in_memory(features, folder):.2f} (target ≤ 3)")


def _parts_in_memory(features: Features, folder: Path) -> float:
    """Return the peak memory of writing, in parts and with the raw part included, measured in a fresh process."""
    np.save(folder / "part.npy", features[:PART_VIEWS])
    code = f"""
import numpy as np
from pathlib import Path
from benchmarks.making import dense_spec, part_of, peak_mb
from eupe.extract.process import limit_blas
from eupe.store.writer import StoreWriter, create_store
features = np.load({str(folder / "part.npy")!r})
one = features.nbytes / 1e6
limit_blas()
spec = dense_spec(features, "fp16")
path = Path({str(folder / "memory.zarr")!r})
create_store(path, spec)
writer = StoreWriter(path)
writer.commit(part_of(features[:8], 0))
before = peak_mb()
for _ in range(4):
    writer.commit(part_of(features, 0))
print(1 + (peak_mb() - before) / one)
"""
    shutil.rmtree(folder / "memory.zarr", ignore_errors=True)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def measure_verify(features: Features, folder: Path) -> None:
    """Compare `eupe store verify` with decompressing the same chunks from memory."""
    store = write_store(folder / "verify.zarr", features)
    chunks, pool = encoded_chunks(features, "fp16"), ThreadPoolExecutor(THREADS)
    results = interleaved(
        {
            "verify": lambda: len(features) / seconds(lambda: verify(store.path)),
            "codec limit": lambda: decode_rate(chunks, pool, THREADS),
        },
        REPEATS,
    )
    for name, values in results.items():
        print(f"{name}: {spread(values)} views/s")
    ratio = statistics.median(results["verify"]) / statistics.median(results["codec limit"])
    print(f"verify / codec limit: {ratio:.2f} (target ≥ 0.7)")


def measure_open(features: Features, folder: Path) -> None:
    """Open stores of up to ten million rows and read a batch, in a fresh process; most of their parts are absent."""
    for count in (100_000, 10_000_000):
        path = folder / f"rows-{count}.zarr"
        shutil.rmtree(path, ignore_errors=True)
        spec = dense_spec(features[:PART_VIEWS], "fp16")
        spec = type(spec)(**{**spec.__dict__, "corpus": {**spec.corpus, "segments": [count]}})
        create_store(path, spec)
        writer = StoreWriter(path)
        rng = np.random.default_rng(0)
        parts = sorted(rng.choice(spec.num_parts, 16, replace=False).tolist())
        for part in parts:
            writer.commit(_as_part(features, part, spec.part_rows(part).stop - spec.part_rows(part).start))
        rows = [int(spec.part_rows(p).start + r) for p in parts for r in rng.integers(0, 200, 4)]
        code = f"""
import json, time
from pathlib import Path
began = time.perf_counter()
import eupe
store = eupe.open_store({str(path)!r})
store.read({rows}, [0] * {len(rows)})
first = time.perf_counter() - began
for _ in range(50):
    store.read({rows}, [0] * {len(rows)})
peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print(json.dumps([first, int(peak) / 1024]))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        first, peak = json.loads(done.stdout)
        print(f"{count:,} rows: opened and a batch read in {first:.2f} s, imports counted in; peak {peak:.0f} MB")


def _as_part(features: Features, index: int, count: int):  # type: ignore[no-untyped-def]
    part = part_of(features[:count], 0)
    return type(part)(**{**part.__dict__, "index": index})


def measure_precision(features: Features, folder: Path) -> None:
    """Print, for every precision, its share of raw fp16's bytes and the cosines of standardised tokens."""
    sample = features[:: max(1, len(features) // 512)]
    calibration = calibrated(features)
    print("| precision | share of raw fp16 | mean cosine | 5th percentile | least |\n|---|---|---|---|---|")
    for precision in CANDIDATES:
        share = sum(map(len, encoded_chunks(sample, precision))) / sample.nbytes
        kept = cosines(sample.reshape(-1, sample.shape[-1]), precision, calibration)
        print(f"| {precision} | {share:.3f} | {kept.mean():.6f} | {np.percentile(kept, 5):.6f} | {kept.min():.6f} |")


CODECS = (("zstd", 1), ("zstd", 3), ("zstd", 5), ("lz4", 1), ("lz4", 5), ("lz4", 9), ("lz4hc", 5))


def measure_codec(features: Features, folder: Path) -> None:
    """Print the bytes and rates of codecs and of orders within the chunk, on all cores, from and to memory."""
    sample, pool = np.array(features[:1024]), ThreadPoolExecutor(THREADS)
    quantised = encode(sample, "int8", calibrated(features))
    print("| chunk | codec | share of raw fp16 | compressed, views/s | decompressed, views/s |\n|---|---|---|---|---|")
    for precision, values in (("fp16", sample), ("int8", quantised)):
        for order, ordered in (
            ("channel first", np.ascontiguousarray(values.transpose(0, 3, 1, 2))),
            ("token first", np.ascontiguousarray(values)),
        ):
            for name, level in CODECS:
                for shuffle in (blosc.BITSHUFFLE, blosc.SHUFFLE if precision == "fp16" else blosc.NOSHUFFLE):
                    _print_codec(f"{precision}, {order}", ordered, name, level, shuffle, sample.nbytes, pool)


def _print_codec(
    words: str, values: np.ndarray, name: str, level: int, shuffle: int, raw: int, pool: ThreadPoolExecutor
) -> None:  # type: ignore[type-arg]
    compress = lambda chunk: blosc.compress(chunk, name.encode(), level, shuffle, 0)  # noqa: E731
    chunks: list[bytes] = []
    writing = seconds(lambda: chunks.extend(pool.map(compress, values)))
    share = sum(map(len, chunks)) / raw
    reading = statistics.median(
        decode_rate([chunk + bytes(CRC_BYTES) for chunk in chunks], pool, THREADS) for _ in range(3)
    )
    how = {blosc.BITSHUFFLE: "bitshuffle", blosc.SHUFFLE: "shuffle", blosc.NOSHUFFLE: "no shuffle"}[shuffle]
    print(
        f"| {words} | {name} {level} {how} | {share:.3f} | {len(chunks) / writing:,.0f} | {reading:,.0f} |", flush=True
    )


MEASURES = {
    "read": measure_read,
    "write": measure_write,
    "verify": measure_verify,
    "open": measure_open,
    "precision": measure_precision,
    "codec": measure_codec,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--features", type=Path, required=True, help="Dense features [V, h, w, D], float16, as .npy.")
    parser.add_argument("--folder", type=Path, required=True, help="Scratch space.")
    given = parser.parse_args()
    blosc.use_threads = False
    given.folder.mkdir(parents=True, exist_ok=True)
    features = np.load(given.features)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("eupe", "zarr", "tensorstore", "numcodecs", "torch"))
    print(f"{given.measure}: {given.features.name} {features.shape}; {THREADS} cores; {libraries}\n")
    MEASURES[given.measure](features, given.folder)


if __name__ == "__main__":
    main()
