"""A saved plan: it runs what was shown, or it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxchat.commands.plan import describe_plan
from mlxchat.errors import ConfigError
from mlxchat.runner import locks
from mlxchat.runner.estimates import estimate_steps
from mlxchat.runner.plan_table import format_plan
from mlxchat.runner.saved_plan import check_saved, load_plan, save_plan
from mlxchat.runner.sealed import seal

CHAIN = {"one": {"stage": "make"}, "two": {"stage": "copy", "source": "one"}}


def save(toys: Any, path: Path, **options: Any) -> Path:
    save_plan(path, toys.plan(CHAIN, **options), config={"a": 1}, overrides=["a=1"], choices={"model": "d4"})
    return path


@pytest.fixture
def saved(toys: Any, tmp_path: Path) -> Path:
    return save(toys, tmp_path / "plan.json")


def test_what_was_saved_comes_back(saved: Path, toys: Any) -> None:
    record = load_plan(saved)
    assert (record["config"], record["overrides"], record["choices"]) == ({"a": 1}, ["a=1"], {"model": "d4"})
    assert [(entry["step"], entry["rid"], entry["state"]) for entry in record["steps"]] == [
        (step.name, step.rid, "run") for step in toys.plan(CHAIN)
    ]


def test_the_same_plan_is_accepted_in_silence(saved: Path, toys: Any) -> None:
    assert check_saved(load_plan(saved), toys.plan(CHAIN), strict=True) == []


def test_a_file_cut_anywhere_or_with_one_bit_flipped_is_refused_in_words(saved: Path) -> None:
    whole = saved.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 7)]
    for place in range(0, len(whole), 11):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        damaged.append(bytes(flipped))
    for content in damaged:
        saved.write_bytes(content)
        with pytest.raises(ConfigError, match=r"--plan: .*plan\.json is (damaged|no saved plan)"):
            load_plan(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "no saved plan"),
        (b"[]", "damaged or was altered"),
        (json.dumps({"kind": "mlxchat plan"}).encode(), "another version"),
        (seal({"kind": "mlxchat plan", "format": 99}), "another version"),
        (seal({"kind": "something else"}), "no saved plan"),
    ],
)
def test_what_is_no_plan_of_ours_is_refused(content: bytes, message: str, saved: Path) -> None:
    saved.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_plan(saved)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--plan: .*gone\.json cannot be read \(No such file"):
        load_plan(tmp_path / "gone.json")


def test_another_id_is_refused(saved: Path, toys: Any) -> None:
    toys.add("make", "(ctx.out / 'result.txt').touch()", version=2)
    with pytest.raises(ConfigError, match=r"one would make make-.*another artifact than planned"):
        check_saved(load_plan(saved), toys.plan(CHAIN), strict=False)


def test_a_step_that_was_done_and_would_run_is_refused(toys: Any, tmp_path: Path) -> None:
    toys.run(toys.plan(CHAIN))
    saved = save(toys, tmp_path / "plan.json")
    with pytest.raises(ConfigError, match=r"two was done, and would run now \(forced\)"):
        check_saved(load_plan(saved), toys.plan(CHAIN, force=["two"]), strict=False)


def test_other_steps_are_refused(saved: Path, toys: Any) -> None:
    with pytest.raises(ConfigError, match="its steps were one, two; now they are one"):
        check_saved(load_plan(saved), toys.plan(CHAIN, targets=["one"]), strict=False)


def test_work_that_was_done_meanwhile_is_no_hindrance(saved: Path, toys: Any) -> None:
    toys.run(toys.plan(CHAIN, targets=["one"]))
    assert check_saved(load_plan(saved), toys.plan(CHAIN), strict=True) == ["one has been done since"]


def test_changed_code_is_remarked_or_under_strict_refused(saved: Path, toys: Any) -> None:
    toys.add("make", "(ctx.out / 'result.txt').write_text('x')")
    remarks = check_saved(load_plan(saved), toys.plan(CHAIN), strict=False)
    assert remarks == ["the code of one changed: stages/make.py"]
    with pytest.raises(ConfigError, match="the code of one changed"):
        check_saved(load_plan(saved), toys.plan(CHAIN), strict=True)


def test_an_estimate_is_what_the_nearest_artifact_of_the_stage_took(toys: Any) -> None:
    toys.add("make", "time.sleep(0.01 * ctx.config.toy.number)\n(ctx.out / 'result.txt').write_text('x' * 1000)")
    plan = toys.plan(CHAIN)
    assert estimate_steps(plan, toys.store) == {"one": None, "two": None}
    assert "(no estimate)" in format_plan(plan, {}, estimate_steps(plan, toys.store))
    toys.run(plan)
    toys.config.toy.number = 2
    plan = toys.plan(CHAIN)
    estimates = estimate_steps(plan, toys.store)
    before = toys.store.read(save_rid(toys))
    assert (estimates["one"].seconds, estimates["one"].bytes) == (before["seconds"], 1000)
    assert estimates["one"].artifact == before["name"]
    assert format_plan(plan, {"one": "9 MB"}, estimates).splitlines()[0].endswith("(9 MB; ~0.0s, 1.0 kB)")


def save_rid(toys: Any) -> str:
    toys.config.toy.number, number = 1, toys.config.toy.number
    rid: str = toys.plan(CHAIN)[0].rid
    toys.config.toy.number = number
    return rid


def test_the_plan_for_programs_names_every_changed_key_old_and_new(toys: Any) -> None:
    toys.run(toys.plan(CHAIN))
    toys.config.toy.number = 2
    plan = toys.plan(CHAIN, seed=3)
    drift = {"one": {"mlx": ("0.31.0", "0.32.0")}}
    record = describe_plan(plan, estimate_steps(plan, toys.store), {"one": "9 MB"}, drift)
    one, two = record["steps"]
    assert one["difference"]["config"] == {"seed": {"old": 1, "new": 3}, "toy.number": {"old": 1, "new": 2}}
    assert (one["state"], one["memory"], two["inputs"]["source"]) == ("run", "9 MB", {"step": "one", "rid": one["rid"]})
    assert one["changed_environment"] == {"mlx": {"old": "0.31.0", "new": "0.32.0"}}
    assert (two["difference"]["inputs"], two["changed_environment"]) == ({"source": "one"}, {})
    assert record["pending"] == ["one", "two"]
    json.dumps(record)


def test_a_step_that_another_process_makes_is_waiting(toys: Any) -> None:
    plan = toys.plan(CHAIN)
    toys.store.prepare()
    with locks.hold(toys.store.lock(plan[0].rid), {"run": "x"}, lambda owner: None):
        first, second = toys.plan(CHAIN)
    assert (first.state, second.state) == ("waiting", "run")
    assert "is making it" in first.reason
    assert format_plan([first, second]).endswith("2 steps: 0 done, 1 to run, 1 waiting")
