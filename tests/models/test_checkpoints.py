"""Weights are found inside what trainers wrap them in, or one sentence says why not."""

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from eupe.errors import TeacherError
from eupe.models.checkpoints import is_usual, read_checkpoint
from eupe.models.encoder import build_encoder
from eupe.teachers.own_forward import fill_at_random
from eupe.teachers.weights import file_digest
from eupe.train.init import init_from_weights

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    model = timm.create_model("test_vit", num_classes=0)
    fill_at_random(model)
    return dict(model.state_dict())


def ahead(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state: State) -> State:
    """Return the state of a model with the same names and other shapes."""
    return {name: torch.cat([tensor, tensor]) if tensor.ndim else tensor for name, tensor in state.items()}


def moved(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
SHARDED_OPTIMIZER = {"state": {"norm.weight": {"exp_avg": torch.ones(3)}}}

WRAPPED: dict[str, Callable[[State], Any]] = {
    "bare": lambda s: s,
    "ordered": OrderedDict,
    "DDP": lambda s: {"epoch": 3, "name": "x", "state_dict": ahead("module.", s), "optimizer": OPTIMIZER},
    "DDP alone": lambda s: ahead("module.", s),
    "compiled": lambda s: ahead("_orig_mod.", s),
    "all three": lambda s: {"state_dict": ahead("module._orig_mod.model.", s)},
    "compiled inside": lambda s: {"model": ahead("student._orig_mod.module.", s)},
    "FSDP": lambda s: {"model": ahead("_fsdp_wrapped_module.", s), "optim": SHARDED_OPTIMIZER},
    "Lightning": lambda s: {"state_dict": ahead("model.", s), "hyper_parameters": {"lr": 1}, "loops": {"a": {}}},
    "tutorial": lambda s: {"model_state_dict": s, "optimizer_state_dict": OPTIMIZER, "loss": torch.ones(())},
    "MAE": lambda s: {"model": s, "scaler": {"scale": torch.ones(1)}, "epoch": 1},
    "two deep": lambda s: {"state": {"model": {"weights": s}}},
    "backbone and heads": lambda s: {"model": {**ahead("backbone.", s), "head.mlp.0.weight": torch.ones(4, 4)}},
    "DINO's teacher alone": lambda s: {"teacher": {**ahead("backbone.", s), "dino_head.last.weight": torch.ones(4)}},
    "a teacher of another width": lambda s: {"student": ahead("backbone.", s), "teacher": ahead("backbone.", other(s))},
    "half": lambda s: {"state_dict": {k: v.half() for k, v in s.items()}},
    "with a queue": lambda s: {"state_dict": ahead("encoder_q.", s), "queue": torch.ones(4, 4)},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_what_trainers_wrap_is_found(wrap: Callable[[State], Any], state: State, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(wrap(state), path)
    found = read_checkpoint(path, fitting=state)
    assert found.keys() == state.keys()
    assert all(torch.allclose(found[name].float(), state[name], atol=1e-2) for name in state)


SEVERAL: dict[str, tuple[Callable[[State], Any], tuple[str, str]]] = {
    "timm": (lambda s: {"state_dict": s, "state_dict_ema": moved(s)}, ("state_dict", "state_dict_ema")),
    "model and ema": (lambda s: {"model": s, "model_ema": {"module": moved(s)}}, ("model", "model_ema.module")),
    "DINO": (
        lambda s: {"student": ahead("module.backbone.", s), "teacher": ahead("backbone.", moved(s))},
        ("student.module.backbone", "teacher.backbone"),
    ),
    "one table": (
        lambda s: {"state_dict": {**ahead("student.", s), **ahead("teacher.", moved(s))}},
        ("state_dict.student", "state_dict.teacher"),
    ),
    "MoCo": (lambda s: {**ahead("encoder_q.", s), **ahead("encoder_k.", moved(s))}, ("encoder_q", "encoder_k")),
}


@pytest.mark.parametrize("fitting", [True, False], ids=["known names", "other names"])
@pytest.mark.parametrize(("wrap", "keys"), SEVERAL.values(), ids=SEVERAL)
def test_several_models_are_asked_about(
    wrap: Callable[[State], Any], keys: tuple[str, str], fitting: bool, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    torch.save(wrap(state), path)
    names = state if fitting else None
    if fitting:
        with pytest.raises(
            TeacherError, match=f"several models, under {keys[0]} and {keys[1]}; choose one with --weights"
        ):
            read_checkpoint(path, fitting=names)
    for key, want in zip(keys, (state, moved(state)), strict=True):
        for typed in (key, key.rpartition(".")[2] if key.startswith("state_dict.") else key.partition(".")[0]):
            found = read_checkpoint(path, key=typed, fitting=names)
            assert torch.equal(found["norm.weight"], want["norm.weight"]), typed
    with pytest.raises(
        TeacherError, match=rf"no tensors under --weights-key nobody; available keys: .*{keys[0].split('.')[0]}"
    ):
        read_checkpoint(path, key="nobody", fitting=names)


def test_a_key_is_part_of_the_digest_where_it_says_more_than_the_file(state: State, tmp_path: Path) -> None:
    both, one = tmp_path / "both.pt", tmp_path / "one.pt"
    torch.save({"state_dict": state, "state_dict_ema": moved(state)}, both)
    torch.save({"model_state_dict": state}, one)
    assert file_digest(both, "state_dict") == file_digest(both) != file_digest(both, "state_dict_ema")
    assert file_digest(both, "state_dict_ema") == file_digest(both, "state_dict_ema.")
    assert is_usual(one, "model_state_dict")


NO_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "git-LFS pointer.*git lfs pull",
    ),
    "page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
    "answer": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a server's answer"),
    "JSON": (b'{"error": "Repository not found"}', "a JSON document"),
    "empty": (b"", "is empty"),
    "text": (b"these are no weights", "neither safetensors nor written by torch.save"),
}


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
@pytest.mark.parametrize(("data", "said"), NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_what_is_no_weights_file_is_named(data: bytes, said: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(data)
    with pytest.raises(TeacherError, match=said) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


OBJECTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "namespace": (lambda s: {"model": s, "args": argparse.Namespace(lr=1)}, r"\(argparse.Namespace\)"),
    "a whole model": (lambda s: timm.create_model("test_vit"), "Python objects"),
    "score": (lambda s: {"model": s, "best": np.float64(0.5)}, "Python objects"),
    "nothing": (lambda s: {"epoch": 3}, "not a state dict"),
    "a list": (lambda s: [torch.ones(3)], "not a state dict"),
}


@pytest.mark.parametrize(("make", "said"), OBJECTS.values(), ids=OBJECTS)
def test_other_objects_are_refused_in_a_sentence(
    make: Callable[[State], Any], said: str, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "x.pth"
    torch.save(make(state), path)
    with pytest.raises(TeacherError, match=said) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert "save only its tensors" in str(error.value) or "state dict" in str(error.value)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_that_is_cut_short(suffix: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    (safetensors.torch.save_file if suffix == "safetensors" else torch.save)(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(TeacherError, match="cut short or damaged: download or save it again"):
        read_checkpoint(path)


def test_the_content_decides_not_the_name(state: State, tmp_path: Path) -> None:
    safetensors.torch.save_file(state, tmp_path / "x.ckpt")
    torch.save(state, tmp_path / "x.safetensors")
    for name in ("x.ckpt", "x.safetensors"):
        assert read_checkpoint(tmp_path / name).keys() == state.keys()


def test_a_folder_of_several_checkpoints_is_no_model(state: State, tmp_path: Path) -> None:
    for epoch in (1, 2):
        torch.save(state, tmp_path / f"epoch_{epoch}.pt")
    with pytest.raises(TeacherError, match=r"several checkpoints: epoch_1.pt and epoch_2.pt"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("wrap", ["DDP", "all three", "backbone and heads"])
def test_a_student_starts_from_wrapped_weights(wrap: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save(WRAPPED[wrap](state), path)
    encoder = build_encoder("test_vit", size=160)
    report = init_from_weights(path, encoder)
    assert report.share == 1 and not report.fresh
    assert torch.equal(encoder.model.state_dict()["norm.weight"], state["norm.weight"])
    torch.save({"model": state, "model_ema": moved(state)}, path)
    with pytest.raises(TeacherError, match="model_ema; save the one that you mean in a separate file"):
        init_from_weights(path, encoder)


def test_adapters_are_merged_first(state: State, tmp_path: Path) -> None:
    safetensors.torch.save_file(
        {"base_model.model.blocks.0.q.lora_A.weight": torch.ones(2)}, tmp_path / "a.safetensors"
    )
    torch.save({"state_dict": {**state, "blocks.0.q.lora_B.default.weight": torch.ones(2)}}, tmp_path / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        with pytest.raises(TeacherError, match=rf"{name} holds an adapter's tensors .*merge it first"):
            read_checkpoint(tmp_path / name, fitting=state)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path).keys() == state.keys()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(TeacherError, match=r"holds an adapter \(adapter_config.json\).*merge it first"):
        read_checkpoint(tmp_path)
    assert read_checkpoint(tmp_path / "model.safetensors").keys() == state.keys(), "a file is what it is"
