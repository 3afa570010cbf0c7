"""The process in which rustbpe counts and merges, since it holds the interpreter for minutes: started by `data/bpe.py`.

It runs as a file and imports nothing of mlxchat. On stdin: a line of JSON (pattern, num_tokens, buffer, parent), then
frames of a number of texts, their lengths in bytes, and their UTF-8; no texts end them. On stdout: lines of JSON, what
was done so far, at last the ranks. It never holds more text than one buffer and what waits to become the next.
"""

from __future__ import annotations

import base64
import ctypes
import json
import logging
import os
import re
import resource
import signal
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO

_REPORT_SECONDS = 0.25
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, on Linux
_UNIQUE = re.compile(r"(\d+) unique$")
_MERGES = re.compile(r"\((\d+)/(\d+) merges\)")


class Texts:
    """Texts of the pipe, which a thread reads ahead while rustbpe counts without the interpreter's lock."""

    def __init__(self, pipe: BinaryIO, most_waiting: int) -> None:
        """Begin to read; no more than `most_waiting` texts wait."""
        self._pipe, self._most = pipe, most_waiting
        self._waiting: deque[str] = deque()
        self._changed = threading.Condition()
        self._is_over = self._is_whole = False
        self.chars = self.texts = 0
        threading.Thread(target=self._read, daemon=True).start()

    def __iter__(self) -> Iterator[str]:
        """Yield every text once."""
        reported = time.monotonic()
        while True:
            with self._changed:
                while not self._waiting and not self._is_over:
                    self._changed.wait()
                if not self._waiting:
                    break
                text = self._waiting.popleft()
                if 2 * len(self._waiting) < self._most:
                    self._changed.notify_all()
            self.chars += len(text)
            self.texts += 1
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                say(chars=self.chars)
            yield text
        if not self._is_whole:
            os._exit(1)  # the parent is gone
        say(chars=self.chars)

    def _read(self) -> None:
        try:
            while True:
                (count,) = struct.unpack("<I", self._take(4))
                if count == 0:
                    self._is_whole = True
                    return
                lengths = struct.unpack(f"<{count}I", self._take(4 * count))
                data, start, texts = self._take(sum(lengths)), 0, []
                for length in lengths:
                    texts.append(data[start : start + length].decode())
                    start += length
                with self._changed:
                    while len(self._waiting) >= self._most:
                        self._changed.wait()
                    self._waiting.extend(texts)
                    self._changed.notify_all()
        except EOFError:
            return
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _take(self, count: int) -> bytes:
        data = self._pipe.read(count)
        if len(data) < count:
            raise EOFError
        return data


class Listener(logging.Handler):
    """Reports progress that rustbpe writes to its log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Report the number of distinct pieces, and of merges."""
        message = record.getMessage()
        if found := _UNIQUE.search(message):
            say(pieces=int(found[1]))
        elif found := _MERGES.search(message):
            say(merges=int(found[1]))


def say(**facts: Any) -> None:
    """Write a line of JSON; end the process if nobody reads."""
    try:
        os.write(_OUT, (json.dumps(facts) + "\n").encode())
    except BrokenPipeError:
        os._exit(1)


def end_with(parent: int) -> None:
    """End with the parent: by a signal of the kernel on Linux, elsewhere when the pipe closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def peak_bytes() -> int:
    """Return the most memory that this process has held. Linux's getrusage counts what the parent held, too."""
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
            found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Train, and write the ranks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ctrl-c comes to the parent, which ends us
    pipe = sys.stdin.buffer
    order = json.loads(pipe.readline())
    end_with(order["parent"])
    import rustbpe

    logging.basicConfig(level=logging.INFO, handlers=[Listener()])
    texts, trainer = Texts(pipe, order["buffer"]), rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), order["num_tokens"], buffer_size=order["buffer"], pattern=order["pattern"])
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    ordered = sorted(ranks, key=ranks.__getitem__)
    data = (
        json.dumps({"peak_bytes": peak_bytes(), "ranks": [base64.b64encode(token).decode() for token in ordered]})
        + "\n"
    )
    with os.fdopen(_OUT, "wb") as out:
        out.write(data.encode())


if __name__ == "__main__":
    _OUT = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no report
    main()
