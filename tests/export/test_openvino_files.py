"""OpenVINO models, run by OpenVINO as the README's code does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
from exporting import CONVNEXT, SHALLOW_VIT, Exports, code_of, least_cosine, photograph, some_slow, tokens_of

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
