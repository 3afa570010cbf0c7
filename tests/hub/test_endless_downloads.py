"""Servers that never deliver: every download ends after a bounded number of requests, with one message."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.servers import Loopback, QuietHandler
from mlxchat.errors import DataError, MlxchatError, PassingError
from mlxchat.hub import cache, downloads
from mlxchat.hub.client import fetch_url

CONTENT = bytes(range(256)) * 1000
HALF, WHOLE = len(CONTENT) // 2, len(CONTENT)
STEP = WHOLE // 128
Answer = Callable[[Any, int, int], None]


def send(request: Any, status: int, body: bytes, **headers: str) -> None:
    """Send an answer; Content-Length is the body's unless it is given. An empty header is left out."""
    request.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        if value:
            request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    request.wfile.write(body)
    request.close_connection = True


def rest(request: Any, start: int, most: int, **headers: str) -> None:
    """Announce the bytes from `start` on, send `most` of them."""
    facts = {"Content_Length": str(WHOLE - start), "Content_Range": f"bytes {start}-{WHOLE - 1}/{WHOLE}"}
    send(request, 206 if start else 200, CONTENT[start : start + most], **{**facts, **headers})


class Server:
    """Answers request number n (from 1) for bytes from `start` on by `answer(request, n, start)`."""

    def __init__(self) -> None:
        self.answer: Answer = lambda request, number, start: rest(request, start, WHOLE)
        self.starts: list[int] = []
        self.pauses: list[float] = []
        server = self

        class Handler(QuietHandler):
            def do_GET(self) -> None:
                start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
                server.starts.append(start)
                try:
                    server.answer(self, len(server.starts), start)
                except OSError:
                    self.close_connection = True

        self.http = Loopback(Handler)
        self.url = f"{self.http.url}/files/a"

    def fetch(self, size: int | None = WHOLE) -> Path:
        """Fetch the file; None: its size is what the server says."""
        target = cache.cache_folder() / "a"
        downloads.Download(target=target, url=self.url, name="a", bytes=size).fetch(target.with_name("lock"))
        return target


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(downloads.Download, "_pause", lambda self, seconds: server.pauses.append(seconds))
    with server.http:
        yield server


def cut(request: Any, number: int, start: int) -> None:
    """Ignore Range; cut in the middle."""
    rest(request, 0, HALF)


def cut_then(second: Answer) -> Answer:
    """Cut whole files in the middle; continue them by `second`."""
    return lambda request, number, start: second(request, number, start) if start else cut(request, number, 0)


def continued(most: int, **headers: str) -> Answer:
    """Cut whole files in the middle; continue them with `most` bytes and these headers."""
    return cut_then(lambda request, number, start: rest(request, start, most, **headers))


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    return lambda request, number, start: send(request, code, body, **headers)


def redirect(request: Any, number: int, start: int) -> None:
    send(request, 302, b"", Location=request.path)


ENDLESS: dict[str, tuple[Answer, int]] = {
    "Range is ignored and every answer is cut": (cut, 7),
    "one byte more each time": (lambda request, number, start: rest(request, start, 1), 20),
    "a whole file, one byte longer each time": (lambda request, number, start: rest(request, 0, 1000 + number), 20),
    "a whole file, longer each time, and cut before its end": (
        lambda request, number, start: rest(request, 0, 1000 + number, Content_Length=str(1002 + number)),
        20,
    ),
    "nothing": (lambda request, number, start: rest(request, start, 0), 6),
    "another range": (continued(9, Content_Range="bytes 7-9/10"), 12),
    "no Content-Range": (continued(9, Content_Range=""), 12),
    "a range of no digits": (continued(9, Content_Range="bytes ²-"), 12),
    "another total": (continued(9, Content_Range=f"bytes {HALF}-{WHOLE}/{WHOLE + 1}"), 12),
    "416": (cut_then(status(416)), 12),
    "416 at once": (status(416), 6),
    "redirects in a circle": (redirect, 6 * 21),
    "a redirect to no address": (status(302, Location="ftp://[x"), 6),
    "a redirect to a host that no name server takes": (status(302, Location=f"http://{'a' * 300}/"), 6),
    "a length that is too short": (status(200, CONTENT[:HALF]), 3),
    "a length that is too long": (lambda request, number, start: rest(request, 0, WHOLE, Content_Length="999999"), 7),
    "busy for a year": (status(503, Retry_After="31536000"), 6),
    "busy for a number of 400 digits": (status(429, Retry_After="9" * 400), 6),
    "busy for no number": (status(503, Retry_After="²"), 6),
    # If a little further each time were progress, 10 GB in steps of 1 MB would be 50 TB.
    "Range is ignored, a little further each time": (
        lambda request, number, start: rest(request, 0, number * STEP),
        40,
    ),
    "416, a little further each time": (
        lambda request, number, start: send(request, 416, b"") if start else rest(request, 0, number * STEP),
        40,
    ),
    "another range, a little further each time": (
        lambda request, number, start: rest(request, start, number * STEP, Content_Range=""),
        40,
    ),
}
# Where a listing says the size, a longer length does no harm; where nothing does, a shorter one is the truth.
SIZES: dict[str, tuple[int | None, ...]] = {
    "a length that is too short": (WHOLE,),
    **{name: (WHOLE,) for name in ENDLESS if name.endswith("a little further each time")},
    "a length that is too long": (None,),
    "a whole file, longer each time, and cut before its end": (None,),
}


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name in ENDLESS for size in SIZES.get(name, (WHOLE, None))]
)
def test_download_ends_after_a_bounded_number_of_requests(name, size, server):
    """A failure count that any byte resets would allow endless requests."""
    behaviour, most = ENDLESS[name]
    # Beyond the bound the whole file is sent, so that the test fails instead of hanging.
    server.answer = lambda request, number, start: (
        behaviour(request, number, start) if number <= 200 else rest(request, start, WHOLE)
    )
    with pytest.raises(MlxchatError, match=r"\ba (cannot be|is corrupt)") as raised:
        server.fetch(size)
    assert len(str(raised.value)) < 600
    assert len(server.starts) <= most
    assert all(pause <= 60 for pause in server.pauses)
    assert sum(server.pauses) <= 5 * 60
    assert not (cache.cache_folder() / "a").exists()


def test_attempts_without_progress_back_off(server):
    server.answer = cut
    with pytest.raises(PassingError, match=r"128,000 of 256,000 bytes.*Range"):
        server.fetch()
    assert server.starts == [0, *[HALF] * 6]
    first = downloads.FIRST_PAUSE_SECONDS
    assert server.pauses == [0.0, *[first * 2**number for number in range(5)]]


def test_whole_file_arrives_although_range_is_ignored(server):
    sizes = [HALF, 1000, HALF - 1, 3 * WHOLE // 4, 10, WHOLE]
    server.answer = lambda request, number, start: rest(request, 0, sizes[number - 1])
    assert server.fetch().read_bytes() == CONTENT
    assert len(server.starts) == len(sizes)


def test_redirect_body_is_not_read(server):
    """The HTTP library would keep all of it in memory."""
    sent = 0

    def answer(request: Any, number: int, start: int) -> None:
        nonlocal sent
        if number > 1:
            rest(request, start, WHOLE)
            return
        send(request, 302, b"", Location="/files/b", Content_Length=str(1 << 40))
        while sent < 64 << 20:
            request.wfile.write(bytes(1 << 20))
            sent += 1 << 20

    server.answer = answer
    assert server.fetch().read_bytes() == CONTENT
    assert sent < 32 << 20


def test_many_cuts_with_progress_are_accepted(server):
    server.answer = lambda request, number, start: rest(request, start, WHOLE // 40)
    assert server.fetch().read_bytes() == CONTENT
    assert sum(server.pauses) == 0


TRICKLES = {
    "a byte of the body": (f"HTTP/1.1 200 OK\r\nContent-Length: {WHOLE}\r\n\r\n", "a"),
    "the head of a chunk": ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;", "a"),
    "a trailer": ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: ", "a"),
    "interim responses": ("", "HTTP/1.1 102 Processing\r\n\r\n"),
    "a header": ("HTTP/1.1 200 OK\r\nX: ", "X"),
}


@pytest.fixture(params=TRICKLES)
def trickling(request: pytest.FixtureRequest, server: Server) -> Iterator[Server]:
    """A server whose answers begin and then trickle; each byte resets the HTTP library's read timeout."""
    over, (begin, again) = threading.Event(), TRICKLES[request.param]

    def answer(handler: Any, number: int, start: int) -> None:
        handler.wfile.write(begin.encode())
        while not over.wait(0.01):
            handler.wfile.write(again.encode())

    server.answer = answer
    threading.Timer(20, over.set).start()
    yield server
    over.set()


def test_trickling_answers_are_cut(trickling, monkeypatch):
    monkeypatch.setattr(downloads, "_SLOW_SECONDS", 0.05)
    with pytest.raises(PassingError, match="fewer than"):
        trickling.fetch(None)
    assert len(trickling.starts) <= 20  # fewer where a slow machine cuts before the request
    with pytest.raises(TimeoutError, match="no complete answer within"):
        downloads.read_answer(trickling.url, {}, downloads.within(0.05))


def test_tls_handshake_that_trickles_is_cut(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle() -> None:
            connection, _ = listener.accept()
            with contextlib.suppress(OSError), connection:
                connection.sendall(b"\x16\x03\x03\x40\x00")  # a record of 16 kB, whose bytes come slowly
                while True:
                    connection.sendall(b"\0")
                    time.sleep(0.01)

        threading.Thread(target=trickle, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="no complete answer within"):
            downloads.read_answer(f"https://127.0.0.1:{listener.getsockname()[1]}/a", {}, downloads.within(0.2))
        assert time.monotonic() - began < 10


def test_redirects_share_one_time_limit(server, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(downloads.time, "monotonic", lambda: clock[0])

    def answer(request: Any, number: int, start: int) -> None:
        clock[0] += 0.4 * downloads._SLOW_SECONDS
        redirect(request, number, start)

    server.answer = answer
    with pytest.raises(PassingError, match="fewer than"):
        server.fetch()
    assert len(server.starts) <= 4 * downloads.TRIES, "instead of 21"


def test_waiting_for_headers_can_be_stopped(server):
    over, calls = threading.Event(), 0

    def answer(request: Any, number: int, start: int) -> None:
        while not over.wait(0.01):
            request.wfile.write(b"HTTP/1.1 102 Processing\r\n\r\n")

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise DataError("stopped")

    server.answer = answer
    target = cache.cache_folder() / "a"
    download = downloads.Download(target=target, url=server.url, name="a", bytes=WHOLE, check=check)
    try:
        with pytest.raises(DataError, match="stopped"):
            download.fetch(target.with_name("lock"))
        assert "watch of an answer" not in {thread.name for thread in threading.enumerate()}
    finally:
        over.set()


def test_changed_length_restarts_the_download(server):
    """A length announced before a cut must not be trusted for ever, also by later commands."""
    lengths = iter([2 * WHOLE, WHOLE])
    server.answer = lambda request, number, start: rest(request, 0, WHOLE, Content_Length=str(next(lengths)))
    assert server.fetch(None).read_bytes() == CONTENT


def test_wrong_length_does_not_outlive_a_command(server, monkeypatch):
    monkeypatch.setattr(downloads, "TRIES", 1)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    server.answer = lambda request, number, start: rest(request, 0, 0, Content_Length=str(2 * WHOLE))
    with pytest.raises(PassingError):
        fetch_url(server.url)
    server.answer = lambda request, number, start: rest(request, 0, WHOLE)
    assert fetch_url(server.url).read_bytes() == CONTENT


def test_wrong_content_is_downloaded_three_times(server):
    server.answer = lambda request, number, start: send(request, 200, b"x" * (WHOLE + 1))
    with pytest.raises(DataError, match="in 3 consecutive downloads"):
        server.fetch()
    assert len(server.starts) == 3
