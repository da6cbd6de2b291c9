"""What a mistake's sentence advises can be followed: it names what is there, and where a value came from."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import ray
from making import TINY_STUDENT

from eupe.errors import TeacherError
from eupe.extract import job
from eupe.extract.actors import cause_of
from eupe.models import hub as hub_module
from eupe.models.hub import hub_or_offline
from eupe.store import Store
from eupe.train.config import TrainConfig
from eupe.train.loop import train

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_store: Store, tiny_weights: Path, tiny_corpus: Path) -> Path:
    """A store, a finished run, one that was stopped, pictures and weights. Not to be changed."""
    world = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_store.path.local, world / "store/a.zarr")
    config = TrainConfig(targets=(tiny_store.path,), student=TINY_STUDENT, out=world / "runs/tiny", steps=1)
    train(replace(config, batch_size=4, head_width=8, holdout=0.3, dtype="fp32"))
    shutil.copytree(world / "runs/tiny", world / "runs/cut")
    for name in ("report.json", "student.json"):
        (world / "runs/cut" / name).unlink()
    shutil.copy(tiny_weights, world / "w.safetensors")
    (world / "text.safetensors").write_text("no weights at all")
    (world / "pics").symlink_to(tiny_corpus)
    (world / "proxy.yaml").write_text("batch-size: 4096\nlr: 0.5\n")
    return world


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the world, now the working directory, where indexing pictures fails the test and no Ray answers."""

    def no_ray(**_: Any) -> None:
        raise ConnectionError("could not find any running Ray instance")

    monkeypatch.chdir(world)
    monkeypatch.setattr(job, "open_corpus", lambda *_, **__: pytest.fail("pictures were indexed"))
    monkeypatch.setattr(ray, "init", no_ray)
    return world


EXTRACT = ("extract", "--teacher", "timm:test_vit", "--corpus", "pics")
TRAIN = ("train", "--targets", "store/a.zarr", "--out", "r")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "--targets", "runs/tiny", "--student", "test_vit", "--out", "r"), "tiny is a training run, not a"),
        (("store", "verify", "runs/tiny"), "cache its student's features with `eupe extract --teacher"),
        (
            ("eval", "knn", "runs/tinny", "--data", "pics"),
            "error: there is no directory runs/tinny; did you mean runs/t",
        ),
        (("extract", "--teacher", "runs/proxy", "--corpus", "pics"), "error: there is no directory runs/proxy"),
        (("extract", "--teacher", "runs/cut", "--corpus", "pics"), "run runs/cut is not finished"),
        (("eval", "agreement", "runs/cut"), "run runs/cut is not finished: it has no report.json; finish it with"),
        (("eval", "agreement", "store/a.zarr"), "store/a.zarr is not a training run: it is a store"),
        (("export", "store/a.zarr", "--format", "timm", "--out", "x"), "is not a training run: it is a store"),
        (("eval", "agreement", "runs/none"), "runs/none is not a training run: there is no such directory"),
        ((*TRAIN, "--recipe", "stage1"), "training views (--batch-size is from --recipe stage1)"),
        (
            (*TRAIN, "--recipe", "stage1", "--config", "proxy.yaml"),
            "--batch-size 4096 exceeds the 46 training views (--batch-size is from --config proxy.yaml)",
        ),
        ((*TRAIN, "--config", "none.yaml"), "--config none.yaml does not exist"),
        (
            ("extract", "--teacher", "dinov2", "--teacher", "efficientnet-lite0", "--corpus", "pics", "--size", "320"),
            "14 px (dinov2-s), 32 px (efficientnet-lite0); give --size 224 or --size 448, or extract them separately",
        ),
        (
            ("plan", "--teacher", "dinov2", "--teacher", "dinov3-s", "--num-images", "9", "--size", "100"),
            "14 px (dinov2-s), 16 px (dinov3-s); give --size 112, or extract them separately",
        ),
        ((*EXTRACT, "--precision", "int4"), "precision 'int4' is unknown"),
        ((*EXTRACT, "--dtype", "fp12"), "--dtype fp12 is unknown"),
        ((*EXTRACT, "--weights", "pics"), "pics holds no weights"),
        (
            (*EXTRACT, "--weights", "text.safetensors"),
            "text.safetensors is not a weights file: neither",
        ),
        ((*EXTRACT, "--weights", "proxy.yaml"), "proxy.yaml is not a weights file"),
        ((*EXTRACT, "--weights", "timm:test_vit=w.safetensors"), "the path alone, without TEACHER=: --weights w.safet"),
        ((*EXTRACT, "--weights", "w.safetensors", "--out", "runs"), "runs exists and is not a feature store"),
        ((*EXTRACT, "--weights", "w.safetensors", "--ray-address", "auto"), "no Ray cluster answers"),
        (
            ("extract", "--teacher", "dinov2", "--corpus", "pics", "--weights", "w.safetensors"),
            "w.safetensors has no config.json next to it, and the configuration of facebook/dinov2-small cannot be",
        ),
        (
            ("eval", "knn", "store/a.zarr", "dinov2", "pixels", "--weights", "w.safetensors", "--data", "pics"),
            "--weights takes TEACHER=PATH, got w.safetensors; write --weights dinov2=w.safetensors",
        ),
    ],
)
def test_a_mistake_says_what_to_do_before_any_picture_is_read(
    here: Path, words: tuple[str, ...], said: str, run_eupe: Run
) -> None:
    outcome = run_eupe(*words)
    assert outcome.code == 2
    assert said in " ".join(outcome.err.split())
    assert outcome.err.count("error: ") == 1 and "Errno" not in outcome.err


def test_an_option_that_was_typed_is_not_said_to_be_from_a_file(here: Path, run_eupe: Run) -> None:
    told = run_eupe(*TRAIN, "--recipe", "stage1", "--config", "proxy.yaml", "--batch-size", "8192").err
    assert told.endswith("--batch-size 8192 exceeds the 46 training views\n")


def test_without_a_hub_the_cache_alone_is_asked_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from eupe.teachers.hf_adapter import describe

    hub_module._hub_answers.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(TeacherError, match=r"127\.0\.0\.1:9 does not answer, and the local cache does not have it"):
        describe("hf:nobody/nothing")
    assert time.monotonic() - began < 10
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    hub_module._hub_answers.cache_clear()


def test_a_local_directory_asks_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "_hub_answers", lambda endpoint: pytest.fail("the hub was asked"))
    with hub_or_offline(str(tmp_path)):
        assert not huggingface_hub.constants.HF_HUB_OFFLINE


DEATH = (
    "The actor died because of an error raised in its creation task, \x1b[36mray::ExtractActor.__init__()\x1b[39m "
    "(pid=1, ip=::1, actor_id=0)\n           ^^^^\n"
    "  File \"actors.py\", line 4, in __init__\n    import timm\nModuleNotFoundError: No module named 'timm'"
)

OUT_OF_MEMORY = (
    "The actor is dead because its worker process has died. Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: "
    "Task was killed due to the node running low on memory."
)


def test_of_a_worker_that_could_not_begin_the_exception_is_told() -> None:
    assert cause_of(RuntimeError(DEATH)) == "ModuleNotFoundError: No module named 'timm'"
    many = RuntimeError(f"{DEATH}\nFor debugging consider another day")
    assert cause_of(many) == "ModuleNotFoundError: No module named 'timm'"
    assert cause_of(RuntimeError("The actor died unexpectedly.\n\tclass_name: A\nowner: gone")).endswith(
        "unexpectedly."
    )
    assert cause_of(RuntimeError(f"It died.\n\tpid: 1\n{OUT_OF_MEMORY}\nMore memory is better.")) == (
        "It died. (NODE_OUT_OF_MEMORY: Task was killed due to the node running low on memory)"
    )
    assert cause_of(RuntimeError("")) == "RuntimeError"
    assert cause_of(RuntimeError("\x1b[36mray::A\x1b[39m is gone")) == "ray::A is gone"


@pytest.mark.slow
def test_ray_tells_of_such_a_worker_as_the_words_above() -> None:
    class Unborn:
        def __init__(self) -> None:
            raise ModuleNotFoundError("No module named 'timm'")

        def ask(self) -> None: ...

    class Crashing:
        def ask(self) -> None:
            os._exit(1)

    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        with pytest.raises(ray.exceptions.ActorDiedError) as died:
            ray.get(ray.remote(Unborn).remote().ask.remote())
        with pytest.raises(ray.exceptions.ActorDiedError) as crashed:
            ray.get(ray.remote(Crashing).remote().ask.remote())
    finally:
        ray.shutdown()
    assert cause_of(died.value) == "ModuleNotFoundError: No module named 'timm'"
    assert re.fullmatch(r"The actor died unexpectedly [^(]*\(SYSTEM_ERROR: [^()]+\)", cause_of(crashed.value))


def test_commands_to_paste_are_on_one_line(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    recipe = f"out: out\nsteps: {{student: {{train: {{targets: {tiny_store.path}, student: test_vit, steps: 2}}}}}}"
    Path("r.yaml").write_text(recipe)
    lines = run_eupe("run", "r.yaml", "--dry-run").out.splitlines()
    command = json.loads(run_eupe("run", "r.yaml", "--dry-run", "--json").out)["steps"][0]["command"]
    assert lines[lines.index("# student") + 1] == command and len(command) > 80
