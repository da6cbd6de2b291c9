"""A repaired store is the undamaged one, byte for byte; what cannot be repaired is said before anything is given up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import make_corpus, picture, random_weights
from mending import BATCH, Crew, Crews, announce, crew, extend, files, flip, make_parts
from ports import free_ports

from eupe.errors import CorpusError, EupeError, IncompleteError, SpecMismatchError, TeacherError
from eupe.extract.repair import RepairConfig, RepairReport, repair
from eupe.models.encoder import build_encoder, save_encoder
from eupe.store import open_store
from eupe.store.layout import moments_name
from eupe.store.verify import verify

Run = Callable[..., Any]
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 pictures: three parts."""
    return make_corpus(tmp_path_factory.mktemp("pictures") / "c", count=18)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny_weights: Path) -> Path:
    """Return a finished store of three parts; tests must not change it."""
    return Path(make_parts(tmp_path_factory.mktemp("whole") / "s.zarr", corpus, tiny_weights).path)


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the store for a test to damage."""
    return shutil.copytree(whole, tmp_path / "s.zarr")


def mend(store: Path, weights: Path | None = None, **config: Any) -> tuple[RepairReport, Crews]:
    crews = Crews()
    config = {"batch_size": BATCH, **config}
    return repair(RepairConfig(store=store, weights=weights, **config), open_crew=crews), crews


def cut(name: str) -> Damage:
    return lambda store: (store / name).write_bytes((store / name).read_bytes()[:-50])


def lose(name: str) -> Damage:
    return lambda store: (store / name).unlink()


def turn(name: str, place: float = 0.4) -> Damage:
    return lambda store: flip(store / name, place)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (turn("64/dense/c/1/0/0/0/0"), [1]),
        (turn("64/summary/c/0/0/0"), [0]),
        (turn("64/dense/c/2/0/0/0/0", 0.999), [2]),
        (cut("64/dense/c/2/0/0/0/0"), [2]),
        (lose("64/summary/c/1/0/0"), [1]),
        (lose("boxes/c/1/0/0"), [1]),
        (turn("flips/c/0/0"), [0]),
        (cut("digests/c/2/0"), [2]),
        (lose("parts/00001.parquet"), [1]),
        (turn("parts/00000.parquet"), [0]),
        (lambda store: [lose("parts/00002.parquet")(store), turn("boxes/c/0/0/0")(store)], [0, 2]),
        (lambda store: [lose("parts/00002.parquet")(store), turn("stats/64/dense/cov/c/0/0")(store)], [2]),
        (lambda store: shutil.copy(store / "boxes/c/0/0/0", store / "boxes/c/1/0/0"), [1]),
        (lambda store: [shutil.rmtree(store / "parts"), shutil.rmtree(store / "64")], [0, 1, 2]),
    ],
)
def test_only_damaged_parts_are_extracted_and_the_store_is_as_it_was(
    store: Path, whole: Path, tiny_weights: Path, damage: Damage, parts: list[int]
) -> None:
    damage(store)
    report, crews = mend(store, tiny_weights)
    assert (list(report.parts), crews.made) == (parts, parts)
    assert files(store) == files(whole)


@pytest.mark.parametrize(
    ("damage", "documents", "statistics"),
    [
        (turn("stats/64/dense/mean/c/0"), [], True),
        (turn("stats/zarr.json"), [], True),
        (lose("stats/64/summary/std/zarr.json"), [], True),
        (lambda store: shutil.rmtree(store / "stats"), [], True),
        (turn("boxes/zarr.json"), ["boxes/zarr.json"], False),
        (lose("64/dense/zarr.json"), ["64/dense/zarr.json"], False),
        (lambda store: shutil.rmtree(store / "corpus"), ["corpus/00000.parquet"], False),
        (turn("corpus/00000.parquet"), ["corpus/00000.parquet"], False),
    ],
)
def test_no_teacher_is_asked_for_where_none_is_needed(
    store: Path, whole: Path, damage: Damage, documents: list[str], statistics: bool
) -> None:
    damage(store)
    report, crews = mend(store)
    assert (list(report.documents), report.statistics, report.parts) == (documents, statistics, ())
    assert crews.opened == []
    assert files(store) == files(whole)


def test_a_whole_store_is_left_alone(store: Path, whole: Path) -> None:
    report, crews = mend(store)
    assert (report.parts, report.documents, report.statistics, crews.opened) == ((), (), False, [])
    assert report.num_bytes == open_store(store).stored_bytes
    assert files(store) == files(whole)


@pytest.mark.parametrize("precision", ["int8", "bitround:4"])
def test_any_precision_is_repaired(tmp_path: Path, corpus: Path, tiny_weights: Path, precision: str) -> None:
    path = Path(make_parts(tmp_path / "s.zarr", corpus, tiny_weights, precision=precision).path)
    before = files(path)
    turn("64/dense/c/1/0/0/0/0")(path)
    shutil.rmtree(path / "stats")
    assert mend(path, tiny_weights)[0].parts == (1,)
    assert files(path) == before


@pytest.mark.parametrize(
    "damage",
    [
        turn("64/dense/c/4/0/0/0/0"),
        turn("stats/64/dense/cov/c/0/0"),
        lambda store: shutil.rmtree(store / "stats"),
        lose("corpus/00000.parquet"),
        lose("corpus/00001.parquet"),
        lambda store: shutil.rmtree(store / "corpus"),
        lambda store: [lose("corpus/00002.parquet")(store), lose("parts/00004.parquet")(store)],
    ],
)
def test_an_extended_store_is_repaired(tmp_path: Path, tiny_weights: Path, damage: Damage) -> None:
    """Statistics that grew by a segment at a time, and an index of several files."""
    corpus = make_corpus(tmp_path / "c", count=18)
    store = make_parts(tmp_path / "s.zarr", corpus, tiny_weights)
    store = extend(store, corpus, tiny_weights, count=2)
    store = extend(store, corpus, tiny_weights, count=3)
    assert store.spec.segment_ends == [3, 4, 5]
    before = files(store.path)
    damage(Path(store.path))
    mend(Path(store.path), tiny_weights)
    assert files(store.path) == before


def test_an_unfinished_store_is_finished(tmp_path: Path, corpus: Path, tiny_weights: Path, store: Path) -> None:
    extra = make_corpus(tmp_path / "c", count=18)
    path = Path(make_parts(tmp_path / "u.zarr", extra, tiny_weights).path)
    announce(open_store(path), extra, count=2)
    assert verify(path).missing == (3,)
    assert mend(path, tiny_weights)[0].parts == (3,)
    assert verify(path).whole
    twin = make_parts(tmp_path / "v.zarr", make_corpus(tmp_path / "d", count=18), tiny_weights)
    extend(twin, tmp_path / "d", tiny_weights, count=2)
    theirs = files(twin.path)
    for name, data in files(path).items():
        if name != "zarr.json" and not name.startswith("corpus/"):
            assert data == theirs[name], name


def test_damaged_moments_are_taken_from_the_features(tmp_path: Path, tiny_weights: Path) -> None:
    corpus = make_corpus(tmp_path / "c", count=18)
    store = make_parts(tmp_path / "s.zarr", corpus, tiny_weights)
    announce(store, corpus, count=2)
    crew(tiny_weights).run_parts(open_store(store.path), lambda status: None)
    shutil.copytree(Path(store.path), tmp_path / "t.zarr")
    flip(tmp_path / "t.zarr/parts" / moments_name(3), 0.6)
    for path in (Path(store.path), tmp_path / "t.zarr"):
        assert mend(path)[0].parts == ()
    assert files(tmp_path / "t.zarr") == files(store.path)


def refused(store: Path, error: type[EupeError], words: str, weights: Path | None = None, **config: Any) -> None:
    before = files(store)
    with pytest.raises(error, match=words):
        mend(store, weights, **config)
    assert files(store) == before


def test_other_weights_are_refused_and_nothing_is_given_up(store: Path, tmp_path: Path, tiny_weights: Path) -> None:
    turn("64/dense/c/1/0/0/0/0")(store)
    other = random_weights("test_vit", tmp_path / "other.safetensors", seed=5)
    refused(store, TeacherError, "give the original file with --weights", other)
    refused(store, TeacherError, "do not exist", tmp_path / "none.safetensors")
    refused(
        store,
        SpecMismatchError,
        "made by a different teacher than timm:test_vit2",
        tiny_weights,
        teacher="timm:test_vit2",
    )
    refused(store, EupeError, "--batch-size must be at least 1", tiny_weights, batch_size=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_an_arithmetic_that_this_machine_lacks_is_refused(store: Path, tiny_weights: Path) -> None:
    document = store / "zarr.json"
    document.write_text(document.read_text().replace('"dtype": "fp32"', '"dtype": "fp16"'))
    turn("64/dense/c/1/0/0/0/0")(store)
    refused(store, EupeError, "computed in fp16, which this machine does not support", tiny_weights)


def test_pictures_that_changed_are_refused_and_those_that_moved_are_found(tmp_path: Path, tiny_weights: Path) -> None:
    corpus = make_corpus(tmp_path / "c", count=18)
    path = Path(make_parts(tmp_path / "s.zarr", corpus, tiny_weights).path)
    before = files(path)
    turn("64/dense/c/0/0/0/0/0")(path)
    shutil.move(corpus, tmp_path / "moved")
    refused(path, CorpusError, "are not in .*; give their folder with --corpus", tiny_weights)
    changed = tmp_path / "moved" / "class0" / "0000.png"
    right = changed.read_bytes()
    picture(99).save(changed)
    refused(
        path,
        CorpusError,
        r"1 pictures in .* have changed .*\(class0/0000.png\)",
        tiny_weights,
        corpus=tmp_path / "moved",
    )
    changed.write_bytes(right)
    mend(path, tiny_weights, corpus=tmp_path / "moved")
    assert files(path) == before


def test_an_index_cannot_be_made_of_other_pictures(tmp_path: Path, tiny_weights: Path) -> None:
    corpus = make_corpus(tmp_path / "c", count=10)
    path = Path(make_parts(tmp_path / "s.zarr", corpus, tiny_weights).path)
    lose("corpus/00000.parquet")(path)
    picture(99).save(corpus / "class0" / "0000.png")
    refused(path, CorpusError, r"00000.parquet is missing, .* the pictures are needed .* restore the original pictures")
    shutil.rmtree(corpus)
    refused(path, CorpusError, "the store can be read, but not repaired or extended")


def test_a_teacher_that_moved_is_found(tmp_path: Path, corpus: Path) -> None:
    torch.manual_seed(0)
    save_encoder(build_encoder("test_vit", size=64), tmp_path / "run")
    weights = tmp_path / "run" / "student.safetensors"
    path = Path(make_parts(tmp_path / "s.zarr", corpus, weights, teacher=str(tmp_path / "run")).path)
    before = files(path)
    lose("boxes/c/1/0/0")(path)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    refused(path, TeacherError, "is no longer at .*run; give its new location with --teacher")
    mend(path, teacher=str(tmp_path / "moved"))
    assert files(path) == before


def test_statistics_are_taken_again_where_the_features_may_have_changed(store: Path, tiny_weights: Path) -> None:
    """A part computed in other batches may differ in its last bits; the statistics are of what is stored."""
    turn("64/dense/c/1/0/0/0/0")(store)
    assert not mend(store, tiny_weights)[0].statistics
    lose("parts/00001.parquet")(store)
    assert mend(store, tiny_weights)[0].statistics
    shards = [store / "64/dense/c/1/0/0/0/0", store / "64/summary/c/1/0/0"]
    before = [shard.read_bytes() for shard in shards]
    turn("64/dense/c/1/0/0/0/0")(store)
    report, crews = mend(store, tiny_weights, batch_size=3)
    assert crews.opened[0].config.batch_size == 3
    assert report.statistics == (before != [shard.read_bytes() for shard in shards])
    stats, features = open_store(store).stats(64, "dense"), open_store(store).read(*everything(store)).dense
    assert features is not None
    assert np.allclose(stats.mean, features.reshape(-1, features.shape[-1]).astype(np.float64).mean(axis=0))


def everything(store: Path) -> tuple[list[int], list[int]]:
    rows = open_store(store).samples["row"].to_pylist()
    return [row for row in rows for _ in range(2)], [0, 1] * len(rows)


def test_damage_that_stays_is_told(store: Path, tiny_weights: Path) -> None:
    class Clumsy(Crew):
        def run_parts(self, store: Any, on_status: Any) -> float:
            super().run_parts(store, on_status)
            flip(Path(store.path) / "64/dense/c/0/0/0/0/0", 0.5)
            return 1.0

    turn("64/dense/c/1/0/0/0/0")(store)
    config = RepairConfig(store=store, weights=tiny_weights, batch_size=BATCH)
    with pytest.raises(IncompleteError, match=r"still damaged after its repair \(part 0"):
        repair(config, open_crew=Clumsy)


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_the_verb_repairs_on_ray(store: Path, whole: Path, tmp_path: Path, tiny_weights: Path, run_eupe: Run) -> None:
    turn("64/dense/c/1/0/0/0/0")(store)
    lose("parts/00002.parquet")(store)
    lose("boxes/zarr.json")(store)
    damaged = files(store)
    words = ["store", "repair", store, "--weights", tiny_weights, "--batch-size", BATCH]
    mended = {name: data for name, data in damaged.items() if name != "boxes/zarr.json"}
    for more, said in (
        (["--ray-address", f"127.0.0.1:{free_ports(1)[0]}"], "no Ray cluster answers"),
        (["--workers", 2, "--gpus-per-worker", 99], "2 workers with 99 GPUs each do not fit"),
    ):
        outcome = run_eupe(*words, *more)
        assert outcome.code == 2
        assert said in " ".join(outcome.err.split())
    assert {name: data for name, data in files(store).items() if name in mended} == mended
    outcome = run_eupe(*words, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["parts"] == [1, 2]
    assert files(store) == files(whole)


def test_the_verb_says_what_is_wrong(store: Path, tmp_path: Path, run_eupe: Run) -> None:
    turn("64/dense/c/1/0/0/0/0")(store)
    other = random_weights("test_vit", tmp_path / "other.safetensors", seed=5)
    for words, said in (
        (["--weights", other], "give the original file with --weights"),
        (["--weights", other, "--corpus", tmp_path / "nowhere"], "nowhere; give their folder with --corpus"),
        (["--weights", other, "--teacher", "timm:nothing"], "nothing"),
    ):
        outcome = run_eupe("store", "repair", store, *words)
        assert outcome.code == 2
        assert said in " ".join(outcome.err.split())
        assert "Traceback" not in outcome.err
