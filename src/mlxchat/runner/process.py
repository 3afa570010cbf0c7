"""The running process: stopping by signals, keeping a Mac awake."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Signals that requested the run of this process to stop.
_heard: list[list[int]] = []


def ends_at_once(number: int) -> bool:
    """Return True if a signal, repeated, means "at once": Ctrl-C, and `kill` outside of SLURM.

    SLURM repeats SIGTERM within milliseconds, and a closing terminal SIGHUP.
    """
    in_job = "SLURM_JOB_ID" in os.environ or "SUBMITIT_EXECUTOR" in os.environ
    return number == signal.SIGINT or (number == signal.SIGTERM and not in_job)


def heard_signals() -> list[signal.Signals]:
    """Return the signals that stop a run: under nohup without SIGHUP."""
    return [number for number in SIGNALS if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]


def is_stopping() -> bool:
    """Return True if a signal has requested the run of this process to stop."""
    return any(_heard)


@contextmanager
def stop_on_signals(
    request: Callable[[int], None], announce: Callable[[], None], leave: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Call `request` with the number of the first signal; at a second that `ends_at_once`, call `leave` and exit.

    `request` interrupts the main thread at any point, so it may only set a flag. `announce` prints in another thread,
    since printing could interrupt another line.

    Files on disk are always complete, so no cleanup is needed. Outside the main thread this does nothing: the program
    that started the thread handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    _heard.append(received)

    def handle(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1 and ends_at_once(number):
            _end(number, leave)
        if number == signal.SIGHUP:
            leave_terminal()
        request(number)

    def watch() -> None:
        """Exit at the second signal even if the main thread is inside a library and cannot handle signals."""
        seen = 0
        while numbers := os.read(reading, 16):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                seen += 1
                if seen > 1 and ends_at_once(number):
                    _end(number, leave)
                if seen == 1:
                    with suppress(Exception):
                        announce()

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    former = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, handle) for number in heard_signals()}
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


def leave_terminal() -> None:
    """Print nowhere from now on: writing to a closed terminal fails."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(handle).st_mode):
                os.dup2(nowhere, handle)
    os.close(nowhere)


def _end(number: int, leave: Callable[[], None]) -> None:
    with suppress(Exception):
        leave()
    os._exit(128 + number)


@contextmanager
def keep_awake() -> Iterator[None]:
    """Keep a Mac awake in the body; its display may sleep. Does nothing elsewhere."""
    program = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if program is None:
        yield
        return
    # -w: caffeinate ends with this process
    quiet = subprocess.DEVNULL
    try:
        watcher = subprocess.Popen(
            [program, "-i", "-w", str(os.getpid())], start_new_session=True, stdin=quiet, stdout=quiet, stderr=quiet
        )
    except OSError:
        yield
        return
    try:
        yield
    finally:
        watcher.terminate()
        watcher.wait()
