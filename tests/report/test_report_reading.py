"""What `collect` makes of run folders that are whole, unfinished, damaged or empty."""

import pytest

from mlxchat.errors import StoreError
from mlxchat.report.collect import collect
from mlxchat.report.summary import answers, troubles


def test_report_without_results(make):
    fake = make(absent=["corpus", "tokenizer", "pretrain", "midtrain", "sft", "rl"], without=["eval_mid"])
    for step in ("eval_base", "eval_sft", "eval_rl"):
        (fake.folder(step) / "manifest.json").unlink()
    fake.write_lines(fake.run / "events.jsonl", [])
    report = fake.read()
    assert {step.outcome for step in report.steps} == {"missing"}
    assert dict(answers(report))["What did it cost?"] == "None of the 9 steps has a result yet."
    assert fake.write_report().is_file()


def test_outcomes_of_steps(make):
    fake = make(absent=["sft", "rl", "eval_sft", "eval_rl"])
    fake.append_event(event="step_started", step="sft")
    fake.append_event(event="step_started", step="rl")
    for event in ("step_failed", "run_failed"):
        fake.append_event(event=event, step="rl", error="out of memory")
    report = fake.read()
    steps = ["corpus", "pretrain", "sft", "rl", "eval_rl"]
    outcomes = ["cached", "run", "unfinished", "failed", "missing"]
    assert [report.step(name).outcome for name in steps] == outcomes
    assert sum("out of memory" in trouble for trouble in troubles(report)) == 1


def test_curves_of_an_unfinished_step_come_from_its_work_folder(make):
    fake = make(absent=["sft"])
    work = fake.root / "work" / fake.rid("sft") / "ckpt" / "records" / "metrics.jsonl"
    fake.write_lines(work, [{"iteration": 0, "loss": 2.0}, {"iteration": 1, "loss": 1.5}])
    assert fake.read().step("sft").series("loss") == ([0, 1], [2.0, 1.5])


def test_missing_plan_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"plan\.json is absent, unreadable or without steps"):
        collect(tmp_path, tmp_path / "runs" / "x")
