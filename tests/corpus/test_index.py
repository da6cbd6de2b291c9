import hashlib
import os
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import make_corpus, picture

from eupe.corpus import folder as folders
from eupe.corpus.index import Corpus, fingerprint, index_folder, open_corpus, read_index, write_index
from eupe.errors import CorpusError


def test_rows_are_the_pictures_sorted_with_their_hashes_and_labels(tmp_path: Path) -> None:
    make_corpus(tmp_path, count=7, classes=2)
    picture(9).save(tmp_path / "loose.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    rows = index_folder(tmp_path).samples.to_pylist()
    expected = sorted(p for p in tmp_path.rglob("*") if p.suffix.lower() == ".png" and p.name[0] != ".")
    assert [row["key"] for row in rows] == sorted(p.relative_to(tmp_path).as_posix() for p in expected)
    for row in rows:
        data = (tmp_path / row["key"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["num_bytes"] == len(data)
    assert {row["label"] for row in rows} == {"class0", "class1", None}


def test_the_fingerprint_changes_with_content_and_names_only(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "a", count=4)
    first = index_folder(corpus).fingerprint
    (corpus / "class0" / "0000.png").touch()
    assert index_folder(corpus).fingerprint == first
    assert index_folder(make_corpus(tmp_path / "b", count=4)).fingerprint == first
    (corpus / "class0" / "0000.png").rename(corpus / "class0" / "renamed.png")
    renamed = index_folder(corpus).fingerprint
    picture(50).save(corpus / "class0" / "renamed.png")
    assert len({first, renamed, index_folder(corpus).fingerprint}) == 3


def test_unchanged_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(tmp_path / "c", count=4)
    before = index_folder(corpus)
    picture(60).save(corpus / "class1" / "0001.png")
    opened: list[str] = []
    hash_of = folders._hash_of
    monkeypatch.setattr(folders, "_hash_of", lambda path: opened.append(path.name) or hash_of(path))
    again = index_folder(corpus, previous=before)
    assert opened == ["0001.png"]
    monkeypatch.undo()
    assert again.fingerprint == index_folder(corpus).fingerprint


def test_an_index_of_another_folder_is_not_trusted(tmp_path: Path) -> None:
    corpus, twin = make_corpus(tmp_path / "c", count=3), make_corpus(tmp_path / "t", count=3)
    picture(61).save(twin / "class0" / "0000.png")
    size = (corpus / "class0" / "0000.png").stat().st_size
    (twin / "class0" / "0000.png").write_bytes((twin / "class0" / "0000.png").read_bytes()[:size].ljust(size, b"x"))
    for folder in (corpus, twin):
        for path in folder.rglob("*.png"):
            os.utime(path, (1, 1))
    honest = index_folder(twin).fingerprint
    assert index_folder(twin, previous=index_folder(corpus)).fingerprint == honest


def test_an_index_stands_in_for_its_folder(tmp_path: Path) -> None:
    corpus = index_folder(make_corpus(tmp_path / "c", count=5))
    write_index(corpus, tmp_path / "i.parquet")
    again = open_corpus(tmp_path / "i.parquet")
    assert again.root == corpus.root
    assert again.samples.equals(corpus.samples)
    assert again.pick(limit=2).samples.equals(corpus.samples.slice(0, 2))


def keys_of(corpus: Corpus) -> list[str]:
    return corpus.samples["key"].to_pylist()  # type: ignore[no-any-return]


def test_pictures_are_picked_by_patterns(tmp_path: Path) -> None:
    corpus = index_folder(make_corpus(tmp_path / "c", count=9))
    everything = keys_of(corpus)
    assert keys_of(corpus.pick()) == everything
    first = [key for key in everything if key.startswith("class0/")]
    assert 0 < len(first) < 9 and keys_of(corpus.pick(include=["class0/*"])) == first
    assert keys_of(corpus.pick(include=["class0/*", "*.jpg"])) == first
    assert keys_of(corpus.pick(exclude=["class0/*"])) == [key for key in everything if key not in first]
    one = first[0]
    assert one not in keys_of(corpus.pick(include=["class0/*"], exclude=[f"*/{one.split('/')[1]}"]))
    with pytest.raises(CorpusError, match=rf"leave none of the 9 pictures of .*, like {everything[0]}"):
        corpus.pick(include=["0000.png"])


def test_a_shuffled_corpus_is_the_same_pictures_in_another_order(tmp_path: Path) -> None:
    corpus = index_folder(make_corpus(tmp_path / "c", count=24))
    zero, one = (corpus.pick(shuffle=seed) for seed in (0, 1))
    assert zero.fingerprint == one.fingerprint == corpus.fingerprint
    assert sorted(keys_of(zero)) == keys_of(corpus) != keys_of(zero) != keys_of(one)
    assert zero.samples.equals(corpus.pick(shuffle=0).samples)
    some = corpus.pick(shuffle=0, limit=7)
    assert keys_of(some) == keys_of(zero)[:7] and len({key.split("/")[0] for key in keys_of(some)}) > 1
    rows = {row["key"]: row for row in corpus.samples.to_pylist()}
    assert all(row == rows[row["key"]] for row in some.samples.to_pylist())


def test_an_unreadable_file_is_a_row_without_a_hash(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, count=2)
    (corpus / "class0" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    rows = {row["key"]: row for row in index_folder(corpus).samples.to_pylist()}
    assert rows["class0/dangling.png"]["sha256"] is None
    assert rows["class0/0000.png"]["sha256"] is not None


def test_refusals_say_what_and_where(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        open_corpus(tmp_path / "missing")
    with pytest.raises(CorpusError, match="holds no picture"):
        open_corpus(tmp_path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CorpusError, match="cannot be read as Parquet"):
        open_corpus(tmp_path / "x.parquet")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(CorpusError, match="neither a folder"):
        open_corpus(tmp_path / "x.zip")
    corpus = make_corpus(tmp_path / "c", count=1)
    write_index(index_folder(corpus), tmp_path / "i.parquet")
    corpus.rename(tmp_path / "moved")
    with pytest.raises(CorpusError, match="does not exist"):
        read_index(tmp_path / "i.parquet")


@given(
    st.dictionaries(
        st.text("aé~/-9", min_size=1, max_size=4),
        st.one_of(st.none(), st.text("0f", min_size=1, max_size=3)),
        min_size=1,
    ),
    st.integers(1, 4),
)
def test_the_fingerprint_is_that_of_a_naive_loop(rows: dict[str, str | None], at_once: int) -> None:
    lines = [f"{key}\0{sha256 or 'unreadable'}\n" for key, sha256 in sorted(rows.items())]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    with mock.patch("eupe.corpus.index.ROWS_AT_ONCE", at_once):
        for order in (list(rows), sorted(rows)):
            table = pa.table({"key": order, "sha256": pa.array([rows[key] for key in order], pa.string())})
            assert fingerprint(pa.concat_tables([table.slice(0, 1), table.slice(1)])) == expected
