"""How many of the project's files one training step and one extracted part run through: `pytest -s` names them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from making import TINY_SIZE, TINY_STUDENT, make_corpus, make_store

import eupe
from eupe.extract.worker import Worker
from eupe.train.config import TrainConfig
from eupe.train.loop import train
from eupe.train.trainer import Trainer

ROOT = Path(eupe.__file__).parent
MOST_OF_A_STEP, MOST_OF_A_PART = 17, 18


class Files:
    """The project's files of which a function was called, in any thread, while it was on."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.on = False

    def __call__(self, frame: Any, event: str, _: object) -> None:
        if self.on and event == "call" and frame.f_code.co_name != "<module>":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                self.names.add(str(path.relative_to(ROOT)))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch this thread, and all that begin from now on."""
        before = sys.getprofile()
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(before)
            threading.setprofile(None)  # type: ignore[arg-type]

    def during(self, real: Callable[..., Any], *, call: int) -> Callable[..., Any]:
        """Wrap a function so that the files are noted from the end of the call before a certain one to its end."""
        calls = 0

        def called(*args: Any, **named: Any) -> Any:
            nonlocal calls
            found = real(*args, **named)
            calls += 1
            self.on = calls == call - 1
            return found

        return called


def test_a_training_step(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store keeps the views' pixels; from another, a step decodes and renders pictures, too."""
    store = make_store(tmp_path / "store.zarr", make_corpus(tmp_path / "corpus"), tiny_weights, pixels=True)
    files = Files()
    monkeypatch.setattr(Trainer, "optimizer_step", files.during(Trainer.optimizer_step, call=4))
    config = TrainConfig(
        targets=(store.path,),
        student=TINY_STUDENT,
        out=tmp_path / "run",
        steps=6,
        batch_size=4,
        size=(TINY_SIZE,),
        head_width=16,
        clip=1.0,
        ema=0.9,
        log_every=100,
    )
    with files.watching():
        train(config)
    print(f"\none training step: {len(files.names)} files", *sorted(files.names), sep="\n  ")
    assert "train/trainer.py" in files.names and len(files.names) <= MOST_OF_A_STEP


def test_an_extracted_part(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, real = Files(), Worker.run
    corpus = make_corpus(tmp_path / "corpus")
    make_store(tmp_path / "warm.zarr", corpus, tiny_weights)

    def watched(*args: Any, **named: Any) -> Any:
        files.on = True
        try:
            return real(*args, **named)
        finally:
            files.on = False

    monkeypatch.setattr(Worker, "run", watched)
    with files.watching():
        make_store(tmp_path / "store.zarr", corpus, tiny_weights)
    print(f"\none extracted part: {len(files.names)} files", *sorted(files.names), sep="\n  ")
    assert "store/writer.py" in files.names and len(files.names) <= MOST_OF_A_PART
