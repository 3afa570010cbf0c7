"""The time to a target: curves and clocks of extensions."""

from pathlib import Path
from typing import Any

import pytest

from mlxchat.evals.scores import read_scores
from mlxchat.report.collect import RunReport, StepReport
from mlxchat.report.summary import answers
from mlxchat.report.target import describe_target

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


def test_extension_adds_to_the_clock():
    run = run_of("a", settings={"target_bpb": 1.2})
    for record in run.steps[0].records:
        if "elapsed_seconds" in record and record["iteration"] > 20:
            record["elapsed_seconds"] -= 20
    assert ": 30.0s, 3k tokens" in describe_target(run.steps[0], None)


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
