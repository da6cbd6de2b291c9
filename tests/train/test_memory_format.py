"""Convolutions compute channels last, in training and evaluation: faster, and the same but for rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from making import TINY_STUDENT, random_weights, tiny_config
from safetensors.torch import load_file
from torch import nn

from eupe.common.compute import fastest_format, normalise
from eupe.evaluate.subject import EncoderSubject, open_subjects
from eupe.models.checkpoints import read_metadata
from eupe.models.encoder import build_encoder, on_paper
from eupe.store import Store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import load_teacher
from eupe.train.config import TrainConfig
from eupe.train.loop import train
from eupe.train.parallel import World
from eupe.train.run_spec import METHOD, resolve
from eupe.train.stream import open_corpora, stream, training_requests
from eupe.train.trainer import Trainer

CPU = torch.device("cpu")
FIRST, LAST = torch.contiguous_format, torch.channels_last
CNN = "test_efficientnet"
SIDE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def config(tiny_store: Store, tmp_path: Path) -> TrainConfig:
    return tiny_config(tiny_store.path, tmp_path / "run", student=CNN, steps=2, head_width=16)


def trainer_of(config: TrainConfig, **recorded: object) -> Trainer:
    corpora = open_corpora(config)
    spec = resolve(config, corpora)
    spec = replace(spec, config={**spec.config, **recorded})
    return Trainer(config, spec, corpora[0], world=World(), device=CPU)


def formats(module: nn.Module) -> set[torch.memory_format]:
    """Those of the weights that tell: one channel, or one pixel, lies as it would in either."""
    weights = [weight for weight in module.parameters() if weight.ndim == 4]
    return {LAST if weight.is_contiguous(memory_format=LAST) else FIRST for weight in weights if _tells(weight)}


def _tells(weight: torch.Tensor) -> bool:
    return weight.is_contiguous() != weight.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("tf_efficientnet_lite0", LAST),
        ("mobilenetv4_conv_small", LAST),
        ("convnext_atto", LAST),
        ("resnet18", LAST),
        ("regnety_002", LAST),
        ("vit_tiny_patch16_dinov3_qkvb", FIRST),
        ("vit_small_patch14_dinov2", FIRST),
        ("swin_tiny_patch4_window7_224", FIRST),
        ("mixer_s16_224", FIRST),
        ("mobilenetv4_hybrid_medium", FIRST),
        ("mobilevit_xs", FIRST),
    ],
)
def test_models_of_convolutions_compute_channels_last(arch: str, expected: torch.memory_format) -> None:
    assert fastest_format(on_paper(arch)) == expected


@pytest.mark.parametrize("arch", ["tf_efficientnet_lite0", "mobilenetv4_conv_small", "convnext_atto", "resnet18"])
def test_tokens_differ_by_rounding_alone(arch: str) -> None:
    views = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8))
    torch.manual_seed(0)
    encoder = build_encoder(arch, size=SIDE).eval()
    with torch.no_grad():
        theirs = encoder(normalise(views, MEAN, STD))
        pixels = normalise(views, MEAN, STD, memory_format=LAST)
        assert torch.equal(pixels, normalise(views, MEAN, STD)) and pixels.is_contiguous(memory_format=LAST)
        ours = encoder.to(memory_format=LAST)(pixels)
    assert formats(encoder) == {LAST}
    assert theirs.summary is not None and ours.summary is not None
    for a, b in ((ours.summary, theirs.summary), (ours.dense, theirs.dense)):
        assert (a - b).abs().max() < 1e-5 * max(1.0, b.abs().max().item())


def test_a_student_of_convolutions_trains_channels_last_and_loses_as_much(config: TrainConfig) -> None:
    trainer, corpora = trainer_of(config), open_corpora(config)
    distiller = trainer.distiller
    assert formats(distiller.encoder) == {LAST} and distiller.memory_format == LAST
    requests = training_requests(trainer.spec, corpora, World(), first_step=0, num_microbatches=1)
    batch, _ = stream(corpora, requests, CPU)
    ours = distiller(batch).total
    distiller.use_memory_format(FIRST)
    assert formats(distiller.encoder) == {FIRST}
    torch.testing.assert_close(ours, distiller(batch).total, rtol=1e-5, atol=1e-5)


def test_other_students_and_older_and_sharded_runs_lie_as_before(config: TrainConfig) -> None:
    sharded = replace(config, student="convnext_atto", shard=True, num_workers=2)
    for trainer in (
        trainer_of(replace(config, student=TINY_STUDENT)),
        trainer_of(config, **{METHOD: 2}),
        trainer_of(sharded),
    ):
        assert trainer.distiller.memory_format == FIRST
        assert all(weight.is_contiguous() for weight in trainer.distiller.parameters())


def test_what_is_written_does_not_depend_on_it(config: TrainConfig) -> None:
    trainer = trainer_of(config)
    config.out.mkdir()
    trainer.save(0)
    first = trainer_of(replace(config, out=config.out.with_name("first")), **{METHOD: 2})
    first.config.out.mkdir()
    first.save(0)
    ours, theirs = (run / "checkpoints" / "00000000.safetensors" for run in (config.out, first.config.out))
    assert read_metadata(ours) == read_metadata(theirs), "step, dtype and checksum of names, shapes and bytes"


def test_a_teacher_extracts_as_before_and_is_evaluated_channels_last(tmp_path: Path) -> None:
    weights = random_weights(CNN, tmp_path / "cnn.safetensors")
    spec = resolve_teacher(f"timm:{CNN}")
    teacher = load_teacher(spec, weights=weights, device=CPU, dtype=torch.float32, sizes=(SIDE,))
    assert teacher.memory_format == FIRST and formats(teacher.module) == {FIRST}
    views = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    theirs = teacher(torch.from_numpy(views))
    quick = teacher.in_fastest_format()
    assert quick.memory_format == LAST and formats(quick.module) == {LAST}
    ours = quick(torch.from_numpy(views))
    for kind in ("summary", "dense"):
        torch.testing.assert_close(getattr(ours, kind), getattr(theirs, kind), rtol=1e-5, atol=1e-5)
    (subject,) = open_subjects([f"timm:{CNN}"], {f"timm:{CNN}": weights})
    assert isinstance(subject, EncoderSubject)
    assert subject._loaded(SIDE).memory_format == replace(subject, untrained=True)._loaded(SIDE).memory_format == LAST


def test_a_run_channels_last_is_exported_as_any_other(config: TrainConfig) -> None:
    train(config)
    student = load_file(config.out / "student.safetensors")
    build_encoder(CNN, size=SIDE).model.load_state_dict(student)
    assert all(value.is_contiguous() for value in student.values())
