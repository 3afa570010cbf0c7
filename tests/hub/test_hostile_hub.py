"""A hostile Hub: no path leads out of the cache, no file fills the disk, no listing is endless."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kit.servers import Loopback, QuietHandler
from mlxchat.errors import DataError, MlxchatError, PassingError
from mlxchat.hub import cache, downloads, listings
from mlxchat.hub.cache import hub_cache
from mlxchat.hub.client import HubFile, fetch_url, list_files

COMMIT, GIT, SHA256 = "0" * 40, "a" * 40, "b" * 64
OUT = "../../../../out"


class Hostile(QuietHandler):
    """Answers with the server's `commit` and `entry`; every other path is an endless file."""

    server: Any
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self.server.hosts.append(self.headers["Host"])
        answer = {"/revision/": {"id": "a/b", "sha": self.server.commit}, "/tree/": [self.server.entry]}
        found = next((value for part, value in answer.items() if part in self.path), None)
        self.send_response(self.server.status if "/tree/" in self.path else 200)
        if found is not None:
            if "/tree/" in self.path:
                for name, value in self.server.headers(len(self.server.hosts)).items():
                    self.send_header(name, value)
            body = json.dumps(found).encode()
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        if self.path.endswith("promised"):
            self.send_header("Content-Length", "10")
        self.end_headers()
        for _ in range(self.server.blocks):
            try:
                self.wfile.write(bytes(1 << 16))
            except OSError:
                return
            self.server.sent += 1 << 16


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = Loopback(Hostile)
    server.commit, server.blocks, server.sent = COMMIT, 1 << 12, 0
    server.entry = {"type": "file", "path": "data/a.parquet", "oid": GIT, "size": 10}
    server.hosts, server.status, server.headers = [], 200, lambda number: {}
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MLXCHAT_CACHE", str(tmp_path / "cache"))
    with server:
        yield server


@pytest.mark.parametrize(
    "changed",
    [
        {"commit": OUT}, {"commit": ".."}, {"commit": "a/b"}, {"commit": ""},
        {"path": OUT}, {"path": "/etc/passwd"}, {"path": "data/../../x"}, {"path": "..\\x"}, {"path": "a\0b"},
        {"path": ""}, {"oid": OUT}, {"oid": "A" * 40}, {"oid": ""}, {"lfs": {"oid": OUT, "size": 10, "pointerSize": 1}},
        {"size": "ten"}, {"size": -5}, {"size": 1.5}, {"size": 10**400}, {"path": "a" * 250}, {"path": "b/" * 600},
        {"path": "a\ud800"}, {"path": "a\u202eb"}, {"path": "a\x9bb"},
    ],
    ids=lambda changed: ascii(changed)[:40],
)  # fmt: skip
def test_listing_that_leaves_the_cache_is_refused(hostile, tmp_path, changed):
    if "commit" in changed:
        hostile.commit = changed["commit"]
    else:
        hostile.entry |= changed
    with pytest.raises(DataError, match="a/b "):
        list_files("a/b")
    assert not list((tmp_path / "cache").rglob(f"{COMMIT}.json"))
    assert not list(tmp_path.glob("out*")), "nothing outside of the cache"


@pytest.mark.parametrize("path", ["a.parquet", "data/train-00000-of-00001.parquet", "données/a b.parquet", "..a/b..c"])
@pytest.mark.parametrize("sums", [(SHA256, None), (None, GIT)], ids=["lfs", "git"])
def test_ordinary_paths_are_inside_the_cache(path, sums):
    file = HubFile("org/name", "dataset", COMMIT, path, 0, *sums)
    assert file.place.resolve().is_relative_to(hub_cache().resolve())


def test_file_longer_than_listed_is_discarded(hostile):
    """Without Content-Length only the listed size ends the transfer."""
    target = cache.cache_folder() / "a"
    download = downloads.Download(target=target, url=f"{hostile.url}/files/a", name="a", bytes=100_000)
    with pytest.raises(DataError, match=r"more than \d+ bytes instead of 100000, in 3 consecutive"):
        download.fetch(target.with_name("lock"))
    assert hostile.sent < 3 * (hostile.blocks << 16) / 4
    assert not target.exists()
    assert not target.with_name("a.part").exists()


def test_endless_file_stops_before_the_disk_is_full(hostile, monkeypatch):
    monkeypatch.setattr(downloads, "_LOOK_BYTES", 1 << 20)
    free = iter([10**9] * 3 + [10**6] * 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=next(free)))
    with pytest.raises(DataError, match=r"free\. Make room"):
        fetch_url(f"{hostile.url}/files/b")
    assert hostile.sent < hostile.blocks << 16


@pytest.mark.parametrize("place", ["/tree/0?page=1", "/tree/0?page={number}", "http://localhost:{port}/tree/x"])
def test_endless_list_of_files_is_refused(hostile, monkeypatch, place):
    """Circular pages, endless new pages, pages of another host (which must not get the token)."""
    monkeypatch.setattr(listings, "_MOST_PAGES", 20)
    port = hostile.server_address[1]

    def link(number: int) -> dict[str, str]:
        after = place.format(number=number, port=port) if number < 200 else ""
        return {"Link": f'<{after if "://" in after else hostile.url + after}>; rel="next"'} if after else {}

    hostile.headers = link
    with pytest.raises(DataError, match=r"a/b: its list of files (repeats a page|has over)"):
        list_files("a/b")
    assert len(hostile.hosts) <= 22
    assert set(hostile.hosts) == {f"127.0.0.1:{port}"}


def test_retry_after_is_capped_at_a_minute(hostile, monkeypatch):
    """The official client would sleep for a year."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    hostile.status, hostile.headers = 503, lambda number: {"Retry-After": "31536000"}
    with pytest.raises(PassingError, match=r"a/b: the Hub at .* does not answer .*503"):
        list_files("a/b")
    assert slept == [60.0] * 5


@pytest.mark.parametrize("entry", [7, {"type": "file"}, {"type": "file", "path": "a", "size": 1, "lfs": 7}])
def test_malformed_listing_is_one_message(hostile, monkeypatch, entry):
    monkeypatch.setattr(listings, "FIRST_PAUSE_SECONDS", 0.0)
    hostile.entry = entry
    with pytest.raises(MlxchatError, match="a/b"):
        list_files("a/b")


@pytest.mark.parametrize(
    ("body", "message"),
    [("[" * 100_000, r"a/b: .* nested too deeply"), ("x" * (2 << 20), "its answer has more than 1 MB")],
    ids=["nested", "long"],
)
def test_unreadable_listing_is_one_message(hostile, monkeypatch, body, message):
    monkeypatch.setattr(listings, "FIRST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(downloads, "MOST_ANSWER_BYTES", 1 << 20)
    monkeypatch.setattr(json, "dumps", lambda value: body)
    with pytest.raises(PassingError, match=message):
        list_files("a/b")
