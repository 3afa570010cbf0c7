"""The plan: order, wiring, and whether and why each step runs."""

import importlib
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxchat.config.pins import File, Folder
from mlxchat.errors import ConfigError
from mlxchat.runner.keys import pin_externals
from mlxchat.runner.plan import order_steps
from mlxchat.runner.reasons import estimate_steps, format_plan
from mlxchat.runner.stage import Stages, read_stage
from mlxchat.store import manifest as manifest_module

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


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        ("sft", ["corpus", "tokenizer", "pretrain", "sft"]),
        ("corpus", ["corpus"]),
        ("eval", ["corpus", "tokenizer", "pretrain", "sft", "eval_sft", "eval_base"]),  # a stage: all its steps
        ("eval_base", ["corpus", "tokenizer", "pretrain", "eval_base"]),
    ],
)
def test_target_includes_only_needed_steps(target, steps):
    assert order_steps(REAL, [target], Stages()) == steps


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"sft": {"stage": "stf", "checkpoint": "pretrain"}}, r'pipeline\.sft\.stage is "stf".*mean "sft"\?'),
        ({"sft": {"checkpoint": "pretrain"}}, r"pipeline\.sft.*stage"),
        ({"sft": {"stage": "sft", "checkpont": "pretrain"}}, r'"checkpont" is not a role.*mean "checkpoint"\?'),
        ({"sft": {"stage": "sft", "checkpoint": "pretrian"}}, r'is "pretrian".*Did you mean "pretrain"\?'),
        ({"sft": {"stage": "sft"}}, r"pipeline\.sft\.checkpoint is missing: stage sft needs a checkpoint"),
        ({"sft": {"stage": "sft", "checkpoint": "corpus"}}, "checkpoint is corpus, a corpus; expected a checkpoint"),
        (
            {"eval_sft": {"stage": "eval", "checkpoint": "sft", "corpus": "tokenizer"}},  # an optional role
            r"eval_sft\.corpus is tokenizer, a tokenizer; expected a corpus",
        ),
        ({"sft": {"stage": "sft", "checkpoint": "sft"}}, r"cycle: sft → sft"),
        ({"a": {"stage": "sft", "checkpoint": "b"}, "b": {"stage": "sft", "checkpoint": "a"}}, r"cycle: a → b → a"),
    ],
)
def test_wrong_wiring_gets_a_suggestion(steps, message):
    with pytest.raises(ConfigError, match=message):
        order_steps(REAL | steps, None, Stages())


def test_wiring_mistakes_are_reported_together():
    wrong = {"sft": {"stage": "sft"}, "eval_sft": {"stage": "evla"}, "more": {"stage": "rl", "checkpoint": "nope"}}
    with pytest.raises(ConfigError, match=r'"sftt" is neither a stage nor a step.*Did you mean "sft"\?') as caught:
        order_steps(REAL | wrong, ["sftt", "midtrain"], Stages())
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == [
        "pipeline.sft.checkpoint", "pipeline.eval_sft.stage", "pipeline.more.checkpoint", '"sftt"', "stage",
    ]  # fmt: skip


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


def declare(toys, before: str, after: str) -> None:
    """Change the declaration of the stage make."""
    file = toys.package / "make.py"
    file.write_text(file.read_text().replace(before, after))
    read_stage.cache_clear()
    sys.modules.pop(f"{toys.package.name}.make", None)
    importlib.invalidate_caches()


def test_unchanged_data_seed_is_not_listed(toys):
    declare(toys, "produces=", 'seeded="both", produces=')
    toys.run(toys.plan(CHAIN))
    assert reasons(toys, seed=2, data_seed=1)["one"] == ("run", "config changed: seed 1 → 2")
    assert reasons(toys, seed=1, data_seed=2)["one"] == ("run", "config changed: data_seed 1 → 2")


def test_changed_data_seed_is_named_by_its_key(toys):
    declare(toys, "produces=", 'seeded="data", produces=')
    toys.run(toys.plan(CHAIN))
    assert reasons(toys, seed=1, data_seed=2)["one"] == ("run", "config changed: data_seed 1 → 2")


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
    assert [step.key for step in toys.plan(renamed)] == [step.key for step in toys.plan(CHAIN)][:2]
    whole = {step.name: step.key for step in toys.plan(CHAIN)}
    for target in CHAIN:
        part = {step.name: step.key for step in toys.plan(CHAIN, targets=[target])}
        assert part == {name: whole[name] for name in part}
        assert target in part


def test_planning_writes_nothing(toys):
    toys.plan(CHAIN)
    assert not toys.outputs.exists()


def test_planning_reads_only_needed_manifests(toys, monkeypatch):
    pipeline = {"s0": {"stage": "make"}} | {f"s{n}": {"stage": "copy", "source": f"s{n - 1}"} for n in range(1, 10)}
    toys.run(toys.plan(pipeline))
    for number in range(200):
        (toys.outputs / "store" / f"copy-other-{number:016d}").mkdir()
        (toys.outputs / "store" / f"copy-other-{number:016d}" / "manifest.json").write_text("damaged, and never read")
    seen: list[bytes] = []
    read = manifest_module.parse_manifest
    monkeypatch.setattr(manifest_module, "parse_manifest", lambda data: seen.append(data) or read(data))
    assert {step.state for step in toys.plan(pipeline)} == {"done"}
    assert len(seen) == 20, "of each step its record and its manifest"


def test_estimate_comes_from_the_nearest_artifact_of_this_size():
    def made(label: str, epochs: int, seconds: float) -> dict[str, Any]:
        return {
            "name": f"sft-{label}-{'a' * 16}", "config": {"sft": {"num_epochs": epochs}}, "version": 1,
            "inputs": {}, "seed": 1, "published": "2026", "seconds": seconds, "outputs": [{"bytes": 7}],
        }  # fmt: skip

    def estimated(label: str) -> Any:
        step: Any = SimpleNamespace(
            name="sft", stage=SimpleNamespace(name="sft"), done=False, title=f"sft-{label}",
            identity={"sft": {"num_epochs": 2}},
        )  # fmt: skip
        store: Any = SimpleNamespace(recent=lambda stage: iter([made("d4", 9, 1.0), made("d4", 2, 5.0)]))
        return estimate_steps([step], store)["sft"]

    assert (estimated("d4").seconds, estimated("d4").bytes) == (5.0, 7)
    assert estimated("d20") is None


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


def test_metadata_of_old_stages_is_refused():
    @dataclass
    class Old:
        path: str = field(default="a.txt", metadata={"external": "file"})

    with pytest.raises(ConfigError, match=r'toy\.path: metadata=\{"external": …\} .*Write \{"pin": File\(\)\}'):
        pin_externals({"toy": Old()})


def test_incomplete_stage_declaration_is_refused(toys):
    declare(toys, "version=1, ", "")
    with pytest.raises(ConfigError, match=r"make\.py: importing it failed .*'version'"):
        toys.plan(CHAIN)


def test_long_lines_fit_the_terminal_and_stay_whole_elsewhere(toys, monkeypatch):
    plan = toys.plan(CHAIN)
    remarks = dict.fromkeys(CHAIN, "38.2 MB with 2,048 tokens at a time; " * 3)
    whole = format_plan(plan, remarks)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    narrow = format_plan(plan, remarks)
    assert max(map(len, whole.splitlines())) > 60 >= max(map(len, narrow.splitlines()))
    assert narrow.split() == whole.split()
