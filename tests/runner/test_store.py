"""The outputs folder: nothing half-made is ever found, names are for people, faults are told in words."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxchat.errors import StoreError
from mlxchat.runner.store import Store, artifact_name, describe_outputs, read_manifest

RID = "abcdefghijklmnop" + "q" * 36


def manifest(**more: Any) -> dict[str, Any]:
    return {"rid": RID, "name": f"sft-d4-{RID[:16]}", "published": "2026-01-01", **more}


def make_artifact(store: Store, rid: str = RID, name: str = "", text: str = "content") -> Path:
    store.prepare()
    out = store.work(rid) / "out"
    (out / "deep").mkdir(parents=True)
    (out / "model.txt").write_text(text)
    (out / "deep" / "more.txt").write_text(text)
    return store.publish(out, name or f"sft-d4-{rid[:16]}", manifest(rid=rid))


def test_what_is_made_outside_a_checkout_can_be_read(toys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed from a wheel there is no git: for a day such manifests were called damaged by the next step."""
    monkeypatch.setattr("mlxchat.runner.environment.git_state", lambda folder: None)
    toys.run(toys.plan({"first": {"stage": "make"}, "second": {"stage": "copy", "source": "first"}}))
    assert read_manifest(toys.store.resolve("second"))["git"] is None


def test_a_manifest_that_readers_would_refuse_is_not_published(store: Store) -> None:
    out = store.work(RID) / "out"
    out.mkdir(parents=True)
    with pytest.raises(StoreError, match=r"cannot be published: .*metrics\.loss is 'low', expected a number"):
        store.publish(out, f"sft-d4-{RID[:16]}", manifest(metrics={"loss": "low"}))
    assert list((store.outputs / "store").iterdir()) == []
    assert out.is_dir(), "what was made is kept"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "outputs")
    found.prepare()
    return found


def test_an_artifact_is_found_if_and_only_if_its_manifest_is_there(store: Store) -> None:
    place = store.outputs / "store" / f"sft-d4-{RID[:16]}"
    place.mkdir()
    (place / "model.safetensors").write_text("weights")
    assert (store.find(RID), store.read(RID), list(store.manifests())) == (None, None, [])
    (place / "manifest.json").write_text(json.dumps(manifest()))
    store.forget()
    assert (store.find(RID), store.read(RID), list(store.manifests())) == (place, manifest(), [manifest()])


def test_another_store_object_sees_what_was_published_after_it_forgets(store: Store) -> None:
    other = Store(store.outputs)
    assert other.find(RID) is None
    place = make_artifact(store)
    other.forget()
    assert other.find(RID) == place


# Publishes again and again, killed at one file operation further each time, until it lives to the end.
CRASHES = """
import json, os, shutil, signal, sys
from pathlib import Path
from mlxchat.runner.store import Store

outputs, rid, name, old = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "rebuild"
WATCHED = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "shutil.rmtree")
armed, countdown = False, 0

def kill_at_countdown(event, arguments):
    global countdown
    if armed and event in WATCHED:
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill_at_countdown)

def make(store, text):
    out = store.work(rid) / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for index in range(3):
        (out / f"{index}.txt").write_text(text)
    return out

def publish(store, text):
    return store.publish(make(store, text), name, {"text": text})

states = []
for crash in range(1, 200):
    store = Store(outputs)
    store.prepare()
    if old:
        publish(store, "old")
    out = make(store, "new")
    child = os.fork()
    if child == 0:
        armed, countdown = True, crash
        store.publish(out, name, {"text": "new"})
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    found = Store(outputs).find(rid)
    texts = sorted({path.read_text() for path in found.glob("*.txt")}) if found else []
    count = len(list(found.glob("*.txt"))) if found else 0
    states.append([json.loads((found / "manifest.json").read_text())["text"] if found else None, texts, count])
    again = publish(Store(outputs), "new")
    assert Store(outputs).find(rid) == again and len(list(again.glob("*.txt"))) == 3
    shutil.rmtree(outputs)
    if status == 0:
        break
print(json.dumps(states))
"""


@pytest.mark.parametrize("before", ["nothing", "rebuild"])
def test_a_kill_at_any_file_operation_of_publishing_leaves_no_partial_artifact(before: str, tmp_path: Path) -> None:
    name = f"sft-d4-{RID[:16]}"
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tmp_path / "outputs"), RID, name, before],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    states = json.loads(done.stdout)
    whole = [["new", ["new"], 3], ["old", ["old"], 3], [None, [], 0]]
    assert [state for state in states if state not in whole] == []
    assert states[-1] == ["new", ["new"], 3], "undisturbed, it is published"
    assert len(states) > 6, "some operations were interrupted"
    assert states[0] == (["old", ["old"], 3] if before == "rebuild" else [None, [], 0])


@pytest.mark.skipif(sys.platform != "linux", reason="files are told by their handles in /proc")
def test_everything_is_on_disk_before_the_rename_makes_it_an_artifact(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(str(Path(f"/proc/self/fd/{handle}").readlink())), fsync(handle))
    )
    monkeypatch.setattr(Path, "rename", lambda path, target: (events.append("rename"), rename(path, target))[1])
    make_artifact(store)
    synced = {Path(name).name for name in events[: events.index("rename")]}
    assert synced >= {"manifest.json", "model.txt", "more.txt", "deep", "out"}
    assert Path(events[-1]).name == "store", "the folder that holds the new name is synced after the rename"


def test_publishing_again_replaces_the_artifact_and_leaves_nothing_behind(store: Store) -> None:
    make_artifact(store, text="old")
    place = make_artifact(store, text="new")
    assert (place / "model.txt").read_text() == "new"
    assert [path.name for path in (store.outputs / "store").iterdir()] == [place.name]
    assert [path.name for path in (store.outputs / "work").iterdir() if path.name.startswith(".")] == []


def test_who_may_read_the_folder_may_read_every_file_of_an_artifact(store: Store) -> None:
    out = store.work(RID) / "out"
    out.mkdir(parents=True)
    out.chmod(0o750)
    private = out / "model.safetensors"
    private.write_text("weights")
    private.chmod(0o600)  # as safetensors writes it
    place = store.publish(out, f"sft-d4-{RID[:16]}", manifest())
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in place.iterdir()} == {
        "manifest.json": "0o640",
        "model.safetensors": "0o640",
    }


def test_refs_are_relative_and_survive_a_move_of_the_folder(store: Store, tmp_path: Path) -> None:
    place = make_artifact(store)
    store.set_ref("latest", "sft", place)
    store.set_ref("run1", "sft", place)
    link = store.outputs / "refs" / "latest" / "sft"
    assert not link.readlink().is_absolute()
    moved = store.outputs.rename(tmp_path / "elsewhere")
    expected = {"sft": moved / "store" / place.name}
    assert Store(moved).refs() == Store(moved).refs("run1") == expected


def test_a_ref_is_replaced_in_one_step(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_artifact(store), make_artifact(store, rid="z" * 52)
    store.set_ref("latest", "sft", first)
    seen = []
    replace = Path.replace

    def look(path: Path, target: Path) -> Path:
        seen.append(store.refs()["sft"])
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", look)
    store.set_ref("latest", "sft", second)
    assert (seen, store.refs()) == ([first], {"sft": second})
    assert [path.name for path in (store.outputs / "refs" / "latest").iterdir()] == ["sft"]


def test_a_ref_whose_artifact_is_gone_is_left_out(store: Store) -> None:
    place = make_artifact(store)
    store.set_ref("latest", "sft", place)
    (place / "manifest.json").unlink()
    assert store.refs() == {}


def test_a_manifest_cut_anywhere_is_refused_with_the_remedy(store: Store) -> None:
    place = make_artifact(store)
    whole = (place / "manifest.json").read_bytes()
    for length in range(len(whole.rstrip())):
        (place / "manifest.json").write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"manifest\.json is damaged.*Remove the folder"):
            read_manifest(place)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"not json", b"[]", b"null", b'"text"', b"3"])
def test_a_manifest_that_is_no_record_is_refused_with_the_remedy(content: bytes, store: Store) -> None:
    place = make_artifact(store)
    (place / "manifest.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"manifest\.json is damaged.*Remove the folder"):
        read_manifest(place)


def test_an_outputs_folder_that_is_a_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "outputs").touch()
    with pytest.raises(StoreError, match=r"cannot be written .*outputs=PATH"):
        Store(tmp_path / "outputs").prepare()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_outputs_folder_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir(mode=0o555)
    with pytest.raises(StoreError, match=r"cannot be written .*outputs=PATH"):
        Store(tmp_path / "outputs").prepare()


def test_preparing_leaves_only_the_folders(store: Store) -> None:
    assert sorted(path.name for path in store.outputs.iterdir()) == ["locks", "refs", "runs", "store", "work"]
    assert [path for path in store.outputs.rglob("*") if path.is_file()] == []


def test_people_name_an_artifact_by_step_folder_or_start_of_its_id(store: Store) -> None:
    place = make_artifact(store)
    store.set_ref("latest", "sft", place)
    assert store.resolve("sft") == store.resolve(place.name) == store.resolve(RID[:5]) == place


def test_a_name_of_two_artifacts_is_refused(store: Store) -> None:
    make_artifact(store)
    make_artifact(store, rid=RID[:8] + "2" * 44)
    with pytest.raises(StoreError, match=r'"abcdefgh" is ambiguous'):
        store.resolve("abcdefgh")


def test_a_name_of_no_artifact_is_refused_with_the_steps_there_are(store: Store) -> None:
    store.set_ref("latest", "sft", make_artifact(store))
    with pytest.raises(StoreError, match=r'"nope" is no artifact.*latest run.*: sft'):
        store.resolve("nope")


@pytest.mark.parametrize("label", ["../../etc", "a/b", "a b", "-x", ".", "", "ü"])
def test_a_label_never_leaves_the_store_folder(label: str) -> None:
    name = artifact_name("sft", label, RID)
    assert Path(name).name == name
    assert name.startswith("sft-")
    assert name.endswith(f"-{RID[:16]}")


def test_outputs_are_described_by_size_and_sha256_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.bin").write_bytes(b"\x00" * 3000)
    (tmp_path / "a.txt").write_bytes(b"abc")
    files, _ = describe_outputs(tmp_path)
    assert files == [
        {"path": "a.txt", "bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()},
        {"path": "deep/b.bin", "bytes": 3000, "sha256": hashlib.sha256(bytes(3000)).hexdigest()},
    ]


@pytest.mark.parametrize(
    ("name", "counts"), [("model.bin", True), ("new.bin", True), ("metrics.jsonl", False), ("samples.jsonl", False)]
)
def test_the_digest_of_the_whole_leaves_out_observations(name: str, counts: bool, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"1")
    _, before = describe_outputs(tmp_path)
    (tmp_path / name).write_bytes(b"2")
    files, after = describe_outputs(tmp_path)
    assert (after != before) == counts
    assert name in {file["path"] for file in files}, "it is listed in any case"


def test_a_manifest_of_gigabytes_is_refused_without_reading_it(tmp_path: Path) -> None:
    """2 MB of a compressed archive unpacked to 2 GB of blanks, of which importing took 4 GB of memory."""
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(StoreError, match="it is larger than 64 MB"):
        read_manifest(tmp_path)
