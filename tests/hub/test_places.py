"""Transfers over fsspec: artifacts arrive complete, hashed and with their inputs; interrupted transfers resume."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.artifacts import contents, find_faults
from kit.toys import PIPELINE
from mlxchat.cli import dispatch
from mlxchat.errors import ConfigError, PassingError, StoreError
from mlxchat.hub.places import Place, export_to, import_from, open_place, push_artifacts
from mlxchat.store.catalog import closure
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store


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
from mlxchat.hub import places
from mlxchat.hub.places import open_place
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store
from mlxchat.store.catalog import closure
way, url, outputs = sys.argv[1:]
store = Store(Path(outputs))
if way == "export":
    places.export_to(open_place(url), closure(store, [resolve(store, "second")]))
else:
    places.import_from(store, open_place(url), [])
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
