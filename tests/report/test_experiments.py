"""Verdicts on experiments: runs of toys whose score is their number plus a noise that is no setting."""

import csv
import json
import math
from contextlib import suppress
from typing import Any

import pytest

from kit.commands import Say
from kit.toys import ONE
from mlxchat.errors import StepFailed
from mlxchat.report.experiments import (
    compare_means,
    group_seeds,
    standard_error,
    table_of_seeds,
    why_no_best,
)
from mlxchat.runner.leader import execute

SCORES = {
    "base": (1, (0, 4, -4)),
    "better": (0, (0, 5, -5)),
    "worse": (2, (0, 5, -5)),
    "same": (3, (-290, -330, -310)),
    "lucky": (4, (-440,)),
}
"""Name → number, and the noise of each seed in hundredths; smaller scores are better."""


@pytest.fixture
def say(say: Say, toys: Any) -> Say:
    """`mlxchat compare --baseline` on the toys' runs; `same` scores as `better` does, less what its seeds scatter."""
    toys.add(
        "make",
        """
        (ctx.out / 'result.txt').write_text('')
        ctx.metrics['score'] = ctx.config.toy.number + ctx.config.toy.cadence / 100
        """,
        metrics={"score": "minimize"},
    )
    for name, (number, noises) in SCORES.items():
        for seed, noise in enumerate(noises):
            toys.config.toy.number, toys.config.toy.cadence = number, noise
            run_experiment(toys, f"{name}-job{seed}", toys.plan(ONE, seed=seed))
    ours = ("--metric", "one.score", f"outputs={toys.outputs}")
    return lambda verb, *arguments, **options: say(verb, *ours, *arguments, **options)


def run_experiment(toys: Any, name: str, plan: list[Any]) -> None:
    """Run a plan as the run of this name."""
    run = toys.make_run()
    with suppress(StepFailed):
        execute(plan, toys.store, run)
    folder = run.folder.with_name(f"20260101-0000{toys.invocations:02d}-000000-1-{name}")
    run.folder.rename(folder)
    steps = [{"step": step.name, "key": step.key, "rid": ""} for step in plan]
    (folder / "plan.json").write_text(json.dumps({"started": "2026-01-01T00:00:00+00:00", "steps": steps}))


def test_each_experiment_is_judged_against_the_best_kept_before(say):
    found = json.loads(say("compare", "--baseline", "base", "--format", "json"))
    base, better, _, same, lucky = experiments = found["experiments"]
    assert [each["name"] for each in experiments] == [*SCORES]
    assert [each["verdict"] for each in experiments] == ["keep", "keep", "discard", "not decided", "not decided"]
    assert [each["against"] for each in experiments] == [None, "base", "better", "better", "better"]
    assert (base["values"], base["mean"]) == ([1.0, 1.04, 0.96], pytest.approx(1))
    assert base["stderr"] == pytest.approx(0.04 / 3**0.5)
    assert better["difference"][0] == pytest.approx(-1)
    assert better["difference"][1] < -1 < better["difference"][2] < 0
    assert better["changes"] == "toy.number 1 → 0"
    assert same["more_seeds"] >= 1
    assert lucky["difference"] is None, "one seed has no scatter"


def test_named_runs_alone_are_judged(say, toys):
    found = json.loads(say("compare", "worse", "--baseline", "base", "--format", "json"))
    assert [each["name"] for each in found["experiments"]] == ["base", "worse"]
    table = say("compare", "lucky", "worse", "--baseline", "base")
    assert "baseline" in table
    assert "at least 2 each" in table
    assert "no run has recorded one.scor." in say("compare", "--baseline", "base", "--metric", "one.scor", code=2)
    folder = next(path.name for path in (toys.outputs / "runs").glob("*-base-job1"))
    assert len(json.loads(say("compare", "--baseline", folder, "--format", "json"))["experiments"]) == len(SCORES)
    assert 'Did you mean "one.score"?' in say("compare", "--baseline", "base", "--metric", "score", code=2)
    assert "--baseline bas: 0 experiments" in say("compare", "--baseline", "bas", code=2)
    assert "needs --baseline" in say("compare", "--format", "tsv", code=2)


def test_journal_has_the_columns_of_autoresearch(say, toys):
    toys.add("make", "raise ValueError('broken')", metrics={"score": "minimize"}, version=2)
    toys.config.toy.number = 9
    run_experiment(toys, "broken", toys.plan(ONE))
    rows = [*csv.reader(say("compare", "--baseline", "base", "--format", "tsv").splitlines(), delimiter="\t")]
    assert rows[0] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert [row[1:4:2] for row in rows[1:3]] == [["1.000000", "keep"], ["0.000000", "keep"]]
    assert rows[2][4] == "better: toy.number 1 → 0"
    assert rows[-1] == ["-", "0.000000", "0.0", "crash", "broken"]


def test_report_draws_the_progress(say, toys):
    place = say("report", "--baseline", "base").strip().removeprefix("report: ")
    text = (toys.outputs / "reports" / "since-base" / "report.md").read_text()
    assert place.endswith("reports/since-base/report.html")
    assert "1 keep, 1 discard, 2 not decided" in text
    drawn = (toys.outputs / "reports" / "since-base" / "report" / "progress.svg").read_text()
    for words in ("1 of 4 experiments kept", ">better<", "worse 2.0000 ± 0.0289 (discard)"):
        assert words in drawn


# Welch's interval, and how many seeds would decide


@pytest.mark.parametrize(
    ("old", "new", "low", "high"),
    [
        ([1.752, 1.749, 1.757], [1.731, 1.735, 1.729], -0.0293649, -0.0126351),
        ([1.0, 1.4], [1.1, 1.3], -1.3837046, 1.3837046),
        ([2.0, 2.1, 2.2, 2.05, 2.3], [2.4, 2.2, 2.9], -0.4568447, 1.1968447),
    ],
)
def test_interval_is_scipys(old, new, low, high):
    """Expected: scipy 1.17.1, ttest_ind(new, old, equal_var=False).confidence_interval(0.95)."""
    found = compare_means(old, new)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-4)
    assert found.is_decided == (low > 0 or high < 0)


def test_more_seeds_are_the_fewest_that_decide():
    """Means 1 apart with unit variance: t(2n − 2) × sqrt(2 / n) < 1 first holds for nine values each."""
    found = compare_means([-1.0, 0.0, 1.0], [0.0, 1.0, 2.0])
    assert (found.mean, found.is_decided, found.more_seeds) == (1.0, False, 6)
    assert compare_means([0.0, 0.1, 0.2], [5.0, 5.1, 5.2]).more_seeds == 0
    assert compare_means([-1.0, 0.0, 1.0], [-1.0, 0.0, 1.01]).more_seeds is None
    assert compare_means([1.0], [0.0, 0.1]) is None, "the scatter of one value is not known"
    assert compare_means([1.0, 1.0], [1.0, 1.0]).is_decided is False
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert standard_error([1.0]) is None


def test_sweep_has_a_best_only_where_seeds_show_it():
    jobs = [
        {"settings": {"stage": "pretrain", "lr": lr, "seed": seed}, "metrics": {"one.score": lr + noise}}
        for lr in (0.1, 0.5)
        for seed, noise in enumerate((0.0, 0.01, -0.01))
    ]
    groups = group_seeds(jobs, "one.score", less_is_better=True)
    assert [group.title for group in groups] == ["lr=0.1", "lr=0.5"]
    assert why_no_best(groups) == ""
    assert table_of_seeds(groups, "one.score").rows[1] == [
        "lr=0.5",
        "3",
        "0.5000 ± 0.0058",
        "+0.4000 [+0.3773, +0.4227]",
    ]
    assert [group.title for group in group_seeds(jobs, "one.score", less_is_better=False)] == ["lr=0.5", "lr=0.1"]
    close = [
        job | {"metrics": {"one.score": job["metrics"]["one.score"] / 100 + number % 3}}
        for number, job in enumerate(jobs)
    ]
    assert "may be chance" in why_no_best(group_seeds(close, "one.score", less_is_better=True))
    assert "seeds only" in why_no_best(group_seeds(jobs[:3], "one.score", less_is_better=True))
    assert group_seeds(jobs[::3], "one.score", less_is_better=True) == [], "no seeds"
