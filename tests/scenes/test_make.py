"""`python -m scenes`: the same bytes on any number of processes, whole or not at all; one sentence for a mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eupe.common.locks import LOCK, lock_file
from eupe.errors import ConfigError, IncompleteError, StorageError
from scenes import make
from scenes.layouts import LAYOUTS, Layout, Request
from scenes.make import ScenesConfig, make_scenes

Run = Callable[..., Any]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One layout whose pictures are files of a few bytes; returns the numbers that were drawn."""
    drawn: list[int] = []

    def draw(root: Path, request: Request, number: int) -> int:
        drawn.append(number)
        (root / f"{number}.txt").write_text(f"{request.seed} {number}")
        return number

    def finish(root: Path, request: Request, numbers: Sequence[int]) -> dict[str, int]:
        assert list(numbers) == list(range(request.pictures))
        return {"pictures": len(numbers)}

    monkeypatch.setattr(make, "LAYOUTS", {"quick": Layout(draw, finish)})
    return drawn


def config(out: Path, pictures: int = 24, size: int = 40, seed: int = 0) -> ScenesConfig:
    return ScenesConfig(out=out, pictures=pictures, size=size, seed=seed)


def test_pictures_do_not_depend_on_who_draws_them_or_when(tmp_path: Path) -> None:
    request = Request(pictures=24, size=40, seed=1)
    jobs = [(layout, number) for layout in LAYOUTS for number in (1, 5)]
    results = {}
    for name, order, processes in (("alone", jobs, 1), ("shared", jobs, 2), ("backwards", jobs[::-1], 1)):
        (tmp_path / name).mkdir()
        found = list(make._drawn(tmp_path / name, request, order, processes))
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        results[name] = (
            {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files},
            sorted(map(repr, found)),
        )
    assert len(results["alone"][0]) == 2 * (1 + 4 + 1 + 1 + 1)
    assert results["alone"] == results["shared"] == results["backwards"]


def test_the_same_request_is_found_done_and_another_is_refused(tmp_path: Path, quick: list[int]) -> None:
    out = tmp_path / "scenes"
    first = make_scenes(config(out), processes=1)
    assert (first.cached, first.counts) == (False, {"quick": {"pictures": 24}})
    again = make_scenes(config(out), processes=1)
    assert again == replace(first, cached=True)
    assert len(quick) == 24
    with pytest.raises(ConfigError, match=r"seed 0 there, 4 requested.*another --out"):
        make_scenes(config(out, seed=4), processes=1)
    with pytest.raises(ConfigError, match=r"pictures 24 there, 30 requested; size 40 there, 56 requested"):
        make_scenes(config(out, pictures=30, size=56), processes=1)


def test_only_the_folders_that_were_asked_for_are_made(
    tmp_path: Path, quick: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (layout,) = make.LAYOUTS.values()
    monkeypatch.setattr(make, "LAYOUTS", {"one": layout, "two and three": layout, "four": layout})
    for only, made in ((("three", "one"), ["one", "two and three"]), ((), ["one", "two and three", "four"])):
        asked = replace(config(tmp_path / "-".join(made)), only=only)
        assert list(make_scenes(asked, processes=1).counts) == made
        assert make_scenes(asked, processes=1).cached
    with pytest.raises(ConfigError, match="one, two and three there, four requested"):
        make_scenes(replace(config(tmp_path / "one-two and three"), only=("four",)), processes=1)
    with pytest.raises(ConfigError, match="--only five is not a folder of scenes; give one of one, two, three, four"):
        make_scenes(replace(config(tmp_path / "other"), only=("five",)), processes=1)


def test_scenes_of_an_older_version_are_refused(
    tmp_path: Path, quick: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_scenes(config(tmp_path / "scenes"), processes=1)
    monkeypatch.setattr(make, "VERSION", make.VERSION + 1)
    with pytest.raises(ConfigError, match="version 1 there, 2 requested"):
        make_scenes(config(tmp_path / "scenes"), processes=1)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, quick: list[int]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    (tmp_path / "spec").mkdir()
    (tmp_path / "spec/scenes.json").write_text("[]")
    for name in ("mine", "file", "spec"):
        with pytest.raises(ConfigError, match="exists and is not a folder of scenes; give another --out"):
            make_scenes(config(tmp_path / name), processes=1)
    assert (tmp_path / "mine/letter.txt").read_text() == "dear"
    assert quick == []
    (tmp_path / "empty").mkdir()
    assert make_scenes(config(tmp_path / "empty"), processes=1).counts == {"quick": {"pictures": 24}}


def test_a_failure_leaves_nothing_and_what_was_left_by_a_kill_is_cleared(
    tmp_path: Path, quick: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "scenes"
    unfinished = tmp_path / "deep" / ".scenes.unfinished"
    (unfinished / "old").mkdir(parents=True)
    (unfinished / "scenes.json").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    whole = make.LAYOUTS
    monkeypatch.setattr(make, "LAYOUTS", {"quick": replace(whole["quick"], finish=full)})
    with pytest.raises(StorageError, match=r"cannot be written .*No space left.*nothing was left"):
        make_scenes(config(out), processes=1)
    assert list((tmp_path / "deep").iterdir()) == []

    monkeypatch.setattr(make, "LAYOUTS", whole)
    (unfinished / "old").mkdir(parents=True)
    make_scenes(config(out), processes=1)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["scenes"]
    assert not (out / "old").exists()


def test_two_at_once_do_not_mix(tmp_path: Path, quick: list[int]) -> None:
    unfinished = tmp_path / ".scenes.unfinished"
    unfinished.mkdir()
    other = lock_file(tmp_path / f".scenes{LOCK}", verb="python -m scenes", of=tmp_path / "scenes")
    with pytest.raises(ConfigError, match=r"scenes is being written by `python -m scenes`, process \d+"):
        make_scenes(config(tmp_path / "scenes"), processes=1)
    assert unfinished.exists()
    os.close(other)
    assert not make_scenes(config(tmp_path / "scenes"), processes=1).cached


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_nothing_kept(number: signal.Signals, tmp_path: Path, quick: list[int]) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(IncompleteError, match="nothing was kept"):
        make_scenes(config(tmp_path / "scenes"), processes=1, progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert len(quick) <= 5


def test_progress_counts_every_picture(tmp_path: Path, quick: list[int]) -> None:
    told: list[tuple[int, int]] = []
    make_scenes(config(tmp_path / "scenes"), processes=1, progress=lambda done, of: told.append((done, of)))
    assert told == [(i + 1, 24) for i in range(24)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pictures", 0], "--pictures 0 is too few: give 24 or more"),
        (["--pictures", 23], "--pictures 23 is too few"),
        (["--size", 7], "--size 7 is not a valid picture size; give 32 to 1024 pixels"),
        (["--size", 4000], "--size 4000 is not a valid picture size"),
        (["--seed", -1], "--seed -1 is negative"),
    ],
)
def test_hostile_options_of_scenes_get_one_sentence(
    words: list[object], said: str, tmp_path: Path, run_scenes: Run
) -> None:
    outcome = run_scenes("--out", tmp_path / "scenes", *words)
    assert outcome.code == 2
    assert said in outcome.err
    assert "Traceback" not in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_python_runs_it_as_a_module(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "scenes", "--out", str(tmp_path / "scenes"), "--size", "7"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --size 7 is not a valid picture size; give 32 to 1024 pixels\n"


def test_the_command_makes_scenes_and_finds_them_again(
    tmp_path: Path, run_scenes: Run, quick: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--out", tmp_path / "scenes", "--pictures", 24, "--size", 40, "--seed", 2)
    monkeypatch.setattr(make, "make_scenes", partial(make_scenes, processes=1))
    made = run_scenes(*words, "--json")
    again = run_scenes(*words)
    assert (made.code, again.code) == (0, 0)
    assert json.loads(made.out) == {
        "out": str(tmp_path / "scenes"),
        "counts": {"quick": {"pictures": 24}},
        "cached": False,
    }
    assert "nothing to do: these scenes already exist" in again.out
    assert json.loads((tmp_path / "scenes/scenes.json").read_text())["request"]["seed"] == 2


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scenes", "--out", str(tmp_path / "scenes"), "--pictures", "200"]
    parent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    unfinished = tmp_path / ".scenes.unfinished"
    deadline = time.monotonic() + 60
    while not list(unfinished.rglob("*.jpg")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert children
    parent.kill()
    parent.wait()
    while any(_is_alive(int(child)) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (tmp_path / "scenes").exists()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_scenes_need_neither_torch_nor_the_store(tmp_path: Path) -> None:
    code = (
        "import sys; import scenes.make; "
        "print([m for m in ('torch', 'pyarrow', 'tensorstore', 'zarr', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_takes_the_side_of_the_pictures(
    tmp_path: Path, run_scenes: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "LAYOUTS", {"classification": LAYOUTS["classification"]})
    monkeypatch.setattr(make, "make_scenes", partial(make_scenes, processes=1))
    for size in (32, 48):
        outcome = run_scenes("--out", tmp_path / str(size), "--pictures", 24, "--size", size)
        assert outcome.code == 0, outcome.err
        sides = {Image.open(path).size for path in (tmp_path / str(size)).rglob("*.jpg")}
        assert sides == {(size, size)}
