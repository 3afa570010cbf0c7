"""The plan: order, wiring, and whether and why each step runs."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxchat.config.pins import File, Folder
from mlxchat.errors import ConfigError
from mlxchat.runner.keys import pin_externals
from mlxchat.runner.plan import order_steps
from mlxchat.runner.stage import Stages

CHAIN = {
    "one": {"stage": "make"},
    "two": {"stage": "copy", "source": "one"},
    "three": {"stage": "copy", "source": "two"},
}
REAL = {
    "corpus": {"stage": "corpus"},
    "tokenizer": {"stage": "tokenizer", "corpus": "corpus"},
    "pretrain": {"stage": "pretrain", "corpus": "corpus", "tokenizer": "tokenizer"},
    "sft": {"stage": "sft", "checkpoint": "pretrain"},
    "eval_sft": {"stage": "eval", "checkpoint": "sft"},
    "eval_base": {"stage": "eval", "checkpoint": "pretrain", "corpus": "corpus"},
}


@given(st.permutations(list(REAL)), st.none() | st.lists(st.sampled_from(list(REAL)), min_size=1))
def test_steps_are_in_topological_order(names, targets):
    pipeline = {name: REAL[name] for name in names}
    order = order_steps(pipeline, targets, Stages())
    assert len(set(order)) == len(order)
    assert set(targets or names) <= set(order)
    for step in order:
        sources = {source for role, source in REAL[step].items() if role != "stage"}
        assert sources <= set(order[: order.index(step)])


def test_target_includes_only_needed_steps():
    needed = ["corpus", "tokenizer", "pretrain"]
    assert order_steps(REAL, ["sft"], Stages()) == [*needed, "sft"]
    assert order_steps(REAL, ["eval"], Stages()) == [*needed, "sft", "eval_sft", "eval_base"], "all steps of a stage"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"sft": {"stage": "stf", "checkpoint": "pretrain"}}, r'pipeline\.sft\.stage is "stf".*mean "sft"\?'),
        ({"sft": {"stage": "sft", "checkpont": "pretrain"}}, r'"checkpont" is not a role.*mean "checkpoint"\?'),
        ({"sft": {"stage": "sft", "checkpoint": "pretrian"}}, r'is "pretrian".*Did you mean "pretrain"\?'),
        ({"sft": {"stage": "sft"}}, r"pipeline\.sft\.checkpoint is missing: stage sft needs a checkpoint"),
        ({"sft": {"stage": "sft", "checkpoint": "corpus"}}, "checkpoint is corpus, a corpus; expected a checkpoint"),
        ({"a": {"stage": "sft", "checkpoint": "b"}, "b": {"stage": "sft", "checkpoint": "a"}}, r"cycle: a → b → a"),
    ],
)
def test_wrong_wiring_gets_a_suggestion(steps, message):
    with pytest.raises(ConfigError, match=message):
        order_steps(REAL | steps, None, Stages())


def reasons(toys: Any, **options: Any) -> dict[str, tuple[str, str]]:
    """Return step → (state, reason) as the next invocation sees them."""
    return {step.name: (step.state, step.reason) for step in toys.plan(CHAIN, **options)}


def test_changed_setting_is_shown_old_and_new(toys):
    toys.run(toys.plan(CHAIN))
    toys.config.toy.number = 2
    assert reasons(toys) == {
        "one": ("run", "config changed: toy.number 1 → 2"),
        "two": ("maybe", "input source (one) will be rebuilt"),
        "three": ("maybe", "input source (two) will be rebuilt"),
    }


def test_reason_compares_with_the_nearest_artifact(toys):
    for number, seed in ((1, 1), (7, 1), (1, 2)):
        toys.config.toy.number = number
        toys.run(toys.plan({"one": CHAIN["one"]}, seed=seed))
    toys.config.toy.number = 9
    (step,) = toys.plan({"one": CHAIN["one"]}, seed=2)
    assert step.reason == "config changed: toy.number 1 → 9"


@pytest.mark.parametrize(("force", "forced"), [(["two"], {"two"}), (["all"], set(CHAIN)), ([], set())])
def test_force_runs_exactly_its_steps(force, forced, toys):
    toys.run(toys.plan(CHAIN))
    found = reasons(toys, force=force)
    assert {step for step, reason in found.items() if reason == ("run", "forced")} == forced
    # What is made from it is done if its bytes come out the same.
    below = {"three"} - forced if forced else set()
    assert {step for step, (state, _) in found.items() if state == "maybe"} == below


def test_raised_version_reruns_the_stage(toys):
    toys.run(toys.plan(CHAIN))
    toys.add("make", "(ctx.out / 'result.txt').write_text('x')", version=2)
    assert reasons(toys)["one"] == ("run", "stage changed: version 1 → 2")


def test_targets_and_names_of_steps_change_no_id(toys):
    renamed = {"first": {"stage": "make"}, "second": {"stage": "copy", "source": "first"}}
    whole = [step.key for step in toys.plan(CHAIN)]
    assert [step.key for step in toys.plan(renamed)] == whole[:2]
    assert [step.key for step in toys.plan(CHAIN, targets=["two"])] == whole[:2]


@dataclass
class Sources:
    paths: list[str] = field(default_factory=list, metadata={"pin": File()})
    model: str | None = field(default=None, metadata={"pin": Folder()})


def test_missing_files_are_reported_together():
    sources = {"a": Sources(paths=["/no/such"], model="/nothing"), "b": {"x": Sources(paths=["/nor/this"])}}
    with pytest.raises(ConfigError) as caught:
        pin_externals(sources)
    assert str(caught.value).splitlines() == [
        "a.paths: /no/such cannot be read (No such file or directory)",
        "a.model: /nothing cannot be read (no folder with files)",
        "b.x.paths: /nor/this cannot be read (No such file or directory)",
    ]
