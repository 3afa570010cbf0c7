"""The outputs folder: artifacts are complete or absent, refs are relative, errors name the remedy;
shared artifacts, and folders that are written whole."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxchat.errors import StoreError
from mlxchat.store.files import whole_file, whole_folder, write_whole
from mlxchat.store.manifest import SCHEMA, SHARED_KIND, describe_outputs, read_manifest, write_manifest
from mlxchat.store.naming import refs_of
from mlxchat.store.store import SharedArtifacts, Store

KEY = "abcdefghijklmnop" + "q" * 36
RID = "bcdefghijklmnopq" + "r" * 36


def manifest(**more: Any) -> dict[str, Any]:
    return {"key": KEY, "stage": "sft", "published": "2026-01-01", **more}


def make_artifact(store: Store, text: str = "content", **more: Any) -> Path:
    store.prepare()
    out = store.work(KEY) / "out"
    (out / "deep").mkdir(parents=True)
    (out / "model.txt").write_text(text)
    (out / "deep" / "more.txt").write_text(text)
    place = store.publish(out, "d4", manifest(**more))
    shutil.rmtree(store.work(KEY))
    return place


def test_invalid_manifest_is_not_published(store):
    out = store.work(KEY) / "out"
    out.mkdir(parents=True)
    with pytest.raises(StoreError, match=r"cannot be published: .*metrics\.loss is 'low', expected a number"):
        store.publish(out, "d4", manifest(metrics={"loss": "low"}))
    assert list((store.outputs / "store").iterdir()) == []
    assert out.is_dir(), "the outputs are kept"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "outputs")
    found.prepare()
    return found


def test_artifact_exists_if_its_manifest_does(store):
    place = store.outputs / "store" / f"sft-d4-{RID[:16]}"
    place.mkdir()
    (place / "model.safetensors").write_text("weights")
    assert (store.find(RID), list(store.manifests())) == (None, [])
    made = manifest(rid=RID, schema=SCHEMA)
    write_manifest(place, made)
    store.forget()
    assert (store.find(RID), list(store.manifests())) == (place, [made])


def test_damaged_artifact_is_replaced_by_equal_contents(store):
    place = make_artifact(store)
    (place / "model.txt").write_text("changed")
    assert make_artifact(store) == place
    assert (place / "model.txt").read_text() == "content"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/fd")
def test_everything_is_synced_before_the_rename(store, monkeypatch):
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(str(Path(f"/proc/self/fd/{handle}").readlink())), fsync(handle))
    )
    monkeypatch.setattr(Path, "rename", lambda path, target: (events.append("rename"), rename(path, target))[1])
    make_artifact(store)
    synced = {Path(name).name for name in events[: events.index("rename")]}
    assert synced >= {"records", "manifest.json", "model.txt", "more.txt", "deep", "out"}
    assert Path(events[-1]).name == "store", "the folder that holds the new name is synced after the rename"


def test_other_contents_are_another_artifact(store):
    """A forced step must not take the bytes from pins and readers of the former artifact."""
    old = make_artifact(store, "old", published="2026-01-01")
    new = make_artifact(store, "new", published="2026-01-02")
    assert [(place / "model.txt").read_text() for place in (old, new)] == ["old", "new"]
    assert store.find_made(KEY) == new
    shutil.rmtree(new)
    store.forget()
    assert store.find_made(KEY) == old


def test_equal_contents_keep_the_artifact_and_add_a_record(store):
    first = make_artifact(store, published="2026-01-01")
    assert make_artifact(store, published="2026-01-02") == first
    assert read_manifest(first)["published"] == "2026-01-01", "it is never written again"
    assert store.made(KEY)["published"] == "2026-01-02"
    assert len(list((store.outputs / "records").iterdir())) == 2
    assert read_manifest(first)["tree"] == read_manifest(make_artifact(store, key="z" * 52))["tree"]


def test_files_get_the_permissions_of_their_folder(store):
    out = store.work(KEY) / "out"
    out.mkdir(parents=True)
    out.chmod(0o750)
    private = out / "model.safetensors"
    private.write_text("weights")
    private.chmod(0o600)  # as safetensors writes it
    place = store.publish(out, "d4", manifest())
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in place.iterdir()} == {
        "manifest.json": "0o640",
        "model.safetensors": "0o640",
    }


def test_refs_survive_a_move_of_the_folder(store, tmp_path):
    place = make_artifact(store)
    store.set_ref("latest", "sft", place)
    link = store.outputs / "refs" / "latest" / "sft"
    assert not link.readlink().is_absolute()
    moved = store.outputs.rename(tmp_path / "elsewhere")
    assert refs_of(Store(moved)) == {"sft": moved / "store" / place.name}


@pytest.mark.parametrize(("name", "counts"), [("model.bin", True), ("new.bin", True), ("metrics.jsonl", False)])
def test_tree_excludes_observations(name, counts, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"1")
    _, before = describe_outputs(tmp_path)
    (tmp_path / name).write_bytes(b"2")
    files, after = describe_outputs(tmp_path)
    assert (after != before) == counts
    assert {"path": name, "bytes": 1, "sha256": hashlib.sha256(b"2").hexdigest()} in files


LINEAGE = {"corpus": {"step": "corpus", "artifact": "corpus-a", "rid": "r", "tree": "t"}}


@pytest.fixture
def shared(tmp_path: Path) -> SharedArtifacts:
    Store(tmp_path / "outputs").prepare()
    return open_shared(tmp_path / "outputs")


def open_shared(outputs: Path, say: Callable[[str], None] = print) -> SharedArtifacts:
    return SharedArtifacts(outputs=outputs, run="run", inputs=LINEAGE, facts=lambda: {"git": None}, say=say)


def obtain(shared: SharedArtifacts, make: Callable[[Path], dict[str, float]], **changes: Any) -> Path:
    return shared.obtain(**{"version": 1, "label": "shard", "identity": {"text": "abc"}, "make": make, **changes})


def write(folder: Path) -> dict[str, float]:
    (folder / "tokens").write_text("content")
    return {"tokens": 7, "tokens_per_second": 5.0}


def refuse(folder: Path) -> dict[str, float]:
    raise AssertionError("it exists already")


def test_existing_artifact_is_reused_and_has_lineage_and_digests(shared):
    place = obtain(shared, write)
    assert (place / "tokens").read_text() == "content"
    assert obtain(shared, refuse) == obtain(open_shared(shared.outputs), refuse, label="other") == place
    (manifest,) = Store(shared.outputs).manifests()
    assert place.name == manifest["name"] == f"tokens-shard-{manifest['rid'][:16]}"
    assert manifest["kind"] == manifest["stage"] == manifest["step"] == SHARED_KIND
    assert manifest["inputs"] == LINEAGE
    assert (manifest["metrics"], manifest["tokens_per_second"]) == ({"tokens": 7}, 5.0)
    assert (manifest["outputs"], manifest["tree"]) == describe_outputs(place)


def fill(path: Path, content: str = "new", *, force: bool = False) -> None:
    with whole_folder(path, force=force) as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "file").write_text(content)


def test_file_is_replaced_atomically(tmp_path):
    place = tmp_path / "file"
    write_whole(place, "old")
    with whole_file(place) as file:
        file.write_text("new")
        assert place.read_text() == "old"
    assert [(path, path.read_text()) for path in tmp_path.iterdir()] == [(place, "new")]


def test_existing_folder_is_replaced_only_by_force(tmp_path):
    fill(tmp_path / "out", "mine")
    with pytest.raises(StoreError, match="exists already"):
        fill(tmp_path / "out")
    assert (tmp_path / "out" / "inside" / "file").read_text() == "mine"
    fill(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "inside" / "file").read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_killed_export_leaves_no_folder_and_its_leftovers_are_removed(tmp_path):
    script = f"""
from pathlib import Path
from mlxchat.store.files import whole_folder
with whole_folder(Path({str(tmp_path / "out")!r})) as folder:
    (folder / "half").touch()
"""
    environ = os.environ | {"MLXCHAT_CRASH_AT": "export.synced"}
    assert subprocess.run([sys.executable, "-c", script], env=environ, check=False).returncode == -signal.SIGKILL
    assert [each.name for each in tmp_path.iterdir()] == [".out.unfinished"]
    fill(tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["inside"]
