"""ExecuTorch, LiteRT and Core ML, by their own libraries; each only where its package is installed."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporting import CONVNEXT, SHALLOW_VIT, Exports, code_of, least_cosine, photograph, tokens_of
from making import make_corpus

from eupe.errors import ConformanceError
from eupe.export import coreml_files
from eupe.export.config import ExportConfig
from eupe.export.job import export
from eupe.export.source import open_source
from eupe.models.encoder import load_encoder

pytestmark = pytest.mark.slow
FILES = {"executorch": "model.pte", "litert": "model.tflite"}
PACKAGES = {"executorch": "executorch", "litert": "litert_torch"}


@pytest.mark.parametrize(("form", "arch"), [("executorch", SHALLOW_VIT), ("litert", CONVNEXT)])
def test_the_card_s_code_gives_the_run_s_tokens(form: str, arch: str, tmp_path: Path) -> None:
    pytest.importorskip(PACKAGES[form])
    exports = Exports(tmp_path, form, rotated=True)
    path = photograph(tmp_path / "p.png")
    names: dict[str, Any] = {"DIR": str(exports.out(arch)), "PICTURE": str(path)}
    exec(code_of(exports.out(arch) / "README.md"), names)
    _, summary, dense = tokens_of(exports.run(arch), path)
    assert least_cosine(names["summary"], summary) > 0.99999
    assert least_cosine(names["dense"], dense) > 0.99999
    assert [said.shape[-1] for said in names["teachers"]] == [20, 12, 12]
    assert sorted(file.name for file in exports.out(arch).iterdir()) == ["README.md", "export.json", FILES[form]]


@pytest.mark.parametrize("form", [*FILES, "coreml"])
def test_the_page_s_command(form: str, tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    pytest.importorskip({**PACKAGES, "coreml": "coremltools"}[form])
    page = (Path(__file__).parents[2] / "docs" / "edge.md").read_text()
    (words,) = re.findall(rf"^eupe (export runs/tiny --format {form} .*?) +#", page, re.MULTILINE)
    own = {
        "runs/tiny": Exports(tmp_path, form).run(CONVNEXT),
        "photos": make_corpus(tmp_path / "own", count=6, classes=2),
    }
    *options, out = [own.get(word, word) for word in words.split()]
    outcome = run_eupe(*options, tmp_path / out, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["precision"] == {"litert": "int8", "coreml": "fp16"}.get(form, "fp32")
    assert (tmp_path / out / {**FILES, "coreml": "model.mlpackage"}[form]).exists()


@pytest.mark.parametrize(("precision", "bytes_each", "least"), [("fp16", 2, 0.9999), ("int8", 1, 0.99)])
def test_litert_in_fewer_bits(precision: str, bytes_each: int, least: float, tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    from ai_edge_litert.interpreter import Interpreter

    run, out = Exports(tmp_path, "litert").run(SHALLOW_VIT), tmp_path / "out"
    report = export(ExportConfig(run=run, out=out, format="litert", precision=precision))
    model = Interpreter(model_path=str(out / "model.tflite"), experimental_preserve_all_tensors=True)
    kept = {2: np.float16, 1: np.int8}[bytes_each]
    count = sum(parameter.numel() for parameter in load_encoder(run).parameters())
    held = [each["shape"] for each in model.get_tensor_details() if each["dtype"] == kept]
    assert sum(int(np.prod(shape)) for shape in held) > 0.9 * count
    assert (out / "model.tflite").stat().st_size < 1.3 * bytes_each * count
    _, summary, dense = tokens_of(run, path := photograph(tmp_path / "p.png"))
    names: dict[str, Any] = {"DIR": str(out), "PICTURE": str(path)}
    exec(code_of(out / "README.md"), names)
    assert least < least_cosine(names["summary"], summary)
    assert least < least_cosine(names["dense"], dense)
    assert ("dynamic was kept" in " ".join(report.notes)) == (precision == "int8")


def test_a_core_ml_package_is_the_student_as_far_as_its_file_tells(tmp_path: Path) -> None:
    coremltools = pytest.importorskip("coremltools")
    run, out = Exports(tmp_path, "coreml").run(SHALLOW_VIT), tmp_path / "out"
    report = export(ExportConfig(run=run, out=out, format="coreml", precision="fp16", heads=("all",)))
    assert report.outputs == {} and report.exported_ms is None and report.num_pictures == 0
    card = (out / "README.md").read_text()
    assert "This package was not run, because Core ML runs only on Apple's systems." in card
    assert "The export was not run" in card and "least cosine" not in card
    spec = coremltools.utils.load_spec(str(out / "model.mlpackage"))
    ends = [*spec.description.input, *spec.description.output]
    shapes = {end.name: list(end.type.multiArrayType.shape) for end in ends}
    assert shapes == {
        "pixels": [1, 3, 64, 64],
        "summary": [1, 192],
        "dense": [1, 4, 4, 192],
        "dinov2_s_summary": [1, 20],
        "dinov2_s_dense": [1, 4, 4, 12],
        "efficientnet_lite0_dense": [1, 4, 4, 12],
    }
    count = sum(parameter.numel() for parameter in load_encoder(run).parameters())
    (weights,) = out.rglob("weight.bin")
    assert 2 * count < weights.stat().st_size < 2.2 * count
    assert export(ExportConfig(run=run, out=out, format="coreml", precision="fp16", heads=("all",))).cached


@pytest.mark.parametrize(("value", "said"), [(1.0, "do not depend on its pixels: dense"), (np.nan, "are not finite: ")])
def test_a_core_ml_package_that_is_wrong_is_found(value: float, said: str, tmp_path: Path) -> None:
    """One whose dense tokens are constant, and one whose weights are not numbers."""
    coremltools = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder

    run = Exports(tmp_path, "coreml").run(SHALLOW_VIT)
    constant = np.full((1, 4, 4, 192), value, np.float32)

    @Builder.program(input_specs=[Builder.TensorSpec(shape=(1, 3, 64, 64))], opset_version=coremltools.target.iOS16)
    def program(pixels: Any) -> Any:
        one = Builder.reduce_mean(x=pixels, axes=[1, 2, 3], keep_dims=True)
        row = Builder.reshape(x=one, shape=[1, 1])
        summary = Builder.tile(x=row, reps=[1, 192], name="summary")
        if np.isnan(value):
            return summary, Builder.add(x=one, y=constant, name="dense")
        return summary, Builder.identity(x=constant, name="dense")

    package = coremltools.convert(
        program,
        skip_model_load=True,
        compute_precision=coremltools.precision.FLOAT32,
        minimum_deployment_target=coremltools.target.iOS16,
    )
    package.save(str(tmp_path / coreml_files.PACKAGE))
    source = open_source(ExportConfig(run=run, out=tmp_path / "out", format="coreml"))
    with pytest.raises(ConformanceError, match=said):
        coreml_files.check_file(source, tmp_path)
