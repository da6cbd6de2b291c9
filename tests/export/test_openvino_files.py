"""OpenVINO models, run by OpenVINO as the README's code does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
from exporting import CONVNEXT, SHALLOW_VIT, Exports, code_of, least_cosine, photograph, some_slow, tokens_of
from making import make_corpus

from eupe.export.config import ExportConfig
from eupe.export.job import export
from eupe.models.encoder import load_encoder


@pytest.mark.parametrize("arch", some_slow(CONVNEXT, slow=[SHALLOW_VIT]))
def test_a_model_gives_the_run_s_tokens(arch: str, tmp_path: Path) -> None:
    exports = Exports(tmp_path, "openvino", rotated=True)
    path = photograph(tmp_path / "p.png")
    names: dict[str, Any] = {"DIR": str(exports.out(arch)), "PICTURE": str(path)}
    exec(code_of(exports.out(arch) / "README.md"), names)
    _, summary, dense = tokens_of(exports.run(arch), path)
    assert least_cosine(torch.from_numpy(names["summary"]), summary) > 0.99999
    assert least_cosine(torch.from_numpy(names["dense"]), dense) > 0.99999
    assert [said.shape[-1] for said in names["teachers"]] == [20, 12, 12]


def test_half_the_bytes_for_any_size(tmp_path: Path) -> None:
    run = Exports(tmp_path, "openvino").run(CONVNEXT)
    out = tmp_path / "out"
    report = export(ExportConfig(run=run, out=out, format="openvino", precision="fp16", dynamic_size=True))
    encoder = load_encoder(run).eval()
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert report.precision == "fp16" and 2 * count <= (out / "model.bin").stat().st_size < 2.4 * count
    pixels = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    answer = openvino.Core().compile_model(out / "model.xml", "CPU")({"pixels": pixels.numpy()})
    with torch.inference_mode():
        expected = encoder(pixels).dense
    assert least_cosine(torch.from_numpy(answer["dense"]), expected) > 0.999
    assert "INFERENCE_PRECISION_HINT" in (out / "README.md").read_text()


def test_eight_bits_calibrated_on_pictures_that_are_given(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    """Weights and products are in int8 as OpenVINO itself reads the file; stdout is JSON alone."""
    run, out = Exports(tmp_path, "openvino").run(CONVNEXT), tmp_path / "out"
    own = make_corpus(tmp_path / "own", count=9, classes=3)
    words = ("--format", "openvino", "--precision", "int8", "--calibrate", own, "--json")
    outcome = run_eupe("export", run, *words, "--out", out)
    assert outcome.code == 0, outcome.err
    notes = json.loads(outcome.out)["notes"]
    assert any("static was kept (least cosine on 4 of your pictures" in note for note in notes)
    model = openvino.Core().read_model(out / "model.xml")
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    in_int8 = [node for node in constants if node.get_element_type() == openvino.Type.i8]
    encoder = load_encoder(run).eval()
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert sum(math.prod(node.get_output_shape(0)) for node in in_int8) > 0.9 * count
    assert (out / "model.bin").stat().st_size < 0.4 * 4 * count
    assert sum(node.get_type_name() == "FakeQuantize" for node in model.get_ops()) > 5, "of activations"
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    answer = openvino.Core().compile_model(model, "CPU")({"pixels": pixels.numpy()})
    with torch.inference_mode():
        expected = encoder(pixels).dense
    assert 0.9 < least_cosine(torch.from_numpy(answer["dense"]), expected) < 0.9999


def test_eight_bits_in_the_file_alone_where_products_in_int8_go_astray(tmp_path: Path) -> None:
    run, out = Exports(tmp_path, "openvino").run("test_efficientnet"), tmp_path / "out"
    report = export(ExportConfig(run=run, out=out, format="openvino", precision="int8"))
    assert "weights was kept" in report.notes[0] and "and computes in float32" in report.notes[0]
    count = sum(parameter.numel() for parameter in load_encoder(run).parameters())
    assert (out / "model.bin").stat().st_size < 0.45 * 4 * count
    assert report.outputs["dense"]["least"] > 0.99
