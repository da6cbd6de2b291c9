"""`eupe export check`: any runtime's outputs are held against the run's student; here, ONNX Runtime's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from exporting import CONVNEXT, SIZE, Exports

from eupe.models.encoder import load_encoder

Run = Callable[..., Any]
NAMES = ["summary", "dense"]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("onnx"), "onnx", heads=())


def asked(graphs: Exports, pixels: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(str(graphs.out(CONVNEXT) / "model.onnx"))
    return dict(zip(NAMES, session.run(NAMES, {"pixels": pixels}), strict=True))


def test_outputs_of_a_runtime_pass_or_fail(graphs: Exports, tmp_path: Path, run_eupe: Run) -> None:
    run, file = graphs.run(CONVNEXT), tmp_path / "pixels.npy"
    told = json.loads(run_eupe("export", "check", run, "--inputs", file, "--json").out)
    pixels = np.load(file)
    assert pixels.dtype == np.float32 and told["shape"] == list(pixels.shape) == [len(pixels), 3, SIZE, SIZE]
    assert run_eupe("export", "check", run, "--inputs", tmp_path / "pixels.bin").code == 0
    assert (tmp_path / "pixels.bin").read_bytes() == pixels.tobytes()

    good = asked(graphs, pixels)
    with torch.inference_mode():
        want = load_encoder(run).eval()(torch.from_numpy(pixels)).dense
    np.testing.assert_allclose(good["dense"], want, rtol=1e-2, atol=1e-3)
    np.savez(tmp_path / "good.npz", **good)
    outcome = run_eupe("export", "check", run, "--outputs", tmp_path / "good.npz", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["outputs"]["dense"]["least"] > 0.9999
    (tmp_path / "trt.json").write_text(as_trtexec(good))
    assert run_eupe("export", "check", run, "--outputs", tmp_path / "trt.json").code == 0

    noise = np.random.default_rng(0).normal(0, good["dense"].std() / 50, good["dense"].shape)
    np.savez(tmp_path / "near.npz", summary=good["summary"], dense=good["dense"] + noise)
    near = ("export", "check", run, "--outputs", tmp_path / "near.npz")
    outcome = run_eupe(*near)
    assert outcome.code == 1 and "near.npz differ from those of" in outcome.err
    assert "dense (least cosine 0.99" in outcome.err and "summary (" not in outcome.err
    assert run_eupe(*near, "--precision", "int8").code == 0

    same = np.repeat(good["summary"].mean(axis=0, keepdims=True), len(pixels), axis=0)
    np.savez(tmp_path / "same.npz", summary=same, dense=good["dense"])
    outcome = run_eupe("export", "check", run, "--outputs", tmp_path / "same.npz", "--precision", "int8")
    assert outcome.code == 1 and "summary (" in outcome.err, "outputs that do not vary"


def as_trtexec(outputs: dict[str, np.ndarray[Any, Any]]) -> str:
    """A file like those of `trtexec --exportOutput`."""
    rows = (
        {"name": name, "dimensions": "x".join(map(str, value.shape)), "values": value.ravel().tolist()}
        for name, value in outputs.items()
    )
    return json.dumps(list(rows))


def test_mistakes_get_one_sentence(graphs: Exports, tmp_path: Path, run_eupe: Run) -> None:
    run = graphs.run(CONVNEXT)
    there = tmp_path / "there.npy"
    there.write_text("mine")
    np.savez(tmp_path / "short.npz", summary=np.zeros((3, 4), np.float32))
    for name, text in (("broken.json", "{"), ("list.json", "[1]"), ("broken.npz", "PK"), ("notes.txt", "")):
        (tmp_path / name).write_text(text)
    for words, said in (
        ([], "needs either --inputs, for a file to create, or --outputs, to compare"),
        (["--inputs", there], "already exists; give another name, or remove it"),
        (["--inputs", tmp_path / "pixels.txt"], "must end with .npy or .bin"),
        (["--inputs", tmp_path / "no" / "pixels.npy"], "cannot be written: "),
        (["--outputs", tmp_path / "short.npz"], "has other names or shapes than the run's outputs: got "),
        (["--outputs", tmp_path / "none.npz"], "cannot be read as the outputs of a runtime: "),
        (["--outputs", tmp_path / "broken.json"], "cannot be read as the outputs of a runtime: "),
        (["--outputs", tmp_path / "list.json"], "cannot be read as the outputs of a runtime: "),
        (["--outputs", tmp_path / "broken.npz"], "cannot be read as the outputs of a runtime: "),
        (["--outputs", tmp_path / "notes.txt"], "must end with .npz"),
        (["--outputs", tmp_path / "short.npz", "--precision", "fp8"], "--precision fp8 is unknown"),
    ):
        outcome = run_eupe("export", "check", run, *words)
        found = " ".join(outcome.err.split())
        assert outcome.code == 2 and said in found and "Traceback" not in found, (words, found)
    assert there.read_text() == "mine" and not (tmp_path / "no").exists()
