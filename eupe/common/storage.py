"""Storage paths: a local folder, `s3://BUCKET/PATH` or `gs://BUCKET/PATH`, behind one small interface.

Objects are written whole and atomically: a reader sees the old bytes, the new ones, or nothing. `AWS_ENDPOINT_URL` and
`AWS_REGION` name another S3 server; credentials are found as every AWS or Google client finds them. Requests to a
server that fails briefly are retried; a server that stays silent is given up within some minutes.
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

from eupe.common.files import bytes_of, key_of, name_of, write_file
from eupe.errors import ConfigError, OutageError, StorageError

BLOCK_BYTES = 2**20
DOCUMENT_BYTES = 16 * 2**20
"""Upper bound on a metadata document."""
RANGE_BYTES = 8 * 2**20
"""Size of one request when an object is read sequentially."""
SCHEMES = {"s3": "s3", "gs": "gcs"}
"""Scheme of a URL to tensorstore's name of the driver."""

READS_AT_ONCE = 32
"""Number of reads at once from an object store, where each waits for the network."""
RETRIES = {"max_retries": 6, "initial_delay": "250ms", "max_delay": "4s"}
"""Retries of one request, about twelve seconds in all; tensorstore's default is a quarter of an hour."""
SILENCE = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "10",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "20",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}
"""Limits for an attempt on which no byte moves; tensorstore reads them from the environment and has none by default."""

_context = ts.Context()


@dataclass(frozen=True)
class StoragePath:
    """A folder of objects. `str(place)` is its absolute path or its URL; names in it are written as by `key_of`."""

    url: str

    @classmethod
    def of(cls, where: str | Path | StoragePath) -> StoragePath:
        """Build a place from what a user typed.

        Raises: ConfigError for an unknown scheme, or a URL without a bucket.
        """
        if isinstance(where, StoragePath):
            return where
        text = re.sub(r"^(s3|gs):/(?=[^/])", r"\1://", str(where))  # pathlib keeps only one slash
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

    def __truediv__(self, name: str) -> StoragePath:
        return StoragePath(f"{self.url.rstrip('/')}/{name_of(name)}")

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    @property
    def is_utf8(self) -> bool:
        """Return whether the path is UTF-8; that of an object store always is."""
        return not any("\udc80" <= each <= "\udcff" for each in self.url)

    @property
    def local(self) -> Path:
        """Return the folder; only for a local place."""
        assert self.is_local, self.url
        return Path(self.url)

    def path(self, name: str) -> Path:
        """Return the path of an object; only for a local place."""
        return self.local / name_of(name)

    def resolved(self) -> StoragePath:
        """Return the place without links on its path; a place in an object store stays as it is."""
        return StoragePath(str(self.local.resolve())) if self.is_local else self

    @property
    def name(self) -> str:
        return key_of(self.url.rsplit("/", 1)[-1])

    @property
    def parent(self) -> StoragePath:
        """Return the folder around this place.

        Raises: ConfigError for a bucket.
        """
        parent = self.url.rpartition("/")[0]
        if not self.is_local and "://" not in parent:
            raise ConfigError(f"{self} is a bucket; give a path in it")
        return StoragePath(parent or "/")

    @property
    def bucket(self) -> str:
        """Return scheme and bucket of a place in an object store; empty for a local one."""
        return "" if self.is_local else "/".join(self.url.split("/")[:3])

    def threads(self, local: int) -> int:
        """Return how many objects to read at once: `local` on a disk, more if each read waits for the network."""
        return local if self.is_local else max(local, READS_AT_ONCE)

    def spec(self) -> dict[str, Any]:
        """Return tensorstore's specification of this place as a key-value store, with bounded waiting for a server.

        Raises: StorageError for a local path that is not UTF-8.
        """
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
        """Read a whole object.

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
        """Read a whole small object, such as metadata, from an untrusted source.

        Raises: FileNotFoundError; StorageError if it cannot be read, or has more than `DOCUMENT_BYTES`.
        """
        data = self.read_range(name, 0, DOCUMENT_BYTES + 1)
        if len(data) > DOCUMENT_BYTES:
            raise StorageError(f"{self / name} has more than {DOCUMENT_BYTES} bytes, so it is not metadata of a store")
        return data

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Read `length` bytes of an object from `start` on; fewer if it ends before.

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
        for end in (start + length, None):  # tensorstore refuses a range beyond the end, not an open one
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
        """Return the size of an object in bytes; in an object store by reading single bytes, about 60 for a GB.

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
        """Open an object as a file to read and seek in; one in an object store is read in blocks of 8 MB.

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
        """Yield a whole object piece by piece; a local file is never in memory as a whole.

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
        """Return whether there is an object of this name, by one request.

        Raises: StorageError.
        """
        if self.is_local:
            return self.path(name).is_file()
        # a range of keys that holds only this one, however many names begin with it
        return bytes_of(name) in self._list(bytes_of(name), bytes_of(name) + b"\0")

    def write(self, name: str, data: bytes) -> None:
        """Write an object durably, replacing what is there.

        Raises: StorageError.
        """
        self.write_blocks(name, (data,))

    def write_blocks(self, name: str, blocks: Iterable[bytes]) -> None:
        """Write an object that comes in pieces, as `write` does; a local one is never in memory as a whole.

        Raises: StorageError, and whatever making the pieces raises; then nothing is written.
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
        """Write an object only if there is none; return False if there is one.

        If several writers try at once, one succeeds: on a local disk, on Google's storage, and on S3 servers that
        honour `If-None-Match: *` (Amazon's does since 2024). On a server that ignores it the last writer wins, and each
        gets True.

        Raises: StorageError.
        """
        return self.replace(name, data, None) is not None

    def generation(self, name: str) -> bytes | None:
        """Return the storage's identifier of an object's present content; None if there is no object.

        Raises: StorageError.
        """
        try:
            found = self._objects.read(bytes_of(name)).result()
        except (ValueError, OSError, NotImplementedError) as error:
            raise storage_error(error, self) from error
        return bytes(found.stamp.generation) if found.state == "value" else None

    def replace(self, name: str, data: bytes | None, generation: bytes | None) -> bytes | None:
        """Replace, create or remove an object on the condition of its generation; return its new generation.

        Args:
            data: new content; None to remove the object.
            generation: generation that the object must have; None if there must be no object.
        Returns: None if the object has another generation by now; it then stays as it is.
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
        """List the names of all objects, at any depth, that begin with a prefix; sorted.

        Raises: StorageError.
        """
        # the first key after all that begin with the prefix
        end = prefix.encode()[:-1] + bytes([prefix.encode()[-1] + 1]) if prefix else b""
        return sorted(key_of(os.fsdecode(key)) for key in self._list(prefix.encode(), end))

    def _list(self, first: bytes, end: bytes) -> Sequence[bytes]:
        try:
            keys: Sequence[bytes] = self._objects.list(ts.KvStore.KeyRange(first, end)).result()
        except (ValueError, OSError, NotImplementedError) as error:
            raise storage_error(error, self / first.decode(), "listed") from error
        return keys

    def delete(self, name: str) -> None:
        """Remove an object if it exists.

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
    """Return an absolute path without `..`, which storage libraries refuse.

    A path with `..` is resolved, since what that means depends on links; any other path keeps its links.
    """
    whole = Path(path).absolute()
    return str(whole.resolve() if ".." in whole.parts else whole)


def _pread(descriptor: int, start: int, length: int) -> bytes:
    """Read as much of a range as there is, although a single call may return less."""
    pieces, got = [], 0
    while got < length and (piece := os.pread(descriptor, length - got, start + got)):
        pieces.append(piece)
        got += len(piece)
    return b"".join(pieces)


class _RangedFile(io.RawIOBase):
    """An object as a file, read by ranges."""

    def __init__(self, place: StoragePath, name: str) -> None:
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


AnyPath = str | Path | StoragePath
"""Storage path as a user gives it."""


def _s3_server() -> dict[str, Any]:
    """Return the S3 server, and the source of credentials if the environment holds them, for tensorstore."""
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
"""Error codes of a network disk that is away for a while. EIO is another when writing; when reading, it may be one file
that is damaged for good."""
OS_ERROR = re.compile(r"os_error_code='(\d+)'")
"""Error code in tensorstore's messages."""


def is_outage(error: Exception) -> bool:
    """Return whether an object store did not serve a request, which says nothing about the object."""
    return any(pattern.search(str(error)) for pattern in (REFUSED, UNANSWERED, re.compile("NoSuchBucket")))


def storage_error(error: Exception, where: StoragePath | Path, verb: str = "written") -> StorageError:
    """Build the error, one sentence, for a request that the storage refused."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "No space left" in text or "RESOURCE_EXHAUSTED" in text or "quota" in text:
        return StorageError(
            f"no space left while writing {where}; the parts committed before are intact: free some space and run "
            "the same command again"
        )
    outages = OUTAGES | {errno.EIO} if verb == "written" else OUTAGES
    code = error.errno if isinstance(error, OSError) else OS_ERROR.search(text)
    lost = (int(code[1]) if isinstance(code, re.Match) else code) in outages
    if "://" in str(where):
        lost = UNANSWERED.search(text) is not None and not REFUSED.search(text) and "NoSuchBucket" not in text
        text = _server_words(text)
    return (OutageError if lost else StorageError)(f"{where} cannot be {verb}: {text}")


def without_password(url: str) -> str:
    """Return a URL as it may be shown: without the name and password before its host."""
    return re.sub(r"(://)[^/@]*@", r"\1", url)


def _server_words(text: str) -> str:
    """Return the reason in tensorstore's message, without the details of the request."""
    text = without_password(text)
    said = re.sub(r"^([A-Z_]+: )+", "", re.sub(r"\s*\[[\w-]+='.*", "", text, flags=re.DOTALL))
    if "NoSuchBucket" in text:
        return "the bucket does not exist"
    if REFUSED.search(text):
        return f"the server refuses access ({said}); check the credentials and their permissions"
    if UNANSWERED.search(text):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        server = f"the server {without_password(endpoint)}" if endpoint else "the server"
        fault = "does not answer" if "CURL error" in text else "keeps failing"
        return f"{server} {fault} ({said}); once it answers, run the same command again"
    return said
