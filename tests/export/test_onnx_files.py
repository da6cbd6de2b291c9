"""ONNX graphs, run by ONNX Runtime alone."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exporting import (
    CONVNEXT,
    SHALLOW_TEST_VIT,
    SHALLOW_TEST_VIT3,
    SHALLOW_VIT,
    SIZE,
    Exports,
    least_cosine,
    photograph,
    said_in_a_loop,
    some_slow,
    tokens_of,
)
from making import make_corpus
from PIL import Image
from timm.layers import RotaryEmbeddingDinoV3

import eupe
from eupe.common.compute import normalise
from eupe.corpus.views import render_view
from eupe.errors import ConfigError, CorpusError
from eupe.evaluate.judged_pictures import centre
from eupe.export.config import ExportConfig
from eupe.export.job import export
from eupe.export.onnx_int8 import quantise, quantise_weights
from eupe.export.rotary import TracedRotary
from eupe.export.sample_pictures import varied_pictures
from eupe.export.source import open_source
from eupe.models.encoder import load_encoder
from eupe.train.predict import load_predictors

ARCHS = some_slow(CONVNEXT, slow=[SHALLOW_VIT])


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Return ONNX exports of one size, with heads; tests must not change them."""
    return Exports(tmp_path_factory.mktemp("onnx"), "onnx", rotated=True)


def session_of(out: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])


def asked(run: Path, out: Path, pixels: torch.Tensor) -> tuple[dict[str, Any], Any]:
    session = session_of(out)
    names = [output.name for output in session.get_outputs()]
    answers = dict(zip(names, session.run(names, {"pixels": pixels.numpy()}), strict=True))
    with torch.inference_mode():
        return answers, load_encoder(run).eval()(pixels)


def pictures(run: Path, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    spec = load_encoder(run).spec
    return normalise(torch.from_numpy(varied_pictures(height, width, seed=7)), spec.mean, spec.std)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("batch", [1, 5])
def test_a_graph_takes_batches_of_any_size(arch: str, batch: int, graphs: Exports) -> None:
    got, want = asked(graphs.run(arch), graphs.out(arch), pictures(graphs.run(arch))[:batch])
    assert list(got) == ["summary", "dense", "dinov2-s.summary", "dinov2-s.dense", "efficientnet-lite0.dense"]
    assert least_cosine(got["summary"], want.summary) > 0.99999
    assert least_cosine(got["dense"], want.dense) > 0.99999
    assert len(got["summary"]) == batch


@pytest.mark.parametrize("arch", ARCHS)
def test_heads_in_a_graph_speak_as_the_teachers_do(arch: str, graphs: Exports) -> None:
    got, tokens = asked(graphs.run(arch), graphs.out(arch), pictures(graphs.run(arch)))
    with torch.inference_mode():
        for predictor in load_predictors(graphs.run(arch)):
            for kind, said in zip(("summary", "dense"), predictor(tokens), strict=True):
                if said is not None:
                    found = torch.from_numpy(got[f"{predictor.name}.{kind}"])
                    torch.testing.assert_close(found, said, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_graph_is_valid_and_the_card_s_code_runs_it(arch: str, graphs: Exports, tmp_path: Path) -> None:
    onnx.checker.check_model(str(graphs.out(arch) / "model.onnx"), full_check=True)
    (given,) = session_of(graphs.out(arch)).get_inputs()
    assert (given.name, given.shape[1:]) == ("pixels", [3, SIZE, SIZE])
    path = photograph(tmp_path / "p.png")
    _, summary, dense = tokens_of(graphs.run(arch), path)
    for said in said_in_a_loop(graphs.out(arch), [path, path]):
        assert least_cosine(said["summary"], summary) > 0.99999
        assert least_cosine(said["dense"], dense) > 0.99999
        assert [each.shape[-1] for each in said["teachers"]] == [20, 12, 12]


@pytest.mark.parametrize(
    ("arch", "size"),
    some_slow((SHALLOW_TEST_VIT, 96), slow=[(SHALLOW_TEST_VIT3, None), (CONVNEXT, None), (SHALLOW_VIT, None)]),
)
def test_a_dynamic_graph_takes_any_size_that_the_patch_divides(
    arch: str, size: int | None, graphs: Exports, tmp_path: Path
) -> None:
    """A learned table is resampled once, from the one that was trained, whatever size is given."""
    out = tmp_path / "out"
    report = export(ExportConfig(run=graphs.run(arch), out=out, format="onnx", dynamic_size=True, size=size))
    assert len(json.loads((out / "export.json").read_text())["proof"]["sizes"]) == 4
    assert any("multiples of" in note for note in report.notes)
    for height, width in [(SIZE, SIZE), (160, 96), (32, 224)]:
        got, want = asked(graphs.run(arch), out, pictures(graphs.run(arch), height, width)[:3])
        assert least_cosine(got["summary"], want.summary) > 0.99999
        assert least_cosine(got["dense"], want.dense) > 0.99999


def size_of(out: Path) -> int:
    return sum(file.stat().st_size for file in out.glob("model.onnx*"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [CONVNEXT, SHALLOW_VIT])
def test_half_precision_halves_the_file_and_keeps_the_tokens(arch: str, graphs: Exports, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(ExportConfig(run=graphs.run(arch), out=out, format="onnx", heads=("all",), precision="fp16"))
    assert size_of(out) < 0.65 * size_of(graphs.out(arch))
    got, want = asked(graphs.run(arch), out, pictures(graphs.run(arch))[:5])
    assert got["summary"].dtype == np.float32
    assert 0.999 < least_cosine(got["summary"], want.summary) < 0.9999999


@pytest.mark.slow
@pytest.mark.parametrize("arch", [CONVNEXT, SHALLOW_VIT])
def test_eight_bits_say_how_near_they_come(arch: str, graphs: Exports, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export(ExportConfig(run=graphs.run(arch), out=out, format="onnx", precision="int8"))
    assert size_of(out) < 0.5 * size_of(graphs.out(arch))
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "export.json", "model.onnx"]
    (note,) = report.notes
    assert "dynamic" in note and "static" in note
    got, want = asked(graphs.run(arch), out, pictures(graphs.run(arch)))
    stated = report.outputs["summary"]["mean"]
    found = torch.nn.functional.cosine_similarity(torch.from_numpy(got["summary"]), want.summary).mean()
    assert 0.5 < stated < 0.99999
    assert float(found) == pytest.approx(stated, abs=0.05), "on other pictures than those that it was stated for"
    assert f"{report.outputs['summary']['least']:.6f}" in (out / "README.md").read_text()


def weights_of_products(out: Path) -> list[tuple[str, str]]:
    """Type of every convolution and matrix product with weights, and the type that its weights are kept in."""
    graph = onnx.load(str(out / "model.onnx")).graph
    kept = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    scaled = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    places = {
        "Conv": 1,
        "MatMul": 1,
        "Gemm": 1,
        "QLinearConv": 3,
        "QLinearMatMul": 3,
        "ConvInteger": 1,
        "MatMulInteger": 1,
    }
    names = [(node.op_type, node.input[places[node.op_type]]) for node in graph.node if node.op_type in places]
    return [(kind, kept[scaled.get(name, name)]) for kind, name in names if scaled.get(name, name) in kept]


@pytest.mark.parametrize("arch", some_slow("test_efficientnet", slow=["test_vit"]))
def test_what_is_called_int8_has_its_weights_in_int8(arch: str, graphs: Exports, tmp_path: Path) -> None:
    """A CNN, a ViT, a hybrid, whatever way was kept; as `onnx` itself reads the file."""
    out = tmp_path / "out"
    report = export(ExportConfig(run=graphs.run(arch), out=out, format="onnx", precision="int8"))
    kinds = weights_of_products(out)
    assert len(kinds) > 10 and sum(kept == "INT8" for _, kept in kinds) >= 0.9 * len(kinds)
    num_bytes = 4 * sum(parameter.numel() for parameter in load_encoder(graphs.run(arch)).parameters())
    assert size_of(out) < 0.45 * num_bytes
    assert "of the bytes of the float32 graph" in report.notes[0] and report.outputs["dense"]["least"] < 1


def test_weights_in_int8_are_rounded_for_each_output(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    shapes = {"conv": (5, 3, 2, 2), "product": (7, 6), "gemm": (4, 6)}
    weights = {name: generator.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    weights["product"][:, 2] = 0
    make, float_ = onnx.helper.make_node, onnx.TensorProto.FLOAT
    nodes = [
        make("Conv", ["x", "conv"], ["a"]),
        make("MatMul", ["y", "product"], ["b"]),
        make("Gemm", ["b", "gemm"], ["c"], transB=1),
    ]
    given = [
        onnx.helper.make_tensor_value_info(name, float_, shape) for name, shape in (("x", [1, 3, 4, 4]), ("y", [2, 7]))
    ]
    told = [onnx.helper.make_tensor_value_info(name, float_, None) for name in "abc"]
    initial = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", given, told, initial)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), tmp_path / "a"
    )
    quantise_weights(tmp_path / "a", tmp_path / "b")
    x, y = (generator.normal(0, 1, shape).astype(np.float32) for shape in ((1, 3, 4, 4), (2, 7)))
    session = onnxruntime.InferenceSession(str(tmp_path / "b"), providers=["CPUExecutionProvider"])
    rounded = dict(weights)
    for name, outputs in (("conv", 0), ("product", 1), ("gemm", 0)):
        for i in range(weights[name].shape[outputs]):
            row = np.moveaxis(rounded[name], outputs, 0)[i]
            scale = abs(row).max() / 127 or 1
            row[...] = np.round(row / scale) * scale
    a, b, c = session.run(list("abc"), {"x": x, "y": y})
    convolved = torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(rounded["conv"]))
    np.testing.assert_allclose(a, convolved, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(b, y @ rounded["product"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(c, b @ rounded["gemm"].T, rtol=1e-4, atol=1e-5)


def test_a_graph_that_int8_would_hardly_shrink_is_refused(graphs: Exports, tmp_path: Path) -> None:
    """Most of it is a table, which no product takes."""
    make, float_ = onnx.helper.make_node, onnx.TensorProto.FLOAT
    weights = {"table": np.ones((64, 64), np.float32), "product": np.ones((64, 32), np.float32)}
    ends = [[onnx.helper.make_tensor_value_info(name, float_, [64, width])] for name, width in (("x", 64), ("y", 32))]
    nodes = [make("Add", ["x", "table"], ["sum"]), make("MatMul", ["sum", "product"], ["y"])]
    initial = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = onnx.helper.make_graph(nodes, "g", *ends, initial)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), tmp_path / "a"
    )
    source = open_source(ExportConfig(run=graphs.run(CONVNEXT), out=tmp_path / "out", format="onnx"))
    share = r"with 7\d% of the bytes of the float32 graph"
    words = f"leave most of {CONVNEXT} at {SIZE} px in float32, {share}; use --precision fp16"
    with pytest.raises(ConfigError, match=words):
        quantise(tmp_path / "a", source, lambda graph: pytest.fail("is asked"), None)


def test_what_was_called_int8_and_is_not_is_no_cache_hit(graphs: Exports, tmp_path: Path) -> None:
    out = shutil.copytree(graphs.out(CONVNEXT), tmp_path / "out")
    record = json.loads((out / "export.json").read_text())
    record["asked"]["precision"] = "int8"
    (out / "export.json").write_text(json.dumps(record))
    config = ExportConfig(run=graphs.run(CONVNEXT), out=out, format="onnx", heads=("all",), precision="int8")
    with pytest.raises(ConfigError, match=r"called int8 but has float32 weights, .* remove"):
        export(config)


def test_ranges_are_those_of_the_pictures_that_are_given(
    graphs: Exports, tmp_path: Path, run_eupe: Callable[..., Any]
) -> None:
    """The cosine that is told of them is that of the graph that was left, on every other picture."""
    folder = make_corpus(tmp_path / "own", count=9, classes=3)
    run, out = graphs.run(SHALLOW_TEST_VIT), tmp_path / "out"
    words = ["export", run, "--format", "onnx", "--precision", "int8", "--calibrate", folder, "--out", out, "--json"]
    outcome = run_eupe(*words)
    assert outcome.code == 0, outcome.err
    (note,) = json.loads(outcome.out)["notes"]
    kept, told = re.search(r"(\w+) was kept \(least cosine on 4 of your pictures for selection: (.*)\)", note).groups()  # type: ignore[union-attr]
    spec = load_encoder(run).spec
    images = [Image.open(path).convert("RGB") for path in sorted(folder.rglob("*.png"))[1::2]]
    views = [render_view(each, centre(*each.size)[0], spec.size) for each in images]
    got, want = asked(run, out, normalise(torch.from_numpy(np.stack(views)), spec.mean, spec.std))
    least = min(least_cosine(got[kind], getattr(want, kind)) for kind in ("summary", "dense"))
    assert f"{kept} {least:.4f}" in told
    assert json.loads(run_eupe(*words).out)["cached"]
    next(folder.rglob("*.png")).unlink()
    other = run_eupe(*words)
    assert other.code == 2 and "holds another export" in other.err


def test_calibration_needs_two_pictures(graphs: Exports, tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "own", count=1, classes=1)
    config = ExportConfig(
        run=graphs.run(SHALLOW_TEST_VIT), out=tmp_path / "out", format="onnx", precision="int8", calibrate=folder
    )
    with pytest.raises(CorpusError, match="has only one picture; give at least two"):
        export(config)
    assert not config.out.exists()


def test_a_graph_says_nothing_of_the_machine_that_wrote_it(graphs: Exports) -> None:
    data = (graphs.out(CONVNEXT) / "model.onnx").read_bytes()
    for words in (str(Path(eupe.__file__).parent), "site-packages", "stack_trace", "torch.export"):
        assert words.encode() not in data


@pytest.mark.slow
def test_weights_beyond_the_limit_of_one_file_lie_beside_it(
    graphs: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    out = tmp_path / "out"
    export(ExportConfig(run=graphs.run(SHALLOW_TEST_VIT), out=out, format="onnx"))
    assert (out / "model.onnx.data").stat().st_size > (out / "model.onnx").stat().st_size
    got, want = asked(graphs.run(SHALLOW_TEST_VIT), out, pictures(graphs.run(SHALLOW_TEST_VIT))[:2])
    assert least_cosine(got["summary"], want.summary) > 0.99999


@pytest.mark.parametrize(("x_first", "halves"), [(False, True), (True, False)])
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 7), (1, 2)])
def test_rotary_positions_that_trace_are_timm_s(x_first: bool, halves: bool, rows: int, columns: int) -> None:
    rope = RotaryEmbeddingDinoV3(32, grid_indexing="xy" if x_first else "ij", rotate_half=halves, grid_offset=0.1)
    want = rope.eval().get_embed([rows, columns])
    torch.testing.assert_close(TracedRotary(rope).get_embed([rows, columns]), want, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_command_line_takes_precision_and_any_size(
    graphs: Exports, tmp_path: Path, run_eupe: Callable[..., Any]
) -> None:
    run = graphs.run(SHALLOW_TEST_VIT)
    for name, option in (("plain", []), ("half", ["--precision", "fp16"]), ("any", ["--dynamic-size"])):
        outcome = run_eupe("export", run, "--format", "onnx", "--out", tmp_path / name, *option)
        assert outcome.code == 0, outcome.err
    assert size_of(tmp_path / "half") < 0.65 * size_of(tmp_path / "plain")
    other = pictures(run, 96, 32)[:2]
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        asked(run, tmp_path / "plain", other)
    got, want = asked(run, tmp_path / "any", other)
    assert least_cosine(got["dense"], want.dense) > 0.99999
