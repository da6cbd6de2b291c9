"""Claims about training from a store, side by side: waiting for data, the loader alone, online distillation, memory.

python -m benchmarks.train {wait,loader,online,layout,quality,memory} --folder SCRATCH [--size PX ...] [--repeats N]

The pictures are real photographs with four crops each, repeated under other keys where more are needed. The teacher is
DINOv2-S at the student's size, rounded down to a multiple of its patch of 14. The store in SCRATCH is compressed;
pictures are decoded when they are needed. Steps use the trainer's own requests, stream, trainer and meter, without logs
and checkpoints.

`wait` compares steps on cached targets with the same steps on batches in memory.

`loader` compares the stream with reading and decoding, each measured alone on all cores; then a very small student on
the stream with reading, decoding and its own step.

`online` compares training from a store, including extraction, with a teacher that runs in every step, by the rates of
a few steps. Its second teacher has ViT-L's size and random weights.

`layout` compares steps of a convolutional student channels last and channels first, on batches in memory.

`quality` compares the students of both. `memory` measures the memory of a run's process over an epoch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from transformers import Dinov2Config, Dinov2Model

from benchmarks import student as of_student
from benchmarks.extract import Took, fresh, print_ratios, print_times, ratio, work
from benchmarks.features import ASSETS, SOURCES
from benchmarks.making import interleaved, repeated_corpus
from benchmarks.online import OnlineTeacher, PicturesAlone, online_stream
from demo.assets import prepare_assets
from eupe.common.compute import compute_dtype, dtype_name, pick_device
from eupe.corpus.index import Corpus, index_folder
from eupe.corpus.views import ViewSpec, render_view
from eupe.extract.calibrate import fastest_batch
from eupe.extract.parts import store_spec
from eupe.extract.worker import PartExtractor
from eupe.store import open_store
from eupe.store.layout import KINDS
from eupe.store.writer import finish_store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import Teacher, load_teacher
from eupe.train.config import TrainConfig
from eupe.train.log import TrainStatus
from eupe.train.loop import judged, train, training_sample
from eupe.train.parallel import World
from eupe.train.run_spec import RunSpec, resolve
from eupe.train.stream import PREFETCH_BATCHES, Meter, open_corpora, stream, training_requests
from eupe.train.targets import Batch, Request, TargetSet
from eupe.train.trainer import Trainer
from eupe.train.validate import fit_gains, held_out_cosines

VIEWS = ViewSpec(policy="rrc", num_views=4)
SMALL, LARGE = "dinov2-s", "dinov2-l"
TINY, TINY_HEADS = "test_vit", 32
ENDLESS = 10**6
"""Number of steps in the configuration of a run of which only some are taken."""
WARM_UP = PREFETCH_BATCHES + 1
"""Steps before those that are timed; they use up the batches that were loaded ahead."""
IN_MEMORY = 4
"""Number of batches that are reused when nothing is read."""
READS_IN_FLIGHT = 6
HOLDOUT = 0.1
ABLATIONS, EPOCHS, EPOCH_VIEWS = 5, (1, 10), 10**6
CACHED, DATA_WAIT, LOADER, ONLINE, AGREE, FLAT = 0.97, 0.02, 0.85, 3.0, 0.002, 1.05
"""Target values."""
WARM_SHARE, WINDOW = 0.2, 0.1
"""Shares of a run's steps: those that do not count for its memory, and those in each window for a median."""


@dataclass(frozen=True)
class Given:
    """The options of the command line."""

    folder: Path
    sizes: tuple[int, ...]
    teachers: tuple[str, ...]
    student: str
    head_width: int
    pictures: int
    batch_size: int
    steps: int
    repeats: int


@dataclass(frozen=True)
class Steps(Took):
    """The time that steps took after the warm-up."""

    data_wait: float
    """Share of the time, as the trainer reports it."""


def teacher_side(size: int) -> int:
    """Return the student's side rounded down to a multiple of DINOv2's patch of 14."""
    return size // 14 * 14


def loaded(name: str, size: int) -> Teacher:
    """Load DINOv2-S with its weights, or DINOv2-L with random ones, in the dtype that `auto` chooses here."""
    spec, device = resolve_teacher(name), pick_device()
    dtype = compute_dtype("auto", device)
    if name == SMALL:
        weights = ASSETS / SOURCES[SMALL].weights
        return load_teacher(spec, weights=weights, device=device, dtype=dtype, sizes=(size,))
    config = Dinov2Config(
        hidden_size=spec.dense_dim, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=spec.patch
    )
    module = Dinov2Model(config).eval().requires_grad_(False)
    return Teacher(spec=spec, module=module.to(device), device=device, dtype=dtype)


def repeated(given: Given) -> Corpus:
    return repeated_corpus(ASSETS / "photos", given.folder / "pictures", given.pictures)


def computer_of(teacher: Teacher, corpus: Corpus, size: int, views: ViewSpec) -> PartExtractor:
    spec = store_spec(
        teacher.spec,
        corpus,
        views=views,
        sizes=(size,),
        tokens=KINDS,
        weights_sha256="",
        dtype=dtype_name(teacher.dtype),
    )
    batch = fastest_batch(teacher, (size,))
    return PartExtractor(teacher, spec, corpus_root=corpus.root, views=views, batch_size=batch)


def store_of(extractor: PartExtractor, corpus: Corpus, folder: Path) -> Path:
    """Make a finished store and return its path."""
    work([extractor], corpus, folder)
    return finish_store(folder / "0.zarr").path.local


def store_for(given: Given, teacher: Teacher, size: int) -> Path:
    """Make a finished store of the repeated photographs and return its path."""
    corpus = repeated(given)
    return store_of(computer_of(teacher, corpus, size, VIEWS), corpus, given.folder / f"{size}")


class Run:
    """A training run whose steps are taken one by one on request."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.corpora: list[TargetSet] = open_corpora(config)
        self.spec: RunSpec = resolve(config, self.corpora)
        self.device = pick_device()
        self.trainer = Trainer(config, self.spec, self.corpora[0], world=World(), device=self.device)
        self._first = 0

    def requests(self, first_step: int) -> Iterator[Request]:
        return training_requests(self.spec, self.corpora, World(), first_step=first_step, num_microbatches=1)

    def cached(self, first_step: int = 0) -> Iterator[Batch]:
        return stream(self.corpora, self.requests(first_step), self.device)

    def in_memory(self) -> Iterator[Batch]:
        """Return an endless repetition of a few batches."""
        batches = self.cached()
        kept = list(islice(batches, IN_MEMORY))
        closed(batches)
        return cycle(kept)

    def online(self, teacher: OnlineTeacher, first_step: int = 0) -> Iterator[Batch]:
        pictures = PicturesAlone.of(self.corpora[0], holdout=self.config.holdout)
        return online_stream(pictures, teacher, self.requests(first_step), self.device)

    def step(self, batch: Batch) -> None:
        """Take one step."""
        self.trainer.forward_backward(batch, microbatch=0)
        self.trainer.optimizer_step(batch.request.step)

    def timed(self, batches: Callable[[int], Iterator[Batch]], steps: int) -> Steps:
        """Take and time steps on batches that no earlier call has used."""
        first, self._first = self._first, self._first + steps + WARM_UP
        return timed(batches(first), self.step, steps)


def timed(batches: Iterator[Batch], use: Callable[[Batch], object], steps: int) -> Steps:
    """Use batches for the warm-up, then time the next `steps` batches."""
    meter = Meter(1)
    waiting = meter.waiting(batches)
    for batch in islice(waiting, WARM_UP):
        use(batch)
    meter.rates()  # starts a new interval, so that the warm-up does not count
    views = 0

    def go() -> None:
        nonlocal views
        for batch in islice(waiting, steps):
            use(batch)
            views += len(batch.keys)

    took = Took.by(0, go)
    rates = meter.rates()
    closed(batches)
    return Steps(views, took.wall_s, took.cpu_s, rates.data_wait)


def closed(batches: Iterator[Batch]) -> None:
    """Stop a stream and wait until it loads nothing any more."""
    if isinstance(batches, Generator):
        batches.close()


def config_of(given: Given, store: Path, size: int, **options: Any) -> TrainConfig:
    wanted: dict[str, Any] = {
        "student": given.student,
        "head_width": given.head_width,
        "batch_size": given.batch_size,
        "steps": ENDLESS,
        "holdout": HOLDOUT,
    }
    return TrainConfig(targets=(store,), out=given.folder / "run", size=(size,), **{**wanted, **options})


def describe(given: Given, size: int, teacher: Teacher) -> str:
    return (
        f"{given.student} at {size} px, heads of {given.head_width}, batches of {given.batch_size}, "
        f"{dtype_name(compute_dtype('auto', pick_device()))}; {teacher.spec.name} at {teacher_side(size)} px; "
        f"{given.pictures} pictures of {VIEWS.num_views} views; {given.steps} steps after {WARM_UP}"
    )


def measure_wait(given: Given) -> None:
    """Compare steps on cached targets with steps on batches in memory."""
    for size in given.sizes:
        teacher = loaded(SMALL, teacher_side(size))
        run = Run(config_of(given, store_for(given, teacher, teacher_side(size)), size))
        kept = run.in_memory()
        print(f"\n{describe(given, size, teacher)}\n", flush=True)
        found = interleaved(
            {
                "cached targets, pictures decoded": partial(run.timed, run.cached, given.steps),
                "batches in memory": partial(run.timed, lambda first, kept=kept: kept, given.steps),
            },
            given.repeats,
        )
        print_times(found)
        cached, in_memory = found.values()
        waits = [steps.data_wait for steps in cached]
        print_ratios(
            ("rate of cached / in memory", ratio(in_memory, cached), f"≥ {CACHED}"),
            ("data-wait, share of the time", waits, f"≤ {DATA_WAIT}"),
        )


class Bare:
    """The work that a loader cannot avoid, in two stages that each use all cores."""

    def __init__(self, run: Run, views: int) -> None:
        (self._targets,) = run.corpora
        self._length, self._size = run.config.batch_size, run.spec.size
        self._store = self._targets.stores[0]
        chosen = islice(run.requests(0), -(-views // self._length))
        self._batches = [request.views.tolist() for request in chosen]
        self._rows = self._store.rows(self._targets.keys)
        self._views = [view for batch in self._batches for view in batch]
        self._params = [params for batch in self._batches for params in self._read(batch).stored().params]

    def read(self) -> Took:
        """Read the features and crops of every batch, with some batches in flight."""

        def go() -> None:
            pending: deque[Any] = deque()
            for batch in self._batches:
                pending.append(self._read(batch))
                if len(pending) > READS_IN_FLIGHT:
                    pending.popleft().stored()
            for last in pending:
                last.stored()

        return Took.by(len(self._views), go)

    def decode(self) -> Took:
        """Read, decode and render the pictures."""

        def one(view: list[int], params: Any) -> None:
            render_view(self._targets.read_image(view[0]), params, self._size)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return Took.by(len(self._views), lambda: deque(pool.map(one, self._views, self._params), maxlen=0))

    def _read(self, batch: list[list[int]]) -> Any:
        return self._store.read_async([self._rows[sample] for sample, _ in batch], [number for _, number in batch])


def measure_loader(given: Given) -> None:
    """Compare the stream, and the smallest student on it, with reading and decoding alone."""
    for size in given.sizes:
        teacher = loaded(SMALL, teacher_side(size))
        run = Run(config_of(given, store_for(given, teacher, teacher_side(size)), size))
        bare, kept = Bare(run, given.steps * given.batch_size), run.in_memory()
        print(f"\n{describe(given, size, teacher)}\n", flush=True)
        read, decode = "reading alone", "decoding alone"
        drained, step, small = "the stream, nothing done with it", "the student in memory", "the student on the stream"
        found = interleaved(
            {
                read: bare.read,
                decode: bare.decode,
                drained: lambda run=run: timed(run.cached(), lambda batch: None, given.steps),
                step: partial(run.timed, lambda first, kept=kept: kept, given.steps),
                small: partial(run.timed, run.cached, given.steps),
            },
            given.repeats,
        )
        print_times(found)
        print_ratios(
            ("the stream / reading, then decoding", ratio(summed(found, read, decode), found[drained]), f"≥ {LOADER}"),
            (
                "the student / reading, then decoding, then its step",
                ratio(summed(found, read, decode, step), found[small]),
                f"≥ {LOADER}",
            ),
        )


def summed(found: dict[str, list[Any]], *names: str) -> list[Took]:
    """Return the time of one view through all of the named stages in turn, round by round."""
    rounds = zip(*(found[name] for name in names), strict=True)
    return [Took(1, sum(took.wall_s / took.views for took in each), 0.0) for each in rounds]


def measure_online(given: Given) -> None:
    """Compare extraction and cached training with a teacher in every step."""
    for size in given.sizes:
        if size != teacher_side(size):
            raise SystemExit(f"teacher and student get the same pixels: --size {size} is not a multiple of 14")
        for name in given.teachers:
            compare_online(given, loaded(name, size), size)


def compare_online(given: Given, teacher: Teacher, size: int) -> None:
    corpus = repeated(given)
    extractor = computer_of(teacher, corpus, size, VIEWS)
    run = Run(config_of(given, store_of(extractor, corpus, given.folder / f"{size}"), size))
    by_step = OnlineTeacher(teacher, size, batch_size=extractor.forward.batch_size)
    print(f"\n{describe(given, size, teacher)}; the teacher computes in {dtype_name(teacher.dtype)}\n", flush=True)
    found = interleaved(
        {
            "extraction": partial(work, [extractor], corpus, given.folder / "again"),
            "cached": partial(run.timed, run.cached, given.steps),
            "online": partial(run.timed, partial(run.online, by_step), given.steps),
        },
        given.repeats,
    )
    print_times(found)
    (targets,) = run.corpora
    once = targets.num_joined / len(targets.training)
    extraction, cached, online = (
        [EPOCH_VIEWS * took.wall_s / took.views for took in found[name]] for name in ("extraction", "cached", "online")
    )
    extraction = [once * seconds for seconds in extraction]
    print(f"\n{EPOCH_VIEWS:,} training views an epoch, computed from these rates; extraction with what is held out\n")
    print("| epochs of each | extraction, h | five from the store, with it, h | five online, h |\n|---|---|---|---|")
    for epochs in EPOCHS:
        totals = list(zip(*ablations(extraction, cached, online, epochs), strict=True))
        hours = [statistics.median(seconds) / 3600 for seconds in zip(*totals, strict=True)]
        print(f"| {epochs} | {statistics.median(extraction) / 3600:.2f} | {hours[0]:.2f} | {hours[1]:.2f} |")
    rows = [("an epoch: online / cached", [o / c for o, c in zip(online, cached, strict=True)], "")]
    for epochs in EPOCHS:
        ours, theirs = ablations(extraction, cached, online, epochs)
        words = f"{ABLATIONS} ablations, epochs of each: {epochs}: online / store"
        rows.append((words, [b / a for a, b in zip(ours, theirs, strict=True)], f"≥ {ONLINE:g}"))
    print_ratios(*rows)


def ablations(
    extraction: list[float], cached: list[float], online: list[float], epochs: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of all ablations from one store, including its extraction, and online, round by round.

    Args:
        extraction: seconds of the extraction.
        cached: seconds of an epoch from the store.
        online: seconds of an epoch with the teacher in every step.
    """
    from_store = [x + ABLATIONS * epochs * c for x, c in zip(extraction, cached, strict=True)]
    return from_store, [ABLATIONS * epochs * o for o in online]


def measure_layout(given: Given) -> None:
    """Compare steps of a student in the memory format that it is trained in with steps channels first."""
    for size in given.sizes:
        teacher = loaded(SMALL, teacher_side(size))
        store = store_for(given, teacher, teacher_side(size))
        last, first = (Run(config_of(given, store, size)) for _ in range(2))
        first.trainer.distiller.use_memory_format(torch.contiguous_format)
        kept = last.in_memory()
        print(f"\n{describe(given, size, teacher)}\n", flush=True)
        found = interleaved(
            {
                "as it is trained": partial(last.timed, lambda _, kept=kept: kept, given.steps),
                "channels first": partial(first.timed, lambda _, kept=kept: kept, given.steps),
            },
            given.repeats,
        )
        print_times(found)
        as_trained, channels_first = found.values()
        print_ratios(("channels first / as it is trained", ratio(channels_first, as_trained), ""))


def measure_quality(given: Given) -> None:
    """Compare students with the same views, steps and seed: fp16 targets from a store, or float32 targets online."""
    whole, (size,) = index_folder(ASSETS / "photos"), given.sizes
    corpus = Corpus(whole.root, whole.samples.slice(0, given.pictures))
    teacher = loaded(SMALL, teacher_side(size))
    extractor = computer_of(teacher, corpus, size, of_student.VIEWS)
    store = store_of(extractor, corpus, given.folder)
    by_step = OnlineTeacher(teacher, size, batch_size=extractor.forward.batch_size)
    print(
        f"\n{given.student} at {size} px, {given.steps} steps of {given.batch_size} views at {of_student.LR:g}, "
        f"float32; {SMALL} in {dtype_name(teacher.dtype)}; {len(corpus)} pictures of {of_student.VIEWS.num_views} "
        f"views, {of_student.HOLDOUT:.0%} held out\n"
    )
    print("| targets | seed | summary, raw | summary, normalised | dense, raw | dense, normalised |")
    print("|---|---|---|---|---|---|", flush=True)
    found: dict[tuple[str, int], list[float]] = {}
    for seed in range(given.repeats):
        for how in ("cached", "online"):
            found[how, seed] = agreement_of(given, store, size, seed, None if how == "cached" else by_step)
            print(f"| {how} | {seed} | {' | '.join(f'{x:.5f}' for x in found[how, seed])} |", flush=True)
    print()
    for seed in range(given.repeats):
        words = of_student.apart(found["cached", seed], found["online", seed])
        print(f"cached against online, seed {seed}: {words}; target ≤ {AGREE}")
    for seed in range(1, given.repeats):
        words = of_student.apart(found["cached", seed], found["cached", 0])
        print(f"cached, seed {seed} against 0: {words}")


def agreement_of(given: Given, store: Path, size: int, seed: int, teacher: OnlineTeacher | None) -> list[float]:
    """Train to the end, and return the agreement with the store on all views of the held-out pictures."""
    recipe: dict[str, Any] = {"steps": given.steps, "lr": of_student.LR, "warmup": 0.1, "dtype": "fp32", "seed": seed}
    run = Run(config_of(given, store, size, holdout=of_student.HOLDOUT, **recipe))
    for batch in run.cached() if teacher is None else run.online(teacher):
        run.step(batch)
    (targets,) = run.corpora

    def batches(views: Any) -> Iterator[Batch]:
        return stream([targets], judged(run.spec, views), run.device)

    gains = fit_gains(run.trainer.distiller, batches(training_sample(targets)), run.device)
    held_out = batches(targets.views_of(targets.held_out))
    (kinds,) = held_out_cosines(run.trainer.distiller, held_out, run.device, gains)
    means = [kinds[kind].means() for kind in KINDS]
    return [each[space] for each in means for space in ("raw", "normalised")]


def measure_memory(given: Given) -> None:
    """Measure the memory of a whole run's process, step by step, over one epoch of a student."""
    for size in given.sizes:
        teacher = loaded(SMALL, teacher_side(size))
        store = store_for(given, teacher, teacher_side(size))
        stored_mb = open_store(store).stored_bytes / 1e6
        config = config_of(given, store, size, steps=None, epochs=1, log_every=1)
        config = replace(config, out=fresh(config.out))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            held = pool.apply(held_mb, (config,))
        steps = len(held)
        print(
            f"\n{given.student} at {size} px, {steps} steps of {given.batch_size} views; store of {stored_mb:,.0f} MB\n"
        )
        print("| after, share of the epoch | resident, MB |\n|---|---|")
        for tenth in range(1, 11):
            print(f"| {tenth / 10:.0%} | {held[-(-steps * tenth // 10) - 1]:,.0f} |")
        print_ratios(("last / first after the warm-up", [flatness(held)], f"≤ {FLAT}"))


def held_mb(config: TrainConfig) -> list[float]:
    """Train, and return the resident memory of this process after each step, in MB."""
    held: list[float] = []

    def note(status: TrainStatus) -> None:
        held.append(int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024 / 1e6)

    train(config, on_status=note)
    return held


def flatness(held: list[float]) -> float:
    """Return the median memory of the last steps, divided by that of the first steps after the warm-up."""
    first, window = int(WARM_SHARE * len(held)), max(1, round(WINDOW * len(held)))
    return statistics.median(held[-window:]) / statistics.median(held[first : first + window])


VIT_T: dict[str, Any] = {"student": "vit_tiny_patch16_dinov3_qkvb", "head_width": 3072, "batch_size": 32}
DEFAULTS: dict[str, tuple[Callable[[Given], None], dict[str, Any]]] = {
    "wait": (measure_wait, {**VIT_T, "sizes": (128, 224), "pictures": 256, "steps": 12, "repeats": 7}),
    "loader": (
        measure_loader,
        {"student": TINY, "head_width": TINY_HEADS, "batch_size": 64, "sizes": (128, 224), "pictures": 256}
        | {"steps": 24, "repeats": 7},
    ),
    "online": (measure_online, {**VIT_T, "sizes": (224,), "pictures": 64, "steps": 5, "repeats": 3}),
    "layout": (
        measure_layout,
        {"student": "tf_efficientnet_lite0", "head_width": 512, "batch_size": 32, "sizes": (128,), "pictures": 64}
        | {"steps": 4, "repeats": 5},
    ),
    "quality": (
        measure_quality,
        {"student": of_student.STUDENT, "head_width": 512, "batch_size": of_student.BATCH_SIZE, "sizes": (112,)}
        | {"pictures": 130, "steps": 1500, "repeats": 2},
    ),
    "memory": (
        measure_memory,
        {"student": TINY, "head_width": 512, "batch_size": 16, "sizes": (112,), "pictures": 2048}
        | {"steps": 0, "repeats": 1},
    ),
}
"""Functions of the measurements, with the default options of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=DEFAULTS)
    parser.add_argument("--folder", type=Path, required=True, help="Scratch space.")
    parser.add_argument(
        "--size", type=int, nargs="+", dest="sizes", help="Sides of the student's input, measured one by one."
    )
    parser.add_argument(
        "--teachers", nargs="+", default=(SMALL, LARGE), choices=(SMALL, LARGE), help="Teachers of `online`."
    )
    parser.add_argument("--student")
    parser.add_argument("--head-width", type=int)
    parser.add_argument(
        "--pictures", type=int, help="Number of pictures: photographs, repeated; `quality` takes each at most once."
    )
    parser.add_argument("--batch-size", type=int)
    parser.add_argument(
        "--steps", type=int, help="Number of steps that are timed together; for `quality`, those of a run."
    )
    parser.add_argument("--repeats", type=int, help="Number of rounds; for `quality`, of seeds.")
    words = vars(parser.parse_args())
    measure, defaults = DEFAULTS[words.pop("measure")]
    given = Given(**{**defaults, **{name: value for name, value in words.items() if value is not None}})
    folder = given.folder.absolute() / "train"
    folder.mkdir(parents=True, exist_ok=True)
    prepare_assets(ASSETS)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("eupe", "torch", "timm", "transformers", "pillow"))
    print(f"{measure.__name__.removeprefix('measure_')}: {os.cpu_count()} cores; {libraries}")
    measure(replace(given, folder=folder, sizes=tuple(given.sizes), teachers=tuple(given.teachers)))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
