"""Push and pull: all inputs or nothing, verified before it reaches the store, and no path leads outside."""

from pathlib import Path
from typing import Any

import pytest

from kit.artifacts import contents, find_faults
from kit.toys import PIPELINE
from mlxchat.errors import StoreError
from mlxchat.hub.places import export_to, import_from, open_place
from mlxchat.store.catalog import closure
from mlxchat.store.files import seal
from mlxchat.store.fingerprint import compute_key
from mlxchat.store.gc import find_garbage
from mlxchat.store.manifest import identify, tree_of
from mlxchat.store.naming import latest, refs_of, resolve
from mlxchat.store.store import Store


@pytest.fixture
def made(toys: Any) -> Any:
    toys.run(toys.plan(PIPELINE))
    return toys


def export(folders: list[Path], to: Path) -> int:
    return export_to(open_place(f"file://{to}"), folders)


def import_all(store: Store, source: Path) -> tuple[list[Path], list[Path]]:
    return import_from(store, open_place(f"file://{source}"), [])


def exported(made: Any, to: Path) -> Path:
    export(closure(made.store, [resolve(made.store, "second")]), to)
    return to


def test_export_and_import_keep_every_byte(made, tmp_path):
    other = Store(tmp_path / "other")
    new, known = import_all(other, exported(made, tmp_path / "folder"))
    assert [place.name.split("-")[0] for place in new] == ["make", "copy"]
    assert known == []
    assert contents(other.outputs / "store") == contents(made.outputs / "store")
    assert [fault for place in new for fault in find_faults(other, place)] == []
    assert import_all(other, tmp_path / "folder")[0] == [], "the second time nothing is new"
    assert [item for item in find_garbage(other).garbage if item.kind == "artifact"] == []
    assert latest(other).startswith("imported-")
    names = {step: place.name for step, place in refs_of(other).items()}
    assert names == {step: resolve(made.store, step).name for step in PIPELINE}


def test_import_includes_inputs_that_differ_here(made, tmp_path):
    """The child must not be imported alone: its inputs would be missing."""
    place = exported(made, tmp_path / "folder")
    theirs = resolve(made.store, "first")
    made.outputs = tmp_path / "other"
    made.add("make", "(ctx.out / 'result.txt').write_text('of another machine')")
    made.run(made.plan({"first": PIPELINE["first"]}, force=["first"]))
    ours = resolve(made.store, "first")
    assert ours.name != theirs.name
    new, known = import_all(made.store, place)
    assert ([folder.name.split("-")[0] for folder in new], known) == (["make", "copy"], [])
    assert [fault for folder in new for fault in find_faults(made.store, folder)] == []
    assert [(folder / "result.txt").read_text() for folder in (ours, new[0])] == ["of another machine", "1"]
    assert made.store.find_made(made.plan(PIPELINE)[0].key) == ours, "the local result takes precedence"


def test_export_refuses_missing_inputs(made, tmp_path):
    first = resolve(made.store, "first")
    first.rename(tmp_path / first.name)
    with pytest.raises(StoreError, match="which is not in"):
        closure(made.store, [resolve(made.store, "second")])


def small_record(**changes: Any) -> dict[str, Any]:
    """Return a minimal manifest whose key and id are those of its contents."""
    record = {
        "schema": 3, "name": "x", "stage": "make", "step": "first", "kind": "number", "version": 1, "config": {},
        "inputs": {}, "pins": {}, "outputs": [], "metrics": {}, "seconds": 1.0, "published": "2026-01-01T00:00:00",
        **changes,
    }  # fmt: skip
    record.setdefault("tree", tree_of({"outputs": []}))
    record.setdefault("key", compute_key(record["stage"], 1, record["config"], {}, {}))
    record.setdefault("rid", identify({"key": record["key"], "outputs": []}))
    return record


def write_small(folder: Path, record: dict[str, Any]) -> Path:
    place = folder / "store" / f"make-{small_record()['rid'][:16]}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "manifest.json").write_bytes(seal(record))
    return folder


MISSHAPEN = {
    "inputs without rid": {"inputs": {"a": {}}},
    "key outside": {"key": "../../../escaped"},
    "metrics of text": {"metrics": {"loss": "x"}},
    "outputs outside": {"outputs": [{"path": "../../x", "bytes": 1, "sha256": "0"}]},
    "stage outside": {"stage": "../../../escaped"},
    "step outside": {"step": "../../../home/papers"},
    "of another version": {"schema": 2},
}


@pytest.mark.parametrize("change", MISSHAPEN.values(), ids=MISSHAPEN)
def test_malformed_manifest_is_refused(change, tmp_path):
    other = Store(tmp_path / "other")
    source = write_small(tmp_path, small_record(**change))
    with pytest.raises(StoreError, match=r"the manifest of make-.* is damaged"):
        import_all(other, source)
    assert list((other.outputs / "store").iterdir()) == list((other.outputs / "records").iterdir()) == []
    assert len(import_all(other, write_small(tmp_path, small_record()))[0]) == 1, "else it is valid"
