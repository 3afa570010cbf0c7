"""The outputs folder: artifacts are complete or absent, refs are relative, errors name the remedy."""

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxchat.errors import StoreError
from mlxchat.store.manifest import SCHEMA, describe_outputs, read_manifest, write_manifest
from mlxchat.store.naming import refs_of
from mlxchat.store.store import Store

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
