"""What all transfers share: the client of the Hub, one retry loop, one meaning of faults."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from mlxchat.errors import DataError, MlxchatError, PassingError

# Pauses of 0.5, 1, 2, 4 s between them. huggingface_hub retries inside each of them, too.
TRIES = 5
FIRST_PAUSE_SECONDS = 0.5
_PASSING_STATUS = (408, 425, 429)
_T = TypeVar("_T")


def endpoint() -> str:
    """Return the Hub's address: HF_ENDPOINT, or the real one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_client(token: str | None = None) -> Any:
    """Return huggingface_hub's client of the current endpoint, which transfers over plain HTTP.

    hf_xet retries silently for minutes where a Hub has no Xet storage or it does not answer, and cannot be stopped.
    """
    from huggingface_hub import HfApi, constants

    constants.HF_HUB_DISABLE_XET = True
    return HfApi(endpoint=endpoint(), token=token, library_name="mlxchat")


class WrongContent(Exception):
    """A complete download has another checksum than it must have."""


def retried(request: Callable[[], _T], name: str, thing: str, *, tries: int = TRIES) -> _T:
    """Return what a request returns; transient faults are retried with growing pauses, wrong content once.

    `name` is what is requested and `thing` what a server that refuses does not have, for messages. What remains is a
    DataError (absent, refused, wrong content, full disk) or a PassingError (the server does not answer).
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP library

    for number in range(tries):
        fault: MlxchatError
        try:
            return request()
        except WrongContent as error:
            fault = DataError(f"{name} is corrupt: {error}. Nothing was kept. The server or a proxy damages it")
            is_last = number > 0
        except (HTTPError, OSError, ValueError) as error:
            fault = _fault_of(error, name, thing)
            is_last = not isinstance(fault, PassingError)
        if is_last or number + 1 == tries:
            break
        time.sleep(FIRST_PAUSE_SECONDS * 2**number)
    # Outside the handler: raised inside, it would be classified by its cause as transient.
    raise fault


def _fault_of(error: Exception, name: str, thing: str) -> MlxchatError:
    """Return an exception of a request as an error of one line."""
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of the request for the file's headers
    is_remote = isinstance(error, (HTTPError, ConnectionError, TimeoutError))
    if isinstance(error, OSError) and not is_remote and error.errno is not None:
        return DataError(f"{name} cannot be written: {error.strerror} ({error.filename or 'HF_HOME or MLXCHAT_CACHE'})")
    server = "its server" if "://" in name else f"the Hub at {endpoint()}"
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", 500)
    if isinstance(error, HFValidationError) or (status < 500 and status not in _PASSING_STATUS):
        hint = " If it is not public, set HF_TOKEN to a token that may read it." if status in (401, 403) else ""
        return DataError(f"{name}: {server} has no such {thing} ({reason}).{hint}")
    return PassingError(f"{name}: {server} does not answer ({reason}). The same command continues.")
