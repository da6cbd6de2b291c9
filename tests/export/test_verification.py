"""What is not the same model is not exported."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import SIZE, finished_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from eupe.errors import ConformanceError
from eupe.export import job
from eupe.export.config import ExportConfig
from eupe.export.job import export
from eupe.export.proof import Proof, compare, require_sameness
from eupe.export.sample_pictures import varied_pictures
from eupe.export.source import Source, Written


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("run") / "run", "test_vit2")


Damage = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return lambda tensors: {**tensors, name: change(tensors[name])}


DAMAGES: dict[str, tuple[str, Damage]] = {
    "a layer scale": ("model", changed("blocks.5.ls2.gamma", torch.ones_like)),
    "a bias": ("model", changed("blocks.3.attn.qkv.bias", torch.zeros_like)),
    "the last norm": ("model", changed("fc_norm.bias", torch.zeros_like)),
    "a register": ("model", changed("reg_token", lambda t: 2 * t)),
    "a head": ("heads", changed("dinov2-s.dense.3.bias", torch.zeros_like)),
    "a head's length": ("heads", changed("dinov2-s.summary.3.weight", lambda t: 1.1 * t)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_directory_with_one_changed_tensor_is_refused_and_not_left(
    damage: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Callable[..., Any]
) -> None:
    file, spoil = DAMAGES[damage]
    form = job.FORMATS["timm"]

    def write(source: Source, config: ExportConfig, folder: Path) -> Written:
        written = form.write(source, config, folder)
        path = folder / f"{file}.safetensors"
        save_file(spoil(load_file(path)), path)
        return written

    monkeypatch.setitem(job.FORMATS, "timm", dataclasses.replace(form, write=write))
    outcome = run_eupe("export", run, "--format", "timm", "--heads", "all", "--out", tmp_path / "out")
    assert outcome.code == 1
    assert "differ from its run's, so the export was removed" in " ".join(outcome.err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost", ["blocks.0.norm1.bias", "reg_token"])
def test_a_directory_that_cannot_be_loaded_is_refused_and_not_left(
    lost: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = job.FORMATS["timm"]

    def write(source: Source, config: ExportConfig, folder: Path) -> Written:
        written = form.write(source, config, folder)
        path = folder / "model.safetensors"
        save_file({name: value for name, value in load_file(path).items() if name != lost}, path)
        return written

    monkeypatch.setitem(job.FORMATS, "timm", dataclasses.replace(form, write=write))
    with pytest.raises(ConformanceError, match=f"cannot be reloaded and run .*{lost}.*the export was removed"):
        export(ExportConfig(run=run, out=tmp_path / "out", format="timm"))
    assert list(tmp_path.iterdir()) == []


def outputs(seed: int = 0) -> dict[str, Tensor]:
    """Those of six pictures."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "summary": torch.randn(6, 8, generator=generator) + 2,
        "dense": torch.randn(6, 3, 3, 5, generator=generator),
    }


def with_token(outputs: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    dense = outputs["dense"].clone()
    dense[4, 1, 2] = change(dense[4, 1, 2])
    return {**outputs, "dense": dense}


WRONG: dict[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "one token of one picture": ("dense", lambda o: with_token(o, lambda t: t.flip(0))),
    "the length of one token": ("dense", lambda o: with_token(o, lambda t: 1.02 * t)),
    "one number that is none": ("dense", lambda o: with_token(o, lambda t: torch.nan * t)),
    "the same for every picture": ("summary", lambda o: {**o, "summary": o["summary"][:1].expand(6, -1)}),
    "pictures in another order": ("summary", lambda o: {**o, "summary": o["summary"].flip(0)}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_each_way_to_be_wrong_is_seen(wrong: str) -> None:
    name, spoil = WRONG[wrong]
    proof = Proof(6, ((8, 8),), compare(outputs(), spoil(outputs())), 1.0, 1.0)
    with pytest.raises(ConformanceError, match=rf"^it was reloaded.*: {name} \(least cosine"):
        require_sameness(proof, "fp32", "it")


def test_what_says_the_same_of_every_picture_is_refused_however_near_it_is() -> None:
    """Pictures that hardly differ: a graph in which one was traced into a constant is near them all."""
    nearly = {"summary": outputs()["summary"][:1] + 1e-4 * outputs(1)["summary"]}
    constant = {"summary": nearly["summary"].mean(dim=0, keepdim=True).expand(6, -1)}
    found = compare(nearly, constant)
    assert found["summary"].least > 0.9999
    with pytest.raises(ConformanceError, match=r"error 100\.00%"):
        require_sameness(Proof(6, ((8, 8),), found, 1.0, 1.0), "int8", "it")


def turned(token: Tensor, angle: float) -> Tensor:
    """Every token turned by an angle, in radians, and as long as before."""
    aside = torch.randn(token.shape, generator=torch.Generator().manual_seed(5))
    aside = aside - (aside * token).sum(-1, keepdim=True) / token.square().sum(-1, keepdim=True) * token
    aside = aside / aside.norm(dim=-1, keepdim=True) * token.norm(dim=-1, keepdim=True)
    return token * math.cos(angle) + aside * math.sin(angle)


@pytest.mark.parametrize(
    ("angle", "passes"),
    [(0.01, {"fp32", "fp16", "int8"}), (0.03, {"fp16", "int8"}), (0.1, {"int8"})],
)
def test_tolerances_are_those_of_the_precision(angle: float, passes: set[str]) -> None:
    rough = {name: turned(value, angle) for name, value in outputs().items()}
    proof = Proof(6, ((8, 8),), compare(outputs(), rough), 1.0, 1.0)
    for precision in ("fp32", "fp16", "int8"):
        if precision in passes:
            require_sameness(proof, precision, "it")
        else:
            with pytest.raises(ConformanceError, match="least cosine"):
                require_sameness(proof, precision, "it")


def test_tokens_that_are_nothing_in_both_are_the_same_and_in_one_are_not() -> None:
    """A CNN whose last layer is a ReLU may give tokens of zeros; they are the same only if both sides have them."""
    nothing = with_token(outputs(), lambda t: 0 * t)
    found = compare(nothing, nothing)["dense"]
    assert (found.least, found.stretched) == (pytest.approx(1), 0)
    for want, got in ((nothing, outputs()), (outputs(), nothing)):
        with pytest.raises(ConformanceError, match="dense"):
            require_sameness(Proof(6, ((8, 8),), compare(want, got), 1.0, 1.0), "fp32", "it")


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ConformanceError, match=r"other names or shapes than its run's: got .*\(6, 9, 5\).*, expected"):
        compare(outputs(), {**outputs(), "dense": outputs()["dense"].flatten(1, 2)})
    with pytest.raises(ConformanceError):
        compare(outputs(), {"summary": outputs()["summary"]})


def test_pictures_are_varied_and_repeat_by_seed() -> None:
    first, again, other = (varied_pictures(SIZE, SIZE, seed=seed) for seed in (0, 0, 1))
    assert first.shape[1:] == (SIZE, SIZE, 3) and len(first) >= 16
    assert (first == again).all()
    same = [(a == b).all() for a, b in zip(first, other, strict=True)]
    assert sum(same) <= 3, "black, white, and a grey picture"
    flat = [picture for picture in first if (picture == picture[0, 0]).all()]
    assert len(flat) == 3
    assert varied_pictures(32, 96).shape[1:] == (32, 96, 3)
