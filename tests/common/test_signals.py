"""Signals ask for an end once, then insist; those that are ignored stay so."""

import os
import signal
from collections.abc import Iterator

import pytest

from eupe.common.signals import stop_signals

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Set them as a shell in the foreground does; one in the background, and `nohup`, ignore some."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_asks_and_the_second_does_not_wait(number: signal.Signals) -> None:
    handler = signal.getsignal(number)
    with stop_signals(*NUMBERS) as stop_asked:
        assert not stop_asked()
        os.kill(os.getpid(), number)
        assert stop_asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize("number", NUMBERS)
def test_an_ignored_one_asks_for_nothing_and_stays_ignored(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    others = [other for other in NUMBERS if other != number]
    with stop_signals(*NUMBERS) as stop_asked:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert not stop_asked()
        os.kill(os.getpid(), others[0])
        assert stop_asked()
    assert signal.getsignal(number) is signal.SIG_IGN
