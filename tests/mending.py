"""Stores of several parts made without Ray, ways to damage them, and a crew that mends them in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from making import BATCH, TWO_CROPS, make_store, picture

from eupe.common.storage import StoragePath
from eupe.corpus.index import Corpus, index_bytes, index_folder
from eupe.extract.config import ExtractConfig
from eupe.extract.dispatch import Status
from eupe.extract.job import stored_index
from eupe.extract.parts import plan_work_units
from eupe.extract.worker import PartExtractor, Worker
from eupe.store import Store, open_store
from eupe.store.layout import segment_name
from eupe.store.reader import committed_parts
from eupe.store.writer import extend_store, finish_store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import file_digest, load_teacher

SAMPLES_PER_PART = 8


def make_parts(path: Path, corpus: Path, weights: Path, **options: Any) -> Store:
    """Like `make_store`, in parts of eight samples."""
    with mock.patch("eupe.extract.parts.samples_per_part", lambda num_samples, num_bytes: SAMPLES_PER_PART):
        return make_store(path, corpus, weights, **options)


def extend(store: Store, corpus: Path, weights: Path, *, count: int) -> Store:
    """Pictures are added to a store's corpus, and their features to the store; it is finished again."""
    announce(store, corpus, count=count)
    crew(weights).run_parts(open_store(store.path), lambda status: None)
    return finish_store(store.path)


def announce(store: Store, corpus: Path, *, count: int) -> None:
    """Pictures are added to a store's corpus, and room for them to the store."""
    known = store.spec.num_samples
    for i in range(count):
        picture(1000 + known + i).save(corpus / "class0" / f"new{known + i}.png")
    index = index_folder(corpus)
    new = np.array(["/new" in key and int(Path(key).stem[3:]) >= known for key in index.samples["key"].to_pylist()])
    added = Corpus(index.root, index.samples.filter(new))
    store.path.write(segment_name(len(store.spec.corpus["segments"])), index_bytes(added))
    extend_store(store, fingerprint=index.fingerprint, num_new=len(added))


def crew(weights: Path, teacher: str = "timm:test_vit", **config: object) -> Crew:
    spec = resolve_teacher(teacher)
    given = {"teacher": teacher, "corpus": "", "weights": weights, "batch_size": BATCH, "views": TWO_CROPS, **config}
    return Crew(ExtractConfig(**given), spec, None)  # type: ignore[arg-type]


class Crew:
    """Extracts in this process."""

    def __init__(self, config: ExtractConfig, teacher: TeacherSpec, corpus: Corpus | None) -> None:
        self.config = config
        self.teacher = teacher
        self.made: list[int] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def weights_sha256(self) -> str:
        assert self.config.weights is not None
        return file_digest(self.config.weights)

    def prepare(self, store: Store) -> None:
        pass

    def run_parts(self, store: Store, on_status: Callable[[Status], None]) -> float:
        spec, config = store.spec, self.config
        loaded = load_teacher(
            self.teacher,
            weights=config.weights,
            device=torch.device("cpu"),
            dtype=torch.float32,
            sizes=spec.sizes,
        )
        root = StoragePath.of(config.corpus or spec.corpus["root"])
        extractor = PartExtractor(
            loaded, spec, corpus_root=root, views=config.views, batch_size=config.batch_size or BATCH
        )
        worker = Worker([extractor], [store.path])
        for unit in plan_work_units([spec], stored_index(store).samples, [committed_parts(store.path)]):
            worker.run(unit)
            self.made += [task.index for _, task in unit.tasks]
        return 1.0


class Crews:
    """Opens crews and remembers them."""

    def __init__(self) -> None:
        self.opened: list[Crew] = []

    def __call__(self, config: ExtractConfig, teacher: TeacherSpec, corpus: Corpus) -> Crew:
        self.opened.append(Crew(config, teacher, corpus))
        return self.opened[-1]

    @property
    def made(self) -> list[int]:
        """Parts that were extracted."""
        return [part for crew in self.opened for part in crew.made]


def files(path: Path | StoragePath) -> dict[str, bytes]:
    """Every file below a folder."""
    root = Path(path)
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def flip(file: Path, place: float, bit: int = 3) -> None:
    """Turn one bit over; `place` is a share of the file's length."""
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    file.write_bytes(data)
