"""Runs the server until a signal: the first one lets answers finish, the second one drops them."""

from __future__ import annotations

import logging
import socket

import uvicorn
from fastapi import FastAPI

from mlxchat.errors import ConfigError, visible

_MOST_CONNECTIONS = 200
_GRACE_SECONDS = 30
"""Further ones get status 503; macOS allows 256 files by default."""


class _Lines(logging.Formatter):
    """Escapes control characters in log lines and tracebacks, which quote requests and files."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def run_server(app: FastAPI, host: str, port: int, *, name: str, key_needed: bool) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code.

    Answers have 30 s to finish after the first signal; port 0 is any free port.

    Raises:
        ConfigError: the address cannot be bound.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
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
        app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_SECONDS,
        server_header=False, limit_concurrency=_MOST_CONNECTIONS,
    )  # fmt: skip
    print(banner, flush=True)  # further connections wait until the server is started
    with listening:
        uvicorn.Server(config).run(sockets=[listening])
    return 0
