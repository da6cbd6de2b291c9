"""Checkpoints as trainers leave them, by the ways in which a user hands them over."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from teacher_checks import CPU, views
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from eupe.errors import ConfigError, TeacherError
from eupe.evaluate.subject import EncoderSubject, open_subjects
from eupe.extract.actors import JobActors
from eupe.extract.config import ExtractConfig
from eupe.extract.job import checked_teachers
from eupe.teachers.library_check import compare
from eupe.teachers.own_forward import fill_at_random, narrow
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import load_teacher

State = dict[str, Tensor]
NAME = "timm:test_vit"


def saved(folder: Path) -> Path:
    """A model and its average in one file."""
    model = timm.create_model("test_vit", num_classes=5)
    fill_at_random(model)
    state = model.state_dict()
    average = {name: tensor * 0.9 for name, tensor in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": average}, folder / "both.pth.tar")
    return folder / "both.pth.tar"


def test_a_key_chooses_among_models_everywhere(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    both, spec = saved(tmp_path), resolve_teacher(NAME)
    pixels, summaries = views(160).numpy(), []
    for key in ("state_dict", "state_dict_ema"):
        assert run_eupe("teachers", "verify", NAME, "--weights", both, "--weights-key", key).code == 0
        (subject,) = open_subjects([NAME], {NAME: both}, keys={NAME: key})
        assert isinstance(subject, EncoderSubject)
        teacher = load_teacher(spec, weights=both, key=key, device=CPU, dtype=torch.float32, sizes=(160,))
        summary = teacher(torch.from_numpy(pixels)).summary
        torch.testing.assert_close(subject.encode(pixels, size=160).summary, summary, rtol=0.1, atol=0.1)
        summaries.append(summary)
    assert (summaries[0] - summaries[1]).abs().max() > 1e-2
    for words in (
        ["teachers", "verify", NAME, "--weights", both],
        ["eval", "knn", NAME, "--weights", f"{NAME}={both}"],
    ):
        outcome = run_eupe(*words, *(["--data", tmp_path] if "eval" in words else []))
        assert outcome.code == 2 and "Traceback" not in outcome.err
    assert "under state_dict and state_dict_ema; choose one with --weights-key" in " ".join(
        run_eupe("teachers", "verify", NAME, "--weights", both).err.split()
    )


def test_a_key_is_part_of_a_store_s_identity(tmp_path: Path) -> None:
    both, spec = saved(tmp_path), resolve_teacher(NAME)
    configs = [
        ExtractConfig(teacher=NAME, corpus=tmp_path, weights=both, weights_key=key)
        for key in (None, "state_dict", "state_dict_ema")
    ]
    digests = JobActors(configs, [spec] * 3, None).weights_sha256  # type: ignore[arg-type]
    assert digests[0] == digests[1] != digests[2]


def test_a_key_without_its_file(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="--weights-key ema needs a weights file"):
        checked_teachers([ExtractConfig(teacher=NAME, corpus=tmp_path, weights_key="ema")])
    for words in (["teachers", "verify", NAME, "--weights-key", "ema"], ["eval", "knn", NAME, "--weights-key", "ema"],
                  ["eval", "knn", NAME, "--weights-key", f"{NAME}=ema"]):  # fmt: skip
        outcome = run_eupe(*words)
        assert outcome.code == 2 and "--weights" in outcome.err


WRAPS: dict[str, Callable[[State], Any]] = {
    "open_clip's own": lambda s: {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in s.items()}, "optimizer": {}},
    "compiled": lambda s: {"state_dict": {f"_orig_mod.{k}": v for k, v in s.items()}},
    "inside another": lambda s: {"state_dict": {f"model.clip.{k}": v for k, v in s.items()}},
    "the tower alone": lambda s: {k.removeprefix("visual."): v for k, v in s.items() if k.startswith("visual.")},
}


@pytest.mark.usefixtures("narrow_vits")
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_open_clip_s_training_checkpoints(wrap: Callable[[State], Any], tmp_path: Path) -> None:
    """Also of an architecture of which there are no published weights, with the defaults that it is trained with."""
    spec = resolve_teacher("open_clip:ViT-S-32-alt")
    assert (spec.mean, spec.std) == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    spec = narrow(spec)
    whole = open_clip.create_model("ViT-S-32-alt", load_weights=False)
    fill_at_random(whole)
    torch.save(wrap(whole.state_dict()), tmp_path / "epoch_1.pt")
    assert compare(spec, tmp_path / "epoch_1.pt").agrees
    with pytest.raises(TeacherError, match="publishes no weights of ViT-S-32-alt; give your own with --weights"):
        load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(224,))


@pytest.mark.parametrize("prefix", ["module.", "model.backbone.", "student.module._orig_mod."])
def test_transformers_models_inside_trainers(prefix: str, tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56)
    model = Dinov2Model(config)
    fill_at_random(model)
    config.save_pretrained(tmp_path)
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": {**state, "head.weight": torch.ones(2, 2)}}, tmp_path / "last.ckpt")
    spec = resolve_teacher(f"hf:{tmp_path}", tmp_path / "last.ckpt")
    assert compare(spec, tmp_path / "last.ckpt").agrees


def test_a_run_s_weights_from_elsewhere(tmp_path: Path) -> None:
    from eupe.models.encoder import build_encoder, save_encoder

    encoder = build_encoder("test_vit", size=64)
    save_encoder(encoder, tmp_path)
    state = {f"module.model.{name}": tensor + 1 for name, tensor in encoder.model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "w.pt")
    teacher = load_teacher(
        resolve_teacher(str(tmp_path)), weights=tmp_path / "w.pt", device=CPU, dtype=torch.float32, sizes=(64,)
    )
    want = encoder.model.state_dict()["norm.weight"] + 1
    assert torch.equal(teacher.module.model.state_dict()["norm.weight"], want)  # type: ignore[union-attr]
    assert json.loads((tmp_path / "student.json").read_text())["arch"] == "test_vit"


def test_a_directory_s_own_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    """A git-LFS pointer in a local directory is reported as such, not as a file that the hub failed to send."""
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    spec = resolve_teacher(f"hf:{tmp_path}")
    with pytest.raises(TeacherError, match=r"model.safetensors is a git-LFS pointer"):
        load_teacher(spec, weights=None, device=CPU, dtype=torch.float32, sizes=(56,))
    with pytest.raises(TeacherError, match=r"model.safetensors is a git-LFS pointer"):
        checked_teachers([ExtractConfig(teacher=spec.name, corpus=tmp_path)])
