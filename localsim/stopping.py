"""Ctrl-C and SIGTERM as a request to stop after the present step."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

ONE_SIGNAL_SECONDS = 5.0
LAST_WORDS_SECONDS = 20.0


def speak_first() -> None:
    """Let SIGTERM wait for up to `LAST_WORDS_SECONDS` while this process says what happened, and ends.

    As soon as one of several processes has ended, torchrun sends it to all others.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    until = time.monotonic() + LAST_WORDS_SECONDS
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def wait(number: int, _frame: object) -> None:
        if time.monotonic() > until:
            signal.signal(number, before)
            signal.raise_signal(number)

    signal.signal(signal.SIGTERM, wait)


@contextlib.contextmanager
def stop_signals(alone: bool = True) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the step; a second one stops at once.

    Args:
        alone: False where several processes train together. There one signal may come twice: from a scheduler to all
            processes, and from torchrun, which passes on what it got itself; a second one counts after
            `ONE_SIGNAL_SECONDS`, and after a failure or stop `speak_first` holds.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    first = 0.0

    def request(number: int, _frame: object) -> None:
        nonlocal first
        again = stop.is_set()
        if not again:
            first = time.monotonic()
            stop.set()
        if alone:
            signal.signal(number, before[signal.Signals(number)])
        elif again and time.monotonic() - first > ONE_SIGNAL_SECONDS:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    ends_well = False
    try:
        yield stop
        ends_well = True
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if not (alone or ends_well):
            speak_first()
