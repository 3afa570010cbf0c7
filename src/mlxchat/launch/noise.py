"""What MLX prints when a peer is lost, some twenty lines: kept for whoever looks for it, not for the terminal."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

# How its lines begin; those of two threads may fall into each other, and then one has lost its first word.
_NOISE = (b"[ring] ", b"Sending to socket ", b"Receiving from socket ", b"Socket ", b"Too many send/recv errors")


def divert_noise(keep: Callable[[str], None]) -> None:
    """Pass what is written to standard error on, but lines of MLX's ring, with which `keep` is called; until the end.

    Python's own stream goes to the terminal as before. With MLX_RING_VERBOSE nothing is changed.
    """
    if os.environ.get("MLX_RING_VERBOSE"):
        return
    sys.stderr.flush()
    original = os.dup(2)
    reading, writing = os.pipe()
    former, is_own = sys.stderr, sys.stderr is sys.__stderr__
    if is_own:  # a bar is only drawn on a terminal; a stream in its place may stay as it is
        sys.stderr = os.fdopen(os.dup(original), "w", encoding=former.encoding, errors=former.errors, buffering=1)
    os.dup2(writing, 2)
    os.close(writing)

    def work() -> None:
        rest = b""
        while chunk := os.read(reading, 65536):
            *lines, rest = (rest + chunk).split(b"\n")
            # A line that is not finished, such as a question, and none of MLX's that has only begun.
            if rest and not any(rest.startswith(noise[: len(rest)]) for noise in _NOISE):
                lines, rest = [*lines, rest], b""
                end = b""
            else:
                end = b"\n"
            for number, line in enumerate(lines):
                if line.startswith(_NOISE) or _NOISE[0] in line:
                    keep(line.decode(errors="replace"))
                else:
                    with suppress(OSError):
                        os.write(original, line + (end if number == len(lines) - 1 else b"\n"))

    thread = threading.Thread(target=work, name="noise", daemon=True)
    thread.start()

    def restore() -> None:
        os.dup2(original, 2)
        thread.join(0.2)  # a program that is left behind may keep the pipe open

    atexit.register(restore)
