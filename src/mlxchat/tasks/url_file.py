"""A file that a task reads: the user's own, or one at an address, fetched when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxchat.errors import ConfigError


@dataclass(frozen=True)
class UrlSource:
    """An address that a task reads."""

    url: str
    sha256: str | None = None


def url_source(task: str, url: str, sha256: str | None = None) -> UrlSource:
    """Return an address to read from.

    Raises:
        ConfigError: it is none.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f'url of task {task} is "{url}", expected an address that begins with http:// or https://. A file of your '
            "own is given as path=FILE, so that its content is part of the artifact's id."
        )
    return UrlSource(url, sha256)


def fetch_source(source: UrlSource, check: Callable[[], None] = lambda: None) -> Path:
    """Return the file at an address, downloaded if it is not there."""
    from mlxchat.hub.client import fetch_url

    return fetch_url(source.url, sha256=source.sha256, check=check)


def record_source(source: UrlSource) -> dict[str, Any]:
    """Return the record of a file that was fetched: url, sha256, bytes."""
    from mlxchat.hub.client import record

    return {"name": source.url.rpartition("/")[2], **record(fetch_source(source))}
