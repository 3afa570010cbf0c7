"""Runs the server until a signal: the first one lets answers finish, the second one drops them."""

from __future__ import annotations

import logging
import socket

import uvicorn
from fastapi import FastAPI

from mlxchat.errors import ConfigError, visible
from mlxchat.serve.security import most_connections


class _Lines(logging.Formatter):
    """Escapes control characters in log lines and tracebacks, which quote requests and files."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, banner: str) -> None:
        super().__init__(config)
        self._banner = banner

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._banner, flush=True)


def run_server(app: FastAPI, host: str, port: int, *, name: str, key_needed: bool, grace_seconds: int) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code.

    `grace_seconds` is the time that answers have to finish after the first signal; port 0 is any free port.

    Raises:
        ConfigError: the address cannot be bound.
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
    banner = f"{name} at {address}  (page: {address}/, OpenAI: {address}/v1{key}). Ctrl-C stops."
    logging.basicConfig(level=logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Lines("%(asctime)s %(message)s"))
    for quiet in ("sse_starlette", "asyncio"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False,
        timeout_graceful_shutdown=grace_seconds, server_header=False, http="h11",
        limit_concurrency=most_connections(),
    )  # fmt: skip
    with listening:
        _Server(config, banner).run(sockets=[listening])
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
