"""Exports for timm, loaded by timm alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from exporting import (
    CONVNEXT,
    SIZE,
    VIT,
    Exports,
    assert_teaches,
    fill,
    finished_run,
    least_cosine,
    photograph,
    said_in_a_loop,
    some_slow,
    tokens_of,
)
from safetensors.torch import load_file
from timm.models import eva

from eupe.common.compute import Tokens, normalise
from eupe.export.authors import in_authors_names
from eupe.export.config import ExportConfig
from eupe.export.job import export
from eupe.export.sample_pictures import varied_pictures
from eupe.models.encoder import load_encoder
from eupe.train.predict import load_predictors

SUMMARIES = {
    VIT: "cls",
    "test_vit": "cls",
    "test_vit2": "pooled",
    CONVNEXT: "pooled",
    "convnext_atto": "pooled",
    "tf_efficientnet_lite0": "pooled",
    "mambaout_femto": "pooled",
    "vit_small_patch16_eupe": "cls",
}
"""Students and their summaries: rotary, learned positions, no class token; CNNs, one with channels last; our proxy."""
SLOW = ("test_vit2", "convnext_atto", "tf_efficientnet_lite0", "mambaout_femto", "vit_small_patch16_eupe")
ARCHS = some_slow(VIT, "test_vit", CONVNEXT, slow=SLOW)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("timm"), "timm")


@pytest.mark.parametrize("arch", ARCHS)
def test_timm_s_own_forward_pass_gives_the_run_s_summary(arch: str, exports: Exports) -> None:
    encoder, out = load_encoder(exports.run(arch)).eval(), exports.out(arch)
    model = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    pixels = normalise(torch.from_numpy(varied_pictures(SIZE, SIZE, seed=7)), encoder.spec.mean, encoder.spec.std)
    with torch.inference_mode():
        assert least_cosine(model(pixels), encoder(pixels).summary) > 0.99999
    assert encoder.spec.summary == SUMMARIES[arch]
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1, "colleagues can read the weights, too"
    assert model.num_features == json.loads((out / "config.json").read_text())["num_features"]
    settings = timm.data.resolve_model_data_config(model)
    assert tuple(settings["input_size"]) == (3, SIZE, SIZE)
    assert (settings["crop_pct"], settings["interpolation"], settings["crop_mode"]) == (1.0, "bicubic", "center")
    assert (tuple(settings["mean"]), tuple(settings["std"])) == (encoder.spec.mean, encoder.spec.std)


def assert_said(names: dict[str, Any], run: Path, path: Path) -> None:
    """Check that the card's code gives what the run gives for a picture: its tokens and its predictions of teachers."""
    encoder, summary, dense = tokens_of(run, path)
    assert least_cosine(names["summary"], summary) > 0.99999
    assert least_cosine(names["dense"], dense) > 0.99999
    assert names["dense"].shape[1:3] == (SIZE // encoder.spec.patch,) * 2
    teachers = names["teachers"]
    assert teachers.keys() == {"dinov2-s.summary", "dinov2-s.dense", "efficientnet-lite0.dense"}
    with torch.inference_mode():
        for predictor in load_predictors(run):
            for kind, said in zip(
                ("summary", "dense"), predictor(Tokens(names["summary"], names["dense"])), strict=True
            ):
                if said is not None:
                    torch.testing.assert_close(teachers[f"{predictor.name}.{kind}"], said, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_an_export_teaches(arch: str, exports: Exports) -> None:
    assert_teaches(f"timm:local-dir:{exports.out(arch)}", exports.run(arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_code_in_the_card_gives_the_run_s_tokens(arch: str, exports: Exports, tmp_path: Path) -> None:
    path = photograph(tmp_path / "p.png", width=110)
    for said in said_in_a_loop(exports.out(arch), [path, path]):
        assert_said(said, exports.run(arch), path)


ALONE = """
import pathlib, sys, torch
for place in sys.argv[2:]:
    code = (pathlib.Path(place) / "README.md").read_text().partition("```python\\n")[2].partition("```")[0]
    names = {"DIR": place, "PICTURE": sys.argv[1]}
    exec(code, names)
    torch.save({name: names[name] for name in ("summary", "dense", "teachers")}, f"{place}.pt")
assert not any(name.split(".")[0] == "eupe" for name in sys.modules)
"""


@pytest.mark.slow
def test_the_code_in_the_card_runs_where_there_is_no_eupe(exports: Exports, tmp_path: Path) -> None:
    path = photograph(tmp_path / "p.png", width=110)
    places = [str(exports.out(arch)) for arch in SUMMARIES]
    subprocess.run([sys.executable, "-I", "-c", ALONE, str(path), *places], cwd=tmp_path, check=True)
    for arch, place in zip(SUMMARIES, places, strict=True):
        assert_said(torch.load(f"{place}.pt"), exports.run(arch), path)


def test_weights_are_those_of_timm_s_architecture_by_name(exports: Exports) -> None:
    weights = load_file(exports.out(VIT) / "model.safetensors")
    model = timm.create_model(VIT, num_classes=0)
    model.load_state_dict(weights, strict=True)
    theirs = load_file(exports.run(VIT) / "student.safetensors")
    assert weights.keys() == theirs.keys()
    assert all(torch.equal(weights[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(
    "arch", ["vit_tiny_patch16_dinov3_qkvb", "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb"]
)
def test_the_authors_names_come_back_as_ours_through_timm_s_own_conversion(arch: str) -> None:
    model = timm.create_model(arch, num_classes=0, depth=2)
    fill(model)
    written = in_authors_names(model)
    assert {"storage_tokens", "mask_token", "blocks.1.ls2.gamma", "rope_embed.periods"} <= written.keys()
    assert not any("gamma_" in name or "reg_token" in name or "q_bias" in name for name in written)
    assert ("blocks.0.attn.qkv.bias" in written) == ("qkvb" in arch)
    assert ("blocks.0.mlp.w3.weight" in written) == ("plus" in arch)
    back = eva.checkpoint_filter_fn(dict(written), model)
    ours = model.state_dict()
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], value) for name, value in ours.items())


@pytest.mark.parametrize("arch", some_slow("test_vit", slow=[CONVNEXT, VIT]))
def test_another_size_is_that_of_the_run_at_that_size(arch: str, exports: Exports, tmp_path: Path) -> None:
    run, out = exports.run(arch), tmp_path / "out"
    assert export(ExportConfig(run=run, out=out, format="timm", size=96)).size == 96
    model = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    encoder = load_encoder(run).eval()
    pixels = normalise(torch.from_numpy(varied_pictures(96, 96, seed=7)), encoder.spec.mean, encoder.spec.std)
    with torch.inference_mode():
        assert least_cosine(model(pixels), encoder(pixels).summary) > 0.99999
    assert tuple(timm.data.resolve_model_data_config(model)["input_size"]) == (3, 96, 96)
    if arch == "test_vit":
        assert load_file(out / "model.safetensors")["pos_embed"].shape[1] == 1 + 6 * 6


def test_a_classifier_can_be_asked_for_as_of_any_timm_model(exports: Exports) -> None:
    model = timm.create_model(f"local-dir:{exports.out(VIT)}", pretrained=True, num_classes=10)
    assert model(torch.zeros(1, 3, SIZE, SIZE)).shape == (1, 10)
    assert torch.equal(model.cls_token, load_file(exports.out(VIT) / "model.safetensors")["cls_token"])


@pytest.mark.parametrize("arch", ARCHS)
def test_the_proof_is_recorded(arch: str, exports: Exports) -> None:
    record = json.loads((exports.out(arch) / "export.json").read_text())
    assert record["report"]["num_pictures"] >= 8
    assert record["proof"]["sizes"] == [[SIZE, SIZE]]
    for found in record["report"]["outputs"].values():
        assert found["least"] >= 0.9999 and found["stretched"] <= 0.01 and found["astray"] < 1e-4


def test_the_command_line_takes_the_size_of_the_input(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    run = finished_run(tmp_path / "run", "test_vit")
    for size, option in ((64, []), (96, ["--size", 96])):
        outcome = run_eupe("export", run, "--format", "timm", "--out", tmp_path / str(size), "--json", *option)
        assert json.loads(outcome.out)["size"] == size
        model = timm.create_model(f"local-dir:{tmp_path / str(size)}", pretrained=True, num_classes=0)
        assert model.patch_embed.img_size == (size, size)
