"""The running process: stopping by signals, keeping a Mac awake."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def heard_signals() -> list[signal.Signals]:
    """Return the signals that stop a run: under nohup without SIGHUP."""
    return [number for number in SIGNALS if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]


@contextmanager
def stop_on_signals(request: Callable[[int], None], announce: Callable[[], None]) -> Iterator[None]:
    """Call `request` with the number of the first signal, and end the process at a repeated Ctrl-C or `kill`.

    `request` interrupts the main thread at any point, so it may only set a flag. `announce` prints in another thread,
    which also ends the process if the main thread is inside a library and cannot handle signals. Files on disk are
    always complete, so no cleanup is needed. Outside the main thread this does nothing: the program that started the
    thread handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        request(number)

    def watch() -> None:
        # SLURM repeats SIGTERM within milliseconds, and a closing terminal SIGHUP: these wait for the run.
        in_job = "SLURM_JOB_ID" in os.environ or "SUBMITIT_EXECUTOR" in os.environ
        ending = {signal.SIGINT} if in_job else {signal.SIGINT, signal.SIGTERM}
        is_stopping = False
        while numbers := os.read(reading, 16):
            for number in numbers:
                if number in SIGNALS and not is_stopping:
                    is_stopping = True
                    with suppress(Exception):
                        announce()
                elif number in ending:
                    os._exit(128 + number)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    former = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, handle) for number in heard_signals()}
    try:
        yield
    finally:
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


@contextmanager
def keep_awake() -> Iterator[None]:
    """Keep a Mac awake in the body; its display may sleep. Does nothing elsewhere."""
    if sys.platform != "darwin":
        yield
        return
    # -w: caffeinate ends with this process
    with subprocess.Popen(["caffeinate", "-i", "-w", str(os.getpid())], start_new_session=True) as watcher:
        try:
            yield
        finally:
            watcher.terminate()
