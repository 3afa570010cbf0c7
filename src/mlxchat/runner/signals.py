"""Stopping: the first SIGINT or SIGTERM asks for it, the second one leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Of the run in this process, the signals that asked it to stop.
_heard: list[list[int]] = []


def is_stopping() -> bool:
    """Tell whether a signal has asked the run of this process to stop."""
    return any(_heard)


@contextmanager
def stop_on_signals(
    request: Callable[[int], None], announce: Callable[[], None], leave: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Call `request` with the number of the first signal; at the second one call `leave` and end the process.

    `request` is called wherever the main thread is, so it may only take a note. `announce` is for people and is called
    by a thread of its own: a line cannot be printed in the middle of another one.

    Everything on disk is whole at any moment, so nothing needs to be cleaned up. In any thread but the main one this
    does nothing: whoever runs us there handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    _heard.append(received)

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            _end(number, leave)
        request(number)

    def watch() -> None:
        """End the process at the second signal even if the main thread is inside a library and handles none."""
        seen = 0
        while numbers := os.read(reading, 16):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                seen += 1
                if seen > 1:
                    _end(number, leave)
                if seen == 1:
                    with suppress(Exception):
                        announce()

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    former = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, handle) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        yield
    finally:
        _heard.pop()
        for number, handler in handlers.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)
        signal.set_wakeup_fd(former)
        os.close(writing)
        thread.join()
        os.close(reading)


def _end(number: int, leave: Callable[[], None]) -> None:
    with suppress(Exception):
        leave()
    os._exit(128 + number)
