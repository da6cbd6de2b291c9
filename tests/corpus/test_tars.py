"""Tars are written and read again by `tarfile`; nothing of ours knows how the other side does it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from containers import make_tar, png, tars_of
from making import make_corpus

from eupe.corpus.index import Corpus, index_folder, open_corpus, read_index, write_index
from eupe.corpus.pictures import insides, read_picture
from eupe.errors import CorpusError

if TYPE_CHECKING:
    from object_store import S3Server


def contents(corpus: Corpus) -> dict[str, bytes]:
    keys = corpus.samples["key"].to_pylist()
    return {key: read_picture(corpus.root, key, i) for key, i in zip(keys, insides(corpus.samples), strict=True)}


def by_tarfile(folder: Path, *names: str) -> dict[str, bytes]:
    """Every picture, in order."""
    found = {}
    for name in names:
        with tarfile.open(folder / name) as tar:
            for member in tar:
                if member.isfile() and member.name.lower().endswith((".png", ".jpg")) and ".seg." not in member.name:
                    file = tar.extractfile(member)
                    assert file is not None
                    found[f"{name}/{member.name.removeprefix('./')}"] = file.read()
    return found


MEMBERS = {
    "./0001.png": png(1),
    "./0001.cls": b"3\n",
    "./0001.txt": "ein Höhlenbär".encode(),
    "./0001.seg.png": png(7),
    "a.b/0002.PNG": png(2),
    "a.b/0002.json": json.dumps({"class": 5, "text": "two"}).encode(),
    "x/0003.json": json.dumps({"label": "cat", "caption": "three", "other": [1]}).encode(),
    f"x/{'long' * 60}.jpg": png(4),
    "x/0003.png": png(3),
    "x/.hidden": b"?",
    "README": b"no sample",
    "lost.txt": b"of no picture",
}


def test_samples_are_the_pictures_with_their_labels_and_captions(tmp_path: Path) -> None:
    make_tar(tmp_path / "s" / "a.tar", MEMBERS)
    make_tar(tmp_path / "s" / "deep" / "b.tar", {"0.png": png(9)}, format=tarfile.GNU_FORMAT)
    corpus = open_corpus(tmp_path / "s")
    assert contents(corpus) == by_tarfile(tmp_path / "s", "a.tar", "deep/b.tar")
    assert list(contents(corpus)) == list(by_tarfile(tmp_path / "s", "a.tar", "deep/b.tar"))
    words = {".cls": 1, ".json": 2, ".txt": 1}
    assert corpus.left_out == {f"label and caption files: {kind}": count for kind, count in words.items()} | {
        "label and caption files without a picture: .txt": 1,
        "files of kinds that are not read: no suffix": 1,
        "hidden files: .hidden": 1,
        "pictures of other keys of their samples: seg.png": 1,
    }
    assert corpus.num_found == len(MEMBERS) + 1, "every member is taken or counted"
    rows = {row["key"]: row for row in corpus.samples.to_pylist()}
    assert {key: (row["label"], row["caption"]) for key, row in rows.items()} == {
        "a.tar/0001.png": ("3", "ein Höhlenbär"),
        "a.tar/a.b/0002.PNG": ("5", "two"),
        f"a.tar/x/{'long' * 60}.jpg": (None, None),
        "a.tar/x/0003.png": ("cat", "three"),
        "deep/b.tar/0.png": (None, None),
    }
    for key, data in contents(corpus).items():
        assert rows[key]["sha256"] == hashlib.sha256(data).hexdigest()
        assert rows[key]["num_bytes"] == len(data) == rows[key]["length"]
        assert rows[key]["mtime_ns"] == (tmp_path / "s" / rows[key]["file"]).stat().st_mtime_ns


def test_one_tar_a_range_and_a_list_are_the_same_pictures(tmp_path: Path) -> None:
    folder = tars_of(make_corpus(tmp_path / "p", count=12), tmp_path / "s", count=3)
    whole = open_corpus(folder)
    assert len(whole) == 12
    for pattern in ("{000..002}.tar", "{000,001,002}.tar", "00{2..0}.tar", "0{0}{0,1,2}.tar"):
        assert open_corpus(f"{folder}/{pattern}").samples.equals(whole.samples), pattern
    one = open_corpus(folder / "001.tar")
    assert one.root == whole.root
    assert one.samples.equals(whole.pick(include=["001.tar/*"]).samples)
    with pytest.raises(CorpusError, match=r"1 of the 4 files do not exist, the first is .*/003\.tar"):
        open_corpus(f"{folder}/{{000..003}}.tar")
    write_index(whole, tmp_path / "i.parquet")
    again = read_index(tmp_path / "i.parquet")
    assert again.samples.equals(whole.samples) and contents(again) == contents(whole)


def test_what_is_not_clear_is_refused(tmp_path: Path) -> None:
    for members, words in (
        ({"a.png": png(1), "a.jpg": png(2)}, r"one sample has two pictures, x\.tar/a\.png and x\.tar/a\.jpg"),
        ({"a.cls": b"1"}, "holds no picture in its 1 tars"),
    ):
        make_tar(tmp_path / "x.tar", members)
        with pytest.raises(CorpusError, match=words):
            open_corpus(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo("a.png")
            info.size = len(png(1))
            tar.addfile(info, io.BytesIO(png(1)))
    with pytest.raises(CorpusError, match=r"x\.tar/a\.png is in its tar twice"):
        open_corpus(tmp_path / "x.tar")


def test_a_tar_that_is_gzipped_or_beside_pictures_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    (tmp_path / "renamed.tar").write_bytes((tmp_path / "x.tar.gz").read_bytes())
    for source in (tmp_path / "x.tar.gz", tmp_path / "renamed.tar", tmp_path, f"{tmp_path}/{{x,y}}.tgz"):
        with pytest.raises(CorpusError, match=r"is gzipped|do not exist"):
            open_corpus(source)
    folder = make_corpus(tmp_path / "mixed", count=2)
    make_tar(folder / "t.tar", {"a.png": png(1)})
    with pytest.raises(CorpusError, match=r"holds 2 pictures and 1 tars \(t\.tar\)"):
        open_corpus(folder)


def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    make_tar(tmp_path / "x.tar", {f"{i}.{kind}": png(i) for i in range(4) for kind in ("png", "seg.png")})
    whole = (tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        members = tar.getmembers()
    ends = {member.offset_data + member.size: i for i, member in enumerate(members, 1)}
    for length in sorted({0, 100, 512, *(m.offset + d for m in members for d in (0, 1, 512, 700)), *ends}):
        (tmp_path / "x.tar").write_bytes(whole[:length])
        with pytest.raises(CorpusError, match=r"x\.tar is truncated or damaged .*, after \d complete samples") as error:
            open_corpus(tmp_path / "x.tar")
        told = int(str(error.value).split("after ")[1].split()[0])
        padded, complete = (sum(-(-end // b) * b <= length for end in ends) for b in (tarfile.BLOCKSIZE, 1))
        assert padded // 2 <= told <= -(-complete // 2), length
    damaged = bytearray(whole)
    damaged[members[4].offset : members[4].offset + 512] = b"\x07" * 512
    (tmp_path / "x.tar").write_bytes(damaged)
    with pytest.raises(CorpusError, match="after 2 complete samples"):
        open_corpus(tmp_path / "x.tar")


def test_a_tar_of_the_same_time_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tars_of(make_corpus(tmp_path / "p", count=6), tmp_path / "s", count=2)
    before = index_folder(folder)
    make_tar(folder / "001.tar", {"0.png": png(50), "1.png": png(51)})
    hashed: list[str] = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda *data: hashed.append("x") or sha256(*data))
    again = index_folder(folder, previous=before)
    assert len(hashed) == 2
    monkeypatch.undo()
    assert again.samples.equals(index_folder(folder).samples)


def test_tars_in_a_bucket_are_read_by_ranges(s3: S3Server, tmp_path: Path) -> None:
    from object_store import upload

    folder = tars_of(make_corpus(tmp_path / "p", count=9), tmp_path / "s", count=2)
    place = upload(folder, s3.bucket / "shards")
    ours, theirs = open_corpus(place), open_corpus(folder)
    columns = [name for name in theirs.samples.schema.names if name != "mtime_ns"]
    assert ours.samples.select(columns).equals(theirs.samples.select(columns))
    assert open_corpus(f"{place}/{{000..001}}.tar").samples.equals(ours.samples)
    s3.forget()
    assert contents(ours) == contents(theirs)
    assert sum(asked.num_bytes for asked in s3.served("GET")) == sum(map(len, contents(theirs).values()))
    with pytest.raises(CorpusError, match=r"1 of the 3 files do not exist"):
        open_corpus(f"{place}/{{000..002}}.tar")
    data = place.read("000.tar")
    place.write("000.tar", data[: len(data) // 2])
    with pytest.raises(CorpusError, match=r"000\.tar is truncated"):
        open_corpus(place)
