"""Students that timm does not have, and students that start from weights: from a cache through a run to an export."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
import transformers
from making import TINY_SIZE, cached_timm, make_store
from safetensors.torch import load_file
from torch import Tensor

from eupe.common.kinds import TRUST_VARIABLE
from eupe.evaluate.licences import Origin, origins
from eupe.models.encoder import load_encoder
from eupe.store import Store
from eupe.train.config import ENCODER_LR_MULT, FROZEN_SHARE
from eupe.train.run_spec import read_run_spec

Run = Callable[..., Any]
DETECTOR = """
from transformers import AutoBackbone, RTDetrResNetConfig


def backbone():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return AutoBackbone.from_config(RTDetrResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"]))


class Widened:
    pass
"""
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
FEW = ("--steps", 6, "--batch-size", 8, "--head-width", 16, "--holdout", 0.3, "--dtype", "fp32", "--json")


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (file := tmp_path / "detector.py").write_text(DETECTOR)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "detector", raising=False)
    return file


def vit_folder(folder: Path, *, licence: str | None = None) -> Path:
    """A ViT of Transformers with its weights, as the library saves it."""
    torch.manual_seed(3)
    model = transformers.ViTModel(transformers.ViTConfig(**VIT, image_size=TINY_SIZE, patch_size=16))
    model.save_pretrained(folder)
    if licence is not None:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n")
    return folder


def student_of(kind: str, folder: Path) -> str:
    return {
        "torchvision": "torchvision:resnet18",
        "transformers": f"hf:{vit_folder(folder / 'vit')}" if kind == "transformers" else "",
        "detector": "detector:backbone",
    }[kind]


@pytest.mark.parametrize("kind", ["torchvision", "transformers", "detector"])
def test_from_a_cache_to_an_export_and_to_the_next_cache(
    kind: str, tiny_store: Store, tiny_corpus: Path, own_module: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_module.parent
    student, run, onnx = student_of(kind, folder), folder / "run", folder / "onnx"
    outcome = run_eupe("train", "--targets", tiny_store.path, "--student", student, "--out", run, *FEW)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["steps"] == 6
    monkeypatch.setenv(TRUST_VARIABLE, "1" if kind == "detector" else "0")
    if kind == "transformers":
        shutil.rmtree(folder / "vit")  # the run says what it needs of it
    outcome = run_eupe("eval", "knn", run, "--data", tiny_corpus, "--size", TINY_SIZE, "--json")
    assert outcome.code == 0 and 0 <= json.loads(outcome.out)["results"][0]["scores"]["accuracy"] <= 1, outcome.err
    outcome = run_eupe("export", run, "--format", "onnx", "--out", onnx, "--json")
    assert outcome.code == 0, outcome.err
    pixels = torch.randn(1, 3, TINY_SIZE, TINY_SIZE, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(onnx / "model.onnx")
    said = dict(zip(["summary", "dense"], session.run(["summary", "dense"], {"pixels": pixels.numpy()}), strict=True))
    with torch.inference_mode():
        tokens = load_encoder(run).eval()(pixels)
    for name, ours in (("summary", tokens.summary), ("dense", tokens.dense)):
        assert ours is not None
        np.testing.assert_allclose(said[name], ours.numpy(), atol=1e-4 * float(ours.abs().max()))
    store = make_store(folder / "next.zarr", tiny_corpus, run / "student.safetensors", teacher=str(run))
    assert store.spec.teacher["dense_dim"] == tokens.dense.shape[-1]
    if kind == "torchvision":  # the weights are the library's by name
        weights = load_file(run / "student.safetensors")
        missing, unexpected = torchvision.models.resnet18().load_state_dict(weights, strict=False)
        assert missing == ["fc.weight", "fc.bias"] and not unexpected
    outcome = run_eupe("export", run, "--format", "timm", "--out", folder / "timm")
    assert outcome.code == 2 and "--format timm is for students of timm; the weights of" in outcome.err
    assert not (folder / "timm").exists()


def test_a_run_is_resumed_with_the_source_that_it_began_with(
    tiny_store: Store, own_module: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "train",
        "--targets",
        tiny_store.path,
        "--student",
        "detector:backbone",
        "--out",
        own_module.parent / "run",
    )
    assert run_eupe(*words, *FEW).code == 0
    own_module.write_text(f"# another text\n{DETECTOR}")
    monkeypatch.delitem(sys.modules, "detector")
    outcome = run_eupe(*words, *FEW, "--resume")
    assert outcome.code == 2 and "source: was" in outcome.err


@pytest.mark.parametrize("by", ["options", "recipe", "init"])
def test_a_file_s_word_runs_no_code_without_trust(
    by: str, tiny_store: Store, own_module: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_module.parent
    monkeypatch.chdir(folder)
    monkeypatch.setenv(TRUST_VARIABLE, "0")  # the flag sets it
    own_module.write_text("raise SystemExit('run!')")
    options = f"targets: {tiny_store.path}\nstudent: detector:backbone\nsteps: 6\nbatch-size: 8\n"
    (folder / "options.yaml").write_text(options)
    (folder / "recipe.yaml").write_text(
        f"out: out\nsteps:\n  s: {{train: {{targets: {tiny_store.path}, student: detector:backbone, steps: 6}}}}\n"
    )
    if by == "init":
        own_module.write_text(DETECTOR)
        words = ("--targets", tiny_store.path, "--student", "detector:backbone", "--out", "first")
        assert run_eupe("train", *words, *FEW).code == 0
    command = {
        "options": ("train", "--config", "options.yaml", "--out", "run"),
        "recipe": ("run", "recipe.yaml"),
        "init": ("train", "--init", "first", "--targets", tiny_store.path, "--out", "run", *FEW),
    }[by]
    outcome = run_eupe(*command)
    assert outcome.code == 2 and "is built by detector:backbone, which is code" in " ".join(outcome.err.split())
    if by != "init":
        own_module.write_text(DETECTOR)
    dry = ("--dry-run",) if by == "recipe" else ()
    outcome = run_eupe("--trust-factory", *command, *dry)
    assert outcome.code == 0, outcome.err


def test_neither_file_of_a_run_runs_code_without_trust(
    tiny_store: Store, own_module: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, "0")
    run = own_module.parent / "run"
    words = ("train", "--targets", tiny_store.path, "--student", "test_vit", "--out", run, *FEW)
    assert run_eupe(*words).code == 0
    spec = json.loads((run / "config.json").read_text())
    spec["config"]["student"] = "detector:backbone"
    (run / "config.json").write_text(json.dumps(spec))
    own_module.write_text("raise SystemExit('run!')")
    outcome = run_eupe("eval", "agreement", run)
    assert outcome.code == 2 and "is built by detector:backbone, which is code" in " ".join(outcome.err.split())


def weights_of(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The words for a student with pretrained weights, which its library has fetched before, and these weights."""
    if name == "timm":
        return ("--student", "test_resnet.r160_in1k"), cached_timm(folder, "test_resnet.r160_in1k", monkeypatch)
    if name == "torchvision":
        torch.manual_seed(5)
        net = torchvision.models.shufflenet_v2_x0_5()
        (checkpoints := folder / "torch/hub/checkpoints").mkdir(parents=True)
        url = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.url
        torch.save(net.state_dict(), checkpoints / Path(url).name)
        monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
        return ("--student", "torchvision:shufflenet_v2_x0_5", "--pretrained"), net.state_dict()
    vit = vit_folder(folder / "vit", licence="apache-2.0")
    return ("--student", f"hf:{vit}", "--pretrained"), transformers.ViTModel.from_pretrained(vit).state_dict()


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_a_pretrained_student_starts_from_its_library_s_weights_and_is_protected(
    library: str, tiny_store: Store, tmp_path: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, theirs = weights_of(library, tmp_path, monkeypatch)
    run = tmp_path / "run"
    few = ("--steps", 6, "--batch-size", 8, "--head-width", 16, "--lr", 1e-9, "--weight-decay", 0, "--dtype", "fp32")
    outcome = run_eupe("train", "--targets", tiny_store.path, "--out", run, "--holdout", 0.3, *few, *words)
    assert outcome.code == 0, outcome.err
    ours = load_encoder(run).model.state_dict()
    shared = [name for name, value in ours.items() if name in theirs and value.is_floating_point()]
    assert len(shared) >= 0.5 * len(ours)
    for name in shared:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)
    config = read_run_spec(run).config
    assert (config["freeze_encoder"], config["encoder_lr_mult"]) == (FROZEN_SHARE, ENCODER_LR_MULT)
    assert "the encoder starts from pretrained weights" in " ".join(outcome.err.split())
    (start,) = [origin for origin in origins(run, read_run_spec(run)) if "test_vit" not in origin.name]
    licence = {"timm": "apache-2.0", "torchvision": "unknown", "transformers": "apache-2.0"}[library]
    assert start == Origin(start.name, licence) and start.name != "unknown"
    other = run_eupe("train", "--targets", tiny_store.path, "--out", run, "--holdout", 0.3, *few, *words[:2])
    if library != "timm":  # a tag means its weights
        assert other.code == 2 and "pretrained: was" in other.err


def test_weights_that_cannot_be_had_are_said_to_be_so(tiny_store: Store, tmp_path: Path, run_eupe: Run) -> None:
    common = ("train", "--targets", tiny_store.path, "--out", tmp_path / "run", *FEW)
    for words, told in (
        (("--student", "test_vit.r160_in1k"), "the pretrained weights of test_vit.r160_in1k cannot be had at 64 px"),
        (("--student", "darknet17", "--pretrained"), "timm has no pretrained weights for darknet17"),
        (("--student", "test_vit", "--pretrained", "--init", tmp_path), "--pretrained and --init are two starts"),
    ):
        outcome = run_eupe(*common, *words)
        assert outcome.code == 2 and told in " ".join(outcome.err.split()), outcome.err
        assert not (tmp_path / "run").exists()
