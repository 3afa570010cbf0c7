"""A line between rank 0 and another rank, beside MLX's collectives: short messages, and the news of an end.

The kernel closes it when a process dies, however it dies; beats tell of one that hangs or whose network is gone.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Message = dict[str, Any]

BEAT_SECONDS = 1.0
# A process that computes says something each second; a machine that swaps may need some more.
SILENCE_SECONDS = float(os.environ.get("MLXCHAT_SILENCE_SECONDS", "15"))
_MOST_BYTES = 16 * 2**20
_RETRY_SECONDS = 0.2
# What a short message waits for a longer one that is on its way to somebody who reads.
_TURN_SECONDS = 0.1


class Line:
    """Messages to and from one other process."""

    def __init__(self, connection: socket.socket) -> None:
        """Take a connected socket."""
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        self._socket = connection
        self._file = connection.makefile("rb")
        self._sending = threading.Lock()
        self.heard = time.monotonic()
        """When the last message came."""

    def send(self, message: Message) -> bool:
        """Send a message; tell whether the line still takes any.

        Raises:
            ValueError: it is longer than what the other side reads.
        """
        text = json.dumps(message).encode() + b"\n"
        if len(text) > _MOST_BYTES:
            raise ValueError(f"a message to another rank has {len(text)} bytes, more than {_MOST_BYTES}")
        try:
            with self._sending:
                self._socket.sendall(text)
        except OSError:
            return False
        return True

    def send_at_once(self, message: Message) -> None:
        """Send a short message, or leave it: who watches for ranks that hang must not wait for one to read."""
        if not self._sending.acquire(timeout=_TURN_SECONDS):
            return
        try:
            with suppress(OSError, ValueError):  # also a line that was closed here
                poll = select.poll()
                poll.register(self._socket, select.POLLOUT)
                if poll.poll(0):
                    self._socket.sendall(json.dumps(message).encode() + b"\n")
        finally:
            self._sending.release()

    def receive(self) -> Message | None:
        """Return the next message, or None if there are no more, or it is none."""
        try:
            text = self._file.readline(_MOST_BYTES)
            self.heard = time.monotonic()
            message = json.loads(text) if text.endswith(b"\n") else None
        except (OSError, ValueError):  # also a line that was closed here
            return None
        return message if isinstance(message, dict) else None

    def receive_within(self, seconds: float) -> Message | None:
        """Return the next message if it comes in time, else None."""
        self._socket.settimeout(seconds)
        try:
            return self.receive()
        finally:
            with suppress(OSError):
                self._socket.settimeout(None)

    def listen(self, on_message: Callable[[Message], None], on_end: Callable[[], None]) -> None:
        """Call a function with every message, and another at the end of the line, in a thread of their own."""

        def work() -> None:
            while (message := self.receive()) is not None:
                on_message(message)
            on_end()

        threading.Thread(target=work, name="line", daemon=True).start()

    def cut(self) -> None:
        """Let no thread here wait at the line any more; what was sent still arrives."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the line for both sides, also for a thread that waits at it."""
        self.cut()
        for part in (self._file, self._socket):
            with suppress(OSError):
                part.close()


def connect(address: tuple[str, int], seconds: float) -> Line:
    """Return a line to whoever listens at an address, or will soon.

    Raises:
        OSError: nobody did in time.
    """
    until = time.monotonic() + seconds
    while True:
        try:
            return Line(socket.create_connection(address, timeout=max(1.0, min(10.0, seconds))))
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(_RETRY_SECONDS)


def listen_at(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0: one that the kernel chooses.

    Raises:
        OSError: somebody else has the port, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=64)
