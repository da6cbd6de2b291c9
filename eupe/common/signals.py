"""Orderly end of a command on a signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial


@contextmanager
def stop_signals(*numbers: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether a signal has requested a stop; a second signal raises KeyboardInterrupt.

    The caller stops at its next safe point. A signal that is ignored stays ignored: `nohup` ignores SIGHUP, and a shell
    ignores SIGINT for background jobs. Outside the main thread the handlers stay as they are, and the function always
    returns False.
    """
    asked: list[int] = []
    stop_asked = partial(bool, asked)

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    # Python lets only the main thread set handlers
    if threading.current_thread() is not threading.main_thread():
        yield stop_asked
        return
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield stop_asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
