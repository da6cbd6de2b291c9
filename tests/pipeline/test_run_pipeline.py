"""A pipeline run for real, with tiny teachers and students."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
from making import make_corpus
from planning import plan
from timm.models import save_for_hf

from eupe.common.storage import StoragePath
from eupe.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("joined")]

PYTHON = sys.executable
"""Before it is forked: its processes are one another's children, as a user's are."""
PATIENCE_S = 480
STEPS = 150
"""Of a training that is stopped on its way: ten of them are done when it writes its first line."""


@dataclass(frozen=True)
class Ended:
    code: int
    steps: dict[str, dict[str, Any]]
    err: str

    @property
    def commands(self) -> list[str]:
        return re.findall(r"^\$ eupe (.*)$", self.err, re.MULTILINE)


def begin(folder: Path, *words: str, program: str | None = None, recipe: str = "r.yaml") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [program or sys.executable, "-m", "eupe", "run", recipe, "--json", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=PATIENCE_S)
    steps = {step["step"]: step for step in json.loads(out)["steps"]} if out else {}
    return Ended(process.returncode, steps, err)


def run(folder: Path, *words: str, recipe: str = "r.yaml") -> Ended:
    return end(begin(folder, *words, recipe=recipe))


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def verbs(commands: Sequence[str]) -> list[str]:
    return [command.split()[0] for command in commands]


def write(folder: Path, steps: str, *, let: str = "{}") -> Path:
    (folder / "r.yaml").write_text(f"out: out\nlet: {let}\nsteps:\n{steps}")
    return folder


def test_the_recipe_open_in_miniature(tmp_path: Path) -> None:
    """Random weights stand in for those of the experts, and for those that proxy and student start from."""
    make_corpus(tmp_path / "photos", count=120)
    for split in ("train", "val"):
        make_corpus(tmp_path / "labelled" / split, count=12)
    save_for_hf(timm.create_model("test_vit", num_classes=0), tmp_path / "expert", safe_serialization=True)
    small = {"size": 64, "batch-size": 8, "proxy-steps": 2, "student-steps": 2, "views": "rrc:1", "out": "out"}
    small |= {"corpus": "photos", "labelled": "labelled"}
    small |= dict.fromkeys(("texts", "language", "parts"), "timm:local-dir:expert")
    small |= dict.fromkeys(("proxy", "student"), "test_vit")
    words = [word for name, value in small.items() for word in ("--set", f"{name}={value}")]
    ended = run(tmp_path, *words, recipe="open")
    assert ended.code == 0, ended.err
    assert verbs(ended.commands) == [*["extract"] * 3, "train", "extract", "train", "eval", "eval", "export"]
    exported = json.loads((tmp_path / ended.steps["timm"]["output"] / "config.json").read_text())
    assert exported["architecture"] == "test_vit"


def test_the_whole_way_runs_once_and_again_only_what_a_change_touches(tmp_path: Path, tiny_weights: Path) -> None:
    make_corpus(tmp_path / "photos")
    shutil.copy(tiny_weights, tmp_path / "weights.safetensors")
    training = "student: test_vit, size: 64, batch-size: 8, steps: 3, head-width: 16, holdout: 0.3, dtype: fp32"
    write(
        tmp_path,
        f"""
  expert:
    extract: {{teacher: "timm:test_vit", weights: weights.safetensors, corpus: photos, views: "rrc:2", size: 64}}
  proxy: {{train: {{targets: expert, {training}}}}}
  proxy-features: {{extract: {{teacher: proxy, corpus: photos, views: "rrc:2", size: 64}}}}
  student: {{train: {{targets: proxy-features, {training}, lr: ${{lr}}}}}}
  agreement: {{eval agreement: {{run: student}}}}
  knn: {{eval knn: {{subjects: expert, k: 3}}}}
  whole: {{store verify: {{path: proxy-features}}}}
  page: {{viz: {{items: [expert, proxy], images: photos, out: page.html, limit: 2}}}}
""",
        let="{lr: 0.001}",
    )
    first = run(tmp_path)
    assert first.code == 0, first.err
    assert verbs(first.commands) == ["extract", "train", "extract", "train", "eval", "eval", "store", "viz"]
    assert not any(step["cached"] for step in first.steps.values())
    for step in first.steps.values():
        assert step["output"] is None or (tmp_path / step["output"]).exists()
    kept = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out/reports").iterdir()}
    assert len(kept) == 8
    assert {json.dumps(one["report"]) for one in kept.values()} == {
        json.dumps(step["report"]) for step in first.steps.values()
    }
    assert first.steps["whole"]["report"]["whole"] is True
    assert first.steps["student"]["report"]["steps"] == 3

    again = run(tmp_path)
    assert again.code == 0
    assert again.commands == []
    assert all(step["cached"] for step in again.steps.values())
    assert [step["report"] for step in again.steps.values()] == [step["report"] for step in first.steps.values()]

    changed = run(tmp_path, "--set", "lr=0.01")
    assert changed.code == 0
    assert verbs(changed.commands) == ["train", "eval"]
    assert {name for name, step in changed.steps.items() if not step["cached"]} == {"student", "agreement"}
    assert changed.steps["student"]["report"] != first.steps["student"]["report"]
    assert run(tmp_path).commands == []

    shutil.copy(tmp_path / "photos/class0/0000.png", tmp_path / "photos/class0/more.png")
    grown = run(tmp_path)
    assert grown.code == 0, grown.err
    assert len(grown.commands) == 8
    assert grown.steps["expert"]["output"] == first.steps["expert"]["output"]
    assert grown.steps["expert"]["report"]["num_samples"] == 25
    assert grown.steps["proxy"]["output"] != first.steps["proxy"]["output"]


def training_of(store: StoragePath, steps: int) -> str:
    return f"""
  student:
    train: {{targets: "{store}", student: test_vit, batch-size: 8, steps: {steps}, head-width: 16, holdout: 0.3,
             dtype: fp32, checkpoint-every: ${{every}}}}
  stats: {{store stats: {{path: "{store}"}}}}
"""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_store: Store, forked: None) -> Ended:
    """A pipeline that nobody disturbed."""
    return run(write(tmp_path_factory.mktemp("straight"), training_of(tiny_store.path, STEPS), let="{every: 1000}"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_commit_and_the_same_command_goes_on_there(
    tmp_path: Path, tiny_store: Store, straight: Ended, number: signal.Signals
) -> None:
    write(tmp_path, training_of(tiny_store.path, STEPS), let="{every: 1000}")
    process = begin(tmp_path)
    wait_for(lambda: list((tmp_path / "out").glob("student-*/metrics.jsonl")), process)
    os.kill(process.pid, number)
    stopped = end(process)
    assert stopped.code == 1, stopped.err
    assert "stopped in step student; run the same command to resume" in " ".join(stopped.err.split())
    (checkpoint,) = (tmp_path / "out").glob("student-*/checkpoints/*.safetensors")
    assert 0 < int(checkpoint.stem) < STEPS
    assert not list((tmp_path / "out/reports").glob("student-*"))

    resumed = run(tmp_path)
    assert resumed.code == 0, resumed.err
    assert "--resume" in resumed.commands[0]
    assert verbs(resumed.commands) == ["train", "store"]
    validations = [ended.steps["student"]["report"]["validation"] for ended in (resumed, straight)]
    assert validations[0] == validations[1]


def is_free(lock: Path) -> bool:
    with lock.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_while_a_step_outlives_a_killed_pipeline_no_other_begins(tmp_path: Path, tiny_store: Store) -> None:
    write(tmp_path, training_of(tiny_store.path, 20_000), let="{every: 20}")
    process = begin(tmp_path, program=PYTHON)
    wait_for(lambda: list((tmp_path / "out").glob("student-*/checkpoints/*.safetensors")), process)
    (starter,) = children(process.pid)
    (step,) = children(starter)
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        second = run(tmp_path)
        assert second.code == 2, second.err
        assert "out is being written by `eupe run`" in " ".join(second.err.split())
        assert not is_free(tmp_path / "out/.lock")
    finally:
        os.kill(step, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE_S
    while not is_free(tmp_path / "out/.lock"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("wrong", "code", "said"),
    [
        ('{store verify: {path: "damaged.zarr"}}', 1, "is not whole"),
        ('{train: {targets: "whole.zarr", student: test_vit, batch-size: 4096}}', 2, "--batch-size 4096 exceeds"),
    ],
)
def test_a_step_that_fails_stops_the_pipeline_with_its_own_words_and_code(
    tmp_path: Path, tiny_store: Store, wrong: str, code: int, said: str
) -> None:
    for name in ("whole.zarr", "damaged.zarr"):
        shutil.copytree(tiny_store.path.local, tmp_path / name)
    (tmp_path / "damaged.zarr/parts/00000.parquet").unlink()
    stats = "{store stats: {path: whole.zarr}}"
    write(tmp_path, f"  before: {stats}\n  wrong: {wrong}\n  after: {stats}\n")
    outcome = run(tmp_path)
    assert outcome.code == code
    assert said in " ".join(outcome.err.split())
    assert f"step wrong ended with exit code {code}" in " ".join(outcome.err.split())
    assert len(outcome.commands) == 2
    again = run(tmp_path)
    assert (again.code, len(again.commands)) == (code, 1)


def test_the_summary_names_each_step_and_what_came_of_it(
    tmp_path: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch, run_eupe: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write(tmp_path, training_of(tiny_store.path, 2) + "  agreement: {eval agreement: {run: student}}", let="{every: 9}")
    assert run_eupe("run", "r.yaml").code == 0
    outcome = run_eupe("run", "r.yaml")
    rows = {line.split()[0]: line for line in outcome.out.splitlines() if line.strip()}
    student = plan((tmp_path / "r.yaml").read_text())["student"]
    report = json.loads(student.report.read_text())["report"]
    assert "cached" in rows["student"] and "2 steps" in rows["student"] and str(student.output) in rows["student"]
    normalised = report["validation"]["timm:test_vit"]["dense"]["normalised"]
    assert f"timm:test_vit dense normalised {normalised:.4g}" in rows["student"]
    assert re.search(r"timm:test_vit dense cosine 0\.\d+", rows["agreement"])
