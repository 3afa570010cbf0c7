"""Rankings by the time to a target: curves, clocks of extensions, evaluations, and what may be compared."""

from pathlib import Path
from typing import Any

import pytest

from mlxchat.evals.scores import read_scores
from mlxchat.report.collect import RunReport, StepReport
from mlxchat.report.leaderboard import Target, rank, reach, tables
from mlxchat.report.summary import answers

BPB = [(10, 2.0), (20, 1.5), (30, 1.2), (40, 1.3)]


def run_of(
    rid: str, *, seconds: float = 1.0, corpus: str = "corpus-a", core: float | None = None,
    settings: dict[str, Any] | None = None, cost: float | None = None,
) -> RunReport:  # fmt: skip
    """Return a run of 40 iterations, whose clock goes on by so many seconds an iteration, logged every fourth one."""
    records = [{"iteration": x, "elapsed_seconds": x * seconds} for x in range(4, 41, 4)]
    records += [{"iteration": x, "val_bpb": y} for x, y in BPB]
    manifest = {
        "config": {"pretrain": {"eval_tokens": 1000, **(settings or {})}}, "inputs": {"corpus": {"artifact": corpus}},
        "derived": {"num_iterations": 40, "total_tokens": 4000, "total_flops": 8e9}, "published": "2026-11-23T10:00",
        "overrides": ["model=d4", "outputs=o"], "device": {"name": "Apple M3 | Max"}, "run": f"run-{rid}",
    }  # fmt: skip
    common = {"artifact": rid, "key": rid, "outcome": "run"}
    steps = [StepReport(
        name="pretrain", stage="pretrain", kind="checkpoint", rid=rid, inputs={}, manifest=manifest, **common,
        records=sorted(records, key=lambda record: record["iteration"]),
    )]  # fmt: skip
    if core is not None:
        steps.append(StepReport(
            name="eval_base", stage="eval", kind="scores", rid=f"eval-{rid}", inputs={"checkpoint": "pretrain"},
            manifest={"inputs": {"checkpoint": {"rid": rid}}}, scores=read_scores({"core": {"core": core}}), **common,
        ))  # fmt: skip
    return RunReport(name=rid, folder=Path(), steps=steps, cost_per_hour=cost)


@pytest.mark.parametrize(("value", "iteration"), [(2.0, 10), (1.5, 20), (1.4, 30), (1.25, 30)])
def test_target_is_reached_at_the_first_good_value(value, iteration):
    run = run_of("a", seconds=3.0, cost=36.0)
    found = reach(run, run.steps[0], Target("val_bpb", value), [])
    assert (found.iteration, found.seconds) == (iteration, pytest.approx(3 * iteration))
    assert (found.tokens, found.flops) == (100 * iteration, pytest.approx(2e8 * iteration))
    assert dict(found.costs())["cost"] == f"${3 * iteration / 100:.2f}"


def test_extension_adds_to_the_clock():
    run = run_of("a")
    for record in run.steps[0].records:
        if "elapsed_seconds" in record and record["iteration"] > 20:
            record["elapsed_seconds"] -= 20
    found = reach(run, run.steps[0], Target("val_bpb", 1.2), [])
    assert found.seconds == pytest.approx(30)


def test_core_comes_from_any_evaluation_of_the_model():
    runs = [run_of("a", core=0.3), run_of("b", seconds=0.5), run_of("c", core=0.1)]
    other = run_of("b", core=0.4)
    other.steps.pop(0)
    ((title, rows),) = rank([*runs, other], Target("core", 0.25)).items()
    assert title == "CORE ≥ 0.25"
    assert [(row.step.rid, row.core, row.seconds) for row in rows] == [("b", 0.4, 20.0), ("a", 0.3, 40.0)]


def test_fastest_is_first_per_corpus():
    runs = [run_of("slow", seconds=2), run_of("fast"), run_of("fast"), run_of("elsewhere", corpus="corpus-b")]
    assert rank(runs, Target("val_bpb", 1.1)) == {}
    found = rank(runs, Target("val_bpb", 1.5))
    assert {title: [row.step.rid for row in rows] for title, rows in found.items()} == {
        "val_bpb ≤ 1.5 on corpus-a, 1k tokens": ["fast", "slow"],
        "val_bpb ≤ 1.5 on corpus-b, 1k tokens": ["elsewhere"],
    }


def test_targets_default_to_those_of_the_runs():
    found = rank([run_of("a", settings={"target_bpb": 1.5}), run_of("b", seconds=0.5)], None)
    assert [row.step.rid for row in next(iter(found.values()))] == ["b", "a"]


def test_table_is_markdown_without_empty_columns():
    lines = tables(rank([run_of("a")], Target("val_bpb", 1.5))).splitlines()
    assert lines[2].startswith("| # | time | val_bpb | tokens | FLOPs | iterations | settings | device |")
    assert lines[4].startswith(r"| 1 | 20.0s | 1.50000 | 2k | 4.00e09 | 20 | model=d4 | Apple M3 \| Max | 2026-11-23 |")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"target_bpb": 1.2}, "target, val_bpb ≤ 1.2, after 30 iterations: 30.0s, 3k tokens, 6.00e09 FLOPs, $0.01"),
        ({}, ""),
    ],
)  # fmt: skip
def test_report_says_when_the_target_was_reached(target, said):
    learnt = dict(answers(run_of("a", settings=target, cost=1.2)))["Did it learn?"]
    assert said in learnt
    assert ("target" in learnt) is bool(said)
