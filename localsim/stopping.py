"""Ctrl-C and SIGTERM as a request to stop after the present step."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

ONE_SIGNAL_SECONDS = 5.0


@contextlib.contextmanager
def stop_signals(alone: bool = True) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the step; a second one stops at once.

    Args:
        alone: False where several processes train together. There one signal may come twice: from a scheduler to all
            processes, and from torchrun, which passes on what it got itself; a second one counts after
            `ONE_SIGNAL_SECONDS`.
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
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
