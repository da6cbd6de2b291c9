"""A store made of tars or tables is the store made of the same pictures as files, and serves wherever that does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import make_tar, members_of, tars_of
from making import make_corpus, make_store, picture
from mending import Crews

from eupe.corpus.choice import Choice
from eupe.corpus.index import index_bytes, open_corpus
from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError, CorpusError
from eupe.extract.audit import AuditConfig, audit
from eupe.extract.job import require_same_choice
from eupe.extract.repair import RepairConfig, repair
from eupe.store import Store, open_store
from eupe.store.layout import part_name, segment_name
from eupe.store.verify import verify
from eupe.train.targets import open_targets


def table_of(corpus: Path, folder: Path) -> Path:
    """The pictures of a folder, in their order, as Hugging Face keeps them."""
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(corpus.rglob("*.png"))]
    folder.mkdir()
    pq.write_table(pa.table({"image": images}), folder / "train.parquet", row_group_size=5)
    return folder


def saved_to_disk(corpus: Path, folder: Path) -> Path:
    """The same, as `datasets` leaves it on a disk."""
    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted(corpus.rglob("*.png"))]
    folder.mkdir()
    table = pa.table({"image": images})
    with pa.OSFile(str(folder / "data-0.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    return folder


@pytest.fixture(params=["tars", "table", "arrow"])
def container(request: pytest.FixtureRequest, tiny_corpus: Path, tmp_path: Path) -> Path:
    """The tiny corpus's 24 pictures in another shape."""
    if request.param == "tars":
        return tars_of(tiny_corpus, tmp_path / "shards", count=3)
    make = table_of if request.param == "table" else saved_to_disk
    return make(tiny_corpus, tmp_path / "table")


def features(store: Store) -> list[np.ndarray]:
    rows, views = list(range(24)), [0] * 24
    read = store.read(rows, views)
    assert read.summary is not None and read.dense is not None
    return [read.summary, read.dense, read.boxes, store.read_digests(rows, views)]


def test_features_are_those_of_the_same_files_and_everything_reads_the_pictures(
    container: Path, tiny_corpus: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    ours = make_store(tmp_path / "ours.zarr", container, tiny_weights, views=ViewSpec())
    theirs = make_store(tmp_path / "theirs.zarr", tiny_corpus, tiny_weights, views=ViewSpec())
    for got, expected in zip(features(ours), features(theirs), strict=True):
        assert np.array_equal(got, expected)
    assert ours.samples["sha256"].equals(theirs.samples["sha256"])
    assert verify(ours.path).whole

    targets = open_targets([ours.path], corpus=None, holdout=0.2)
    targets.check_views()
    files = open_targets([theirs.path], corpus=None, holdout=0.2)
    assert all(targets.read_image(i) == files.read_image(i) for i in range(24))

    report = audit(AuditConfig(store=ours.path, samples=5, weights=tiny_weights))
    assert report.changed_views == 0 and all(drift.plain.least > 0.999999 for drift in report.drifts)


def test_parts_and_the_index_are_made_anew(container: Path, tiny_weights: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", container, tiny_weights)
    names = [segment_name(0), f"parts/{part_name(0)}"]
    before = {name: store.path.read(name) for name in names}
    for name in names:
        store.path.delete(name)
    moved = container.rename(tmp_path / "moved")
    with pytest.raises(CorpusError, match="give their folder with --corpus"):
        repair(RepairConfig(store=store.path, weights=tiny_weights), open_crew=Crews())
    repair(RepairConfig(store=store.path, weights=tiny_weights, corpus=moved, batch_size=8), open_crew=Crews())
    assert verify(store.path).whole
    assert store.path.read(names[1]) == before[names[1]]
    assert open_targets([store.path], corpus=moved, holdout=0.2).read_image(3).size == picture(3).size


def test_a_store_goes_on_only_with_what_was_chosen_for_it(
    tiny_corpus: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    folder = tars_of(tiny_corpus, tmp_path / "shards", count=1)
    store = make_store(tmp_path / "s.zarr", folder, tiny_weights)
    corpus = open_corpus(folder)
    require_same_choice(store, corpus)
    chosen = replace(corpus, choice=Choice(label_column="cls"))
    with pytest.raises(ConfigError, match="was made without such an option, but now --label-column cls was given"):
        require_same_choice(store, chosen)
    store.path.write(segment_name(0), index_bytes(chosen))
    require_same_choice(store, chosen)
    with pytest.raises(ConfigError, match="was made with --label-column cls, but now no such option was given"):
        require_same_choice(store, corpus)


def test_a_picture_that_changed_in_its_tar_fails_alone(tiny_weights: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "p", count=4)
    folder = tars_of(corpus, tmp_path / "shards", count=1)
    store = make_store(tmp_path / "s.zarr", folder, tiny_weights)
    data = bytearray((folder / "000.tar").read_bytes())
    place = pq.read_table(store.path.local / segment_name(0)).to_pylist()[2]
    data[place["start"] + place["length"] // 2] ^= 1
    (folder / "000.tar").write_bytes(data)
    with pytest.raises(CorpusError, match=rf"1 pictures .* have changed .*{place['key']}"):
        audit(AuditConfig(store=store.path, samples=4, weights=tiny_weights))
    (folder / "000.tar").write_bytes(data[: place["start"] + 10])
    with pytest.raises(CorpusError, match=r"000\.tar ends before byte"):
        open_targets([store.path], corpus=None, holdout=0.2).read_image(2)
    assert open_store(store.path).finished


@pytest.mark.usefixtures("joined")
def test_the_command_line_extracts_tars_and_trains_from_them(
    tiny_corpus: Path, tiny_weights: Path, tmp_path: Path, run_eupe
) -> None:  # type: ignore[no-untyped-def]
    folder = tars_of(tiny_corpus, tmp_path / "shards", count=2)
    make_tar(folder / "001.tar", {**members_of(folder / "001.tar"), "lost.txt": b"of no picture"})
    store = tmp_path / "s.zarr"
    extraction = ("--teacher", "timm:test_vit", "--weights", tiny_weights, "--size", 64, "--dtype", "fp32", "--json")
    for _ in range(2):
        outcome = run_eupe("extract", *extraction, "--corpus", f"{folder}/{{000..001}}.tar", "--out", store)
        assert outcome.code == 0, outcome.err
    assert '"cached": true' in outcome.out and '"label and caption files without a picture: .txt": 1' in outcome.out
    theirs = make_store(tmp_path / "theirs.zarr", tiny_corpus, tiny_weights, views=ViewSpec())
    ours = open_store(store)
    assert ours.samples["label"].equals(theirs.samples["label"])
    assert np.array_equal(features(ours)[3], features(theirs)[3])
    assert np.abs(features(ours)[0].astype(float) - features(theirs)[0].astype(float)).max() < 0.02
    outcome = run_eupe(
        *("train", "--targets", store, "--student", "test_vit", "--out", tmp_path / "run", "--size", 64),
        *("--steps", 2, "--batch-size", 8, "--head-width", 32),
    )
    assert outcome.code == 0, outcome.err
