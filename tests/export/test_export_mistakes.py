"""Mistakes in an export get one sentence, exit code 2, and leave nothing."""

import builtins
import json
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exporting import finished_run

from eupe.common.locks import LOCK, lock_file
from eupe.export import job

Run = Callable[..., Any]
ARCH = "test_vit"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("run") / "run", ARCH)


def refused(run_eupe: Run, out: Path, *words: object) -> str:
    before = sorted(out.parent.rglob("*"))
    outcome = run_eupe("export", *words, "--out", out)
    assert outcome.code == 2, outcome.err
    assert sorted(out.parent.rglob("*")) == before
    said = " ".join(outcome.err.split())
    assert said.startswith("error: ") and "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--format", "tim"],
            "--format tim is unknown; did you mean timm?; use timm, hf, onnx, openvino, executorch, litert, coreml",
        ),
        (["--format", "timm", "--size", 65], "its patch is 16 pixels and must divide the size; use 64 or 80"),
        (["--format", "timm", "--heads", "dino"], "--heads dino is not a target of the run; "),
        (
            ["--format", "timm", "--precision", "fp16"],
            "--precision fp16 is only for --format onnx, openvino, litert, coreml; --format timm takes fp32",
        ),
        (["--format", "coreml", "--precision", "int8"], "--format coreml takes fp32, fp16"),
        (["--format", "hf", "--dynamic-size"], "--dynamic-size is only for --format onnx"),
        (["--format", "onnx", "--calibrate", "photos"], "--calibrate is only for --precision int8"),
        (["--format", "timm", "--size", 0], "--size must be at least 1 pixel, got 0"),
        (["--format", "timm", "--size", -16], "--size must be at least 1 pixel, got -16"),
        (["--format", "onnx", "--precision", "fp8"], "--precision fp8 is unknown; use fp32, fp16, int8"),
    ],
)
def test_options_that_cannot_work(words: list[object], said: str, run: Path, tmp_path: Path, run_eupe: Run) -> None:
    assert said in refused(run_eupe, tmp_path / "out", run, *words)


@pytest.mark.slow
def test_an_architecture_that_takes_one_size_alone(tmp_path: Path, run_eupe: Run) -> None:
    run = finished_run(tmp_path / "run", "swin_s3_tiny_224", size=224, targets=())
    said = refused(run_eupe, tmp_path / "out", run, "--format", "timm", "--size", 256)
    assert "--size 256 does not work for swin_s3_tiny_224" in said and "leave --size out" in said


def test_a_dynamic_size_is_refused_before_anything_is_traced(
    tmp_path: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path / "run", "test_vit_relpos", targets=())
    monkeypatch.delattr("torch.onnx.export")
    said = refused(run_eupe, tmp_path / "out", run, "--format", "onnx", "--dynamic-size")
    assert "--dynamic-size does not work for test_vit_relpos, which takes only one size (" in said
    assert said.endswith("; leave --dynamic-size out")


def test_runs_that_are_none_or_unfinished(run: Path, tmp_path: Path, run_eupe: Run) -> None:
    assert "is not a training run" in refused(run_eupe, tmp_path / "out", tmp_path, "--format", "timm")
    unfinished = finished_run(tmp_path / "unfinished", ARCH)
    (unfinished / "report.json").unlink()
    said = refused(run_eupe, tmp_path / "out", unfinished, "--format", "timm")
    assert "is not finished: it has no report.json; finish it with `eupe train ... --resume`" in said
    old = finished_run(tmp_path / "old", ARCH)
    (old / "norms.safetensors").unlink()
    assert "has no norms.safetensors" in refused(run_eupe, tmp_path / "out", old, "--format", "timm", "--heads", "all")
    assert run_eupe("export", old, "--format", "timm", "--out", tmp_path / "out").code == 0


def test_a_place_that_holds_something_else(run: Path, tmp_path: Path, run_eupe: Run) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    said = refused(run_eupe, other, run, "--format", "timm")
    assert f"--out {other} already exists and is not an export; give another --out, or remove it" in said
    said = refused(run_eupe, other / "notes.txt", run, "--format", "timm")
    assert "already exists and is not an export" in said


def test_the_same_export_is_a_cache_hit_and_another_is_refused(run: Path, tmp_path: Path, run_eupe: Run) -> None:
    out = tmp_path / "out"
    out.mkdir()
    first = run_eupe("export", run, "--format", "timm", "--out", out, "--json")
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run_eupe("export", run, "--format", "timm", "--out", out, "--json")
    assert json.loads(again.out) == {**json.loads(first.out), "cached": True}
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == files
    for words in (["--heads", "all"], ["--size", 96]):
        assert "holds another export" in refused(run_eupe, out, run, "--format", "timm", *words)
    assert "holds another export" in refused(run_eupe, out, run, "--format", "hf")
    headed = tmp_path / "headed"
    assert run_eupe("export", run, "--format", "timm", "--heads", "dinov2-s", "--out", headed).code == 0
    assert "holds another export" in refused(run_eupe, headed, run, "--format", "timm", "--heads", "all")
    changed = finished_run(tmp_path / "changed", ARCH, seed=5)
    assert "holds another export" in refused(run_eupe, out, changed, "--format", "timm")


@pytest.mark.parametrize(
    ("form", "package", "said"),
    [
        ("onnx", "onnxruntime", "--format onnx needs more packages: pip install 'eupe[export]'"),
        ("onnx", "onnxscript", "--format onnx needs more packages: pip install 'eupe[export]'"),
        ("openvino", "openvino", "--format openvino needs OpenVINO: pip install 'eupe[openvino]'"),
        (
            "openvino --precision int8",
            "nncf",
            "--format openvino needs OpenVINO and NNCF: pip install 'eupe[openvino]'",
        ),
        (
            "litert",
            "ai_edge_litert.interpreter",
            "--format litert needs LiteRT: pip install 'eupe[litert]'",
        ),
        ("coreml", "coremltools", "--format coreml needs coremltools: pip install 'eupe[coreml]'"),
        ("executorch", "executorch.exir", "--format executorch needs ExecuTorch: pip install 'eupe[executorch]'"),
    ],
)
def test_packages_that_are_missing(
    form: str, package: str, said: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    found = refused(run_eupe, tmp_path / "out", run, "--format", *form.split())
    assert said in found and f"No module named '{package}'" in found


def test_an_empty_folder_may_be_the_one_that_one_is_in(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert run_eupe("export", run, "--format", "timm", "--out", ".").code == 0
    assert "# here" in (here / "README.md").read_text()


def test_what_a_killed_export_left_is_no_obstacle(run: Path, tmp_path: Path, run_eupe: Run) -> None:
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "model.safetensors").write_bytes(b"half")
    assert run_eupe("export", run, "--format", "timm", "--out", tmp_path / "out").code == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_an_export_whose_files_are_gone_is_no_cache_hit(run: Path, tmp_path: Path, run_eupe: Run) -> None:
    out = tmp_path / "out"
    words = (run, "--format", "timm")
    assert run_eupe("export", *words, "--out", out).code == 0
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:-1])
    said = refused(run_eupe, out, *words)
    assert "its model.safetensors is missing or has changed in size; remove" in said and "export again" in said
    (out / "model.safetensors").write_bytes(whole)
    (out / "README.md").unlink()
    assert "its README.md is missing or has changed in size" in refused(run_eupe, out, *words)
    record = json.loads((out / "export.json").read_text())
    (out / "export.json").write_text(json.dumps({**record, "files": 3}))
    assert "already exists and is not an export" in refused(run_eupe, out, *words)
    (out / "export.json").write_text("[" * 200_000)
    assert "already exists and is not an export" in refused(run_eupe, out, *words)


def test_two_exports_to_one_place_do_not_mix(run: Path, tmp_path: Path, run_eupe: Run) -> None:
    busy = tmp_path / ".out.unfinished"
    busy.mkdir()
    (busy / "model.safetensors").write_bytes(b"half")
    other = lock_file(tmp_path / f".out{LOCK}", verb="export", of=tmp_path / "out")
    said = refused(run_eupe, tmp_path / "out", run, "--format", "timm")
    assert f"out is being written by `eupe export`, process {os.getpid()}" in said and "wait until it ends" in said
    assert (busy / "model.safetensors").read_bytes() == b"half"
    os.close(other)
    assert run_eupe("export", run, "--format", "timm", "--out", tmp_path / "out").code == 0


def test_one_that_another_made_meanwhile_is_a_cache_hit(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    words = ("export", run, "--format", "timm", "--json", "--out")
    assert run_eupe(*words, tmp_path / "theirs").code == 0
    real = job.unfinished

    def late(out: Path, *, verb: str) -> Any:
        (tmp_path / "theirs").rename(out)
        return real(out, verb=verb)

    monkeypatch.setattr(job, "unfinished", late)
    outcome = run_eupe(*words, tmp_path / "out")
    assert outcome.code == 0 and json.loads(outcome.out)["cached"], outcome.err
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_library_that_refuses_to_write(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    def refuse(*_: object) -> Any:
        raise RuntimeError("too many\nnodes")

    monkeypatch.setitem(job.FORMATS, "timm", replace(job.FORMATS["timm"], write=refuse))
    said = refused(run_eupe, tmp_path / "out", run, "--format", "timm")
    assert "cannot be written as --format timm in fp32 (" in said and "too many" in said


def test_a_disk_that_fills_up(run: Path, tmp_path: Path, run_eupe: Run) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        outcome = run_eupe("export", run, "--format", "timm", "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.code == 1 and outcome.err.startswith("error: the export cannot be written to "), outcome.err
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long(run: Path, tmp_path: Path, run_eupe: Run) -> None:
    outcome = run_eupe("export", run, "--format", "timm", "--out", tmp_path / ("x" * 250))
    assert outcome.code == 1 and "File name too long" in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_disk_that_refuses(run: Path, tmp_path: Path, run_eupe: Run) -> None:
    (tmp_path / "file").write_text("no folder")
    outcome = run_eupe("export", run, "--format", "timm", "--out", tmp_path / "file" / "out")
    assert outcome.code == 1
    assert "the export cannot be written to" in " ".join(outcome.err.split())
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]
