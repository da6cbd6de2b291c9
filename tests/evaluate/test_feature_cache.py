"""Kept tokens: one pass for tasks that share pictures, the same results bit for bit, in a folder of bounded size."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from making import picture, random_weights
from planted import ade20k, blocks, depth_pairs, save, spair

from eupe.common.compute import Tokens
from eupe.common.storage import StoragePath
from eupe.corpus.views import NEUTRAL, ViewParams
from eupe.errors import ConfigError
from eupe.evaluate import feature_cache
from eupe.evaluate import subject as subject_module
from eupe.evaluate.encode import EncodedViews
from eupe.evaluate.feature_cache import TAG_FILE, FeatureCache, open_features
from eupe.evaluate.judged_pictures import Pictures, centre, windows
from eupe.evaluate.subject import Subject, open_subjects
from eupe.teachers.teacher import Teacher

Run = Callable[..., Any]
NAME = "timm:test_vit"
KINDS = ("summary", "dense")


@dataclass
class Work:
    """Records each pass of an encoder."""

    passes: list[tuple[tuple[str, ...], str, int]] = field(default_factory=list)
    """Kinds of token, crop and number of pictures of each pass."""
    forwards: int = 0
    """Number of batches."""

    def taken(self) -> list[tuple[tuple[str, ...], str, int]]:
        """Return the passes so far, and forget them."""
        done, self.passes = self.passes, []
        assert bool(self.forwards) == bool(done)
        self.forwards = 0
        return done


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    counted, encode_views, forward = Work(), subject_module.encode_views, Teacher.encode

    def encode(pictures: Pictures, encode: Any, **how: Any) -> EncodedViews:
        counted.passes.append((tuple(how["kinds"]), how["crop"].__name__, len(pictures)))
        return encode_views(pictures, encode, **how)

    def run(teacher: Teacher, pixels: torch.Tensor, layers: Sequence[int] = ()) -> Tokens:
        counted.forwards += 1
        return forward(teacher, pixels, layers)

    monkeypatch.setattr(subject_module, "encode_views", encode)
    monkeypatch.setattr(Teacher, "encode", run)
    return counted


def labelled(folder: Path) -> Path:
    for split, numbers in (("train", range(6)), ("val", range(100, 103))):
        for number in numbers:
            save(blocks(number, 80, 48)[0], folder / split / f"class{number % 2}" / f"{number}.png")
    return folder


def five_tasks(folder: Path, weights: Path) -> list[list[object]]:
    """Commands for five tasks: two on labelled pictures, two on the same pictures in two layouts, one on others."""
    common = [NAME, "--weights", f"{NAME}={weights}", "--size", 32, "--json"]
    data = labelled(folder / "labelled")
    masks, depths = ade20k(folder / "masks"), depth_pairs(folder / "depths", train=6)
    for ade, plain in (("training", "train"), ("validation", "val")):
        shown = [
            {file.name: file.read_bytes() for file in place.iterdir()}
            for place in (masks / "images" / ade, depths / "images" / plain)
        ]
        assert shown[0] == shown[1]
    return [
        ["eval", "knn", *common, "--data", data, "--k", 1],
        ["eval", "linear", *common, "--data", data, "--penalty", 1],
        ["eval", "segment", *common, "--data", masks, "--steps", 2],
        ["eval", "depth", *common, "--data", depths, "--steps", 2],
        ["eval", "correspond", *common, "--data", spair(folder / "pairs")],
    ]


def test_tasks_take_one_pass_for_each_set_of_pictures_and_crop_and_a_second_command_takes_none(
    tmp_path: Path, tiny_weights: Path, run_eupe: Run, work: Work
) -> None:
    commands = five_tasks(tmp_path, tiny_weights)
    plain = [run_eupe(*command) for command in commands]
    assert [one.code for one in plain] == [0] * 5, [one.err for one in plain]
    without = work.taken()
    assert len(without) == 9

    folder = tmp_path / "features"
    kept = [run_eupe(*command, "--features", folder) for command in commands]
    assert [one.out for one in kept] == [one.out for one in plain]
    assert sorted(work.taken()) == sorted(set(without))
    assert len(set(without)) == 5

    again = [run_eupe(*command, "--features", folder) for command in commands]
    assert [one.out for one in again] == [one.out for one in plain]
    assert work.taken() == []
    assert not any(one.err for one in [*kept, *again])


def test_untrained_encoders_have_their_own_tokens(tmp_path: Path, run_eupe: Run, work: Work) -> None:
    weights = random_weights("test_vit", tmp_path / "w.safetensors", seed=1)
    command = [*five_tasks(tmp_path, weights)[0], "--untrained"]
    plain = run_eupe(*command).out
    command += ["--features", tmp_path / "features"]
    assert len(work.taken()) == 4
    assert run_eupe(*command).out == plain and len(work.taken()) == 4
    assert run_eupe(*command).out == plain and work.taken() == []


def some_pictures(folder: Path) -> Pictures:
    folder.mkdir()
    for i, width in enumerate((80, 150, 64, 48)):
        picture(i, width, 64).save(folder / f"{i}.png")
    return Pictures(StoragePath.of(folder), tuple(f"{i}.png" for i in range(4)))


def encoder(weights: Path, folder: Path | None) -> Subject:
    cache = None if folder is None else open_features(folder, on_note=pytest.fail)
    return open_subjects([NAME], {NAME: weights}, features=cache)[0]


def require_same(views: EncodedViews, expected: EncodedViews) -> None:
    assert views.picture_V.dtype == expected.picture_V.dtype and np.array_equal(views.picture_V, expected.picture_V)
    assert (views.params, views.size) == (expected.params, expected.size)
    for kind in KINDS:
        ours, theirs = getattr(views, kind), getattr(expected, kind)
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.dtype == theirs.dtype and torch.equal(ours, theirs))


@pytest.mark.parametrize("crop", [centre, windows])
def test_kept_views_equal_those_of_a_pass_bit_for_bit(tmp_path: Path, tiny_weights: Path, crop: Any) -> None:
    pictures = some_pictures(tmp_path / "p")
    for kinds in (("summary",), ("dense",), KINDS):
        how: dict[str, Any] = {"kinds": kinds, "size": 64, "crop": crop}
        expected = encoder(tiny_weights, None).encode_views(pictures, **how)
        for _ in range(2):
            require_same(encoder(tiny_weights, tmp_path / "-".join(kinds)).encode_views(pictures, **how), expected)


def test_one_kind_is_found_where_both_were_kept_and_both_are_computed_where_one_is_missing(
    tmp_path: Path, tiny_weights: Path, work: Work
) -> None:
    pictures = some_pictures(tmp_path / "p")

    def kinds_computed(folder: str, kinds: Sequence[str]) -> list[tuple[str, ...]]:
        subject = encoder(tiny_weights, tmp_path / folder)
        views = subject.encode_views(pictures, kinds=kinds, size=64, crop=centre)
        assert [kind for kind in KINDS if getattr(views, kind) is not None] == sorted(kinds, key=KINDS.index)
        return [done for done, _, _ in work.taken()]

    assert kinds_computed("both", KINDS) == [KINDS]
    assert [kinds_computed("both", kinds) for kinds in (("summary",), ("dense",), KINDS)] == [[], [], []]
    assert kinds_computed("one", ("summary",)) == [("summary",)]
    assert kinds_computed("one", KINDS) == [KINDS]
    assert kinds_computed("one", ("dense", "summary")) == []


def test_what_changed_is_computed_again(tmp_path: Path, tiny_weights: Path, work: Work) -> None:
    """More of what counts: test_feature_key.py."""
    some_pictures(tmp_path / "p")
    names = tuple(f"{i}.png" for i in range(4))

    def computed(*names: str, size: int = 64) -> int:
        pictures = Pictures(StoragePath.of(tmp_path / "p"), names)
        encoder(tiny_weights, tmp_path / "f").encode_views(pictures, kinds=["summary"], size=size, crop=centre)
        return len(work.taken())

    assert [computed(*names), computed(*names)] == [1, 0]
    assert [computed(*reversed(names)), computed(*names[1:]), computed(*names, size=32)] == [1, 1, 1]
    before = (tmp_path / "p/2.png").read_bytes()
    picture(7, 64, 64).save(tmp_path / "p/2.png")
    assert [computed(*names), computed(*names)] == [1, 0]
    (tmp_path / "p/2.png").write_bytes(before)
    assert computed(*names) == 0, "what it was before is still kept"


def test_a_picture_that_changes_during_the_pass_is_not_kept_under_what_it_was(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, work: Work
) -> None:
    pictures = some_pictures(tmp_path / "p")
    first, read = (tmp_path / "p/3.png").read_bytes(), Pictures.image

    def changing(these: Pictures, i: int) -> Any:
        picture(9, 48, 64).save(tmp_path / "p/3.png")
        return read(these, i)

    monkeypatch.setattr(Pictures, "image", changing)
    encoder(tiny_weights, tmp_path / "f").encode_views(pictures, kinds=["summary"], size=64, crop=centre)
    monkeypatch.setattr(Pictures, "image", read)
    assert not list(tmp_path.glob("f/*.npz"))
    (tmp_path / "p/3.png").write_bytes(first)
    work.taken()
    subject = encoder(tiny_weights, tmp_path / "f")
    subject.encode_views(Pictures(pictures.root, pictures.keys), kinds=["summary"], size=64, crop=centre)
    assert len(work.taken()) == 1


# The folder, with tokens that need no encoder


def key(number: int) -> str:
    return f"{number:064x}"


def tokens(number: int, kind: str = "dense") -> EncodedViews:
    """Some 8 kB, or 10 kB as an entry."""
    shape = (2, 1000) if kind == "summary" else (2, 4, 4, 128)
    dtype = torch.float32 if kind == "summary" else torch.float16
    params = [ViewParams((0, 0, 8, 8), False, NEUTRAL), ViewParams((1, 0, 9, 8), False, NEUTRAL)]
    views = EncodedViews(np.array([0, 1]), params, 32)
    return replace(views, **{kind: torch.full(shape, float(number), dtype=dtype)})


def room(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float16)


def ask(cache: FeatureCache, number: int, kind: str = "dense") -> bool:
    """Ask for tokens, and return whether they were computed."""
    asked: list[int] = []

    def encode() -> EncodedViews:
        asked.append(number)
        return tokens(number, kind)

    views = cache.encoded_views(lambda: key(number), [kind], encode, room)
    require_same(views, tokens(number, kind))
    return bool(asked)


def held(folder: Path) -> set[int]:
    return {int(path.name[:64], 16) for path in folder.glob("*.npz")}


def age(folder: Path, number: int, seconds: int) -> None:
    """Set how long ago an entry was used: the clock of a file system is coarse."""
    (path,) = folder.glob(f"{key(number)}.*")
    then = path.stat().st_mtime_ns - seconds * 10**9
    os.utime(path, ns=(then, then))


def test_the_least_recently_used_make_room_and_the_folder_stays_below_its_limit(tmp_path: Path) -> None:
    cache = open_features(tmp_path, limit_gb=35_000 / 1e9, on_note=pytest.fail)
    for number in (1, 2, 3):
        assert ask(cache, number)
        age(tmp_path, number, 1000 - number)
    assert held(tmp_path) == {1, 2, 3}
    assert not ask(cache, 1), "now 2 is the one that was not used for longest"
    assert ask(cache, 4)
    assert held(tmp_path) == {1, 3, 4}
    assert sum(path.stat().st_size for path in tmp_path.glob("*.npz")) <= 35_000
    assert ask(cache, 2) and held(tmp_path) == {1, 2, 4}


def test_of_two_writers_at_the_same_time_the_last_one_keeps_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other = (open_features(tmp_path, limit_gb=15_000 / 1e9, on_note=pytest.fail) for _ in range(2))
    write = feature_cache._write

    def write_after_another(*what: Any) -> None:
        monkeypatch.setattr(feature_cache, "_write", write)
        assert ask(other, 2) and held(tmp_path) == {2}
        write(*what)

    monkeypatch.setattr(feature_cache, "_write", write_after_another)
    assert ask(cache, 1) and held(tmp_path) == {1}


def test_what_is_larger_than_the_limit_costs_the_others_nothing(tmp_path: Path) -> None:
    notes: list[str] = []
    ask(open_features(tmp_path, on_note=pytest.fail), 1)
    cache = open_features(tmp_path, limit_gb=1e-6, on_note=notes.append)
    for number in (2, 3):
        assert ask(cache, number)
    assert held(tmp_path) == {1} and not ask(cache, 1)
    (note,) = notes
    assert (
        note.startswith(f"features are not kept in {tmp_path} (") and "there is room for 1 kB by --features-gb" in note
    )


def test_a_cache_takes_half_of_what_is_free_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_features(tmp_path, on_note=pytest.fail)
    ask(cache, 1)
    age(tmp_path, 1, 1000)
    # together with the entry of some 10 kB there are 40 kB, of which half is enough for one more
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 30_000}))
    assert ask(cache, 2) and held(tmp_path) == {1, 2}
    assert ask(cache, 3) and held(tmp_path) == {2, 3}


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut by a byte": lambda content: content[:-1],
    "a token": lambda content: flipped(content, content.index(tokens(1).dense.numpy().tobytes()) + 100),  # type: ignore[union-attr]
    "a box": lambda content: content.replace((9).to_bytes(8, "little"), (8).to_bytes(8, "little"), 1),
    "a shape": lambda content: content.replace(b"(2, 4, 4, 128)", b"(2, 4, 8, 64) "),
    "fewer tokens": lambda content: content.replace(b"(2, 4, 4, 128)", b"(1, 4, 4, 128)"),
    "another type": lambda content: content.replace(b"'<f2'", b"'<u2'"),
    "another name": lambda content: content.replace(b"tokens0", b"tokens1"),
    "not a zip": lambda content: b"x" * len(content),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_computed_again(tmp_path: Path, damage: str) -> None:
    cache = open_features(tmp_path, on_note=pytest.fail)
    ask(cache, 1)
    (path,) = tmp_path.glob("*.npz")
    whole = path.read_bytes()
    broken = DAMAGES[damage](whole)
    assert broken != whole
    path.write_bytes(broken)
    assert ask(cache, 1)
    assert path.read_bytes() == whole and not ask(cache, 1)


def test_every_byte_of_an_entry_is_checked_or_without_effect(tmp_path: Path) -> None:
    cache = open_features(tmp_path, on_note=pytest.fail)
    ask(cache, 1)
    (path,) = tmp_path.glob("*.npz")
    whole = path.read_bytes()
    found_out = 0
    for place in np.random.default_rng(0).permutation(len(whole))[:60].tolist():
        path.write_bytes(flipped(whole, place))
        found_out += ask(cache, 1)  # which compares the tokens
    assert found_out > 50


def test_an_entry_under_the_name_of_another_is_not_taken(tmp_path: Path) -> None:
    cache = open_features(tmp_path, on_note=pytest.fail)
    ask(cache, 1)
    (path,) = tmp_path.glob("*.npz")
    path.rename(path.with_name(f"{key(2)}.dense.npz"))
    assert ask(cache, 2) and not ask(cache, 2)


class Malicious:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_no_object_is_unpickled(tmp_path: Path) -> None:
    cache = open_features(tmp_path / "f", on_note=pytest.fail)
    (tmp_path / "f").mkdir()
    arrays: dict[str, Any] = {"name": np.array([Malicious(tmp_path / "made")], dtype=object)}
    np.savez(tmp_path / f"f/{key(1)}.dense.npz", **arrays)
    assert ask(cache, 1) and not (tmp_path / "made").exists()


def test_dense_tokens_are_read_to_where_they_would_be_computed(tmp_path: Path, tiny_weights: Path, work: Work) -> None:
    pictures, scratch = some_pictures(tmp_path / "p"), tmp_path / "scratch"
    scratch.mkdir()
    for _ in range(2):
        views = encoder(tiny_weights, tmp_path / "f").encode_views(
            pictures, kinds=["dense"], size=64, crop=centre, scratch=scratch
        )
        assert views.dense is not None
        rooms = Path("/proc/self/maps").read_text().splitlines()
        ((start, end),) = (line.split()[0].split("-") for line in rooms if f" {scratch}/" in line)
        assert int(start, 16) <= views.dense.data_ptr() < int(end, 16)
        del views
    assert len(work.taken()) == 1


def test_many_views_are_kept(tmp_path: Path) -> None:
    many = replace(
        tokens(1),
        picture_V=np.arange(45),
        params=[ViewParams((i, 0, i + 8, 8), False, NEUTRAL) for i in range(45)],
        dense=torch.randn(45, 2, 2, 3, generator=torch.Generator().manual_seed(0)).half(),
    )
    cache = open_features(tmp_path, on_note=pytest.fail)
    for encode in (lambda: many, pytest.fail):
        require_same(cache.encoded_views(lambda: key(1), ["dense"], encode, room), many)  # type: ignore[arg-type]


def test_files_of_others_stay_and_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    cache = open_features(tmp_path, limit_gb=25_000 / 1e9, on_note=pytest.fail)
    ask(cache, 1)
    foreign = ["notes.txt", f"{key(7)}.txt", f"{key(7)}.dense.npz.bak", "weights.NPZ", "a.safetensors"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"\0" * 30_000)
    (tmp_path / f"{key(8)}.dense.npz").symlink_to(tmp_path / "notes.txt")
    (tmp_path / f"{key(9)}.dense.npz").mkdir()
    left = tmp_path / f"{key(1)}.dense.npz.{'0' * 16}.__lock"
    left.write_bytes(b"\0" * 15_000)
    for number in (2, 3, 4):
        assert ask(cache, number)
    assert not left.exists()
    assert all((tmp_path / name).stat().st_size == 30_000 for name in foreign)
    assert {8, 9} < held(tmp_path) and 4 in held(tmp_path)


def test_two_at_once_compute_the_same_and_leave_one_entry(tmp_path: Path) -> None:
    together, done = threading.Barrier(2, timeout=60), []

    def evaluate() -> None:
        def encode() -> EncodedViews:
            together.wait()
            return tokens(1)

        cache = open_features(tmp_path, on_note=pytest.fail)
        views = cache.encoded_views(lambda: key(1), ["dense"], encode, room)
        require_same(views, tokens(1))
        done.append(views)

    both = [threading.Thread(target=evaluate) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(done) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{key(1)}.dense.npz", TAG_FILE]
    assert not ask(open_features(tmp_path, on_note=pytest.fail), 1)


def test_a_full_disk_costs_a_note_and_nothing_else(
    tmp_path: Path, tiny_weights: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch, work: Work
) -> None:
    def full(file: IO[bytes], **arrays: Any) -> None:
        file.write(b"x" * 1000)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(feature_cache.np, "savez", full)
    command = [*five_tasks(tmp_path, tiny_weights)[0], "--untrained"]
    plain = run_eupe(*command)
    outcome = run_eupe(*command, "--features", tmp_path / "f")
    assert (outcome.code, outcome.out) == (0, plain.out)
    assert outcome.err.count("features are not kept in") == 1 and "No space left on device" in outcome.err
    assert [path.name for path in (tmp_path / "f").iterdir()] == [TAG_FILE]


def test_a_folder_that_cannot_be_made_costs_a_note(tmp_path: Path, tiny_weights: Path, run_eupe: Run) -> None:
    command = five_tasks(tmp_path, tiny_weights)[0]
    (tmp_path / "file").write_bytes(b"x")
    plain = run_eupe(*command)
    for folder in (tmp_path / "file/below", Path("/proc/eupe")):
        outcome = run_eupe(*command, "--features", folder)
        assert (outcome.code, outcome.out) == (0, plain.out)
        assert outcome.err.startswith(f"features are not kept in {folder} (") and len(outcome.err.splitlines()) == 1


def test_the_limit_is_an_option_and_0_keeps_none(tmp_path: Path, tiny_weights: Path, run_eupe: Run, work: Work) -> None:
    command = [*five_tasks(tmp_path, tiny_weights)[0], "--features", tmp_path / "f"]
    assert run_eupe(*command, "--features-gb", 0).err == "" and not (tmp_path / "f").exists()
    little = run_eupe(*command, "--features-gb", 1e-9)
    assert little.code == 0 and "there is room for 1 B by --features-gb" in little.err
    assert held(tmp_path / "f") == set()
    assert run_eupe(*command).err == "" and len(held(tmp_path / "f")) == 2
    work.taken()
    run_eupe(*command, "--features-gb", 0)
    assert len(work.taken()) == 2, "none is read, either"
    alone = run_eupe(*command[:-2], "--features-gb", 1)
    assert alone.code == 2 and "--features-gb 1 limits the folder of --features" in alone.err


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/thesis.txt").write_text("x")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / TAG_FILE).write_text(f"{feature_cache.SIGNATURE}\n# of another program\n")
    (tmp_path / "c").write_text("x")
    for name in "abc":
        with pytest.raises(ConfigError, match=f"--features {tmp_path / name} is not a folder of features"):
            open_features(tmp_path / name, on_note=pytest.fail)
