"""Any name of a file has one text, which can be written down, shown, and turned back into the name's bytes."""

import os

from hypothesis import example, given
from hypothesis import strategies as st

from eupe.common.files import bytes_of, shown
from eupe.names import key_of, name_of

ODD = st.text(st.sampled_from("aé\\%.\n\x1b\x7f\x85\u202f\uf022\uf0e9\uf00a\U0001f468\u200d")).map(os.fsencode)


@given(st.lists(st.one_of(st.binary(max_size=8), ODD), max_size=4))
@example([b"caf\xe9", "caf\uf0e9".encode(), "café".encode(), b"caf\\xe9", b"caf%E9"])
def test_each_name_has_a_text_of_its_own(names: list[bytes]) -> None:
    keys = [key_of(os.fsdecode(name)) for name in names]
    assert [bytes_of(key) for key in keys] == names
    assert [os.fsencode(name_of(key)) for key in keys] == names
    assert len(set(keys)) == len(set(names))
    for key in keys:
        key.encode()
        assert not any(ord(each) < 32 or 127 <= ord(each) < 160 for each in key)


@given(st.text())
def test_a_name_that_can_be_written_is_its_own_text(name: str) -> None:
    if name.isprintable():
        assert key_of(name) == name_of(name) == shown(name) == name


def test_spaces_and_joiners_of_file_names_stay_as_they_are() -> None:
    for name in (
        "Screenshot 9.41\u202fAM.png",
        "v\u00a013.05",
        "東京\u3000タワー",
        "\U0001f468\u200d\U0001f469",
        "soft\u00adhyphen",
    ):
        assert key_of(name) == name == shown(name)


def test_nothing_shown_steers_a_terminal() -> None:
    assert shown(key_of(os.fsdecode(b"a\xe9\x1b[2J\n\t.png"))) == r"a\xe9\x1b[2J\x0a\x09.png"
    assert shown("two\nlines\x1b[0m \u202egnp.exe\u2066") == "two\nlines\\x1b[0m \\u202egnp.exe\\u2066"
