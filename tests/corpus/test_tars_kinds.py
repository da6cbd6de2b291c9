"""What people call members of tars: keys of samples, dotted names, class folders, links, odd labels and captions.

Each case says all pictures that are to be taken; what a naive reader by `tarfile` finds must be them, byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from containers import make_tar, png

from eupe.common.storage import StoragePath
from eupe.corpus.choice import AS_FOUND, Choice
from eupe.corpus.index import Corpus, open_corpus, read_index
from eupe.corpus.pictures import insides, read_picture
from eupe.corpus.tars import tar_rows
from eupe.errors import CorpusError

CAPTION, JSON = b"a caption", b'{"label": "x", "class": 3}'


def opened(path: Path, choice: Choice = AS_FOUND) -> dict[str, dict[str, Any]]:
    """Rows of an index by member, held against `tarfile`; every member is a row or counted."""
    corpus = open_corpus(path, choice=choice)
    rows = {row["key"].removeprefix(f"{path.name}/"): row for row in corpus.samples.to_pylist()}
    with tarfile.open(path) as tar:
        assert corpus.num_found == sum(not member.isdir() for member in tar.getmembers())
        names = {member.name.removeprefix("./"): member for member in tar.getmembers()}
        for name, inside in zip(rows, insides(corpus.samples), strict=True):
            file = tar.extractfile(names[name])
            assert file is not None
            data = file.read()
            assert read_picture(corpus.root, f"{path.name}/{name}", inside) == data
            assert rows[name]["sha256"] == hashlib.sha256(data).hexdigest() and rows[name]["num_bytes"] == len(data)
    return rows


def members(*names: str) -> dict[str, bytes]:
    kinds = {"txt": CAPTION, "json": JSON, "cls": b"7"}
    return {name: kinds.get(name.rpartition(".")[2], png(i)) for i, name in enumerate(names)}


PAIRS = members(*(f"s{i}.{key}" for i in range(3) for key in ("input.jpg", "output.jpg")))
TWO_KINDS = members(*(f"s{i}.{key}" for i in range(3) for key in ("jpg", "png", "json")))
MASKS = members(*(f"s{i}.{key}" for i in range(3) for key in ("jpg", "seg.png")))
FRAMES = members(*(f"s{i}.{key}" for i in range(3) for key in ("0.jpg", "1.jpg", "json")))


@pytest.mark.parametrize(
    ("contents", "taken"),
    [
        (
            members(*(f"s{i}.{key}" for i in range(3) for key in ("input.jpg", "outputs.txt"))),
            "s0.input.jpg s2.input.jpg",
        ),
        (members("a/img_1.5.jpg", "a/img_1.6.jpg", "a/2024.01.02.jpg", "b/ok.jpg", "b/ok2.jpg"), None),
        (members(*(f"{kind}.{i}.jpg" for kind in ("cat", "dog") for i in range(3))), None),
        (
            members("p/John.Smith.jpg", "p/John.Doe.jpg", "p/x.jpg", "p/x.png", "p/y.jpg", "p/z.JPG", "p/z.final.jpg"),
            None,
        ),
        (members(*(f"v{i}.{k}.jpeg" for i in range(3) for k in range(3))), None),
        (
            members("a/1.5.jpg", "a/1.5.txt", "a/1.6.jpg", "a/1.6.txt", "a/ok.jpg", "a/ok.txt"),
            "a/1.5.jpg a/1.6.jpg a/ok.jpg",
        ),
        (members("a.jpg.jpg", "b.jpg.jpg", "c.jpg"), None),
        (MASKS, "s0.jpg s1.jpg s2.jpg"),
    ],
)
def test_pictures_that_stand_for_themselves(tmp_path: Path, contents: Mapping[str, bytes], taken: str | None) -> None:
    rows = opened(make_tar(tmp_path / "x.tar", contents))
    if taken is None:
        assert list(rows) == list(contents)
    else:
        assert set(taken.split()) <= set(rows) and not any(name.endswith((".txt", "seg.png")) for name in rows)
    captioned = {name for name in rows if f"{name.rpartition('.')[0]}.txt" in contents}
    assert {name for name, row in rows.items() if row["caption"] == CAPTION.decode()} == captioned


@pytest.mark.parametrize(
    ("contents", "keys"),
    [(PAIRS, ("input.jpg", "output.jpg")), (TWO_KINDS, ("jpg", "png")), (FRAMES, ("0.jpg", "1.jpg"))],
)
def test_which_of_several_pictures_is_a_choice(
    tmp_path: Path, contents: Mapping[str, bytes], keys: tuple[str, str]
) -> None:
    path = make_tar(tmp_path / "x.tar", contents)
    with pytest.raises(CorpusError, match=rf"two pictures.*--image-key {keys[0]} \(3 pictures\), {keys[1]} \(3"):
        open_corpus(path)
    for key in keys:
        assert list(opened(path, Choice(image_key=key))) == [f"s{i}.{key}" for i in range(3)]
    every = opened(path, Choice(image_key="*"))
    assert list(every) == [name for name in contents if not name.endswith(".json")]
    with pytest.raises(CorpusError, match=rf"has no picture called depth\.png; --image-key may be {keys[0]}"):
        open_corpus(path, choice=Choice(image_key="depth.png"))


def test_a_mask_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", MASKS)
    assert list(opened(path, Choice(image_key="seg.png"))) == [f"s{i}.seg.png" for i in range(3)]


def labels(path: Path, choice: Choice = AS_FOUND) -> dict[str, str | None]:
    return {name: row["label"] for name, row in opened(path, choice).items()}


def test_class_folders_are_labels_where_no_file_tells_them(tmp_path: Path) -> None:
    def tar(*names: str) -> Path:
        return make_tar(tmp_path / "x.tar", members(*names))

    assert labels(tar("./a/0.jpg", "./b/1.jpg")) == {"a/0.jpg": "a", "b/1.jpg": "b"}
    assert set(labels(tar("top/a/0.jpg", "top/b/1.jpg", "top/README.txt")).values()) == {"a", "b"}
    assert set(labels(tar("top/a/x/0.jpg", "top/b/y/1.jpg")).values()) == {"a", "b"}
    assert set(labels(tar("f/train/a/0.jpg", "f/train/b/1.jpg", "f/val/a/2.jpg")).values()) == {"a", "b"}
    assert set(labels(tar("cats/0.jpg", "cats/1.jpg")).values()) == {"cats"}
    assert labels(tar("train/0.jpg", "1.jpg")) == {"train/0.jpg": None, "1.jpg": None}
    assert labels(tar("a/0.jpg", "b/1.jpg", "b/1.txt")) == {"a/0.jpg": None, "b/1.jpg": None}, "a WebDataset"


def test_an_entry_of_json_is_chosen_as_the_label(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", members("0.jpg", "0.json"))
    assert labels(path) == {"0.jpg": "x"} and labels(path, Choice(label_column="class")) == {"0.jpg": "3"}
    assert "there is also" not in str(open_corpus(path, choice=Choice(label_column="class")).notes)
    assert "labels are taken from `label` of each .json, or else class" in str(open_corpus(path).notes)
    with pytest.raises(
        CorpusError, match=r"--label-column breed is not in any \.json of .*x\.tar; they have label, class"
    ):
        open_corpus(path, choice=Choice(label_column="breed"))


def linked(folder: Path) -> Path:
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(2):
            (folder / name / f"{i}.png").write_bytes(png(10 * i + ord(name)))
    os.link(folder / "a" / "0.png", folder / "b" / "hard.png")
    for name, target in (
        ("b/soft.png", "../a/1.png"),
        ("b/over.png", "../c/1.png"),
        ("b/chain.png", "soft.png"),
        ("c", "a"),
        ("b/gone.png", "../a/9.png"),
        ("b/out.png", "/etc/out.png"),
        ("b/loop.png", "loop.png"),
    ):
        (folder / name).symlink_to(target)
    return folder


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_link_is_the_picture_that_it_leads_to(tmp_path: Path, format: int) -> None:
    folder = linked(tmp_path / "f")
    with tarfile.open(tmp_path / "x.tar", "w", format=format) as tar:
        tar.add(folder, ".")
    corpus = open_corpus(tmp_path / "x.tar")
    data = {
        key.removeprefix("x.tar/"): read_picture(corpus.root, key, inside)
        for key, inside in zip(corpus.samples["key"].to_pylist(), insides(corpus.samples), strict=True)
    }
    links = ("b/hard.png", "b/soft.png", "b/over.png", "b/chain.png")
    assert data == {name: (folder / name).read_bytes() for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png", *links)}
    assert corpus.left_out == {"links to folders": 1, "links to what is not in their tar": 3}
    assert {row["label"] for row in corpus.samples.to_pylist()} == {"a", "b"}


BAD_WORDS = {
    "txt": [b"caf\xe9", b"\xff\xfea\0"],
    "cls": [b"caf\xe9"],
    "json": [b'{"caption": "a", }', b"{", b"caf\xe9", b"[" * 100_000, b"1" * 5000],
}


def test_a_caption_that_cannot_be_read_costs_that_caption(tmp_path: Path) -> None:
    bad = [(kind, data) for kind, texts in BAD_WORDS.items() for data in texts]
    contents = {"ok.png": png(99), "ok.txt": b"ok", "half.png": png(98), "half.json": b'{"caption": "\\ud800x"}'}
    contents |= {"bom.png": png(97), "bom.json": b'\xef\xbb\xbf{"caption": "bom", "label": NaN}'}
    for i, (kind, data) in enumerate(bad):
        contents |= {f"{i}.png": png(i), f"{i}.{kind}": data}
    rows = opened(make_tar(tmp_path / "x.tar", contents))
    assert len(rows) == 3 + len(bad)
    assert {row["caption"] for name, row in rows.items() if name[0].isdigit()} == {None}
    assert [rows[f"{name}.png"]["caption"] for name in ("ok", "half", "bom")] == ["ok", "?x", "bom"]
    assert {row["label"] for row in rows.values()} == {None}
    counted = open_corpus(tmp_path / "x.tar").left_out
    for kind, texts in BAD_WORDS.items():
        assert counted[f"label and caption files that cannot be read: .{kind}"] == len(texts)


def test_a_choice_is_part_of_the_index_and_the_command_line(tmp_path: Path, run_eupe: Any) -> None:
    path, out = make_tar(tmp_path / "x.tar", TWO_KINDS), tmp_path / "i.parquet"
    command = ("index", "--corpus", path, "--out", out)
    outcome = run_eupe(*command)
    assert outcome.code == 2 and "choose one with --image-key jpg (3 pictures), png (3 pictures)" in outcome.err
    outcome = run_eupe(*command, "--image-key", "png")
    assert outcome.code == 0 and "note: labels are taken from `label` of each .json" in outcome.out, outcome.err
    index = read_index(out)
    assert index.choice == Choice(image_key="png") and index.notes
    assert index.samples["key"].to_pylist() == [f"x.tar/s{i}.png" for i in range(3)]
    assert run_eupe(*command, "--image-key", "jpg", "--label-column", "class").code == 0
    assert read_index(out).samples["label"].to_pylist() == ["3"] * 3
    again = run_eupe("index", "--corpus", out, "--out", tmp_path / "j.parquet", "--image-key", "png")
    assert (
        again.code == 2
        and "was made with --image-key jpg --label-column class; --image-key png has an effect only when" in again.err
    )


def test_memory_grows_by_the_members_not_by_what_is_in_them(tmp_path: Path) -> None:
    huge = {f"{i}.json": b'{"caption": "c", "other": "' + bytes([97]) * 2**20 + b'"}' for i in range(12)}
    contents = {
        name: data for i in range(12) for name, data in ((f"{i}.png", png(i)), (f"{i}.json", huge[f"{i}.json"]))
    }
    make_tar(tmp_path / "x.tar", contents | {"big.png": png(50), "big.txt": bytes(17 * 2**20)})
    tracemalloc.start()
    found = tar_rows(StoragePath.of(tmp_path), "x.tar", {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.rows) == 13 and peak < 6 * 2**20
    assert found.left_out["label and caption files that cannot be read: .txt"] == 1


def test_an_earlier_index_vouches_for_links_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(linked(tmp_path / "f"), ".")
    before: Corpus = open_corpus(tmp_path / "x.tar")
    monkeypatch.setattr(hashlib, "sha256", lambda *data: pytest.fail("a picture was hashed again"))
    assert open_corpus(tmp_path / "x.tar", previous=before).samples.equals(before.samples)


def test_members_that_are_no_files_are_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (
            ("pipe.png", tarfile.FIFOTYPE),
            ("folder.png", tarfile.DIRTYPE),
            ("device", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        info = tarfile.TarInfo("a.png")
        info.size = len(png(1))
        tar.addfile(info, io.BytesIO(png(1)))
    assert list(opened(tmp_path / "x.tar")) == ["a.png"]
    assert open_corpus(tmp_path / "x.tar").left_out == {"members that are neither files nor links": 2}
