"""Downloads from a faulty Hub: nothing corrupt is accepted, complete files are fetched once. Transfers of artifacts."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.artifacts import contents, find_faults
from kit.commands import wait_until
from kit.toys import PIPELINE
from mlxchat.cli import dispatch
from mlxchat.errors import ConfigError, DataError, PassingError, StoreError
from mlxchat.hub import client
from mlxchat.hub.cache import HubFile
from mlxchat.hub.client import fetch_files, fetch_url, list_files, record
from mlxchat.hub.places import Place, export_to, import_from, open_place, push_artifacts
from mlxchat.store.catalog import closure
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

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


def transfers(hub: Any, path: str) -> int:
    """Return how often a file was requested, without requests for its headers."""
    return sum(method == "GET" for method, _ in hub.requests(path))


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
    assert [transfers(hub, path) for path in CONTENT] == [2] * len(CONTENT)


def test_altered_file_in_the_cache_is_downloaded_again(hub, texts):
    fetch()
    (file,) = list_files(NAME, pattern="data/2.parquet")
    damaged = bytearray(CONTENT["data/2.parquet"])
    damaged[1000] ^= 1
    file.place.write_bytes(damaged)
    assert fetch("data/2.parquet") == {"data/2.parquet": CONTENT["data/2.parquet"]}


def test_permanently_corrupt_file_is_refused_and_others_kept(hub, texts):
    hub.faults.corrupt, hub.faults.times = "data/2.parquet", 0
    with pytest.raises(DataError, match=r"data/2\.parquet is corrupt: its sha256 is"):
        fetch()
    files = {file.path: file for file in list_files(NAME)}
    bad = files.pop("data/2.parquet")
    assert not bad.place.exists()
    assert all(file.is_there() for file in files.values())


@pytest.mark.parametrize("status", [503, 429])
def test_busy_server_is_retried(hub, texts, status, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.faults.fail_first, hub.faults.status = 4, status
    assert fetch() == CONTENT


def test_full_disk_is_refused_before_the_download(hub, texts, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=(256 << 20) + 799_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"org/texts \(5 files to fetch\) needs 800\.0 kB.*269\.2 MB free.*HF_HOME"):
        fetch()
    assert hub.requests("parquet") == []


def test_check_stops_a_download(hub, texts):
    def check() -> None:
        if hub.sent("0.parquet") > 10_000:
            raise InterruptedError

    hub.faults.block_seconds = 0.3
    began = time.monotonic()
    with pytest.raises(InterruptedError):
        fetch("data/0.parquet", check=check)
    assert time.monotonic() - began < 3.5, "the whole file takes 3.9 s"


CHILD = f"""
from mlxchat.hub.client import fetch_files, list_files
fetch_files(list_files("{NAME}"))
"""


def start_child() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD])


def test_killed_download_keeps_complete_files(hub, texts):
    hub.faults.block_seconds = 0.03
    child = start_child()
    files = list_files(NAME)
    wait_until(lambda: any(file.place.exists() for file in files), seconds=30)
    child.send_signal(signal.SIGKILL)
    child.wait()
    hub.faults.block_seconds = 0.0
    whole = [file.path for file in files if file.place.exists()]
    assert 0 < len(whole) < len(files)
    assert fetch() == CONTENT
    assert [transfers(hub, path) for path in whole] == [1] * len(whole)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    client.forget()


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
    client.forget()
    hub.faults.fail_first = 10_000
    assert fetch() == CONTENT
    assert f"using recorded commit {texts.commit[:12]}" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["", "truncate", "corrupt"])
def test_url_is_downloaded_once_and_recorded(hub, fault):
    """A cut or corrupt download is repeated."""
    hub.files["words.txt"] = content(9)
    sha256 = hashlib.sha256(content(9)).hexdigest()
    if fault:
        setattr(hub.faults, fault, "words.txt")
    url = f"{hub.url}/files/words.txt"
    first, second = fetch_url(url, sha256=sha256), fetch_url(url)
    assert first == second
    assert first.read_bytes() == content(9)
    assert transfers(hub, "words.txt") == (2 if fault else 1)
    assert record(first) == {"url": url, "revision": None, "sha256": sha256, "bytes": 200_000}


def test_url_with_another_checksum_is_refused(hub):
    hub.files["words.txt"] = content(9)
    with pytest.raises(DataError, match=r"words\.txt is corrupt: its sha256 is .*. Nothing was kept"):
        fetch_url(f"{hub.url}/files/words.txt", sha256="0" * 64)
    with pytest.raises(DataError, match=r"missing\.txt: its server has no such file .*404"):
        fetch_url(f"{hub.url}/files/missing.txt")


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [("org/none", "main", "HF_TOKEN"), (NAME, "v9", "404"), ("no name", "main", "alphanumeric")],
)
def test_missing_repository_or_revision_is_one_message(hub, texts, name, revision, message):
    with pytest.raises(DataError, match=f"{name}: the Hub at .* has no such dataset or revision .*{message}"):
        list_files(name, revision=revision)


COMMIT, GIT, SHA256 = "0" * 40, "a" * 40, "b" * 64


@pytest.mark.parametrize(
    "changed",
    [
        {"revision": ".."}, {"revision": "a/b"}, {"revision": ""}, {"path": "../../../../out"}, {"path": "/etc/passwd"},
        {"path": "data/../../x"}, {"path": "..\\x"}, {"path": "a\0b"}, {"path": ""},
        {"path": "a\u202eb"}, {"git_sha1": "../out"}, {"git_sha1": ""},
    ],
    ids=lambda changed: ascii(changed)[:40],
)  # fmt: skip
def test_listing_that_leaves_the_cache_is_refused(changed):
    facts = {"revision": COMMIT, "path": "a.parquet", "bytes": 0, "sha256": None, "git_sha1": GIT}
    with pytest.raises(DataError, match="org/name "):
        HubFile("org/name", "dataset", **{**facts, **changed})


@pytest.mark.slow
def test_two_processes_download_each_file_once(hub, texts):
    hub.faults.block_seconds = 0.005
    children = [start_child(), start_child()]
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    assert hub.sent("parquet") == 800_000
    assert fetch() == CONTENT


# Transfers of artifacts over fsspec: complete, hashed, with their inputs; interrupted ones resume


@pytest.fixture
def made(toys: Any) -> Any:
    toys.run(toys.plan(PIPELINE))
    return toys


@pytest.fixture
def folders(made: Any) -> list[Path]:
    return closure(made.store, [resolve(made.store, "second")])


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """An empty place, without folders as in a bucket."""
    from fsspec.implementations.memory import MemoryFileSystem

    yield open_place(f"memory://bucket-{tmp_path.name}/runs")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("damage", ["file", "short", "long", "missing", "manifest"])
def test_import_refuses_damaged_artifacts(damage, place, folders, tmp_path):
    export_to(place, folders)
    target = place.path(folders[0].name, "manifest.json" if damage == "manifest" else "result.txt")
    content = place.files.cat_file(target)
    flipped = content[:40] + bytes([content[40] ^ 1]) + content[41:] if damage == "manifest" else b"9" * len(content)
    place.files.rm_file(target)
    if damage != "missing":
        altered = {"file": flipped, "manifest": flipped, "short": content[:-1], "long": content + b"x"}[damage]
        place.files.pipe_file(target, altered)
    other = Store(tmp_path / "other")
    with pytest.raises((StoreError, ConfigError)):
        import_from(other, place, [])
    assert list((other.outputs / "store").iterdir()) == []


def test_import_by_name_includes_inputs(place, made, folders, tmp_path):
    export_to(place, folders)
    new, _ = import_from(Store(tmp_path / "one"), place, [folders[0].name[-16:-6]])
    assert [path.name for path in new] == [folders[0].name]
    new, known = import_from(Store(tmp_path / "one"), place, [folders[1].name])
    assert ([path.name for path in new], known) == ([folders[1].name], [])
    with pytest.raises(ConfigError, match=r'"sft" matches no artifacts of .*it holds copy-'):
        import_from(Store(tmp_path / "two"), place, ["sft"])


RUN = """
import sys
from pathlib import Path
from mlxchat.hub.places import export_to, import_from, open_place
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store
from mlxchat.store.catalog import closure
way, url, outputs = sys.argv[1:]
store = Store(Path(outputs))
if way == "export":
    export_to(open_place(url), closure(store, [resolve(store, "second")]))
else:
    import_from(store, open_place(url), [])
"""


@pytest.mark.parametrize(
    ("way", "point"),
    [("export", "send.file"), ("import", "fetch.file"),
     *(pytest.param(*each, marks=pytest.mark.slow) for each in (
         ("export", "send.described"), ("export", "send.described:2"), ("import", "fetch.artifact"),
         ("import", "import.checked"), ("import", "import.renamed"),
     ))],
)  # fmt: skip
def test_killed_transfer_resumes_and_leaves_no_partial_artifact(way, point, toys, tmp_path):
    toys.add("make", "(ctx.out / 'result.txt').write_text('0123456789' * 1000)")
    toys.run(toys.plan(PIPELINE))
    url, other = f"file://{tmp_path}/elsewhere", Store(tmp_path / "other")
    folders = closure(toys.store, [resolve(toys.store, "second")])
    if way == "import":
        export_to(open_place(url), folders)
    command = [sys.executable, "-c", RUN, way, url, str(toys.outputs if way == "export" else other.outputs)]
    killed = subprocess.run(command, env={**os.environ, "MLXCHAT_CRASH_AT": point}, check=False, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    if way == "import":
        here = list((other.outputs / "store").iterdir())
        assert [fault for folder in here for fault in find_faults(other, folder)] == []
    export_to(open_place(url), folders)
    import_from(other, open_place(url), [])
    assert contents(other.outputs / "store") == contents(toys.outputs / "store")
    assert list((other.outputs / "work").iterdir()) == []


def test_missing_package_is_named_with_its_extra(monkeypatch):
    import fsspec

    assert fsspec.__version__
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"s3fs.*pip install 'mlxchat\[s3\]'"):
        open_place("s3://bucket/path")


def test_hub_roundtrip_in_one_commit(upload_hub, made, folders, tmp_path, capsys):
    arguments = ["push", "second", "hf://me/runs/artifacts", f"outputs={made.outputs}"]
    assert dispatch(arguments) == 0
    repository = upload_hub.repositories["me/runs"]
    assert (repository.private, len(repository.commits)) == (True, 1)
    prefix = "artifacts/store/"
    assert {path.removeprefix(prefix): content for path, content in repository.files.items()} == contents(
        made.outputs / "store"
    )
    assert dispatch(arguments) == 0
    assert len(repository.commits) == 1, "nothing was missing"
    assert dispatch(["pull", "hf://me/runs/artifacts", f"outputs={tmp_path}/other"]) == 0
    assert contents(tmp_path / "other" / "store") == contents(made.outputs / "store")
    assert "2 artifacts pulled" in capsys.readouterr().out


def test_failed_upload_leaves_the_repository_empty(upload_hub, folders):
    upload_hub.faults.broken = "/commit/"
    with pytest.raises(PassingError, match="resumes the transfer"):
        push_artifacts(open_place("hf://me/runs"), folders, public=False)
    assert upload_hub.repositories["me/runs"].files == {}
