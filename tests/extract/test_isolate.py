"""Pictures that kill the process that decodes them, found without killing the one that asks."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from making import TINY_SIZE, TWO_CROPS, make_corpus
from planting import planted_environment, poison

from eupe.corpus.index import index_folder
from eupe.extract import isolate, load
from eupe.extract.isolate import find_crashing
from eupe.extract.load import LoadedSample, Loader, Sample, StuckError
from eupe.extract.parts import samples_of
from eupe.store import Store


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in planted_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(load, "PICTURE_SECONDS", 4.0)
    return make_corpus(tmp_path / "corpus", count=9)


def test_every_crashing_sample_is_found_and_nothing_else(corpus: Path) -> None:
    poison(corpus / "class0/0000.png", "segfault")
    poison(corpus / "class2/0005.png", "endless")
    poison(corpus / "class2/0008.png", "greedy")
    (corpus / "class1/0004.png").write_bytes(b"not a picture")
    index = index_folder(corpus)
    found = find_crashing(samples_of(index.samples), index.root, TWO_CROPS, [TINY_SIZE])
    assert set(found) == {"class0/0000.png", "class2/0005.png", "class2/0008.png"}
    assert "SIGSEGV" in found["class0/0000.png"]
    assert "does not come to an end" in found["class2/0005.png"]
    assert "SIGKILL" in found["class2/0008.png"]


def test_whole_pictures_are_no_crashing_samples(corpus: Path) -> None:
    index = index_folder(corpus)
    assert find_crashing(samples_of(index.samples), index.root, TWO_CROPS, [TINY_SIZE]) == {}
    assert find_crashing([], index.root, TWO_CROPS, [TINY_SIZE]) == {}


def test_a_child_that_is_slow_to_start_is_given_time(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The imports alone take longer than these tests' limit for a picture if the machine is busy."""
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\nsleep 4.2\nexec "{sys.executable}" "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    index = index_folder(corpus)
    samples = samples_of(index.samples)[:2]
    assert find_crashing(samples, index.root, TWO_CROPS, [TINY_SIZE]) == {}
    monkeypatch.setattr(isolate, "START_SECONDS", 0.5)
    with pytest.raises(RuntimeError, match=r"named no picture within 0\.5 s"):
        find_crashing(samples, index.root, TWO_CROPS, [TINY_SIZE])


def test_a_child_that_cannot_start_is_not_blamed_on_a_picture(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_folder(corpus)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="cannot start"):
        find_crashing(samples_of(index.samples), index.root, TWO_CROPS, [TINY_SIZE])


def test_a_picture_without_end_is_named(corpus: Path, monkeypatch: pytest.MonkeyPatch, tiny_store: Store) -> None:
    index = index_folder(corpus)
    real = load.load_sample

    def slow(sample: Sample, *args: Any, **named: Any) -> LoadedSample:
        if sample.key == "class1/0004.png":
            time.sleep(2)
        return real(sample, *args, **named)

    monkeypatch.setattr(load, "PICTURE_SECONDS", 1.0)
    monkeypatch.setattr(load, "load_sample", slow)
    loader = Loader(index.root, TWO_CROPS, [tiny_store.spec], ahead=3, cores=2)
    with pytest.raises(StuckError) as caught:
        list(loader.load(samples_of(index.samples)))
    assert caught.value.key == "class1/0004.png"


def test_a_picture_is_not_condemned_for_what_came_from_outside(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that was ended for another reason; its picture, alone, does no harm."""
    real = isolate._run_child
    ended: list[str] = []

    def ended_once(samples: list[Sample], *rest: Any) -> tuple[int | None, str | None]:
        if not ended and len(samples) > 1:
            ended.append(samples[1].key)
            return 1, "it kills the process that decodes it (signal SIGTERM)"
        return real(samples, *rest)

    monkeypatch.setattr(isolate, "_run_child", ended_once)
    poison(corpus / "class2/0005.png", "segfault")
    index = index_folder(corpus)
    assert set(find_crashing(samples_of(index.samples), index.root, TWO_CROPS, [TINY_SIZE])) == {"class2/0005.png"}
    assert len(ended) == 1
