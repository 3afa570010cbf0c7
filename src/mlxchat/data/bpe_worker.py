"""The worker process of `data/bpe.py`, since rustbpe's merging holds the interpreter's lock for minutes.

It runs as a file and imports nothing of mlxchat. It reads lines of JSON from stdin: the settings (pattern, num_tokens,
buffer, parent), then lists of texts, of which an empty one is the last. It writes lines of JSON to stdout: the
progress, and finally the ranks. It holds at most two buffers of texts and starts with SIGINT and SIGTERM blocked.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any, BinaryIO

_REPORT_SECONDS = 0.25
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, on Linux
_UNIQUE = re.compile(r"(\d+) unique$")
_MERGES = re.compile(r"\((\d+)/(\d+) merges\)")


def read_texts(pipe: BinaryIO, most_waiting: int) -> Iterator[str]:
    """Yield the texts of the pipe; a thread reads ahead while rustbpe counts without the interpreter's lock."""
    waiting: Queue[str | None] = Queue(most_waiting)

    def read() -> None:
        for line in pipe:
            texts = json.loads(line)
            for text in texts or [None]:
                waiting.put(text)
            if not texts:
                return
        os._exit(1)  # the parent is gone

    threading.Thread(target=read, daemon=True).start()
    chars, reported = 0, time.monotonic()
    while (text := waiting.get()) is not None:
        chars += len(text)
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            report(chars=chars)
        yield text
    report(chars=chars)


class Listener(logging.Handler):
    """Reports the progress in rustbpe's log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Report the number of distinct pieces or of merges."""
        message = record.getMessage()
        if found := _UNIQUE.search(message):
            report(pieces=int(found[1]))
        elif found := _MERGES.search(message):
            report(merges=int(found[1]))


def report(**facts: Any) -> None:
    """Write a line of JSON; exit if the parent is gone."""
    try:
        print(json.dumps(facts), file=OUT, flush=True)
    except BrokenPipeError:
        os._exit(1)


def end_with(parent: int) -> None:
    """End this process with its parent: on Linux by the kernel's signal, elsewhere when the pipe closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def peak_bytes() -> int:
    """Return this process's peak memory. On Linux, getrusage would include the parent's before the fork."""
    if sys.platform == "linux":
        if found := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii")):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Train, and write the ranks."""
    pipe = sys.stdin.buffer
    settings = json.loads(pipe.readline())
    end_with(settings["parent"])
    import rustbpe

    logging.basicConfig(level=logging.INFO, handlers=[Listener()])
    trainer, buffer = rustbpe.Tokenizer(), settings["buffer"]
    texts = read_texts(pipe, buffer)
    trainer.train_from_iterator(texts, settings["num_tokens"], buffer_size=buffer, pattern=settings["pattern"])
    ranks = sorted((rank, bytes(token).hex()) for token, rank in trainer.get_mergeable_ranks())
    report(peak_bytes=peak_bytes(), ranks=[token for _, token in ranks])


if __name__ == "__main__":
    OUT = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # libraries print to stderr
    main()
