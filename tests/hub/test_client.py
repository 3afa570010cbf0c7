"""Downloads from a faulty Hub: nothing corrupt is accepted, and no byte that arrived is downloaded twice."""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlxchat.errors import DataError, PassingError
from mlxchat.hub import downloads, listings
from mlxchat.hub.cache import hub_cache
from mlxchat.hub.client import fetch_files, fetch_url, list_files, record

NAME = "org/texts"


def content(seed: int, size: int = 200_000) -> bytes:
    return random.Random(seed).randbytes(size)


CONTENT = {f"data/{index}.parquet": content(index) for index in range(4)} | {"README.md": b"# Texts\n"}


@pytest.fixture
def texts(hub: Any) -> Any:
    """A data set of four large files and a small one."""
    return hub.add(NAME, dict(CONTENT))


def fetch(pattern: str = "*", **more: Any) -> dict[str, bytes]:
    files = list_files(NAME, pattern=pattern)
    return {file.path: path.read_bytes() for file, path in zip(files, fetch_files(files, **more), strict=True)}


# What is fetched


def test_files_are_downloaded_once(hub, texts):
    (file,) = list_files(NAME, pattern="data/0.parquet")
    assert (file.bytes, file.revision) == (200_000, texts.commit)
    assert record(file) == {
        "url": f"hf://datasets/{NAME}/data/0.parquet", "revision": texts.commit,
        "sha256": hashlib.sha256(CONTENT["data/0.parquet"]).hexdigest(), "bytes": 200_000,
    }  # fmt: skip
    assert fetch() == CONTENT
    requests = len(hub.log)
    assert fetch() == CONTENT
    assert len(hub.log) == requests


def test_corrupt_file_is_downloaded_again(hub, texts):
    """Files in LFS are checked by sha256, the others by git id."""
    assert {file.path for file in list_files(NAME) if file.sha256 is None} == {"README.md"}
    hub.faults.corrupt = "*"
    assert fetch() == CONTENT
    assert [len(hub.requests(path)) for path in CONTENT] == [2] * len(CONTENT)


def test_official_client_reads_our_cache(hub, texts):
    from huggingface_hub import hf_hub_download

    fetch()
    sent = hub.sent()
    path = hf_hub_download(
        NAME, "data/1.parquet", repo_type="dataset", revision=texts.commit, endpoint=hub.url, cache_dir=hub_cache()
    )
    assert Path(path).read_bytes() == CONTENT["data/1.parquet"]
    assert hub.sent() == sent


def test_matching_shards_of_nanochat_are_used(hub, texts, tmp_path, monkeypatch):
    folder = tmp_path / "nanochat" / "base_data_climbmix"
    folder.mkdir(parents=True)
    (folder / "0.parquet").write_bytes(CONTENT["data/0.parquet"])
    (folder / "1.parquet").write_bytes(bytes(len(CONTENT["data/1.parquet"])))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "nanochat"))
    assert fetch() == CONTENT
    assert hub.requests("0.parquet") == []
    assert len(hub.requests("1.parquet")) == 1
    (folder / "0.parquet").write_bytes(b"another content under the same inode")
    assert fetch() == CONTENT, "a shard that changes later is downloaded"


def test_altered_file_in_the_cache_is_downloaded_again(hub, texts):
    fetch()
    (file,) = list_files(NAME, pattern="data/2.parquet")
    damaged = bytearray(CONTENT["data/2.parquet"])
    damaged[1000] ^= 1
    file.blob.write_bytes(damaged)
    assert fetch("data/2.parquet") == {"data/2.parquet": CONTENT["data/2.parquet"]}


# Faults


@pytest.mark.parametrize("times", [1, 0], ids=["once", "always"])
def test_cut_download_resumes_without_repeating_bytes(hub, texts, times):
    hub.faults.truncate, hub.faults.times = "data/*", times
    assert fetch() == CONTENT
    assert [each.range for each in hub.requests("0.parquet")][:2] == [None, "bytes=100000-"]
    assert hub.sent("parquet") == 800_000


def test_permanently_corrupt_file_is_refused_and_others_kept(hub, texts):
    hub.faults.corrupt, hub.faults.times = "data/2.parquet", 0
    with pytest.raises(DataError, match=r"data/2\.parquet is corrupt: its sha256 is"):
        fetch()
    files = {file.path: file for file in list_files(NAME)}
    bad = files.pop("data/2.parquet")
    assert not bad.place.exists()
    assert not bad.blob.exists()
    assert not list(bad.blob.parent.glob(f"{bad.blob.name}*.part"))
    assert all(file.is_there() for file in files.values())


@pytest.mark.parametrize("status", [503, 429])
def test_busy_server_is_retried(hub, texts, status):
    hub.faults.fail_first, hub.faults.status = 4, status
    assert fetch() == CONTENT


def test_redirect_to_another_host_does_not_get_the_token(hub, texts, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_token")
    hub.faults.redirect, hub.faults.truncate = True, "data/*"
    assert fetch() == CONTENT
    requests = hub.requests("parquet")
    assert {each.token for each in requests if each.host.startswith("127.")} == {"hf_secret_token"}
    assert {each.token for each in requests if each.host.startswith("localhost")} == {None}
    assert hub.sent("parquet") == 800_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hub: hub.repositories[NAME].files.pop("data/0.parquet"), "HTTP 404"),
        (lambda hub: setattr(hub.faults, "denied", "data/*"), r"403.*authorized.*HF_TOKEN"),
    ],
)
def test_permanent_errors_are_not_retried(hub, texts, change, message):
    files = list_files(NAME)
    change(hub)
    before = len(hub.log)
    with pytest.raises(DataError, match=message):
        fetch_files(files)
    assert len(hub.log) <= before + 6


def test_full_disk_is_refused_before_the_download(hub, texts, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=(256 << 20) + 799_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"org/texts \(5 files to fetch\) needs 800\.0 kB.*269\.2 MB free.*HF_HOME"):
        fetch()
    assert hub.requests("parquet") == []


def test_stopped_download_keeps_received_bytes(hub, texts):
    class Enough(Exception):
        pass

    def check() -> None:
        if hub.sent("0.parquet") > 100_000:
            raise Enough

    hub.faults.block_seconds = 0.05
    with pytest.raises(Enough):
        fetch("data/0.parquet", check=check)
    hub.faults.block_seconds = 0.0
    assert fetch("data/0.parquet") == {"data/0.parquet": CONTENT["data/0.parquet"]}
    (again,) = [each for each in hub.requests("0.parquet") if each.range]
    assert int(again.range.removeprefix("bytes=").removesuffix("-")) > 50_000


# Kills and other processes

CHILD = f"""
from mlxchat.hub.client import fetch_files, list_files
fetch_files(list_files("{NAME}"), workers=2)
"""


def start_child() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD])


def test_killed_download_resumes(hub, texts):
    hub.faults.block_seconds = 0.03
    child = start_child()
    until = time.monotonic() + 30
    while hub.sent("2.parquet") < 60_000 and time.monotonic() < until:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    hub.faults.block_seconds = 0.0
    whole = [path for path in ("data/0.parquet", "data/1.parquet") if list_files(NAME, pattern=path)[0].blob.exists()]
    requests = {path: len(hub.requests(path)) for path in whole}
    assert whole
    assert fetch() == CONTENT
    assert {path: len(hub.requests(path)) for path in whole} == requests
    assert hub.requests("2.parquet")[-1].range is not None
    # Only blocks in transit were lost.
    assert hub.sent("parquet") < 800_000 + 3 * 131_072


# Without a network


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    listings.forget()


def test_offline_without_listing_the_error_gives_the_command(hub, texts, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mlxchat", "experiment=speedrun_d20", "--fail-fast"])
    offline(monkeypatch)
    with pytest.raises(DataError, match=r"org/texts.*HF_HUB_OFFLINE.*mlxchat data fetch experiment=speedrun_d20$"):
        list_files(NAME)


def test_offline_cached_files_are_used_and_missing_ones_named(hub, texts, monkeypatch):
    fetch("data/0.parquet")
    offline(monkeypatch)
    requests = len(hub.log)
    assert fetch("data/0.parquet") == {"data/0.parquet": CONTENT["data/0.parquet"]}
    with pytest.raises(DataError, match=r"600\.0 kB.*data/1\.parquet.*mlxchat data fetch"):
        fetch("data/*")
    assert len(hub.log) == requests


def test_recorded_listing_replaces_a_silent_hub(hub, texts, capsys):
    hub.faults.fail_first = 10_000
    with pytest.raises(PassingError, match="does not answer"):
        list_files(NAME)
    hub.faults.fail_first = 0
    fetch()
    listings.forget()
    hub.faults.fail_first = 10_000
    assert fetch() == CONTENT
    assert f"using recorded commit {texts.commit[:12]}" in capsys.readouterr().err


# Plain addresses


def test_url_is_downloaded_once_resumed_and_recorded(hub):
    hub.files["words.txt"] = content(9)
    hub.faults.truncate = "words.txt"
    url = f"{hub.url}/files/words.txt"
    first, second = fetch_url(url), fetch_url(url)
    assert first == second
    assert first.read_bytes() == content(9)
    assert [each.range for each in hub.requests("words.txt")] == [None, "bytes=100000-"]
    assert record(first) == {
        "url": url, "revision": None, "sha256": hashlib.sha256(content(9)).hexdigest(), "bytes": 200_000
    }  # fmt: skip


def test_url_on_the_hub_is_checked_by_etag(hub):
    hub.files["bundle.zip"] = content(9)
    hub.faults.corrupt = "bundle.zip"
    assert fetch_url(f"{hub.url}/files/bundle.zip").read_bytes() == content(9)
    assert len(hub.requests("bundle.zip")) == 2


def test_equal_contents_are_downloaded_once_and_empty_files_exist(hub):
    files = {"a.parquet": content(1), "b.parquet": content(1), "empty.parquet": b""}
    hub.add(NAME, files)
    assert fetch() == files
    assert hub.sent("parquet") == 200_000


@pytest.mark.slow
def test_two_processes_download_each_file_once(hub, texts):
    hub.faults.block_seconds = 0.005
    children = [start_child(), start_child()]
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    assert hub.sent("parquet") == 800_000
    assert fetch() == CONTENT


def test_url_that_changes_during_a_cut_starts_over(hub, monkeypatch):
    hub.files["words.txt"] = content(9)
    hub.faults.truncate = "words.txt"
    receive = downloads.Download._receive

    def change_in_between(self: Any) -> None:
        try:
            receive(self)
        finally:
            hub.files["words.txt"] = content(10)

    monkeypatch.setattr(downloads.Download, "_receive", change_in_between)
    assert fetch_url(f"{hub.url}/files/words.txt").read_bytes() == content(10)
