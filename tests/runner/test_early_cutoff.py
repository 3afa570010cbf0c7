"""Early cutoff: inputs rebuilt with equal bytes rerun nothing downstream."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from kit.toys import started
from mlxchat.store.naming import refs_of

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


def states(toys: Any, **options: Any) -> dict[str, str]:
    return {step.name: step.state for step in toys.plan(CHAIN, **options)}


def read(toys: Any, step: str) -> tuple[Path, dict[str, Any]]:
    """Return folder with files and manifest of a step."""
    (key,) = [planned.key for planned in toys.plan(CHAIN) if planned.name == step]
    return toys.store.find_made(key), toys.store.made(key)


def test_equal_bytes_rerun_nothing_downstream(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    toys.config.toy.number = 5
    plan = toys.plan(CHAIN)
    assert [step.state for step in plan] == ["run", "maybe", "maybe"]
    assert started(toys.run(plan)) == ["one"]
    assert set(states(toys).values()) == {"done"}


def test_different_bytes_rerun_everything_downstream(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    toys.config.toy.number = 15
    assert started(toys.run(toys.plan(CHAIN))) == ["one", "two", "three"]
    assert (read(toys, "three")[0] / "result.txt").read_text() == "1 1 1"


def test_cutoff_works_anywhere_in_the_chain(toys: Any) -> None:
    toys.add("copy", "(ctx.out / 'result.txt').write_text('always')", inputs={"source": "thing"}, config=("other",))
    toys.run(toys.plan(CHAIN))
    toys.config.toy.number = 15
    assert started(toys.run(toys.plan(CHAIN))) == ["one", "two"]  # `two` makes what it made before


def test_equal_settings_and_contents_are_one_artifact(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    place, made = read(toys, "two")
    toys.config.toy.number = 5
    run = toys.run(toys.plan(CHAIN))
    assert read(toys, "two") == (place, made)
    assert {step: folder.name for step, folder in refs_of(toys.store, run.name).items()}["two"] == place.name
    assert len(list((toys.outputs / "store").iterdir())) == 4, (
        "of each settings of `one`, and what was made from either"
    )
    assert not list((toys.outputs / "work").iterdir())


def test_existing_inputs_make_a_step_done(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    toys.config.toy.number = 5
    toys.run(toys.plan(CHAIN, targets=["one"]))
    plan = toys.plan(CHAIN)
    assert [(step.state, step.reason) for step in plan] == [("done", "")] * 3
    assert started(toys.run(plan)) == []


def test_missing_artifact_is_rebuilt_alone(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    shutil.rmtree(read(toys, "two")[0])
    assert [step.state for step in toys.plan(CHAIN)] == ["done", "run", "maybe"]
    assert started(toys.run(toys.plan(CHAIN))) == ["two"]


def test_plan_json_gets_final_keys(toys: Any) -> None:
    plan = toys.plan(CHAIN)
    before = [step.key for step in plan]
    run = toys.run(plan)
    keys = [step.key for step in toys.plan(CHAIN)]
    assert (before[0] == keys[0], before[1] != keys[1], before[2] != keys[2]) == (True, True, True)
    assert [toys.store.made(key)["step"] for key in keys] == ["one", "two", "three"]
    assert [step.settings_key for step in plan] == [step.settings_key for step in toys.plan(CHAIN)]
    assert all((toys.outputs / "store" / path.name).exists() for path in refs_of(toys.store, run.name).values())


def test_key_depends_on_input_contents_not_settings(toys: Any) -> None:
    step = toys.plan(CHAIN)[1]
    key = step.key_with({"source": "0" * 64})
    assert key != step.key_with({"source": "1" * 64})
    toys.config.other.number = 2
    assert key != toys.plan(CHAIN)[1].key_with({"source": "0" * 64})
    toys.config.other.number = 1
    toys.config.toy.number = 3
    assert key == toys.plan(CHAIN)[1].key_with({"source": "0" * 64})
