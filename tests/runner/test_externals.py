"""Outside files are part of the key by content, checked before and after a step."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kit.toys import ONE
from mlxchat.config.pins import File, Folder
from mlxchat.config.schema import TaskItem
from mlxchat.errors import StepFailed
from mlxchat.runner import keys
from mlxchat.store import attempts
from mlxchat.store.fingerprint import hash_file, identity_of


@dataclass
class Source:
    path: str = field(default="", metadata={"pin": File()})


def reading(toys: Any, tmp_path: Path, body: str) -> Path:
    """Have `make` read a file outside; return the file."""
    path = tmp_path / "text.txt"
    path.write_text("old")
    toys.config.toy = Source(str(path))
    toys.add("make", f"path = ctx.config.toy.path\n{body}")
    return path


COPY = "import pathlib; (ctx.out / 'result.txt').write_text(pathlib.Path(path).read_text())"


@pytest.mark.parametrize("when", ["while it ran", "since it was planned"])
def test_changed_file_fails_the_step(when, toys, tmp_path):
    path = reading(toys, tmp_path, f"{COPY}\npathlib.Path(path).write_text('new')" if "ran" in when else COPY)
    plan = toys.plan(ONE)
    if "planned" in when:
        path.write_text("new")
    with pytest.raises(StepFailed, match=rf"step one: .*toy\.path \(\.txt\) changed {when}.*same command again"):
        toys.run(plan)
    assert list(toys.store.manifests()) == []
    assert [attempt["outcome"] for attempt in attempts.read(toys.store.work(plan[0].key))] == ["failed"]


@dataclass
class Outside:
    path: str = field(default="", metadata={"pin": Folder(), "identity": False})


def test_folder_is_pinned_by_names_and_contents(tmp_path):
    pins = []
    for name, text in (("one", "weights"), ("two", "weights"), ("three", "other weights")):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "deep" / "model").write_text(text)
        pins.append(keys.pin_externals({"outside": Outside(str(tmp_path / name))}))
    assert pins[0] == pins[1] != pins[2]
    assert pins[0]["file of folder deep/model"] == hash_file(tmp_path / "one" / "deep" / "model")


def test_moved_file_keeps_its_key_and_another_setting_changes_it(tmp_path):
    def section(one: str, other: str) -> dict[str, Any]:
        return {"sft": {"a": TaskItem(task="jsonl", path=one), "b": TaskItem(task="jsonl", path=other)}}

    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "moved.jsonl")]
    for path, text in zip(paths, ("one", "two", "one"), strict=True):
        Path(path).write_text(text)
    here, moved, exchanged = section(*paths[:2]), section(paths[2], paths[1]), section(paths[1], paths[0])
    assert identity_of(here) == identity_of(moved) == identity_of(exchanged)
    assert keys.pin_externals(here) == keys.pin_externals(moved) != keys.pin_externals(exchanged)
