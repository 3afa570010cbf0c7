"""What all transfers share: huggingface_hub as it is used here, one retry loop, one meaning of faults, the progress."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from mlxchat.config.wording import format_bytes, format_seconds
from mlxchat.errors import DataError, MlxchatError, PassingError
from mlxchat.runner.progress import Progress

# Pauses of 0.5, 1, 2, 4, 8 s between them. huggingface_hub retries inside each of them, too.
TRIES = 3
FIRST_PAUSE_SECONDS = 0.5
_PASSING_STATUS = (408, 425, 429)

Check = Callable[[], None]
"""Called repeatedly during a transfer or a wait; it may raise to stop it."""
_T = TypeVar("_T")


def nothing() -> None:
    """The default check: never stop."""


def endpoint() -> str:
    """Return the Hub's address: HF_ENDPOINT, or the real one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def prepare_client() -> None:
    """Make huggingface_hub transfer over plain HTTP.

    hf_xet retries silently for minutes where a Hub has no Xet storage or it does not answer, and cannot be stopped.
    """
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_XET = True


class WrongContent(Exception):
    """A complete download has another checksum or size than it must have."""


def retried(request: Callable[[], _T], name: str, thing: str, *, tries: int = TRIES) -> _T:
    """Return what a request returns; transient faults are retried with growing pauses, wrong content once.

    Args:
        request: may raise exceptions of the HTTP library, OSError, ValueError, WrongContent.
        name: what is requested, for messages.
        thing: what a server that refuses does not have, for messages.
        tries: number of requests.

    Raises:
        DataError: it does not exist, access is refused, the content is wrong, or the disk cannot be written.
        PassingError: the server does not answer.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP library

    for number in range(tries):
        try:
            return request()
        except WrongContent as error:
            fault: MlxchatError = DataError(
                f"{name} is corrupt: {error}, in {number + 1} downloads. Nothing was kept. "
                "The server or a proxy damages it"
            )
            is_last = number > 0
        except (HTTPError, OSError, ValueError) as error:
            fault = _fault_of(error, name, thing)
            is_last = not isinstance(fault, PassingError)
        # Outside the handler: raised inside, it would be classified by its cause as transient.
        if is_last or number + 1 == tries:
            raise fault
        time.sleep(FIRST_PAUSE_SECONDS * 2**number)
    raise AssertionError("there is at least one try")


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
    status = getattr(getattr(error, "response", None), "status_code", None)
    status = 400 if isinstance(error, HFValidationError) else status
    if status is not None and status < 500 and status not in _PASSING_STATUS:
        hint = " If it is not public, set HF_TOKEN to a token that may read it." if status in (401, 403) else ""
        return DataError(f"{name}: {server} has no such {thing} ({reason}).{hint}")
    return PassingError(f"{name}: {server} does not answer ({reason}). The same command continues.")


_FIRST_SECONDS = 1.0
_INTERVAL_SECONDS = 0.2


class TransferProgress:
    """A thread-safe count of a transfer's bytes, displayed after the first second."""

    def __init__(self, title: str, total: int, *, verb: str = "fetch") -> None:
        """Count up to `total` bytes (0: unknown); the display begins with `verb`."""
        self.title = title
        self.done = 0
        self._bar = _ByteProgress(verb, max(1, total), "")
        self._is_shown = False
        self._shown = self._bar.began
        self._lock = threading.Lock()

    def __enter__(self) -> TransferProgress:
        """Return the counter."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the display; print one line about a long transfer."""
        if self._is_shown:
            self._bar.__exit__(kind, error, trace)
            seconds = max(1e-9, time.monotonic() - self._bar.began)
            speed = f"{format_bytes(self.done / seconds)}/s"
            self._bar.note(f"{self.title}: {format_bytes(self.done)} in {format_seconds(seconds)}, {speed}")

    def add(self, count: int) -> None:
        """Count received bytes; negative: discarded ones."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            seconds = now - self._bar.began
            if seconds < _FIRST_SECONDS or now - self._shown < _INTERVAL_SECONDS:
                return
            self._shown = now
            if not self._is_shown:
                self._is_shown = True
                self._bar.__enter__()
            speed = max(0.0, self.done / seconds)
            self._bar.update(self.done, speed=f"{format_bytes(speed)}/s")


class _ByteProgress(Progress):
    """A bar of bytes."""

    def amount(self, done: int) -> str:
        """Return "DONE of TOTAL" with units, or "DONE" if the total is unknown."""
        return f"{format_bytes(done)} of {format_bytes(self.total)}" if self.total > 1 else format_bytes(done)
