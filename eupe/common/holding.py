"""One writer per place: a lock on disks, a lease in object stores.

A second writer is told who holds the place, and since when. On a disk the hold is a lock (`eupe.common.locks`). In an
object store it is an object that its holder rewrites every few seconds, each time on the condition that it is still
its own; a process that finds one waits to see whether it changes. This needs a server that honours conditional writes.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from eupe.common.locks import LOCK, holder_note, is_held, lock_file
from eupe.common.storage import StoragePath
from eupe.errors import ConfigError, IncompleteError, StorageError

LEASE = ".eupe-lease.json"
RENEW_SECONDS = 5.0
PATIENCE_SECONDS = 4 * RENEW_SECONDS
"""Time that a lease may stay unchanged before its holder counts as dead."""


class Holder:
    """Holder of places for one command, until its end; the same place may be held repeatedly."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._held: set[StoragePath] = set()
        self._stack = ExitStack()
        self._leases: list[_Lease] = []

    def __enter__(self) -> Holder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def hold(self, place: StoragePath) -> None:
        """Hold a place; a folder that is missing is made, and removed again if it stays empty.

        A folder without write permission is not held: nothing will be written there.

        Raises: ConfigError if another process holds it; StorageError.
        """
        place = place.resolved()  # links give one folder several names
        if place in self._held:
            return
        if place.is_local:
            self._stack.enter_context(_locked_folder(place.local, self._verb))
        else:
            self._leases.append(self._stack.enter_context(_Lease(place, self._verb)))
        self._held.add(place)

    def require_held(self) -> None:
        """Raise IncompleteError if another process has taken a lease over, as after a long outage."""
        for lease in self._leases:
            if lease.lost:
                raise IncompleteError(
                    f"another process now writes to {lease.place}, because this one could not renew its lease on it; "
                    "the parts that were committed are intact"
                )


@contextmanager
def _locked_folder(folder: Path, verb: str) -> Iterator[None]:
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = lock_file(folder / LOCK, verb=verb, of=folder)
    except PermissionError:
        yield
        return
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # still locked: after closing it could be another process's
            (folder / LOCK).unlink()
        os.close(descriptor)
        if made:
            with suppress(OSError):  # the folder is not empty
                folder.rmdir()


class _Lease:
    """Object that says who writes below a place, rewritten while its holder lives."""

    def __init__(self, place: StoragePath, verb: str) -> None:
        self.place = place
        self.lost = False
        self._note = holder_note(verb) | {"holder": secrets.token_hex(8)}
        self._generation: bytes | None = None
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True, name="eupe-lease")

    def __enter__(self) -> _Lease:
        """Take the lease, and renew it in a thread.

        Raises: ConfigError if another process holds it; StorageError.
        """
        self._generation = self.place.generation(LEASE)
        if self._generation is not None and not self._is_abandoned():
            raise ConfigError(is_held(self.place, self._found()))
        if not self._write():  # of several that waited, only one replaces this generation
            raise ConfigError(is_held(self.place, self._found()))
        self._renewing.start()
        return self

    def _is_abandoned(self) -> bool:
        """Return whether the lease is free, after waiting to see whether its holder renews it."""
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            time.sleep(RENEW_SECONDS / 5)
            if (now := self.place.generation(LEASE)) != self._generation:
                self._generation = now
                return now is None
        return True

    def _found(self) -> bytes:
        try:
            return self.place.read(LEASE)
        except FileNotFoundError:
            return b""

    def _write(self) -> bool:
        """Write the note with something new in it; return False if another process has the lease."""
        # new content each time: an object store's generation may be a hash of it
        note = json.dumps({**self._note, "renewed": secrets.token_hex(8)}).encode()
        taken = self.place.replace(LEASE, note, self._generation)
        if taken is None and self._found() == note:  # it was written, but the answer was lost
            taken = self.place.generation(LEASE)
        if taken is not None:
            self._generation = taken
        return taken is not None

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            with suppress(StorageError):  # an outage; if another takes the lease meanwhile, the next attempt fails
                if not self._write():
                    self.lost = True
                    return

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._renewing.join()
        if not self.lost:
            with suppress(StorageError):
                self.place.replace(LEASE, None, self._generation)
