"""Where objects are kept: a local folder, `s3://BUCKET/PATH` or `gs://BUCKET/PATH`, through one small vocabulary.

Objects are written whole and atomically: a reader sees the old bytes, the new ones, or nothing. `AWS_ENDPOINT_URL` and
`AWS_REGION` name another S3 server; credentials are found as every AWS or Google client finds them. A server that
fails for a moment is asked again; one that stays silent is given up within some minutes.
"""

from __future__ import annotations

import errno
import io
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import tensorstore as ts

from eupe.errors import ConfigError, OutageError, StorageError
from eupe.files import write_file
from eupe.names import bytes_of, key_of, name_of

BLOCK_BYTES = 2**20
DOCUMENT_BYTES = 16 * 2**20
RANGE_BYTES = 8 * 2**20
"""Of one request, where an object is read from front to back."""
SCHEMES = {"s3": "s3", "gs": "gcs"}
"""Of a URL, to tensorstore's name of the driver."""

READS_AT_ONCE = 32
"""From an object store, where each read waits for the network."""
RETRIES = {"max_retries": 6, "initial_delay": "250ms", "max_delay": "4s"}
"""Of one request: about twelve seconds, where tensorstore by itself goes on for a quarter of an hour."""
SILENCE = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "20",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
"""When an attempt is given up on which no byte moves; tensorstore takes it from the environment, and has no limit."""

_context = ts.Context()


@dataclass(frozen=True)
class Place:
    """A folder of objects. `str(place)` is its absolute path, or its URL; names in it are as `key_of` writes them."""

    url: str

    @classmethod
    def of(cls, where: str | Path | Place) -> Place:
        """From what a user typed.

        Raises: ConfigError for a scheme that is not known, or a URL without a bucket.
        """
        if isinstance(where, Place):
            return where
        text = re.sub(r"^(s3|gs):/(?=[^/])", r"\1://", str(where))  # a Path has lost one of the slashes
        scheme, separator, rest = text.partition("://")
        if not separator:
            return cls(_absolute(text))
        if scheme == "file":
            return cls(_absolute(rest))
        if scheme not in SCHEMES:
            raise ConfigError(f"{text}: {scheme}:// is not supported; give a local path, s3://... or gs://...")
        if not rest.strip("/"):
            raise ConfigError(f"{text} names no bucket; give {scheme}://BUCKET/PATH")
        return cls(f"{scheme}://{rest.strip('/')}")

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        if not self.is_local:
            raise TypeError(f"{self} is not a folder on this machine")
        return self.url

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self.url.rstrip('/')}/{name_of(name)}")

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    @property
    def is_utf8(self) -> bool:
        """Whether the path can be written down; that of no object store cannot."""
        return not any("\udc80" <= each <= "\udcff" for each in self.url)

    @property
    def local(self) -> Path:
        """The folder; only of a local place."""
        assert self.is_local, self.url
        return Path(self.url)

    def path(self, name: str) -> Path:
        """The file of that name; only of a local place."""
        return self.local / name_of(name)

    def resolved(self) -> Place:
        """The folder without links on the way to it; of an object store the same place."""
        return Place(str(self.local.resolve())) if self.is_local else self

    @property
    def name(self) -> str:
        return key_of(self.url.rsplit("/", 1)[-1])

    @property
    def parent(self) -> Place:
        """Raises: ConfigError for a bucket."""
        parent = self.url.rpartition("/")[0]
        if not self.is_local and "://" not in parent:
            raise ConfigError(f"{self} is a bucket; name something in it")
        return Place(parent or "/")

    @property
    def bucket(self) -> str:
        """Scheme and bucket of an object store's place; empty for a disk."""
        return "" if self.is_local else "/".join(self.url.split("/")[:3])

    def threads(self, local: int) -> int:
        """How many objects to read at once: `local` on a disk, more where each read waits for the network."""
        return local if self.is_local else max(local, READS_AT_ONCE)

    def spec(self) -> dict[str, Any]:
        """Tensorstore's specification of this place as a key-value store; waiting for a server is bounded in it."""
        if self.is_local:
            if not self.is_utf8:
                raise StorageError(f"{self} cannot be read: its name is not UTF-8; rename it")
            return {"driver": "file", "path": f"{self.url.rstrip('/')}/"}
        scheme, _, rest = self.url.partition("://")
        bucket, _, path = rest.partition("/")
        driver = SCHEMES[scheme]
        spec: dict[str, Any] = {"driver": driver, "bucket": bucket, "path": f"{path}/" if path else ""}
        spec[f"{driver}_request_retries"] = RETRIES
        for name, seconds in SILENCE.items():
            os.environ.setdefault(name, seconds)
        return spec | (_s3_server() if scheme == "s3" else {})

    def read(self, name: str) -> bytes:
        """A whole object.

        Raises: FileNotFoundError; StorageError if it cannot be read.
        """
        try:
            result = self._objects.read(bytes_of(name)).result()
        except (ValueError, OSError, NotImplementedError) as error:
            raise storage_error(error, self / name, "read") from error
        if result.state != "value":
            raise FileNotFoundError(f"{self / name} does not exist")
        return bytes(result.value)

    def read_document(self, name: str) -> bytes:
        """A whole object that is some kilobytes long, as metadata is, whoever made it.

        Raises: FileNotFoundError; StorageError if it cannot be read, or has more than `DOCUMENT_BYTES`.
        """
        data = self.read_range(name, 0, DOCUMENT_BYTES + 1)
        if len(data) > DOCUMENT_BYTES:
            raise StorageError(f"{self / name} has more than {DOCUMENT_BYTES} bytes, so it is no metadata of a store")
        return data

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of an object from `start` on; fewer where it ends before.

        Raises: FileNotFoundError; StorageError if it cannot be read.
        """
        if self.is_local:
            try:
                with self.path(name).open("rb", buffering=0) as file:
                    return _pread(file.fileno(), start, length)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{self / name} does not exist") from error
            except OSError as error:
                raise storage_error(error, self / name, "read") from error
        for end in (start + length, None):  # tensorstore takes no range that goes beyond the end, but an open one
            try:
                result = self._objects.read(bytes_of(name), byte_range=slice(start, end)).result()
            except (ValueError, OSError, NotImplementedError) as error:
                if "OUT_OF_RANGE" not in str(error):
                    raise storage_error(error, self / name, "read") from error
                continue
            if result.state != "value":
                raise FileNotFoundError(f"{self / name} does not exist")
            return bytes(result.value)[:length]
        return b""

    def size(self, name: str) -> int:
        """Bytes of an object; of one in an object store found by asking for single bytes, some 60 of them for a GB.

        Raises: FileNotFoundError; StorageError if it cannot be read.
        """
        if self.is_local:
            try:
                return self.path(name).stat().st_size
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{self / name} does not exist") from error
            except OSError as error:
                raise StorageError(f"{self / name} cannot be read: {error}") from error
        beyond = 1
        while self.read_range(name, beyond - 1, 1):
            beyond *= 2
        return bisect_left(range(beyond), True, key=lambda place: not self.read_range(name, place, 1))

    def open(self, name: str) -> BinaryIO:
        """An object as a file to read and seek in; one in an object store is read in blocks of 8 MB.

        Raises: FileNotFoundError; StorageError if it cannot be read, then or later.
        """
        if self.is_local:
            try:
                return self.path(name).open("rb")
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{self / name} does not exist") from error
            except OSError as error:
                raise StorageError(f"{self / name} cannot be read: {error}") from error
        return io.BufferedReader(_RangedFile(self, name), RANGE_BYTES)

    def blocks(self, name: str) -> Iterator[bytes]:
        """A whole object piece by piece: a local file is never in memory as a whole.

        Raises: FileNotFoundError; StorageError if it cannot be read.
        """
        if not self.is_local:
            yield self.read(name)
            return
        try:
            with self.path(name).open("rb", buffering=0) as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"{self / name} cannot be read: {error}") from error

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name; one request.

        Raises: StorageError.
        """
        if self.is_local:
            return self.path(name).is_file()
        return bytes_of(name) in self._list(bytes_of(name), bytes_of(name) + b"\0")

    def write(self, name: str, data: bytes) -> None:
        """Put an object, replacing what is there, durably.

        Raises: StorageError.
        """
        self.write_blocks(name, (data,))

    def write_blocks(self, name: str, blocks: Iterable[bytes]) -> None:
        """`write`, of an object that comes in pieces; a local one is never in memory as a whole.

        Raises: StorageError; and what making the pieces raises. Nothing is put then.
        """
        if self.is_local:
            try:
                write_file(self.local / name, blocks)
            except OSError as error:
                raise storage_error(error, self) from error
            return
        data = b"".join(blocks)
        try:
            self._objects.write(bytes_of(name), data).result()
        except (ValueError, OSError, NotImplementedError) as error:
            raise storage_error(error, self) from error

    def create(self, name: str, data: bytes) -> bool:
        """Put an object only where there is none; False if there was one.

        Of several that try at once one succeeds: on a local disk, on Google's storage, and on S3 servers that honour
        `If-None-Match: *` (Amazon's does since 2024). On one that ignores it the last of them wins, and all are told
        that they made the object.

        Raises: StorageError.
        """
        return self.replace(name, data, None) is not None

    def generation(self, name: str) -> bytes | None:
        """Return what an object store calls the present content of an object; None where there is no object.

        Raises: StorageError.
        """
        try:
            found = self._objects.read(bytes_of(name)).result()
        except (ValueError, OSError, NotImplementedError) as error:
            raise storage_error(error, self) from error
        return bytes(found.stamp.generation) if found.state == "value" else None

    def replace(self, name: str, data: bytes | None, generation: bytes | None) -> bytes | None:
        """Put an object in place of one of a generation, or of none, or remove it; return the generation that it has.

        Args:
            data: None to remove it.
        Returns: None if the object is another by now, which stays.
        Raises: StorageError.
        """
        try:
            absent = self._objects.read(bytes_of(name)).result() if generation is None else None
            if absent is not None and absent.state == "value":
                return None
            condition = absent.stamp.generation if absent is not None else generation
            stamp = self._objects.write(bytes_of(name), data, if_equal=condition).result()
        except (ValueError, OSError, NotImplementedError) as error:
            raise storage_error(error, self) from error
        return bytes(stamp.generation) or None

    def list(self, prefix: str = "") -> list[str]:
        """Names of all objects, at any depth, that begin with a prefix; sorted.

        Raises: StorageError.
        """
        end = prefix.encode()[:-1] + bytes([prefix.encode()[-1] + 1]) if prefix else b""
        return sorted(key_of(os.fsdecode(key)) for key in self._list(prefix.encode(), end))

    def _list(self, first: bytes, end: bytes) -> Sequence[bytes]:
        try:
            keys: Sequence[bytes] = self._objects.list(ts.KvStore.KeyRange(first, end)).result()
        except (ValueError, OSError, NotImplementedError) as error:
            raise storage_error(error, self / first.decode(), "listed") from error
        return keys

    def delete(self, name: str) -> None:
        """Remove an object, if it is there.

        Raises: StorageError.
        """
        try:
            self._objects.write(bytes_of(name), None).result()
        except (ValueError, OSError, NotImplementedError) as error:
            raise storage_error(error, self) from error

    @cached_property
    def _objects(self) -> Any:
        return ts.KvStore.open(self.spec(), context=_context).result()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _absolute(path: str) -> str:
    """Storage libraries take no `..`; what it stands for depends on links, and without it these stay as they are."""
    whole = Path(path).absolute()
    return str(whole.resolve() if ".." in whole.parts else whole)


def _pread(descriptor: int, start: int, length: int) -> bytes:
    """As much of a range as there is, whatever a single call gives."""
    pieces, got = [], 0
    while got < length and (piece := os.pread(descriptor, length - got, start + got)):
        pieces.append(piece)
        got += len(piece)
    return b"".join(pieces)


class _RangedFile(io.RawIOBase):
    """An object, read by ranges."""

    def __init__(self, place: Place, name: str) -> None:
        self._place, self._name, self._at = place, name, 0

    @cached_property
    def _size(self) -> int:
        return self._place.size(self._name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at}
        self._at = offset + (self._size if whence == io.SEEK_END else base[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._place.read_range(self._name, self._at, len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


Where = str | Path | Place
"""As a user gives it."""


def _s3_server() -> dict[str, Any]:
    """Which server, and which credentials where the environment holds them."""
    spec: dict[str, Any] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        spec["aws_region"] = region
    if os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY"):
        spec["aws_credentials"] = {"type": "environment"}
    return spec


REFUSED = re.compile(
    r"PERMISSION_DENIED|UNAUTHENTICATED|http_response_code='40[13]'|InvalidAccessKeyId|Failed to get credentials"
)
UNANSWERED = re.compile(r"CURL error|retry attempts failed|UNAVAILABLE|DEADLINE_EXCEEDED")
OUTAGES = {errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENETDOWN}
"""What the system says of a disk of another machine that is away for a while; and EIO, of writing: of reading it may be
the one file that is bad for ever."""
OS_ERROR = re.compile(r"os_error_code='(\d+)'")
"""In tensorstore's messages."""


def is_outage(error: Exception) -> bool:
    """Whether an object store did not serve a request, which says nothing of the object."""
    return any(pattern.search(str(error)) for pattern in (REFUSED, UNANSWERED, re.compile("NoSuchBucket")))


def storage_error(error: Exception, where: Place | Path, verb: str = "written") -> StorageError:
    """One sentence for what the storage refused to do."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "No space left" in text or "RESOURCE_EXHAUSTED" in text or "quota" in text:
        return StorageError(
            f"no space left while writing {where}; the parts committed before are whole: free some space and run the "
            "same command again"
        )
    outages = OUTAGES | {errno.EIO} if verb == "written" else OUTAGES
    code = error.errno if isinstance(error, OSError) else OS_ERROR.search(text)
    lost = (int(code[1]) if isinstance(code, re.Match) else code) in outages
    if "://" in str(where):
        lost = UNANSWERED.search(text) is not None and not REFUSED.search(text) and "NoSuchBucket" not in text
        text = _server_words(text)
    return (OutageError if lost else StorageError)(f"{where} cannot be {verb}: {text}")


def without_password(url: str) -> str:
    """Return a URL as it may be shown: without a name and a password ahead of its host."""
    return re.sub(r"(://)[^/@]*@", r"\1", url)


def _server_words(text: str) -> str:
    """Of tensorstore's message, without the details of the request."""
    text = without_password(text)
    said = re.sub(r"^([A-Z_]+: )+", "", re.sub(r"\s*\[[\w-]+='.*", "", text, flags=re.DOTALL))
    if "NoSuchBucket" in text:
        return "the bucket does not exist"
    if REFUSED.search(text):
        return f"the server refuses access ({said}); check the credentials and what they allow"
    if UNANSWERED.search(text):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        server = f"the server {without_password(endpoint)}" if endpoint else "the server"
        fault = "does not answer" if "CURL error" in text else "keeps failing"
        return f"{server} {fault} ({said}); once it serves, run the same command again"
    return said
