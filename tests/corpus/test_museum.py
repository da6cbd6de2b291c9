"""Whatever lies in a corpus is a picture that is taken, or is counted by the reason for which it is not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from containers import make_tar, png
from making import make_store, picture

from eupe.common.files import key_of, name_of
from eupe.corpus import pictures
from eupe.corpus.index import Corpus, index_bytes, index_from_bytes, open_corpus, read_index
from eupe.corpus.left_out import NO_PICTURE, Patterns, told
from eupe.corpus.pictures import EXTENSIONS, Inside, decode_image, read_picture, readable_formats
from eupe.corpus.resumable import make_index
from eupe.errors import CorpusError
from eupe.store.places import left_out
from eupe.store.verify import verify

if TYPE_CHECKING:
    from object_store import S3Server

Run = Callable[..., Any]

NAMES = (
    "plain.png",
    "Screenshot 2025-03-01 at 9.41.07\u202fAM.png",
    "v\u00a013.05.PNG",
    "東京\u3000タワー.png",
    "fam-\U0001f468\u200d\U0001f469.png",
    "soft\u00adhyphen.png",
    "\u202egnp.right to left\u200f.png",
    "two\nlines\tand\x1b[31m red.png",
    "100%41 \\x41 \uf041.png",
    os.fsdecode(b"caf\xe9.png"),
    "café.png",
    "caf\uf0e9.png",
    "next\x85line.png",
)
"""Of pictures; no two are one file."""


@pytest.fixture
def museum(tmp_path: Path) -> Path:
    """A tree of every kind of thing that people keep with their pictures."""
    root, elsewhere = tmp_path / "museum", tmp_path / "elsewhere"
    for folder in (root / "odd\u202fnames", elsewhere / "b", root / "phone", root / ".git" / "objects", root / "a"):
        folder.mkdir(parents=True)
    for i, name in enumerate(NAMES):
        (root / "odd\u202fnames" / name).write_bytes(png(i))
    (root / os.fsdecode(b"class \xe9")).mkdir()
    (root / os.fsdecode(b"class \xe9") / "1.png").write_bytes(png(20))
    picture(21).save(root / "phone" / "x.AVIF")
    picture(22).save(root / "phone" / "x.jfif", "JPEG")
    picture(23).save(root / "phone" / "x.jpe", "JPEG")
    picture(24).save(root / "phone" / "x.jp2")
    picture(25).save(root / "phone" / "huge.png", icc_profile=bytes(2**21))
    for name in (
        "IMG_0001.XCF",
        "IMG_0002.xcf",
        "y.psd",
        "no suffix",
        "b.jpg~",
        "b.jpg.001",
        "a.txt",
        "a.json",
        "labels.csv",
    ):
        (root / "phone" / name).write_bytes(b"x")
    for name in ("Thumbs.db", ".DS_Store", "phone/._x.jpg", ".git/config", ".git/objects/a.png", "a/metadata.csv"):
        (root / name).write_bytes(b"x")
    pq.write_table(pa.table({"url": ["x"]}), root / "phone" / "00000.parquet")
    for i in range(2):
        (elsewhere / "b" / f"{i}.png").write_bytes(png(30 + i))
    (root / "b").symlink_to(elsewhere / "b")
    (root / "c").symlink_to(root / "phone" / ".." / "b")
    (root / "a" / "linked.png").symlink_to("../b/0.png")
    (root / "a" / "gone.png").symlink_to("../nowhere.png")
    (root / "a" / "gone").symlink_to(elsewhere / "gone")
    (root / "a" / "itself").symlink_to("itself")
    (root / "a" / "up").symlink_to("..")
    (elsewhere / "b" / "back").symlink_to(root)
    return root


LEFT_OUT = {
    "broken links": 2,
    "files of kinds that are not read: .csv": 1,
    "files of kinds that are not read: .db": 1,
    "files of kinds that are not read: .jpg~": 1,
    "files of kinds that are not read: .json": 1,
    "files of kinds that are not read: .parquet": 1,
    "files of kinds that are not read: .psd": 1,
    "files of kinds that are not read: .txt": 1,
    "files of kinds that are not read: .xcf": 2,
    "files of kinds that are not read: no suffix": 1,
    "files of kinds that are not read: other suffixes": 1,
    "files of metadata": 1,
    "hidden files: .DS_Store": 1,
    "hidden files: .git/": 2,
    "hidden files: .jpg": 1,
    "links back to a folder above them": 3,
}


def files_of(root: Path) -> int:
    """Files, and links that lead to none, as `os.walk` finds them; a link back is one, and not entered."""
    count = 0
    for at, folders, files in os.walk(root, followlinks=True):
        back = [
            name
            for name in folders
            if Path(at).is_relative_to((Path(at) / name).resolve()) or (Path(at) / name).resolve() == root
        ]
        folders[:] = [name for name in folders if name not in back]
        count += len(files) + len(back)
    return count


def hashes(corpus: Corpus) -> dict[str, str | None]:
    return dict(zip(corpus.samples["key"].to_pylist(), corpus.samples["sha256"].to_pylist(), strict=True))


def test_all_of_a_tree_is_taken_or_counted(museum: Path, tmp_path: Path) -> None:
    corpus = open_corpus(museum)
    assert corpus.left_out == LEFT_OUT
    assert corpus.num_found == files_of(museum) == len(corpus) + sum(LEFT_OUT.values())
    found = hashes(corpus)
    assert list(found) == sorted(found) and len(found) == len(NAMES) + 1 + 5 + 2 * 2 + 2
    assert [key for key, sha256 in found.items() if sha256 is None] == ["a/gone.png"]
    for key in found.keys() - {"a/gone.png"}:
        data = (museum / name_of(key)).read_bytes()
        assert read_picture(corpus.root, key) == data and hashlib.sha256(data).hexdigest() == found[key]
        assert decode_image(data).size == picture(1).size
    names = {os.fsencode(name_of(key).removeprefix("odd\u202fnames/")) for key in found if key.startswith("odd")}
    assert names == {os.fsencode(name) for name in NAMES}
    assert {"b/0.png", "c/0.png", "a/linked.png", key_of(os.fsdecode(b"class \xe9/1.png"))} <= set(found)
    labels = dict(zip(found, corpus.samples["label"].to_pylist(), strict=True))
    assert all(label == key.split("/")[0] for key, label in labels.items())

    index = make_index(museum, tmp_path / "i.parquet")
    assert index_bytes(index) == index_bytes(corpus) and read_index(tmp_path / "i.parquet").left_out == LEFT_OUT


def test_all_verbs_bear_odd_names(museum: Path, tmp_path: Path, tiny_weights: Path, run_eupe: Run) -> None:
    odd = next(name for name in NAMES if "\x1b" in name)
    (museum / "other").mkdir()
    shutil.copy(museum / "odd\u202fnames" / odd, museum / "other" / odd)
    out = ("--out", tmp_path / "i.parquet")
    outcome = run_eupe("index", "--corpus", museum, *out)
    assert outcome.code == 0, outcome.err
    assert "11 files of kinds that are not read: .xcf 2, .csv 1" in outcome.out
    assert "the same picture" in outcome.out and r"two\x0alines\x09and\x1b[31m red.png" in outcome.out
    assert not any(ord(each) < 32 and each != "\n" for each in outcome.out + outcome.err)
    store = make_store(tmp_path / "s.zarr", museum, tiny_weights)
    assert verify(store.path).whole and left_out(store) == LEFT_OUT
    for words in (("store", "info", store.path), ("store", "verify", store.path)):
        outcome = run_eupe(*words)
        assert outcome.code == 0, outcome.err
        assert not any(ord(each) < 32 and each != "\n" for each in outcome.out + outcome.err)
    outcome = run_eupe("store", "info", store.path, "--json")
    assert json.loads(outcome.out)["left_out"] == LEFT_OUT
    assert json.loads(outcome.out)["num_found"] == files_of(museum)


def test_all_of_a_tar_is_taken_or_counted(museum: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "museum.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        for path in sorted(p for p in museum.rglob("*") if p.is_symlink() or not p.is_dir()):
            tar.add(path, path.relative_to(museum).as_posix(), recursive=False)
    corpus = open_corpus(tmp_path / "museum.tar")
    with tarfile.open(tmp_path / "museum.tar", encoding="utf-8", errors="surrogateescape") as tar:
        members = {member.name: member for member in tar}
        assert corpus.num_found == len(members) == len(corpus) + sum(corpus.left_out.values())
        plain = [m for m in members.values() if m.isreg() and Path(m.name).suffix.lower() in EXTENSIONS]
        pictures = {m.name for m in plain if not any(part.startswith(".") for part in Path(m.name).parts)}
        taken = {name_of(key.removeprefix("museum.tar/")): sha256 for key, sha256 in hashes(corpus).items()}
        assert set(taken) == pictures
        for name, sha256 in taken.items():
            file = tar.extractfile(members[name])
            assert file is not None and hashlib.sha256(file.read()).hexdigest() == sha256
    assert corpus.left_out["links to folders"] + corpus.left_out["links to what is not in their tar"] == sum(
        member.issym() for member in members.values()
    )


def test_all_rows_of_a_table_are_taken_or_counted(museum: Path, tmp_path: Path) -> None:
    paths = [path.relative_to(museum).as_posix() for path in sorted((museum / "odd\u202fnames").iterdir())]
    writable = [path for path in paths if path.isprintable()]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": None, "path": path} for path in [*writable, "phone/y.psd", "../elsewhere/b/0.png", "gone.png"]]
    rows += [
        {"bytes": png(1), "path": None},
        {"bytes": b"no picture", "path": "x"},
        {"bytes": None, "path": None},
        None,
    ]
    pq.write_table(pa.table({"image": pa.array(rows, struct)}), museum / "museum.parquet")
    corpus = open_corpus(museum / "museum.parquet")
    assert corpus.num_found == len(rows) == len(corpus) + sum(corpus.left_out.values())
    found = hashes(corpus)
    for path in writable:
        assert found[path] == hashlib.sha256((museum / path).read_bytes()).hexdigest()
    assert not any("elsewhere" in key for key in found)


def test_patterns_leave_out_before_anything_is_read(museum: Path, tmp_path: Path, run_eupe: Run) -> None:
    whole = open_corpus(museum)
    for include, exclude in (
        (("odd*",), ("*Screenshot*", "*.PNG")),
        ((), ("odd*",)),
        (("?/*", os.fsdecode(b"class \xe9/*")), ()),
    ):
        options = [*(w for p in include for w in ("--include", p)), *(w for p in exclude for w in ("--exclude", p))]
        outcome = run_eupe("index", "--corpus", museum, *options, "--out", tmp_path / "i.parquet", "--json")
        assert outcome.code == 0, outcome.err
        index, picked = read_index(tmp_path / "i.parquet"), whole.pick(include=include, exclude=exclude)
        assert index.samples.equals(picked.samples) and index.left_out == picked.left_out
        assert json.loads(outcome.out)["found"] == index.num_found == whole.num_found
        assert open_corpus(museum, patterns=Patterns(include, exclude)).samples.equals(picked.samples)
        again = open_corpus(tmp_path / "i.parquet", patterns=Patterns((), ("*/plain.png",)))
        assert again.num_found == whole.num_found
    outcome = run_eupe("index", "--corpus", museum, "--exclude", "*", "--out", tmp_path / "i.parquet")
    assert outcome.code == 2 and f"leave none of the {len(whole)} pictures" in outcome.err
    tar = make_tar(tmp_path / "x.tar", {f"{i}.png": png(i) for i in range(4)})
    corpus = open_corpus(tar, patterns=Patterns((), ("*/0.png",)))
    assert len(corpus) == 3 and corpus.left_out == {"left out by --exclude": 1}
    with pytest.raises(CorpusError, match=r"leave none of the 4 pictures"):
        open_corpus(tar, patterns=Patterns(("*.jpg",)))


def test_a_bucket_is_listed_alike(s3: S3Server, tmp_path: Path) -> None:
    place = s3.bucket / "museum"
    names = [*(key_of(name) for name in NAMES if "\x1b" not in name and "\udce9" not in name and "\x85" not in name)]
    for name in (*names, "a/b.xcf", ".git/config", "._x.jpg", "a/notes"):
        place.write(name, png(1))
    corpus = open_corpus(place)
    assert sorted(names) == list(hashes(corpus)) and None not in hashes(corpus).values()
    assert corpus.left_out == {
        "files of kinds that are not read: .xcf": 1,
        "files of kinds that are not read: no suffix": 1,
        "hidden files: .git/": 1,
        "hidden files: .jpg": 1,
    }


def test_tars_are_taken_out_of_what_img2dataset_writes(tmp_path: Path) -> None:
    for i in range(2):
        make_tar(tmp_path / f"{i:05d}.tar", {"a.png": png(i), "b.png": png(9 - i)})
        pq.write_table(pa.table({"url": ["x"], "path": ["y"], "key": ["z"]}), tmp_path / f"{i:05d}.parquet")
        (tmp_path / f"{i:05d}_stats.json").write_text("{}")
    (tmp_path / "00002.parquet").write_bytes(b"PAR1 cut off")
    corpus = open_corpus(tmp_path)
    assert len(corpus) == 4
    assert corpus.left_out == {"files of kinds that are not read: .json": 2, "tables without pictures": 3}
    pq.write_table(pa.table({"image": [png(1)]}), tmp_path / "00003.parquet")
    with pytest.raises(CorpusError, match=r"holds tars \(00000\.tar\) and tables \(00003\.parquet\)"):
        open_corpus(tmp_path)


def test_a_table_without_pictures_among_others_is_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="has no picture column among url"):
        open_corpus(tmp_path)
    pq.write_table(pa.table({"image": [png(1), None]}), tmp_path / "b.parquet")
    corpus = open_corpus(tmp_path)
    assert corpus.left_out == {NO_PICTURE: 1, "tables without pictures": 1}
    make_index(tmp_path, tmp_path / "index.parquet")
    assert open_corpus(tmp_path).left_out == {**corpus.left_out, "indexes of pictures": 1}


def test_indexes_of_before_there_were_reasons_stay_as_they_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(1), None, None]}), tmp_path / "b.parquet")
    data = index_bytes(open_corpus(tmp_path / "b.parquet"))
    metadata = pq.read_schema(pa.BufferReader(data)).metadata
    assert metadata == {b"eupe.root": str(tmp_path).encode(), b"eupe.without_picture": b"2"}
    assert index_bytes(index_from_bytes(data, "here")) == data


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../secret.png", ".."])
def test_no_index_leads_out_of_its_root(tmp_path: Path, name: str, run_eupe: Run) -> None:
    make_tar(tmp_path / "p" / "x.tar", {"a.png": png(1)})
    (tmp_path / "secret.png").write_bytes(png(2))
    corpus = open_corpus(tmp_path / "p")
    row = corpus.samples.to_pylist()[0]
    for changed in ({"file": name}, {"file": None, "start": None, "length": None, "key": name}):
        bad = Corpus(corpus.root, pa.Table.from_pylist([row | changed], schema=corpus.samples.schema))
        (tmp_path / "i.parquet").write_bytes(index_bytes(bad))
        outcome = run_eupe("index", "--corpus", tmp_path / "i.parquet", "--out", tmp_path / "j.parquet")
        assert outcome.code == 2 and f"names {name}, which does not lie below its root" in outcome.err
    for inside in (None, Inside(name, 0, 9), Inside(name, 0, None)):
        with pytest.raises(CorpusError, match="does not lie below"):
            read_picture(corpus.root, name, inside)


def test_a_folder_whose_own_name_cannot_be_written_is_refused(tmp_path: Path, run_eupe: Run) -> None:
    folder = tmp_path / os.fsdecode(b"photos \xe9")
    folder.mkdir()
    (folder / "a.png").write_bytes(png(1))
    outcome = run_eupe("index", "--corpus", folder, "--out", tmp_path / "i.parquet")
    assert outcome.code == 2 and r"photos \xe9: the folder's name is not UTF-8" in outcome.err


def test_kinds_are_those_that_pillow_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix, name in {".jpe": "JPEG", ".avif": "AVIF", ".jp2": "JPEG2000", ".heic": "HEIF"}.items():
        assert (suffix in EXTENSIONS) == (name in pictures.FORMATS)
    monkeypatch.setattr(pictures.features, "check", lambda name: name != "avif")
    assert "AVIF" not in readable_formats() and "JPEG2000" in readable_formats()


def test_heic_is_read_where_its_plugin_is() -> None:
    heif = pytest.importorskip("pillow_heif")
    import io

    file = io.BytesIO()
    picture(3).save(file, format="HEIF", quality=95)
    assert decode_image(file.getvalue()).tobytes() == heif.read_heif(file.getvalue()).to_pillow().tobytes()


def test_what_is_told_is_one_line() -> None:
    assert told({}) == "0"
    kinds = {f"files of kinds that are not read: .{name}": 1 for name in "abcdefghijklmnop"}
    assert told({"broken links": 1, **kinds, "files of kinds that are not read: .psd": 2}) == (
        "19 (1 broken links; 18 files of kinds that are not read: .psd 2, .a 1, .b 1, .c 1, .d 1, .e 1, .f 1, .g 1, "
        ".h 1, .i 1, .j 1, .k 1, 5 other kinds 5)"
    )
    assert "3 files of kinds that are not read: .heic 2, .psd 1; install pillow-heif to read HEIC" in told(
        {"files of kinds that are not read: .psd": 1, "files of kinds that are not read: .heic": 2}
    )
