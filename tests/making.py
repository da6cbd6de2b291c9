"""Small real things for tests: pictures, corpora, teachers with random weights, stores made without Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from eupe.corpus.index import index_folder, write_index
from eupe.corpus.views import ViewSpec
from eupe.extract.plan import plan_parts, store_spec
from eupe.extract.worker import Worker
from eupe.store import Store
from eupe.store.writer import create_store, finish_store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import file_digest, load_teacher

TINY_TEACHER = "timm:test_vit"
TINY_STUDENT = "test_vit"
TINY_SIZE = 64
TWO_CROPS = ViewSpec(policy="rrc", num_views=2)


def picture(seed: int, width: int = 80, height: int = 64) -> Image.Image:
    """A smooth RGB picture with edges in it, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    image.paste(tuple(rng.integers(0, 256, 3).tolist()), (seed % 20, 10, 30 + seed % 20, 30))
    return image


def make_corpus(folder: Path, count: int = 24, classes: int = 3) -> Path:
    """Pictures in class folders."""
    for i in range(count):
        path = folder / f"class{i % classes}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return folder


def random_weights(arch: str, path: Path, seed: int = 0) -> Path:
    """A timm model's weights, drawn at random, as a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(arch, num_classes=0)
    save_file(model.state_dict(), path)
    return path


def make_store(
    path: Path,
    corpus: Path,
    weights: Path,
    *,
    teacher: str = TINY_TEACHER,
    views: ViewSpec = TWO_CROPS,
    sizes: tuple[int, ...] = (TINY_SIZE,),
    dtype: str = "fp32",
) -> Store:
    """A finished store, made in this process."""
    spec = resolve_teacher(teacher)
    index = index_folder(corpus)
    plan = store_spec(
        spec,
        index,
        views=views,
        sizes=sizes,
        tokens=("summary", "dense"),
        weights_sha256=file_digest(weights),
        dtype=dtype,
    )
    create_store(path, plan)
    write_index(index, path / "corpus.parquet")
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    loaded = load_teacher(spec, weights=weights, device=torch.device("cpu"), dtype=torch_dtype, sizes=sizes)
    worker = Worker(loaded, path, corpus_root=index.root, views=views, batch_size=8)
    for task in plan_parts(plan, index.samples, done=()):
        worker.run(task)
    return finish_store(path)
