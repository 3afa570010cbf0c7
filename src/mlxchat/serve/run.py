"""Listening, saying where, and stopping: at the first signal answers are finished, at the second dropped."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from typing import cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlxchat.errors import ConfigError, visible

# Connections that have not said what they want by then are closed.
HEAD_SECONDS = 15.0
# A client that takes fewer bytes of its answer in this time is cut off: what waits for it fills memory.
READ_SECONDS, _READ_BYTES = 60.0, 16 << 10
# Files that are no connections: models, logs, the programs of answers.
_OTHER_FILES = 64


class PatientProtocol(H11Protocol):
    """HTTP that closes connections whose request's head (slow loris) or whose client's reading takes too long."""

    _timer: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Begin to wait for a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(
            high=1 << 16, low=0
        )  # writing is paused until the client has taken everything
        self._watch()

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """Go on, since the client has read."""
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def _expect_reading(self) -> None:
        most = max(0, self.transport.get_write_buffer_size() - _READ_BYTES)
        self._reading = self.loop.call_later(READ_SECONDS, self._check_reading, most)

    def _check_reading(self, most: int) -> None:
        if self.transport.get_write_buffer_size() > most:
            self.transport.abort()
        else:
            self._expect_reading()

    def data_received(self, data: bytes) -> None:
        """Take more of a request; begin to wait where it is the first part of another one."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        for timer in (self._timer, self._reading):
            if timer is not None:
                timer.cancel()

    def _watch(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif not answering and self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def most_connections() -> int:
    """Return how many connections this process has files for; more are answered with 503."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 10_000 if files == resource.RLIM_INFINITY else max(16, min(10_000, files - _OTHER_FILES))


class _Lines(logging.Formatter):
    """Lines of the log, tracebacks included, without control characters: they quote requests and files."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, said: str) -> None:
        super().__init__(config)
        self._said = said

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._said, flush=True)


def run_server(
    app: FastAPI, host: str, port: int, *, name: str, key_needed: bool, grace_seconds: int, log_requests: bool
) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code.

    Args:
        app: what to serve.
        host: where to listen.
        port: 0 takes a free one, which is told.
        name: of the default model, told.
        key_needed: told.
        grace_seconds: how long answers may go on after the first signal.
        log_requests: whether each request is a line of the log.

    Raises:
        ConfigError: nothing can listen there.
    """
    try:
        listening = _listen(host, port)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port"
        ) from None
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}"
    key = "; clients send the key as Authorization: Bearer KEY" if key_needed else ""
    said = f"{name} at {address}  (page: {address}/, OpenAI: {address}/v1{key}). Ctrl-C stops."
    logging.basicConfig(level=logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Lines("%(asctime)s %(message)s"))
    for quiet in ("sse_starlette", "asyncio"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    config = uvicorn.Config(
        app, log_config=None, log_level="info" if log_requests else "warning", access_log=log_requests,
        timeout_graceful_shutdown=grace_seconds, server_header=False, http=cast("type", PatientProtocol),
        limit_concurrency=most_connections(),
    )  # fmt: skip
    with listening:
        _Server(config, said).run(sockets=[listening])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(256)
    except OSError:
        listening.close()
        raise
    return listening
