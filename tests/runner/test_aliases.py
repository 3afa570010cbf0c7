"""Early cutoff: what is rebuilt with the same bytes runs nothing below it, and what has other bytes does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlxchat.runner.aliases import action_key, find_action, key_of, publish_alias, remember_action
from mlxchat.runner.records import Records

CHAIN = {
    "one": {"stage": "make"},
    "two": {"stage": "copy", "source": "one"},
    "three": {"stage": "copy", "source": "two"},
}


@pytest.fixture
def toys(toys: Any) -> Any:
    """Toy stages whose first one rounds: settings 0 to 9 make the same bytes."""
    toys.add("make", "(ctx.out / 'result.txt').write_text(str(ctx.config.toy.number // 10))")
    return toys


def started(run: Any) -> list[str]:
    """Return the steps that a run computed."""
    return [event["step"] for event in Records(run.folder / "events.jsonl").read() if event["event"] == "step_started"]


def states(toys: Any, **options: Any) -> dict[str, str]:
    return {step.name: step.state for step in toys.plan(CHAIN, **options)}


def read(toys: Any, step: str) -> tuple[Path, dict[str, Any]]:
    """Return folder with files and manifest of a step."""
    (rid,) = [planned.rid for planned in toys.plan(CHAIN) if planned.name == step]
    return toys.store.find(rid), toys.store.read(rid)


def test_another_setting_above_that_makes_the_same_bytes_runs_nothing_below(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    toys.config.toy.number = 5
    plan = toys.plan(CHAIN)
    assert [step.state for step in plan] == ["run", "maybe", "maybe"]
    assert started(toys.run(plan)) == ["one"]
    assert set(states(toys).values()) == {"done"}


def test_another_setting_above_that_makes_other_bytes_runs_everything_below(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    toys.config.toy.number = 15
    assert started(toys.run(toys.plan(CHAIN))) == ["one", "two", "three"]
    assert (read(toys, "three")[0] / "result.txt").read_text() == "1 1 1"


def test_the_cutoff_is_anywhere_in_the_chain(toys: Any) -> None:
    toys.add("copy", "(ctx.out / 'result.txt').write_text('always')", inputs={"source": "thing"}, config=("other",))
    toys.run(toys.plan(CHAIN))
    toys.config.toy.number = 15
    assert started(toys.run(toys.plan(CHAIN))) == ["one", "two"]  # `two` makes what it made before


def test_an_alias_is_found_with_the_files_and_tells_its_own_inputs(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    original_place, original = read(toys, "two")
    toys.config.toy.number = 5
    toys.run(toys.plan(CHAIN))
    place, manifest = read(toys, "two")
    assert place == original_place
    assert (manifest["alias_of"], original["alias_of"]) == (original["rid"], None)
    assert manifest["rid"] != original["rid"]
    assert (manifest["tree"], manifest["outputs"], manifest["akey"]) == (
        original["tree"], original["outputs"], original["akey"],
    )  # fmt: skip
    assert manifest["inputs"]["source"]["rid"] == read(toys, "one")[1]["rid"] != original["inputs"]["source"]["rid"]
    folder = toys.store.own_folder(manifest["rid"])
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    assert not list((toys.outputs / "work").iterdir())


def test_an_alias_of_an_alias_names_the_artifact_with_the_files(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    original = read(toys, "three")[1]
    for number in (5, 6):
        toys.config.toy.number = number
        toys.run(toys.plan(CHAIN))
        assert read(toys, "three")[1]["alias_of"] == original["rid"]


def test_a_forced_rebuild_with_the_same_bytes_leaves_what_is_below_done_and_plan_says_maybe(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    plan = toys.plan(CHAIN, force=["one"])
    assert [step.state for step in plan] == ["run", "maybe", "maybe"]
    assert started(toys.run(plan)) == ["one"]


def test_a_forced_rebuild_that_is_not_deterministic_runs_what_is_below(toys: Any) -> None:
    toys.add("make", "(ctx.out / 'result.txt').write_text(str(time.time_ns()))")
    toys.run(toys.plan(CHAIN))
    assert started(toys.run(toys.plan(CHAIN, force=["one"]))) == ["one", "two", "three"]
    assert set(states(toys).values()) == {"done"}


def test_an_alias_whose_original_was_rebuilt_with_other_bytes_is_not_served(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    toys.config.toy.number = 5
    toys.run(toys.plan(CHAIN))
    toys.config.toy.number = 1
    toys.add("copy", "(ctx.out / 'result.txt').write_text('new')", inputs={"source": "thing"}, config=("other",))
    toys.run(toys.plan(CHAIN, force=["two"]))
    toys.config.toy.number = 5
    rid = toys.plan(CHAIN)[1].rid
    assert toys.store.find(rid) is None
    assert toys.store.read(rid) is None
    toys.run(toys.plan(CHAIN))
    assert (read(toys, "two")[0] / "result.txt").read_text() == "new"


def test_an_alias_whose_original_is_gone_is_made_again(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    original = read(toys, "two")[0]
    toys.config.toy.number = 5
    toys.run(toys.plan(CHAIN))
    shutil.rmtree(original)
    assert states(toys)["two"] == "run"
    assert started(toys.run(toys.plan(CHAIN))) == ["two"]
    place, manifest = read(toys, "two")
    assert (manifest["alias_of"], (place / "result.txt").read_text()) == (None, "0 1")


def test_a_forced_alias_becomes_an_artifact_of_its_own_and_spares_the_original(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    original = read(toys, "two")[0]
    toys.config.toy.number = 5
    toys.run(toys.plan(CHAIN))
    assert started(toys.run(toys.plan(CHAIN, force=["two"]))) == ["two"]
    place, manifest = read(toys, "two")
    assert place != original
    assert manifest["alias_of"] is None
    assert (original / "result.txt").read_text() == (place / "result.txt").read_text()


def test_once_its_inputs_are_there_a_plan_knows_that_a_step_will_share(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    name = read(toys, "two")[1]["name"]
    toys.config.toy.number = 5
    toys.run(toys.plan(CHAIN, targets=["one"]))
    plan = toys.plan(CHAIN)
    assert [step.state for step in plan] == ["done", "done", "done"]
    assert plan[1].reason == f"same inputs as {name}"
    assert started(toys.run(plan)) == []
    assert read(toys, "three")[1]["alias_of"] is not None


@pytest.mark.parametrize("damage", ["gone", "cut", "other", "binary", "folder"])
def test_the_index_is_only_a_hint(damage: str, toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    notes = list((toys.outputs / "index" / "act").iterdir())
    assert len(notes) == 3
    for note in notes:
        rid = note.read_text()
        note.unlink()
        if damage == "folder":
            note.mkdir()
        elif damage != "gone":
            other = toys.plan(CHAIN)[0].rid.encode()
            note.write_bytes({"cut": rid[:20].encode(), "other": other, "binary": b"\xff\x00/../"}[damage])
    toys.config.toy.number = 5
    assert started(toys.run(toys.plan(CHAIN))) == ["one"]  # found by looking through the store


def test_a_note_that_leads_to_an_artifact_of_another_action_is_not_believed(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    rid = toys.plan(CHAIN)[2].rid
    remember_action(toys.store, "a" * 52, rid)
    assert find_action(toys.store, "a" * 52) is None
    assert find_action(toys.store, key_of(toys.store.read(rid)))["rid"] == rid


def test_artifacts_from_before_there_were_action_keys_are_shared_too(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    shutil.rmtree(toys.outputs / "index")
    for path in (toys.outputs / "store").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["akey"], manifest["alias_of"], manifest["digest"]
        path.write_text(json.dumps(manifest | {"schema": 1}))
    toys.config.toy.number = 5
    assert started(toys.run(toys.plan(CHAIN))) == ["one"]


def test_the_action_key_knows_contents_in_place_of_ids_and_everything_else_of_the_id(toys: Any) -> None:
    step = toys.plan(CHAIN)[1]
    key = action_key(step, {"source": "0" * 64})
    assert key == action_key(step, {"source": "0" * 64})
    assert key != action_key(step, {"source": "1" * 64})
    toys.config.other.number = 2
    assert key != action_key(toys.plan(CHAIN)[1], {"source": "0" * 64})
    toys.config.other.number = 1
    toys.config.toy.number = 3  # above it: another id, the same action
    again = toys.plan(CHAIN)[1]
    assert (again.rid != step.rid, action_key(again, {"source": "0" * 64})) == (True, key)


def test_another_version_shares_nothing(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    toys.add("copy", "(ctx.out / 'result.txt').write_text('v2')", inputs={"source": "thing"}, version=2)
    toys.config.toy.number = 5
    assert started(toys.run(toys.plan(CHAIN)))[:2] == ["one", "two"]


def test_what_resumes_from_an_alias_reads_the_originals_files(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    toys.config.toy.number = 5
    toys.run(toys.plan(CHAIN))
    toys.config.other.number = 4
    toys.run(toys.plan(CHAIN))
    assert (read(toys, "three")[0] / "result.txt").read_text() == "0 4 4"


def test_an_alias_whose_original_vanishes_while_it_is_made_is_refused(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    place, original = read(toys, "two")
    toys.config.toy.number = 5
    step = toys.plan(CHAIN)[1]
    shutil.rmtree(place)
    with pytest.raises(Exception, match="no longer"):
        publish_alias(toys.store, step, original, original["inputs"], {})
