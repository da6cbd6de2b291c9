"""Small real things for tests: pictures, corpora, teachers with random weights, stores made without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from eupe.common.storage import StoragePath
from eupe.corpus.awkward import picture as picture
from eupe.corpus.index import index_bytes, index_folder
from eupe.corpus.views import ViewSpec
from eupe.extract.calibrate import candidates, measure, sample_task, settle
from eupe.extract.parts import plan_work_units, store_spec
from eupe.extract.worker import PartExtractor, Worker
from eupe.store import Store
from eupe.store.layout import segment_name
from eupe.store.writer import create_store, finish_store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import file_digest, load_teacher
from eupe.train.config import TrainConfig

TINY_TEACHER = "timm:test_vit"
TINY_STUDENT = "test_vit"
TINY_SIZE = 64
BATCH = 8
SIGLIP_WORDS = ["<unk>", "</s>", "a", "photo", "of", "red", "mug", "blue", "ball"]
TWO_CROPS = ViewSpec(policy="rrc", num_views=2)


def make_corpus(folder: Path, count: int = 24, classes: int = 3) -> Path:
    """Pictures in class folders."""
    for i in range(count):
        path = folder / f"class{i % classes}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return folder


def tiny_config(target: StoragePath | str | Path, out: Path, **options: Any) -> TrainConfig:
    """A run of the tiny student on one store, in float32, with three tenths of the pictures held out."""
    usual = {"student": TINY_STUDENT, "batch_size": 8, "head_width": 32, "holdout": 0.3, "dtype": "fp32"}
    return TrainConfig(targets=(target,), out=out, **{**usual, **options})


def own_net() -> nn.Module:
    """A student that is named `making:own_net`."""
    return nn.Conv2d(3, 8, 16, 16)


class OwnPyramid(nn.Module):
    """A student of several maps, of strides 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 6, 8, 8), nn.Conv2d(6, 10, 2, 2)

    def forward(self, pixels_BCHW: Tensor) -> list[Tensor]:
        fine = self.fine(pixels_BCHW)
        return [fine, self.coarse(fine)]


def random_weights(arch: str, path: Path, seed: int = 0) -> Path:
    """A timm model's weights, drawn at random, as a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(arch, num_classes=0)
    save_file(model.state_dict(), path)
    return path


def make_store(
    path: Path | StoragePath,
    corpus: Path | StoragePath,
    weights: Path,
    *,
    teacher: str = TINY_TEACHER,
    views: ViewSpec = TWO_CROPS,
    sizes: tuple[int, ...] = (TINY_SIZE,),
    dtype: str = "fp32",
    precision: str = "fp16",
    fidelity: float | None = None,
    grid: int | None = None,
    pixels: bool = False,
    batch_size: int = BATCH,
    tokens: tuple[str, ...] = ("summary", "dense"),
    layers: tuple[int, ...] = (),
) -> Store:
    """A finished store, made in this process."""
    spec = resolve_teacher(teacher)
    index = index_folder(corpus)
    plan = store_spec(
        spec,
        index,
        views=views,
        sizes=sizes,
        tokens=tokens,
        weights_sha256=file_digest(weights),
        dtype=dtype,
        precision=precision,
        grid=grid,
        pixels=pixels,
        layers=layers,
    )
    plan = replace(plan, forward={"batch_size": batch_size})
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    loaded = load_teacher(spec, weights=weights, device=torch.device("cpu"), dtype=torch_dtype, sizes=sizes)
    extractor = PartExtractor(loaded, plan, corpus_root=index.root, views=views, batch_size=batch_size)
    if precision != "fp16" or fidelity is not None:
        features = extractor.compute(sample_task(plan, index)).features
        plan = settle(plan, measure(plan, features, candidates(plan, fidelity)), fidelity)
        extractor = PartExtractor(loaded, plan, corpus_root=index.root, views=views, batch_size=batch_size)
    create_store(path, plan)
    StoragePath.of(path).create(segment_name(0), index_bytes(index))
    worker = Worker([extractor], [path])
    for unit in plan_work_units([plan], index.samples, done=[()]):
        worker.run(unit)
    return finish_store(path)


def save_siglip_tokenizer(folder: Path) -> None:
    """Words for tokens, padded with 1 as SigLIP's own is."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(SIGLIP_WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="</s>", eos_token="</s>")
    made.save_pretrained(folder)


def cached_timm(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Put random weights of a model of timm where its hub's library looks for what it has fetched; return them."""
    torch.manual_seed(5)
    model = timm.create_model(name.partition(".")[0], num_classes=1000)
    save_file(model.state_dict(), hub_snapshot(folder / "hub", f"timm/{name}") / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    return model.state_dict()


def hub_snapshot(hub: Path, repository: str) -> Path:
    """Make a repository's folder in a hub's cache, in the hub's own layout, and return it."""
    root, revision = hub / f"models--{repository.replace('/', '--')}", "0" * 40
    (snapshot := root / "snapshots" / revision).mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(revision)
    return snapshot
