"""Outside files are part of the key by content, checked before and after a step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kit.toys import ONE
from mlxchat.errors import ConfigError, StepFailed
from mlxchat.runner import keys
from mlxchat.runner.keys import FileCache
from mlxchat.store import attempts
from mlxchat.store.fingerprint import hash_file


@dataclass
class Source:
    path: str = field(default="", metadata={"external": "file"})


def reading(toys: Any, tmp_path: Path, body: str) -> Path:
    """Have `make` read a file outside; return the file."""
    path = tmp_path / "text.txt"
    path.write_text("old")
    toys.config.toy = Source(str(path))
    toys.add("make", f"path = ctx.config.toy.path\n{body}")
    return path


COPY = "import pathlib; (ctx.out / 'result.txt').write_text(pathlib.Path(path).read_text())"


@pytest.mark.parametrize("meddle", ["pathlib.Path(path).write_text('new')", "os.unlink(path)"], ids=["changed", "gone"])
def test_file_changed_during_its_step_fails_the_step(meddle: str, toys: Any, tmp_path: Path) -> None:
    path = reading(toys, tmp_path, f"{COPY}\n{meddle}")
    plan = toys.plan(ONE)
    with pytest.raises(
        StepFailed, match=r"step one: .*(toy\.path \(\.txt\) changed while it ran|text\.txt cannot be read)"
    ):
        toys.run(plan)
    assert list(toys.store.manifests()) == []
    assert [attempt["outcome"] for attempt in attempts.read(toys.store.work(plan[0].key))] == ["failed"]
    path.write_text("new")
    toys.add("make", f"path = ctx.config.toy.path\n{COPY}")
    toys.run(toys.plan(ONE))
    (step,) = toys.plan(ONE)
    assert (toys.store.find_made(step.key) / "result.txt").read_text() == "new"


def test_file_changed_since_planning_fails_the_step(toys: Any, tmp_path: Path) -> None:
    path = reading(toys, tmp_path, COPY)
    plan = toys.plan(ONE)
    path.write_text("new")
    with pytest.raises(
        StepFailed, match=r"toy\.path \(\.txt\) changed since it was planned.*Run the same command again"
    ):
        toys.run(plan)
    assert list(toys.store.manifests()) == []


def test_unchanged_file_passes(toys: Any, tmp_path: Path) -> None:
    reading(toys, tmp_path, COPY)
    toys.run(toys.plan(ONE))
    assert [step.state for step in toys.plan(ONE)] == ["done"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("old")
    hour = time.time_ns() - 3_600_000_000_000
    os.utime(path, ns=(hour, hour))
    return path


def remembered(tmp_path: Path, read: Callable[[Path], Any] = hash_file) -> FileCache:
    (tmp_path / "index").mkdir(exist_ok=True)
    return FileCache(tmp_path / "index" / "files.json", "files", read)


def test_old_file_is_hashed_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_SETTLED_NANOSECONDS", -1)
    hashes = remembered(tmp_path)
    digest = hashes.of(str(text))
    hashes.save()
    assert remembered(tmp_path, lambda path: pytest.fail("hashed again")).of(str(text)) == digest


def test_recently_changed_file_is_hashed_each_time(text: Path, tmp_path: Path) -> None:
    for content in ("one", "two"):
        text.write_text(content)
        hashes = remembered(tmp_path)
        assert hashes.of(str(text)) == hash_file(text)
        hashes.save()
    assert not (tmp_path / "index" / "files.json").exists()


def test_change_with_equal_size_and_time_is_noticed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_SETTLED_NANOSECONDS", -1)
    hashes = remembered(tmp_path)
    before, status = hashes.of(str(text)), text.stat()
    hashes.save()
    text.write_text("new")
    os.utime(text, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `touch -r` does; the inode's own time moves on
    assert remembered(tmp_path).of(str(text)) != before


DAMAGES = (
    lambda text: text[: len(text) // 2],
    lambda text: "",
    lambda text: "[1]",
    lambda text: "\0",
    lambda text: text.replace("files", "others"),
    lambda text: text.replace("[", '["x", '),
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_hash_cache_is_ignored(
    damage: Callable[[str], str], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "_SETTLED_NANOSECONDS", -1)
    hashes = remembered(tmp_path)
    hashes.of(str(text))
    hashes.save()
    cache = tmp_path / "index" / "files.json"
    cache.write_text(damage(cache.read_text()))
    assert remembered(tmp_path).of(str(text)) == hash_file(text)


@dataclass
class Folder:
    path: str = field(default="", metadata={"external": "folder", "identity": False})


def test_folder_is_pinned_by_names_and_contents(tmp_path: Path) -> None:
    pins = []
    for name, text in (("one", "weights"), ("two", "weights"), ("three", "other weights")):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "deep" / "model").write_text(text)
        pins.append(keys.pin_externals({"outside": Folder(str(tmp_path / name))}))
    assert pins[0] == pins[1] != pins[2]
    assert pins[0]["file of folder deep/model"] == hash_file(tmp_path / "one" / "deep" / "model")


@pytest.mark.parametrize("name", ["absent", "empty", "file"])
def test_empty_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"outside\.path: .*no folder with files"):
        keys.pin_externals({"outside": Folder(str(tmp_path / name))})
