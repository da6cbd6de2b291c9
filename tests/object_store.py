"""A real S3 server on this machine, which remembers what it was asked and fails when it is told to."""

from __future__ import annotations

import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import boto3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

from eupe.common.storage import StoragePath

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


@dataclass(frozen=True)
class Asked:
    """One request, and how much the answer carried."""

    method: str
    key: str
    """Below the bucket; empty for a listing."""
    byte_range: str | None
    status: int
    num_bytes: int


@dataclass(frozen=True)
class Fault:
    """An error that is sent in place of the server's answer, to the requests for which `holds_for` is true."""

    status: int
    code: str
    holds_for: Callable[[str, str], bool]
    """Of a method and a key; asked once a request."""


class S3Server:
    """moto behind a log."""

    bucket: StoragePath
    """Of the test that runs."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.asked: list[Asked] = []
        self.faults: list[Fault] = []
        self.delay_seconds = 0.0
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.variables = {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url, "no_proxy": "127.0.0.1"}
        """By which a process finds the server where an `s3://` URL leads."""
        self._buckets = itertools.count()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def begin(self) -> None:
        """An empty bucket; forgets what was asked before, and every fault."""
        name = f"bucket-{next(self._buckets)}"
        self.faults, self.delay_seconds = [], 0.0
        self.client.create_bucket(Bucket=name)
        self.bucket = StoragePath.of(f"s3://{name}")
        self.forget()

    def forget(self) -> None:
        """Forget the requests that were made before."""
        self.asked, self.most_at_once = [], 0

    def put_quickly(self, key: str, data: bytes) -> None:
        """Into the bucket, without a request."""
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(self.bucket.name, key, data)

    def fail(
        self, status: int, code: str, *, method: str = "", key: str = "", times: int = 10**9, after: int = 0
    ) -> None:
        """Answer with an error, to requests of this method and of keys in which this pattern is found.

        Args:
            times: how many such requests.
            after: so many have been served.
        """
        seen = itertools.count()

        def holds_for(asked_method: str, asked_key: str) -> bool:
            if method not in ("", asked_method) or not re.search(key, asked_key):
                return False
            return after <= next(seen) < after + times

        self.faults.append(Fault(status, code, holds_for))

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        path = unquote(environ["PATH_INFO"].encode("latin-1").decode())
        key = path.lstrip("/").partition("/")[2]
        with self._crowd():
            time.sleep(self.delay_seconds)
            with self._lock:
                fault = next((f for f in self.faults if f.holds_for(method, key)), None)
            answered: dict[str, Any] = {"status": 0, "length": 0}

            def note(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
                answered["status"] = int(status.split()[0])
                return start_response(status, headers, *rest)

            if fault is None:
                body = b"".join(self._moto(environ, note))
            else:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                body = f"<Error><Code>{fault.code}</Code><Message>as asked</Message></Error>".encode()
                note(f"{fault.status} Fault", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
            asked = Asked(method, key, environ.get("HTTP_RANGE"), answered["status"], len(body))
            with self._lock:
                self.asked.append(asked)
        return [body]

    @contextmanager
    def _crowd(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def served(self, method: str, pattern: str = "") -> list[Asked]:
        """Requests of a method that went well, of keys in which a pattern is found; in order."""
        return [a for a in self.asked if a.method == method and a.status < 400 and re.search(pattern, a.key)]


def objects(place: StoragePath) -> dict[str, bytes]:
    """All that lies below a place."""
    return {name: place.read(name) for name in place.list()}


def upload(folder: Path, place: StoragePath) -> StoragePath:
    """Every file of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            place.write(path.relative_to(folder).as_posix(), path.read_bytes())
    return place


def download(place: StoragePath, folder: Path) -> Path:
    """Every object of a place."""
    for name, data in objects(place).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder
