"""Files that are there to break a decoder, one by one and all in one extraction."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import Hostile, hostile_files, pixels_of, png
from making import make_store, picture
from PIL import Image

from eupe.common.storage import StoragePath
from eupe.corpus import pictures
from eupe.corpus.index import index_folder, write_index
from eupe.corpus.pictures import decode_image, read_picture
from eupe.corpus.views import ViewSpec, draw_view, render_view, view_digest
from eupe.errors import CorpusError
from eupe.store import open_store

Run = Callable[..., Any]

FILES = hostile_files()
GOOD = [file for file in FILES if file.pixels is not None]
VIEWS = ViewSpec(policy="rrc", num_views=2)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_its_picture_or_is_refused_with_the_reason(file: Hostile) -> None:
    if file.pixels is None:
        with pytest.raises(CorpusError, match=file.reason) as refusal:
            decode_image(file.data)
        assert str(refusal.value).isprintable() and " at 0x" not in str(refusal.value)
        return
    image = decode_image(file.data)
    assert image.mode == "RGB"
    got, expected = np.asarray(image).astype(int), file.pixels.astype(int)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= file.tolerance


def test_the_corpus_is_as_hostile_as_it_says() -> None:
    assert len(FILES) >= 60
    assert len({file.data for file in FILES}) == len(FILES)
    assert len(GOOD) > 60 and len(FILES) - len(GOOD) > 60


def test_the_limit_of_pixels_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = pixels_of(picture(30, 40, 25))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    assert decode_image(png(pixels, 2)).size == (40, 25)
    for too_many in (pixels_of(picture(30, 77, 13)), pixels_of(picture(30, 13, 77))):
        with pytest.raises(CorpusError, match="exceed the limit of 1000"):
            decode_image(png(too_many, 2))


def test_any_bytes_make_a_picture_or_one_line() -> None:
    rng = np.random.default_rng(31)
    small = [file for file in FILES if 100 < len(file.data) < 20_000]
    outcomes = {"picture": 0, "refused": 0}
    for i in range(1500):
        data = bytearray(small[i % len(small)].data)
        for at in rng.integers(0, min(len(data), 400 if i % 2 else len(data)), rng.integers(1, 5)):
            data[at] = rng.integers(256)
        if i % 3 == 0:
            del data[rng.integers(len(data)) :]
        try:
            image = decode_image(bytes(data))
        except CorpusError as error:
            assert str(error).isprintable() and len(str(error)) > 10 and " at 0x" not in str(error)
            outcomes["refused"] += 1
        else:
            assert image.mode == "RGB" and min(image.size) > 0
            outcomes["picture"] += 1
    assert min(outcomes.values()) > 100


def test_what_is_no_file_is_neither_waited_for_nor_read(tmp_path: Path) -> None:
    """A pipe that is opened waits forever, so the corpus is read in a process of its own."""
    picture(1).save(tmp_path / "good.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link-to-folder.jpg").symlink_to(tmp_path / "folder.jpg")
    code = (
        "import sys; from eupe.corpus.index import *\n"
        "from eupe.corpus.pictures import read_picture\n"
        "from eupe.errors import CorpusError\n"
        "corpus = index_folder(sys.argv[1])\n"
        "print({row['key'] for row in corpus.samples.to_pylist() if row['sha256']})\n"
        "for key in ('pipe.png', 'endless.png', 'loop.png', 'folder.jpg', 'gone.png'):\n"
        "    try: read_picture(corpus.root, key); print(key)\n"
        "    except CorpusError as error: print('refused', error)\n"
        "print(corpus.samples['key'].to_pylist())\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    first, *refused, last = process.stdout.splitlines()
    assert first == "{'good.png'}"
    assert len(refused) == 5 and all(line.startswith("refused") for line in refused)
    assert all("not a file" in line for line in (refused[0], refused[1], refused[3]))
    assert last == "['endless.png', 'good.png', 'loop.png', 'pipe.png']"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permissions_is_refused(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "mine.png")
    (tmp_path / "mine.png").chmod(0)
    assert index_folder(tmp_path).samples["sha256"].to_pylist() == [None]
    with pytest.raises(CorpusError, match="cannot be read"):
        read_picture(StoragePath.of(tmp_path), "mine.png")


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_one_extraction_takes_all_of_them(tmp_path: Path, tiny_weights: Path, run_eupe: Run) -> None:
    corpus, good_only = tmp_path / "corpus", tmp_path / "good"
    for folder, files in ((corpus, FILES), (good_only, GOOD)):
        folder.mkdir()
        for file in files:
            (folder / file.name).write_bytes(file.data)
    for name in ("vanishes", "changes", "stays"):
        picture(40).save(corpus / f"{name}.png")
    os.mkfifo(corpus / "pipe.png")
    (corpus / "loop.png").symlink_to(corpus / "loop.png")
    (corpus / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (corpus / "folder.jpg").mkdir()
    write_index(index_folder(corpus), tmp_path / "index.parquet")
    (corpus / "vanishes.png").unlink()
    picture(41).save(corpus / "changes.png")

    words = ["extract", "--teacher", "timm:test_vit", "--weights", tiny_weights, "--corpus", tmp_path / "index.parquet"]
    words += ["--size", 64, "--views", "rrc:2", "--dtype", "fp32", "--batch-size", 1, "--out", tmp_path / "s.zarr"]
    outcome = run_eupe(*words, "--json")
    assert outcome.code == 0 and "Traceback" not in outcome.err, outcome.err
    outside = {"vanishes.png": "does not exist", "changes.png": "has changed", "pipe.png": "not a file"}
    outside |= {"loop.png": "cannot be read|not exist", "dangling.png": "does not exist"}
    reasons = {file.name: file.reason for file in FILES if file.pixels is None} | outside

    store = open_store(tmp_path / "s.zarr")
    rows = {row["key"]: row for row in store.samples.to_pylist()}
    assert len(rows) == store.spec.num_samples == len(FILES) + 6
    assert {key for key, row in rows.items() if row["status"] != "ok"} == reasons.keys()
    assert all(re.search(reason, rows[key]["error"]) for key, reason in reasons.items())
    assert json.loads(outcome.out)["num_failed"] == len(reasons)

    alone = make_store(tmp_path / "alone.zarr", good_only, tiny_weights, views=VIEWS, batch_size=1)
    names = [file.name for file in GOOD]
    for view in range(2):
        ours, theirs = (s.read(s.rows(names), [view] * len(names)) for s in (store, alone))
        for kind in ("summary", "dense"):
            assert np.array_equal(getattr(ours, kind), getattr(theirs, kind))
        assert np.array_equal(ours.boxes, theirs.boxes)
    exact = [file for file in GOOD if file.tolerance == 0]
    digests = store.read_digests(store.rows(file.name for file in exact), [1] * len(exact))
    for file, digest in zip(exact, digests, strict=True):
        assert file.pixels is not None
        upright = Image.fromarray(np.ascontiguousarray(file.pixels))
        params = draw_view(VIEWS, file.name, 1, *upright.size)
        assert view_digest(render_view(upright, params, 64)) == int(digest), file.name
