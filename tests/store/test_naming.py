"""Names of artifacts: every accepted form, and the messages for unknown and ambiguous ones."""

from pathlib import Path

import pytest

from mlxchat.errors import StoreError
from mlxchat.store.manifest import write_manifest
from mlxchat.store.naming import resolve
from mlxchat.store.store import Store

FIRST, SECOND, THIRD = "abcdefgh" + "a" * 44, "abcdzzzz" + "b" * 44, "xyzxyzxy" + "c" * 44
RUN, NEWEST = "20260101-000000-1-toy", "20260102-000000-2-other"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "outputs")
    found.prepare()
    for stage, rid in (("sft", FIRST), ("sft", SECOND), ("rl", THIRD)):
        folder = found.outputs / "store" / f"{stage}-d4-{rid[:16]}"
        folder.mkdir()
        record = {"rid": rid, "stage": stage, "step": stage, "published": f"2026-01-0{len(stage)}", "outputs": []}
        write_manifest(folder, record)
    found.set_ref(NEWEST, "sft", found.outputs / "store" / f"sft-d4-{FIRST[:16]}")
    found.set_ref(RUN, "sft", found.outputs / "store" / f"sft-d4-{SECOND[:16]}")
    found.set_ref("pins", "best", found.outputs / "store" / f"rl-d4-{THIRD[:16]}")
    return found


@pytest.mark.parametrize(
    ("name", "rid"),
    [
        ("sft", FIRST), ("latest/sft", FIRST), (f"{RUN}/sft", SECOND), ("toy/sft", SECOND), ("best", THIRD),
        ("pins/best", THIRD), (f"sft-d4-{FIRST[:16]}", FIRST), ("abcde", FIRST), (SECOND, SECOND), ("x", THIRD),
    ],
)  # fmt: skip
def test_every_form_of_a_name_is_resolved(name, rid, store):
    assert resolve(store, name).name.endswith(rid[:16])


def test_ambiguous_prefix_lists_candidates(store):
    with pytest.raises(StoreError, match=rf'"abcd" is ambiguous.*sft-d4-{FIRST[:16]}, sft-d4-{SECOND[:16]}.*more of'):
        resolve(store, "abcd")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("sftt", "sft"), ("bestt", "best"), ("nothing/sft", ""), ("rl-d4-xyz", "rl-d4-xyzxyzxycccccccc"), ("", "")],
)
def test_unknown_name_suggests_the_nearest(name, hint, store):
    with pytest.raises(StoreError) as caught:
        resolve(store, name)
    assert f'Did you mean "{hint}"?' in str(caught.value) or not hint


def test_step_of_the_latest_run_comes_before_a_pin(store):
    store.set_ref("pins", "sft", store.outputs / "store" / f"rl-d4-{THIRD[:16]}")
    assert resolve(store, "sft").name.endswith(FIRST[:16])
    assert resolve(store, "pins/sft").name.startswith("rl")
