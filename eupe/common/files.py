"""Files: their atomic writing, their permissions, and their names as text.

A reader of a file or folder finds the old bytes, the new ones or nothing, whatever fails. A file is written beside its
final path under another name, flushed to the disk and renamed; then the rename is flushed.

The text of a name can be written down and turned back into the name's bytes. A name that is UTF-8 without control
characters is its own text. In any other name, each byte that cannot be written as it is becomes a character of a
private range, U+F000 plus the byte, as in Cygwin. Characters of that range that occur in a name are written in the same
way, byte by byte, so that no two names have the same text.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".__lock"
"""Suffix of files while they are written; tensorstore uses it, too, and its lists leave such files out."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; if the block succeeds, flush the file and rename it to `path`.

    The file is locked while its writer lives, so that `remove_unfinished` recognises what a killed writer left. If the
    block fails, nothing is left.

    Raises: OSError.
    """
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}{UNFINISHED}")
    try:
        with unfinished.open("xb") as file:
            with suppress(OSError):  # the file system has no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield unfinished
            # by name: a library may have put another file there
            # before the rename: a crash could otherwise leave `path` without its bytes
            sync(unfinished)
            unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_file(path: Path, blocks: Iterable[bytes] | bytes | str) -> None:
    """Write a whole file, given as bytes, text (written as UTF-8) or pieces; make missing folders.

    Raises: OSError, and whatever making the pieces raises; what was there before is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = (blocks.encode(),) if isinstance(blocks, str) else (blocks,) if isinstance(blocks, bytes) else blocks
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        file.writelines(pieces)


def publish(folder: Path, out: Path) -> None:
    """Flush everything in a folder to the disk, then rename it to `out`, which must be missing or an empty folder.

    Raises: OSError.
    """
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)
    folder.rename(out)
    sync(out.absolute().parent)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk.

    Raises: OSError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_open_as(path: Path, descriptor: int) -> bool:
    """Return whether the file open under a descriptor is still the one at `path`, neither removed nor replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def remove_unfinished(folder: Path) -> None:
    """Delete what killed writers left, at any depth; what a living writer has locked stays."""
    for path in folder.rglob(f"*{UNFINISHED}"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()
"""Umask, read once while there is one thread: it cannot be read without changing it."""


def share(path: Path) -> None:
    """Give a file or a folder the mode of this process's new ones; safetensors writes with 0600."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_UMASK)
