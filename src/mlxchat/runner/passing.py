"""Errors that pass by themselves: a network that is down, a server that is busy. Only these are worth another try."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from mlxchat.errors import PassingError

_ERRNO = frozenset(
    getattr(errno, name)
    for name in (
        "EAGAIN", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETRESET",
        "ENETUNREACH", "EPIPE", "ETIMEDOUT", "ESTALE",
    )
    if hasattr(errno, name)
)  # fmt: skip
# Of the HTTP libraries that huggingface_hub has used. Named, because none of them need be installed; without the number
# of a version, which one of them bears in its name.
_CLASSES = frozenset(
    {
        "httpx.TransportError", "requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError",
        "urllib.ProtocolError",  # urllib3
    }
)  # fmt: skip
_TOO_BUSY = (408, 425, 429)


def is_passing(error: BaseException) -> bool:
    """Tell whether an error, or what it was raised for, may be gone at another try.

    True for PassingError, lost or refused connections, time-outs of the network, and HTTP 408, 425, 429 and 5xx.
    """
    return any(_is_passing(link) for link in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, PassingError):
        return True
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "code", None)
    if isinstance(status, int) and 100 <= status < 600:
        return status >= 500 or status in _TOO_BUSY
    if isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno in _ERRNO):
        return True
    if isinstance(reason := getattr(error, "reason", None), BaseException):  # urllib's URLError
        return _is_passing(reason)
    names = {
        f"{kind.__module__.partition('.')[0].rstrip('0123456789')}.{kind.__name__}" for kind in type(error).__mro__
    }
    return bool(names & _CLASSES)
