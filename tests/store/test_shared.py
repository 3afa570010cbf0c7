"""Shared artifacts: created once per content, and never partial."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxchat.store.manifest import SHARED_KIND, describe_outputs
from mlxchat.store.shared import SharedArtifacts
from mlxchat.store.store import Store

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
