"""Resumable, verified downloads over HTTP, for files of the Hub and plain URLs.

Received bytes stay in a `.part` file under a lock. The next attempt resumes it, also after SIGKILL; it is renamed into
place only if size and checksum are right. The official client (2.4) discards the part of a killed process and compares
sizes only.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any

from mlxchat.config.wording import format_bytes, format_seconds
from mlxchat.errors import DataError, MlxchatError, PassingError, StoreError
from mlxchat.hub.cache import check_space, checksum_of, note_verified, read_json, write_json
from mlxchat.runner.progress import Progress
from mlxchat.store import locks

_BLOCK_BYTES = 1 << 20
# Consecutive attempts without enough progress (`Download._milestone`), with pauses of 0.5, 1, 2, 4, 8 s between them.
# The runner's own `retry` comes after these.
TRIES = 6
FIRST_PAUSE_SECONDS = 0.5
_MOST_PAUSE_SECONDS = 60.0
# Complete downloads with a wrong size or checksum before giving up.
_WRONG_TRIES = 3
_CONNECT_SECONDS, _SILENCE_SECONDS = 10.0, 30.0
# A request whose body delivers fewer bytes in this time is closed; headers and redirects count as time without bytes.
_SLOW_SECONDS, _SLOW_BYTES = 60.0, 16 << 10
_CHECK_SECONDS = 0.1
# A transfer of unknown length checks the free disk space each time it has received this many bytes.
_LOOK_BYTES = 64 << 20
_PASSING_STATUS = (408, 425, 429)
_MOST_REDIRECTS = 20
# Limit of API responses.
MOST_ANSWER_BYTES = 64 << 20
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")

Check = Callable[[], None]
"""Called repeatedly during a transfer or a wait; it may raise to stop it."""


def nothing() -> None:
    """The default check: never stop."""


@dataclass(eq=False, kw_only=True)
class Download:
    """A download to `<target>.part`, which is renamed to `target` at the end."""

    target: Path
    url: str
    name: str
    """For messages."""
    bytes: int | None = None
    """Size; None: take it from the response."""
    checksum: str | None = None
    """The sha256 of the content (64 digits) or git's blob id (40)."""
    headers: Callable[[], dict[str, str]] = dict
    """Returns the headers of a request; a token is sent only to the host of `url`."""
    trusts_etag: bool = False
    """Whether an ETag of 64 hexadecimal digits is the sha256 of the content, as on the Hub."""
    on_bytes: Callable[[int], None] = lambda count: None
    """Called with the number of bytes added to the part; negative if some were discarded."""
    check: Check = nothing
    """May raise to stop the transfer; received bytes are kept."""

    def __post_init__(self) -> None:
        self.part = self.target.with_name(f"{self.target.name}.part")
        self.note = self.target.with_name(f"{self.target.name}.part.json")
        self.size = self.bytes
        self.sizes: set[int] = set()
        """Sizes that the server has announced; if they differ, none is trusted."""
        self.facts: dict[str, Any] = {}
        self.mark = 0
        """Length of the part when an attempt last made enough progress."""
        self.ignores_range = False
        self.starts_over = False
        """Whether the part was discarded: all attempts together may then receive far more than the file's size."""

    def fetch(
        self, lock: Path, *, on_wait: Callable[[dict[str, Any]], None] = lambda owner: None,
        is_there: Callable[[], bool] | None = None,
    ) -> str | None:  # fmt: skip
        """Fetch the file and return its checksum; None: it exists already, maybe fetched by another process.

        Args:
            lock: file that is locked during the download.
            on_wait: called once with the holder's record if another thread or process holds the lock.
            is_there: returns whether the target is complete and right; None: an existing target is.

        Raises:
            PassingError: a network or server failure that a retry may not meet.
            DataError: there is no such file, access is refused, or size or checksum is wrong.
        """
        try:
            with locks.hold(lock, {"fetches": self.name}, on_wait, self.check):
                if (is_there or self.target.exists)():
                    return None
                self.target.parent.mkdir(parents=True, exist_ok=True)
                checksum = self._run()
                note_verified(checksum, self.target)
                return checksum
        except StoreError as error:  # its message names the outputs folder
            raise DataError(f"{self.name}: {error}".replace("outputs=PATH", "HF_HOME or MLXCHAT_CACHE")) from None
        except OSError as error:
            if isinstance(error, MlxchatError) or error.errno is None:
                raise
            place = error.filename or self.target
            raise DataError(f"{self.name} cannot be written: {error.strerror} ({place})") from None

    def _run(self) -> str:
        """Download, resume, verify and rename; return the checksum."""
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP library

        wrong = fruitless = 0
        while True:
            try:
                self._receive()
                trouble, pause = "", 0.0
            except HTTPError as error:
                trouble, pause = f"{type(error).__name__}: {error}".strip(": "), 0.0
            except _Busy as busy:
                trouble, pause = str(busy), busy.pause
            if not trouble:
                mistake, checksum = self._verify()
                if not mistake:
                    self.part.replace(self.target)
                    self.note.unlink(missing_ok=True)
                    return checksum
                self._drop()
                self.mark, self.starts_over = 0, False
                wrong += 1
                if wrong == _WRONG_TRIES:
                    raise DataError(
                        f"{self.name} is corrupt: {mistake}, in {wrong} consecutive downloads. Nothing was kept. "
                        f"The server or a proxy damages it: {self.url}"
                    )
                continue
            there = self._arrived_bytes()
            if there >= self._milestone():
                fruitless, self.mark = 0, there
            else:
                fruitless += 1
            if fruitless == TRIES:
                so_far = f"{there:,}{'' if self.size is None else f' of {self.size:,}'} bytes have arrived"
                raise PassingError(
                    f"{self.name} cannot be downloaded now ({trouble}; {self.url}). {so_far}; "
                    + (
                        "the server ignores Range and sends the whole file each time."
                        if self.ignores_range
                        else "the same command resumes there."
                    )
                )
            self._pause(max(pause, FIRST_PAUSE_SECONDS * 2 ** (fruitless - 1) if fruitless else 0.0))

    def _milestone(self) -> int:
        """Return the part's length at which the count of failures is reset.

        Only bytes beyond the longest part so far are progress (a server without Range repeats the others): a 64th of
        the rest, at most 1 MiB. After the part was discarded, and where the length is unknown or differs between
        responses, the part must double.
        """
        if self.size is None or len(self.sizes) > 1 or self.starts_over:
            return max(2 * self.mark, _BLOCK_BYTES)
        return self.mark + max(1, min(_BLOCK_BYTES, (self.size - self.mark) // 64))

    def _arrived_bytes(self) -> int:
        """Return the length of the part."""
        return self.part.stat().st_size if self.part.exists() else 0

    def _receive(self) -> None:
        """Request the missing bytes and append them to the part."""
        start = self._arrived_bytes()
        known = (read_json(self.note) or {}) if start else {}
        self.size = self.size if self.size is not None else known.get("bytes")
        if start and (self.size is None or start > self.size):
            self._drop()
            start = 0
        if start and start == self.size:
            self.facts = known
            return
        headers = self.headers()
        if start:
            headers["Range"] = f"bytes={start}-"
            # Without a checksum the two halves could come from different versions.
            if self.checksum is None and known.get("etag"):
                headers["If-Range"] = known["etag"]
        received, window = 0, (time.monotonic(), 0)

        def look() -> None:
            nonlocal window
            self.check()
            if (now := time.monotonic()) - window[0] >= _SLOW_SECONDS:
                if received - window[1] < _SLOW_BYTES:
                    raise _Busy(f"fewer than {_SLOW_BYTES} bytes in {_SLOW_SECONDS:g} s")
                window = now, received

        with open_url(self.url, headers, look) as answer:
            self._judge(answer)
            if answer.status_code == 416:
                self._drop()
                raise _Busy("the server's file has become shorter than what had arrived; the download starts again")
            if answer.status_code == 206:
                range_ = answer.headers.get("Content-Range", "")
                found = _CONTENT_RANGE.fullmatch(range_)
                if not found or int(found[1]) != start or found[2] not in ("*", str(self.size or found[2])):
                    self._drop()
                    raise _Busy(f"requested bytes from {start}, but the server sent Content-Range {range_[:60]!r}")
            elif start:
                self.ignores_range = True
                self._drop()
                start = 0
            length = answer.headers.get("Content-Length")
            if self.size is None and length is not None and length.isdigit():
                self.size = start + int(length)
                self.sizes.add(self.size)
            if self.size is not None:
                check_space(self.target.parent, self.size - start, self.name)
            self.facts = {"bytes": self.size, "etag": answer.headers.get("ETag")}
            if not start:
                write_json(self.note, self.facts)
            with self.part.open("ab") as file:
                for block in answer.iter_raw():  # unbuffered, so that a cut connection loses nothing
                    file.write(block)
                    received += len(block)
                    self.on_bytes(len(block))
                    if self.size is not None and file.tell() > self.size:
                        break  # more than announced, maybe endless
                    if self.size is None and file.tell() // _LOOK_BYTES > (file.tell() - len(block)) // _LOOK_BYTES:
                        check_space(self.target.parent, _LOOK_BYTES, self.name)
                file.flush()
                os.fsync(file.fileno())

    def _judge(self, answer: Any) -> None:
        """Raise if the status is an error."""
        status = answer.status_code
        if status in (200, 206, 416):
            return
        reason = answer.headers.get("X-Error-Message") or answer.reason_phrase
        if status >= 500 or status in _PASSING_STATUS:
            raise _Busy(f"HTTP {status} {reason}", retry_after(answer.headers))
        hint = " Check that HF_TOKEN is set and may read this repository." if status in (401, 403) else ""
        raise DataError(f"{self.name} cannot be downloaded: HTTP {status} {reason} ({self.url}).{hint}")

    def _verify(self) -> tuple[str, str]:
        """Return what is wrong with the part (empty: nothing) and its checksum."""
        self.part.touch()
        count = self._arrived_bytes()
        expected = self.checksum
        if expected is None and self.trusts_etag:
            expected = _sha256_of_etag(self.facts.get("etag"))
        if self.size is not None and count != self.size:
            return f"{'more than ' * (count > self.size)}{count} bytes instead of {self.size}", ""
        checksum = checksum_of(self.part, like=expected, check=self.check)
        if expected is not None and checksum != expected:
            kind = "sha256" if len(checksum) == 64 else "git id"
            return f"its {kind} is {checksum[:12]}… instead of {expected[:12]}…", checksum
        return "", checksum

    def _drop(self) -> None:
        """Remove the part and reset the size that the server announced."""
        self.size, self.starts_over = self.bytes, True
        with suppress(FileNotFoundError):
            self.on_bytes(-self.part.stat().st_size)
            self.part.unlink()

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check()
            time.sleep(min(0.1, left))


class _Busy(Exception):
    """A transient fault; the request is retried after `pause` seconds or more."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


@contextmanager
def open_url(url: str, headers: Mapping[str, str], look: Check) -> Iterator[Any]:
    """Yield the response to a GET with its body unread and uncompressed; an exception of `look` closes the connection.

    The HTTP library limits only the time between two bytes, so a trickle of single header bytes, chunk lengths,
    trailers or interim responses (HTTP 102) could keep a request alive for ever. Therefore a thread calls `look` every
    0.1 s. The library would also read the body of each redirect, which may be endless.

    Raises:
        HTTPError: a network failure or invalid redirects.
    """
    from huggingface_hub import get_session
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its HTTP library

    over, raised, sockets = Event(), list[BaseException](), list[socket.socket]()

    def trace(event: str, details: dict[str, Any]) -> None:
        if event.endswith(".connect_tcp.complete"):
            # A duplicate, because TLS takes over the socket, and its handshake may be slow, too.
            sockets.append(details["return_value"].get_extra_info("socket").dup())
            if raised:
                raise raised[0]

    def watch() -> None:
        try:
            while not over.wait(_CHECK_SECONDS):
                look()
        except BaseException as error:
            raised.append(error)
            for each in sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    thread = Thread(target=watch, name="watch of an answer", daemon=True)
    thread.start()
    try:
        client = get_session()
        # A new connection, so that `trace` sees its socket.
        sent = {**headers, "Accept-Encoding": "identity", "Connection": "close"}
        request = client.build_request("GET", url, headers=sent)
        request.extensions |= {"trace": trace, "timeout": dict.fromkeys(("read", "write", "pool"), _SILENCE_SECONDS)}
        request.extensions["timeout"]["connect"] = _CONNECT_SECONDS
        for _ in range(1 + _MOST_REDIRECTS):
            look()
            try:
                answer = client.send(request, stream=True, follow_redirects=False)
            except UnicodeError:
                raise HTTPError(f"{request.url.host[:80]} is not a host name") from None
            try:
                if not answer.has_redirect_location:
                    yield answer
                    return
                if answer.next_request is None:
                    raise HTTPError(f"redirect to an invalid address ({answer.headers['Location'][:80]!r})")
                request = answer.next_request
            finally:
                answer.close()
        raise HTTPError(f"more than {_MOST_REDIRECTS} redirects")
    finally:
        over.set()
        thread.join()
        for each in sockets:
            each.close()
        if raised:
            raise raised[0] from None


def within(seconds: float, check: Check = nothing) -> Check:
    """Return a check that also raises TimeoutError after `seconds`."""
    ends = time.monotonic() + seconds

    def look() -> None:
        check()
        if time.monotonic() > ends:
            raise TimeoutError(f"no complete answer within {seconds:g} s")

    return look


def read_answer(url: str, headers: Mapping[str, str], look: Check) -> tuple[Any, bytes]:
    """Return the response to a GET and its body, at most 64 MiB; `look` may raise to stop.

    Raises:
        HTTPError: a network failure.
        ValueError: the body is too long.
    """
    body = bytearray()
    with open_url(url, headers, look) as answer:
        for block in answer.iter_raw():
            body += block
            if len(body) > MOST_ANSWER_BYTES:
                raise ValueError(f"its answer has more than {MOST_ANSWER_BYTES >> 20} MB")
    return answer, bytes(body)


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds of a Retry-After header, at most 60; 0 if it is missing or malformed."""
    after = headers.get("Retry-After", "")
    return min(float(after), _MOST_PAUSE_SECONDS) if after.isdecimal() else 0.0


def _sha256_of_etag(etag: str | None) -> str | None:
    value = (etag or "").removeprefix("W/").strip('"').lower()
    return value if len(value) == 64 and not set(value) - set("0123456789abcdef") else None


_FIRST_SECONDS = 1.0
_INTERVAL_SECONDS = 0.2


class TransferProgress:
    """A thread-safe count of a transfer's bytes, displayed after the first second."""

    def __init__(self, title: str, total: int, *, start: int = 0, verb: str = "fetch") -> None:
        """Start at `start` of `total` bytes (0: unknown); the display begins with `verb`."""
        self.title, self.done, self.start = title, start, start
        self._bar = _ByteProgress(verb, max(1, total), "", start=start)
        self._is_shown, self._shown = False, self._bar.began
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
            count, seconds = self.done - self.start, max(1e-9, time.monotonic() - self._bar.began)
            speed = f"{format_bytes(count / seconds)}/s"
            self._bar.note(f"{self.title}: {format_bytes(count)} in {format_seconds(seconds)}, {speed}")

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
            speed = max(0.0, (self.done - self.start) / max(1e-9, seconds))
            self._bar.update(self.done, speed=f"{format_bytes(speed)}/s")


class _ByteProgress(Progress):
    """A bar of bytes."""

    def amount(self, done: int) -> str:
        """Return "DONE of TOTAL" with units, or "DONE" if the total is unknown."""
        return f"{format_bytes(done)} of {format_bytes(self.total)}" if self.total > 1 else format_bytes(done)
