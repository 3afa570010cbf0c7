"""What `collect` makes of run folders that are whole, unfinished, damaged or empty."""

import math
import subprocess
import sys

import pytest

from mlxchat.errors import StoreError
from mlxchat.report.collect import collect, latest_run
from mlxchat.report.document import write_report
from mlxchat.report.examples import sample_groups
from mlxchat.report.summary import answers, troubles


def test_nothing_done_yet_is_still_a_report(make):
    fake = make(absent=["corpus", "tokenizer", "pretrain", "midtrain", "sft", "rl"], without=["eval_mid"])
    for step in ("eval_base", "eval_sft", "eval_rl"):
        (fake.folder(step) / "manifest.json").unlink()
    fake.write_lines(fake.run / "events.jsonl", [])
    report = fake.read()
    assert {step.outcome for step in report.steps} == {"missing"}
    assert dict(answers(report))["What did it cost?"] == "None of the 9 steps has a result yet."
    assert write_report(fake.root, fake.run).is_file()


def test_outcomes_tell_cached_run_failed_unfinished_and_missing(make):
    fake = make(absent=["sft", "rl", "eval_sft", "eval_rl"])
    fake.append_event(event="step_started", step="sft")
    fake.append_event(event="step_started", step="rl")
    fake.append_event(event="step_failed", step="rl", error="out of memory")
    report = fake.read()
    steps = ["corpus", "pretrain", "sft", "rl", "eval_rl"]
    outcomes = ["cached", "run", "unfinished", "failed", "missing"]
    assert [report.step(name).outcome for name in steps] == outcomes
    assert "Step rl failed: out of memory." in troubles(report)


def test_fault_of_a_step_is_told_once(make):
    fake = make(absent=["rl", "eval_rl"])
    fake.append_event(event="step_failed", step="rl", error="Stopped at iteration 3.")
    fake.append_event(event="run_failed", step="rl", error="Stopped at iteration 3.")
    told = ["Step rl failed: Stopped at iteration 3.", "eval_rl is without a result."]
    assert troubles(fake.read()) == told


def test_fault_outside_any_step_is_that_of_the_run(whole):
    whole.append_event(event="run_failed", error="the disk is full")
    assert troubles(whole.read()) == ["This run failed: the disk is full."]


def test_artifact_is_found_by_its_id_whatever_its_label(whole):
    folder = whole.folder("pretrain")
    renamed = folder.rename(folder.with_name(f"pretrain-other-{whole.rid('pretrain')[:16]}"))
    step = whole.read().step("pretrain")
    assert (step.outcome, step.artifact) == ("run", renamed.name)


def test_name_that_leads_out_of_the_store_is_not_followed(make):
    fake = make(absent=["sft"])
    fake.append_event(event="step_cached", step="sft", artifact=f"../store/{fake.artifact('pretrain')}")
    assert fake.read().step("sft").outcome == "missing"


def test_steps_come_after_their_inputs_whatever_the_order_of_the_plan(make):
    fake = make()
    fake.pipeline = dict(reversed(fake.pipeline.items()))
    fake.write_run()
    seen = set()
    for step in fake.read().steps:
        assert seen.issuperset(step.inputs.values())
        seen.add(step.name)


def test_curves_of_an_unfinished_step_come_from_its_work_folder(make):
    fake = make(absent=["sft"])
    work = fake.root / "work" / fake.rid("sft") / "ckpt" / "records" / "metrics.jsonl"
    fake.write_lines(work, [{"iteration": 0, "loss": 2.0}, {"iteration": 1, "loss": 1.5}])
    assert fake.read().step("sft").series("loss") == ([0, 1], [2.0, 1.5])


def test_truncated_last_lines_are_ignored(whole):
    before = whole.read()
    for path in (whole.run / "events.jsonl", whole.folder("pretrain") / "metrics.jsonl"):
        with path.open("ab") as file:
            file.write('{"iteration": 9999, "loss": "Ж'.encode()[:-1])
    after = whole.read()
    assert after.step("pretrain").records == before.step("pretrain").records
    assert after.outcome == "done"


def test_iteration_written_twice_counts_once_as_written_last(whole):
    lines = [{"iteration": 0, "loss": 9.0}, {"iteration": 1, "loss": 8.0}, {"iteration": 1, "loss": 7.0}]
    whole.write_lines(whole.folder("pretrain") / "metrics.jsonl", lines)
    assert whole.read().step("pretrain").series("loss") == ([0, 1], [9.0, 7.0])


def test_loss_that_is_no_number_is_left_out_of_the_curve(whole):
    lines = [{"iteration": i, "loss": loss} for i, loss in enumerate([9.0, math.nan, None, "8", True])]
    whole.write_lines(whole.folder("pretrain") / "metrics.jsonl", lines)
    assert whole.read().step("pretrain").series("loss") == ([0], [9.0])


def test_manifest_of_wrong_types_does_not_stop_the_report(whole):
    wrong = {"device": "M3", "outputs": None, "attempts": {}, "seconds": "long", "versions": [1], "git": 3}
    whole.edit_json("pretrain", "manifest.json", **wrong)
    scores = {"tasks": {"t": None, "u": {"accuracy": 10**400}}, "pass_at_k": {"x": 1}, "samples": [4], "bpb": 3}
    whole.write_json("eval_sft", "scores.json", scores)
    assert write_report(whole.root, whole.run).is_file()


def test_plan_without_steps_is_a_fault_that_names_the_file(tmp_path):
    with pytest.raises(StoreError, match=r"plan\.json is absent, unreadable or without steps"):
        collect(tmp_path, tmp_path / "runs" / "x")


def test_latest_run_is_the_newest_with_a_plan(whole):
    (whole.root / "runs" / "20261122-000000-000001-1-empty").mkdir()
    assert latest_run(whole.root) == whole.run


def test_no_run_at_all_is_a_fault(tmp_path):
    with pytest.raises(StoreError, match=r"holds no run with a plan\.json"):
        latest_run(tmp_path)


def test_parameters_are_counted_from_the_weights_if_not_derived(whole):
    whole.edit_json("pretrain", "manifest.json", derived={})
    assert "a 2.1M-parameter model" in answers(whole.read())[0][1]


def test_damaged_weights_leave_the_size_out(whole):
    whole.edit_json("pretrain", "manifest.json", derived={})
    (whole.folder("pretrain") / "model.safetensors").write_bytes(b"\xff" * 20)
    assert answers(whole.read())[0][1].startswith("Step pretrain trained a model of 4 layers in 14m22s")


def test_samples_of_pretraining_are_those_of_the_last_iteration(whole):
    step, title, samples = sample_groups(whole.read())[0]
    assert (step, title) == ("pretrain", "Samples at iteration 1,600")
    assert [sample.text for sample in samples] == [" Paris, seen at 1600. The river"]


def test_sample_that_repeats_its_prompt_shows_it_once(whole):
    path = whole.folder("pretrain") / "samples.jsonl"
    whole.write_lines(path, [{"iteration": 1, "prompt": "The sun", "text": "The sun is hot"}])
    _, _, samples = sample_groups(whole.read())[0]
    assert [sample.text for sample in samples] == [" is hot"]


def test_reading_a_run_imports_nothing_heavy():
    heavy = "{'matplotlib', 'jinja2', 'numpy', 'mlx', 'rich'}"
    code = f"import sys, mlxchat.report.collect; print(sorted({heavy} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
