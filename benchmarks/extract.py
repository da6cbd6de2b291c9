"""Claims about extraction, side by side: the pipeline and its stages, a user's own loop, two teachers in one pass.

python -m benchmarks.extract {ideal,typed,peers,together} --folder SCRATCH [--dtype fp32] [--seconds S] [--repeats N]

Teachers with real weights run over four crops each of real photographs at 224 px, which are repeated under other keys
until a run is long enough. All rates count views.

`ideal` compares the pipeline, as a `Worker` in this process and as a whole job on Ray, with the sum of its stages:
decoding, the teacher, and encoding with writing, each measured alone on the machine.

`typed` runs `eupe extract` as a user types it, in its own process that chooses batch size and workers. It compares the
rate after the teacher is loaded with the teacher's forward pass alone in this process.

`peers` compares with what a user would write: a DataLoader and transformers' `Dinov2Model`, with the tokens of a
picture in one .npy file or, as in Theia, in safetensors inside tars. These loops do not check or compress features, or
compute statistics. Of the packaged extractors, clip-retrieval 2.45 cannot be compared: it needs numpy below 2 and
pyarrow below 16, but torch and this project need newer ones; it also supports only CLIP models and keeps only the
summary.

`together` compares two teachers in one pass with one after the other.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from transformers import Dinov2Model

from benchmarks.features import ASSETS, SOURCES, Source
from benchmarks.making import interleaved, repeated_corpus
from demo.assets import prepare_assets
from eupe.common.compute import autocast, compute_dtype, dtype_name, pick_device
from eupe.corpus.index import Corpus, write_index
from eupe.corpus.views import ViewSpec
from eupe.extract.actors import UNITS_IN_FLIGHT
from eupe.extract.calibrate import fastest_batch
from eupe.extract.count import counter
from eupe.extract.job import ExtractConfig, extract
from eupe.extract.load import Loader
from eupe.extract.parts import part_task, plan_work_units, store_spec
from eupe.extract.process import prepare_process
from eupe.extract.worker import PartExtractor, Worker
from eupe.store.writer import Part, StoreWriter, create_store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import Teacher, file_digest, load_teacher

VIEWS = ViewSpec(policy="rrc", num_views=4)
DINOV2, CNN = SOURCES["dinov2-s"], SOURCES["efficientnet_lite0"]
BICUBIC = v2.InterpolationMode.BICUBIC
STAGE_SHARE = 0.06
"""Share of a run's parts that each stage is measured on."""
PIPELINE, TYPED, PEER, BY_DEFAULT, TOGETHER = 0.95, 0.8, 1.5, 1.5, 1.0
"""Target ratios."""
PICTURES_PER_TAR = 256


@dataclass(frozen=True)
class Took:
    """The time that a number of views took."""

    views: int
    wall_s: float
    cpu_s: float
    """Processor time of this process alone."""

    @classmethod
    def by(cls, views: int, work: Callable[[], object]) -> Took:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return cls(views, time.perf_counter() - wall, time.process_time() - cpu)


def ms_per_view(found: list[Took]) -> float:
    """Return the median wall time per view."""
    return statistics.median(1000 * took.wall_s / took.views for took in found)


def cpu_ms_per_view(found: list[Took]) -> float:
    return statistics.median(1000 * took.cpu_s / took.views for took in found)


@dataclass(frozen=True)
class Given:
    """The options of the command line."""

    folder: Path
    dtype: str
    seconds: float
    repeats: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return compute_dtype(self.dtype, pick_device())


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def loaded(source: Source, dtype: torch.dtype) -> Teacher:
    return load_teacher(
        resolve_teacher(source.teacher),
        weights=ASSETS / source.weights,
        device=pick_device(),
        dtype=dtype,
        sizes=(source.size,),
    )


def rate_of(teacher: Teacher, size: int, batch: int) -> float:
    """Return roughly how many views per second the teacher alone computes now."""
    pixels = torch.zeros((batch, size, size, 3), dtype=torch.uint8)
    return 3 * batch / Took.by(3 * batch, lambda: [teacher(pixels) for _ in range(3)]).wall_s


def corpus_for(given: Given, views_per_s: float, seconds: float) -> Corpus:
    """Return a corpus with enough pictures for a run of this many seconds."""
    count = max(16, round(seconds * views_per_s / VIEWS.num_views))
    return repeated_corpus(ASSETS / "photos", given.folder / "pictures", count)


def computer_of(source: Source, teacher: Teacher, corpus: Corpus, batch: int) -> PartExtractor:
    spec = store_spec(
        teacher.spec,
        corpus,
        views=VIEWS,
        sizes=(source.size,),
        tokens=("summary", "dense"),
        weights_sha256=file_digest(ASSETS / source.weights),
        dtype=dtype_name(teacher.dtype),
    )
    return PartExtractor(teacher, spec, corpus_root=corpus.root, views=VIEWS, batch_size=batch)


def work(extractors: list[PartExtractor], corpus: Corpus, folder: Path) -> Took:
    """Run a worker in this process, with UNITS_IN_FLIGHT work units at once."""
    stores = [fresh(folder / f"{i}.zarr") for i in range(len(extractors))]
    specs = [extractor.spec for extractor in extractors]
    for store, spec in zip(stores, specs, strict=True):
        create_store(store, spec)
    worker = Worker(extractors, stores)
    units = plan_work_units(specs, corpus.samples, [set() for _ in specs])

    def run() -> None:
        with ThreadPoolExecutor(UNITS_IN_FLIGHT) as pool:
            failed = sum(pool.map(worker.run, units))
        assert failed == 0

    return Took.by(len(corpus) * extractors[0].views.num_views, run)


def job(given: Given, source: Source, corpus: Corpus, batch: int) -> Took:
    """Run a whole job on its own Ray; the time counts from when its teacher was loaded."""
    index, out = given.folder / "pictures.parquet", fresh(given.folder / "job.zarr")
    write_index(corpus, index)
    report = extract(
        ExtractConfig(
            teacher=source.teacher,
            weights=ASSETS / source.weights,
            corpus=index,
            out=out,
            sizes=(source.size,),
            views=VIEWS,
            dtype=given.dtype,
            batch_size=batch,
            workers=1,
        )
    )
    assert report.views_per_s is not None and report.num_failed == 0
    return Took(report.num_views, report.num_views / report.views_per_s, 0.0)


class Stages:
    """The stages of an extraction, each run alone on the machine over the first pictures of a corpus."""

    def __init__(self, extractor: PartExtractor, corpus: Corpus, folder: Path) -> None:
        self._extractor, self._folder = extractor, folder
        spec = extractor.spec
        parts = range(max(1, round(STAGE_SHARE * spec.num_parts)))
        tasks = [part_task(spec, corpus.samples, part) for part in parts]
        self._samples = [sample for task in tasks for sample in task.samples]
        self._parts: list[Part] = [extractor.compute(task) for task in tasks]
        self._views = len(self._samples) * spec.num_views

    def decode(self) -> Took:
        """Read, check, decode and render, with a thread per core."""
        return Took.by(self._views, lambda: [None for _ in self._load()])

    def forward(self) -> Took:
        """Run the teacher and convert its tokens to float16, on all cores: a batch per core, or one batch on all cores.

        The faster of the two counts.
        """
        views = [{s: v[k] for s, v in sample.views.items()} for sample in self._load() for k in range(VIEWS.num_views)]
        forward, size = self._extractor.forward, self._extractor.forward.batch_size
        (side,) = self._extractor.spec.sizes
        batches = [views[i : i + size] for i in range(0, len(views), size)]

        def side_by_side() -> None:
            for pending in [forward.begin(batch) for batch in batches]:
                pending.wait()

        def one_by_one() -> None:
            for batch in batches:
                forward.teacher(torch.from_numpy(np.stack([view[side] for view in batch])))

        return min((Took.by(self._views, run) for run in (side_by_side, one_by_one)), key=lambda took: took.wall_s)

    def encode(self) -> Took:
        """Encode, compute statistics, compress and write, part by part, with a thread per core."""
        create_store(path := fresh(self._folder / "stages.zarr"), self._extractor.spec)
        writer = StoreWriter(path, count=counter(self._extractor.device))
        return Took.by(self._views, lambda: [writer.commit(part) for part in self._parts])

    def _load(self) -> Iterator[Any]:
        extractor = self._extractor
        loader = Loader(extractor.root, VIEWS, [extractor.spec], ahead=extractor.samples_ahead, cores=extractor.cores)
        return loader.load(self._samples)


def measure_ideal(given: Given) -> None:
    """Compare the pipeline with the sum of its stages."""
    teacher = loaded(DINOV2, given.torch_dtype)
    batch = fastest_batch(teacher, (DINOV2.size,))
    corpus = corpus_for(given, rate_of(teacher, DINOV2.size, batch), given.seconds)
    extractor = computer_of(DINOV2, teacher, corpus, batch)
    stages = Stages(extractor, corpus, given.folder)
    print(
        f"{dtype_name(teacher.dtype)}, batches of {batch}; {len(corpus)} pictures of {VIEWS.num_views} views, "
        f"{extractor.spec.num_parts} parts of {extractor.spec.samples_per_part}\n",
        flush=True,
    )
    found = interleaved(
        {
            "decode": stages.decode,
            "forward": stages.forward,
            "encode": stages.encode,
            "worker": partial(work, [extractor], corpus, given.folder),
            "job": partial(job, given, DINOV2, corpus, batch),
        },
        given.repeats,
    )
    print_times(found)
    rounds = zip(*(found[stage] for stage in ("decode", "forward", "encode")), strict=True)
    ideal = [Took(1, sum(took.wall_s / took.views for took in stages_of_round), 0) for stages_of_round in rounds]
    print_ratios(
        ("worker / ideal", ratio(ideal, found["worker"]), f"≥ {PIPELINE}"),
        ("job / ideal", ratio(ideal, found["job"]), f"≥ {PIPELINE}"),
    )


def typed(given: Given, source: Source, index: Path, wall_s: list[float]) -> Took:
    """Run the command in its own process; the time counts from when its teacher was loaded.

    Args:
        wall_s: list to which the seconds from the start of the command to its end are appended.
    """
    words = ["extract", "--teacher", source.teacher, "--weights", ASSETS / source.weights, "--corpus", index]
    words += ["--views", f"rrc:{VIEWS.num_views}", "--size", source.size, "--dtype", given.dtype]
    words += ["--out", fresh(given.folder / "typed.zarr"), "--json"]
    began = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, "-m", "eupe", *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    )
    wall_s.append(time.perf_counter() - began)
    report = json.loads(ended.stdout)
    assert report["num_failed"] == 0
    return Took(report["num_views"], report["num_views"] / report["views_per_s"], 0.0)


def measure_typed(given: Given) -> None:
    """Compare the command, as a user types it, with the teacher alone."""
    teacher = loaded(DINOV2, given.torch_dtype)
    batch = fastest_batch(teacher, (DINOV2.size,))
    corpus = corpus_for(given, rate_of(teacher, DINOV2.size, batch), given.seconds)
    write_index(corpus, index := given.folder / "pictures.parquet")
    stages = Stages(computer_of(DINOV2, teacher, corpus, batch), corpus, given.folder)
    print(f"{dtype_name(teacher.dtype)}; {len(corpus)} pictures of {VIEWS.num_views} views\n", flush=True)
    wall_s: list[float] = []
    command = partial(typed, given, DINOV2, index, wall_s)
    found = interleaved({"forward": stages.forward, "command": command}, given.repeats)
    print_times(found)
    working = (took.wall_s for took in found["command"])
    started = statistics.median(whole - took for whole, took in zip(wall_s, working, strict=True))
    print(f"\nthe command took {statistics.median(wall_s):.0f} s, {started:.0f} of them before and after its views")
    print_ratios(("command / forward alone", ratio(found["forward"], found["command"]), f"≥ {TYPED}"))


class Pictures(Dataset[tuple[int, torch.Tensor]]):
    """A dataset written as in torchvision's documentation, with crops drawn and resized like the teacher's views."""

    def __init__(self, corpus: Corpus, count: int) -> None:
        self.paths = [corpus.root.local / key for key in corpus.samples["key"].slice(0, count).to_pylist()]
        self._crop = v2.Compose(
            [
                v2.RandomResizedCrop(DINOV2.size, scale=VIEWS.scale, ratio=VIEWS.ratio, interpolation=BICUBIC),
                v2.RandomHorizontalFlip(VIEWS.flip),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor]:
        image = Image.open(self.paths[i]).convert("RGB")
        return i, torch.stack([self._crop(image) for _ in range(VIEWS.num_views)])


Tokens = NDArray[np.float16]
"""Tokens of one picture's K views, class token first, [K, 1 + 256, 384]."""
Keep = Callable[[Iterator[tuple[int, Tokens]], Path], None]


@torch.inference_mode()
def tokens_of(pictures: Pictures, model: Dinov2Model, dtype: torch.dtype, batch: int, workers: int) -> Any:
    """Yield the number and the tokens of each picture."""
    for numbers, views in DataLoader(pictures, batch_size=max(1, batch // VIEWS.num_views), num_workers=workers):
        with autocast(dtype, pick_device()):
            hidden = model(pixel_values=views.flatten(0, 1).to(pick_device())).last_hidden_state
        values = hidden.half().cpu().numpy().reshape(*views.shape[:2], *hidden.shape[1:])
        yield from zip(numbers.tolist(), values, strict=True)


def as_npy(tokens: Iterator[tuple[int, Tokens]], folder: Path) -> None:
    for number, values in tokens:
        np.save(folder / f"{number:08d}.npy", values)


def as_tars(tokens: Iterator[tuple[int, Tokens]], folder: Path) -> None:
    """Write safetensors in tars that WebDataset can read."""
    with ExitStack() as opened:
        for number, values in tokens:
            if number % PICTURES_PER_TAR == 0:
                opened.close()
                tar = opened.enter_context(tarfile.open(folder / f"{number // PICTURES_PER_TAR:05d}.tar", "w"))
            data = save({"summary": values[:, 0].copy(), "dense": values[:, 1:].copy()})
            member = tarfile.TarInfo(f"{number:08d}.safetensors")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


KEPT: Mapping[str, Keep] = {".npy files": as_npy, "safetensors in tars": as_tars}


def loop(
    keep: Keep, workers: int, model: Dinov2Model, pictures: Pictures, dtype: torch.dtype, batch: int, folder: Path
) -> Took:
    """Run the loop that a user would write."""
    fresh(folder).mkdir(parents=True)
    tokens = tokens_of(pictures, model, dtype, batch, workers)
    return Took.by(len(pictures) * VIEWS.num_views, lambda: keep(tokens, folder))


def measure_peers(given: Given) -> None:
    """Compare a worker with the loops that a user would write, in the same dtype and in float32, their default."""
    teacher, model = loaded(DINOV2, given.torch_dtype), Dinov2Model.from_pretrained(ASSETS / DINOV2.weights).eval()
    model = model.to(pick_device())
    batch = fastest_batch(teacher, (DINOV2.size,))
    corpus = corpus_for(given, rate_of(teacher, DINOV2.size, batch), given.seconds)
    extractor = computer_of(DINOV2, teacher, corpus, batch)
    slow = rate_of(replace(teacher, dtype=torch.float32), DINOV2.size, batch)
    counts = {teacher.dtype: len(corpus), torch.float32: max(8, round(given.seconds * slow / VIEWS.num_views))}
    print(f"batches of {batch}; {len(corpus)} pictures of {VIEWS.num_views} views\n", flush=True)
    measures: dict[str, Callable[[], Took]] = {
        f"eupe, {dtype_name(teacher.dtype)}": partial(work, [extractor], corpus, given.folder)
    }
    for dtype, count in counts.items():
        pictures = Pictures(corpus, min(count, len(corpus)))
        for words, keep in KEPT.items():
            for workers in (0, 2):
                name = f"loop of {workers} workers, {words}, {dtype_name(dtype)}"
                out = given.folder / "loop"
                measures[name] = partial(loop, keep, workers, model, pictures, dtype, batch, out)
    found = interleaved(measures, given.repeats)
    print_times(found)
    ours = found[f"eupe, {dtype_name(teacher.dtype)}"]
    same, default = (best(found, dtype) for dtype in (teacher.dtype, torch.float32))
    rows = [(f"eupe / {same}", ratio(found[same], ours), f"≥ {PEER}")]
    if teacher.dtype != torch.float32:
        rows.append((f"eupe / {default}", ratio(found[default], ours), f"≥ {BY_DEFAULT}"))
    print_ratios(*rows)


def best(found: Mapping[str, list[Took]], dtype: torch.dtype) -> str:
    """Return the name of the fastest loop in a dtype."""
    loops = [name for name in found if name.startswith("loop") and name.endswith(dtype_name(dtype))]
    return min(loops, key=lambda name: ms_per_view(found[name]))


def measure_together(given: Given) -> None:
    """Compare two teachers in one pass with one after the other."""
    sources = (DINOV2, CNN)
    teachers = [loaded(source, given.torch_dtype) for source in sources]
    batches = [fastest_batch(teacher, (source.size,)) for source, teacher in zip(sources, teachers, strict=True)]
    corpus = corpus_for(given, rate_of(teachers[0], DINOV2.size, batches[0]), given.seconds)
    extractors = [computer_of(*one, corpus, batch) for *one, batch in zip(sources, teachers, batches, strict=True)]
    print(f"{dtype_name(teachers[0].dtype)}; {len(corpus)} pictures of {VIEWS.num_views} views\n", flush=True)
    alone = {
        source.teacher: partial(work, [extractor], corpus, given.folder / source.weights.replace("/", "-"))
        for source, extractor in zip(sources, extractors, strict=True)
    }
    both = partial(work, extractors, corpus, given.folder / "together")
    found = interleaved({**alone, "both in one pass": both}, given.repeats)
    print_times(found)
    rounds = zip(*(found[name] for name in alone), strict=True)
    apart = [Took(took[0].views, sum(t.wall_s for t in took), 0) for took in rounds]
    print_ratios(("one pass / one after the other, by time", ratio(found["both in one pass"], apart), f"≤ {TOGETHER}"))


def ratio(slow: list[Took], fast: list[Took]) -> list[float]:
    """Return the ratio of the times per view, round by round."""
    return [(a.wall_s / a.views) / (b.wall_s / b.views) for a, b in zip(slow, fast, strict=True)]


def print_times(found: Mapping[str, list[Took]]) -> None:
    print("| | views/s | ms per view | range | processor ms per view |\n|---|---|---|---|---|")
    for name, rounds in found.items():
        each = [1000 * took.wall_s / took.views for took in rounds]
        cpu = f"{cpu_ms_per_view(rounds):.2f}" if any(took.cpu_s for took in rounds) else ""
        middle = ms_per_view(rounds)
        print(f"| {name} | {1000 / middle:,.1f} | {middle:.2f} | {min(each):.2f}–{max(each):.2f} | {cpu} |")


def print_ratios(*rows: tuple[str, list[float], str]) -> None:
    print("\n| ratio | median (range) | target |\n|---|---|---|")
    for name, values, target in rows:
        middle = statistics.median(values)
        print(f"| {name} | {middle:.3f} ({min(values):.3f}–{max(values):.3f}) | {target} |", flush=True)


MEASURES = {
    "ideal": (measure_ideal, 60.0),
    "typed": (measure_typed, 60.0),
    "peers": (measure_peers, 12.0),
    "together": (measure_together, 30.0),
}
"""Functions of the measurements, with the seconds of a run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--folder", type=Path, required=True, help="Scratch space.")
    parser.add_argument("--dtype", default="auto", help="Same as for `eupe extract`.")
    parser.add_argument("--seconds", type=float, help="Approximate duration of one run of the pipeline.")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    prepare_assets(ASSETS)
    prepare_process()
    measure, seconds = MEASURES[given.measure]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("eupe", "torch", "transformers", "torchvision", "ray"))
    print(f"{given.measure}: {os.cpu_count()} cores; {libraries}")
    folder = given.folder.absolute() / "extract"
    folder.mkdir(parents=True, exist_ok=True)
    measure(Given(folder, given.dtype, given.seconds or seconds, given.repeats))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
