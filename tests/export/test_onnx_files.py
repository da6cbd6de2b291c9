"""ONNX graphs, run by ONNX Runtime alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exporting import CONVNEXT, SIZE, VIT, Exports, code_of, least_cosine, photograph, some_slow, tokens_of
from making import make_corpus
from PIL import Image
from timm.layers import RotaryEmbeddingDinoV3

import eupe
from eupe.corpus.views import render_view
from eupe.encoder import load_encoder, normalise
from eupe.errors import CorpusError
from eupe.evaluate.pictures import centre
from eupe.export.config import ExportConfig
from eupe.export.job import export
from eupe.export.pictures import varied_pictures
from eupe.export.rotary import TracedRotary
from eupe.train.predict import load_predictors

ARCHS = some_slow(CONVNEXT, slow=["test_vit", VIT])


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Of one size, with heads."""
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
    card = load_encoder(run).card
    return normalise(torch.from_numpy(varied_pictures(height, width, seed=7)), card.mean, card.std)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("batch", [1, 2, 5])
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
    names: dict[str, Any] = {"DIR": str(graphs.out(arch)), "PICTURE": str(path)}
    exec(code_of(graphs.out(arch) / "README.md"), names)
    _, summary, dense = tokens_of(graphs.run(arch), path)
    assert least_cosine(names["summary"], summary) > 0.99999
    assert least_cosine(names["dense"], dense) > 0.99999
    assert [said.shape[-1] for said in names["teachers"]] == [20, 12, 12]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["test_vit", CONVNEXT, VIT])
def test_a_dynamic_graph_takes_any_size_that_the_patch_divides(arch: str, graphs: Exports, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = export(ExportConfig(run=graphs.run(arch), out=out, format="onnx", dynamic_size=True))
    assert len(json.loads((out / "export.json").read_text())["proof"]["sizes"]) == 4
    assert any("multiples of" in note for note in report.notes)
    for height, width in [(SIZE, SIZE), (160, 96), (32, 224)]:
        got, want = asked(graphs.run(arch), out, pictures(graphs.run(arch), height, width)[:3])
        assert least_cosine(got["summary"], want.summary) > 0.99999
        assert least_cosine(got["dense"], want.dense) > 0.99999


def size_of(out: Path) -> int:
    return sum(file.stat().st_size for file in out.glob("model.onnx*"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["test_vit", CONVNEXT, VIT])
def test_half_precision_halves_the_file_and_keeps_the_tokens(arch: str, graphs: Exports, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(ExportConfig(run=graphs.run(arch), out=out, format="onnx", heads=("all",), precision="fp16"))
    assert size_of(out) < 0.65 * size_of(graphs.out(arch))
    got, want = asked(graphs.run(arch), out, pictures(graphs.run(arch))[:5])
    assert got["summary"].dtype == np.float32
    assert 0.999 < least_cosine(got["summary"], want.summary) < 0.9999999


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["test_vit", CONVNEXT, VIT])
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


def test_ranges_are_those_of_the_pictures_that_are_given(
    graphs: Exports, tmp_path: Path, run_eupe: Callable[..., Any]
) -> None:
    """The cosine that is told of them is that of the graph that was left, on every other picture."""
    folder = make_corpus(tmp_path / "own", count=9, classes=3)
    run, out = graphs.run("test_vit"), tmp_path / "out"
    words = ["export", run, "--format", "onnx", "--precision", "int8", "--calibrate", folder, "--out", out, "--json"]
    outcome = run_eupe(*words)
    assert outcome.code == 0, outcome.err
    (note,) = json.loads(outcome.out)["notes"]
    kept, told = re.search(r"(\w+) was kept \(least cosine on 4 of your pictures for choosing: (.*)\)", note).groups()  # type: ignore[union-attr]
    card = load_encoder(run).card
    images = [Image.open(path).convert("RGB") for path in sorted(folder.rglob("*.png"))[1::2]]
    views = [render_view(each, centre(*each.size)[0], card.size) for each in images]
    got, want = asked(run, out, normalise(torch.from_numpy(np.stack(views)), card.mean, card.std))
    least = min(least_cosine(got[kind], getattr(want, kind)) for kind in ("summary", "dense"))
    assert f"{kept} {least:.4f}" in told
    assert json.loads(run_eupe(*words).out)["cached"]
    next(folder.rglob("*.png")).unlink()
    other = run_eupe(*words)
    assert other.code == 2 and "holds another export" in other.err


def test_calibration_needs_two_pictures(graphs: Exports, tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "own", count=1, classes=1)
    config = ExportConfig(
        run=graphs.run("test_vit"), out=tmp_path / "out", format="onnx", precision="int8", calibrate=folder
    )
    with pytest.raises(CorpusError, match="has one picture; give two or more"):
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
    export(ExportConfig(run=graphs.run("test_vit"), out=out, format="onnx"))
    assert (out / "model.onnx.data").stat().st_size > (out / "model.onnx").stat().st_size
    got, want = asked(graphs.run("test_vit"), out, pictures(graphs.run("test_vit"))[:2])
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
    run = graphs.run("test_vit")
    for name, option in (("plain", []), ("half", ["--precision", "fp16"]), ("any", ["--dynamic-size"])):
        outcome = run_eupe("export", run, "--format", "onnx", "--out", tmp_path / name, *option)
        assert outcome.code == 0, outcome.err
    assert size_of(tmp_path / "half") < 0.65 * size_of(tmp_path / "plain")
    other = pictures(run, 96, 32)[:2]
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        asked(run, tmp_path / "plain", other)
    got, want = asked(run, tmp_path / "any", other)
    assert least_cosine(got["dense"], want.dense) > 0.99999
