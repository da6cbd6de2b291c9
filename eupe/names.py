"""Names of files as text that can be written down and turned back into the name's bytes.

A name that is UTF-8 without control characters is its own text. In any other name, each byte that cannot be written as
it is becomes a character of a private range, U+F000 plus the byte, as in Cygwin. Characters of that range that occur in
a name are written in the same way, byte by byte, so that no two names have the same text.
"""

from __future__ import annotations

import os
import re

PRIVATE = 0xF000
_RANGE = "\uf000-\uf01f\uf07f-\uf0ff"
"""Characters that stand for control characters and for bytes that are not UTF-8."""
_WRITTEN = re.compile(f"[{_RANGE}]")
_UNWRITABLE = re.compile(f"[\x00-\x1f\x7f-\x9f\ud800-\udfff{_RANGE}]")
_NOT_SHOWN = re.compile(
    f"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff{_RANGE}\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
"""Those, and characters that change a line's direction or end it invisibly."""


def key_of(name: str) -> str:
    """Return the text of a name as Python has it, with bytes that are not UTF-8 as surrogates."""
    return _UNWRITABLE.sub(lambda match: "".join(chr(PRIVATE + byte) for byte in _bytes(match[0])), name)


def name_of(key: str) -> str:
    """Return the name, as Python has it, of a text made by `key_of`."""
    if _WRITTEN.search(key) is None:
        return key
    return b"".join(bytes([ord(each) - PRIVATE]) if _WRITTEN.match(each) else each.encode() for each in key).decode(
        errors="surrogateescape"
    )


def bytes_of(key: str) -> bytes:
    """Return the bytes of the name of a text made by `key_of`."""
    return os.fsencode(name_of(key))


def _bytes(character: str) -> bytes:
    # Python has such a surrogate for a byte that is not UTF-8; any other surrogate is encoded as it is
    lone_byte = "\udc80" <= character <= "\udcff"
    return character.encode(errors="surrogateescape" if lone_byte else "surrogatepass")


def shown(text: str) -> str:
    r"""Return text that is safe for a terminal: what would control it is spelled out, such as `\x1b` or `\u202e`."""
    return _NOT_SHOWN.sub(lambda match: _spelled(ord(match[0])), text)


def _spelled(code: int) -> str:
    for first in (PRIVATE, 0xDC00):  # ranges that stand for bytes: of `key_of`, and of Python
        code -= first if first <= code < first + 256 else 0
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
