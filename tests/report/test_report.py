"""What the report says: outcomes of steps, the table of scores, the four answers, examples, curves of several runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mlxchat.errors import StoreError
from mlxchat.evals.examples import write_examples
from mlxchat.report.card import render_card
from mlxchat.report.collect import RunReport, StepReport, collect
from mlxchat.report.comparison import comparison_charts
from mlxchat.report.document import document, render_markdown
from mlxchat.report.examples import telling_examples
from mlxchat.report.summary import answers, troubles
from mlxchat.report.tables import core_table, metric_table, source_table
from mlxchat.store.store import Store


def row(table: Any, first: str) -> Any:
    return next(row for row in table.rows if getattr(row[0], "text", row[0]) == first)


def words(table: Any, first: str) -> list[str]:
    return [cell.text for cell in row(table, first)]


def test_outcomes_of_steps(made):
    made.remove("sft", "rl", "eval_sft", "eval_rl")
    for step in ("sft", "rl"):
        made.add_event(event="step_started", step=step)
    for event in ("step_failed", "run_failed"):
        made.add_event(event=event, step="rl", error="out of memory")
    work = made.outputs / "work" / made.report().step("sft").key / "ckpt" / "records"
    work.mkdir(parents=True)
    (work / "metrics.jsonl").write_text('{"iteration": 0, "loss": 2.0}\n{"iteration": 1, "loss": 1.5}\n{"iter')
    report = made.report()
    outcomes = {"corpus": "run", "sft": "unfinished", "rl": "failed", "eval_rl": "missing"}
    assert {name: report.step(name).outcome for name in outcomes} == outcomes
    assert sum("out of memory" in trouble for trouble in troubles(report)) == 1
    assert report.step("sft").series("loss") == ([0, 1], [2.0, 1.5]), "a step in progress shows what it recorded"


def test_report_without_results(made, tmp_path):
    made.remove(*made.folders)
    report = made.report()
    assert {step.outcome for step in report.steps} == {"missing"}
    assert dict(answers(report))["What did it cost?"] == "None of the 10 steps has a result yet."
    assert made.write_report().is_file()
    with pytest.raises(StoreError, match=r"plan\.json is absent, unreadable or without steps"):
        collect(tmp_path, tmp_path / "runs" / "x")


@pytest.mark.parametrize(
    ("accuracy", "others", "stderr", "is_best"),
    [
        (0.26, 0.22, 0.04, False),  # guessing scores 0.25
        (0.26, 0.22, 0.001, True),
        (0.60, 0.55, 0.04, False),  # the difference has an error of 0.057
        (0.70, 0.55, 0.04, True),
        (0.25, 0.20, 0.0, False),
    ],
)
def test_best_is_marked_only_beyond_the_errors_and_chance(made, accuracy, others, stderr, is_best):
    """Guards against facts_mc 26 ± 4 shaded as best beside 24 ± 4, where guessing scores 25."""
    made.score(capitals={"accuracy": others, "chance": 0.25, "stderr": stderr})
    made.edit("eval_sft", "scores.json", tasks={"capitals": {"accuracy": accuracy, "chance": 0.25, "stderr": stderr}})
    capitals = row(metric_table(made.report()), "capitals")
    assert [cell.is_best for cell in capitals] == [False, False, False, is_best, False]


def test_pass_at_k_of_rl_has_errors_in_both_columns(made):
    lines = [{"iteration": i, "pass_at_1": 0.25 + i / 10, "pass_at_1_stderr": 0.05} for i in (0, 2)]
    made.write_lines("rl", "metrics.jsonl", lines)
    table = metric_table(made.report())
    assert words(table, "pass@1") == ["pass@1", "—", "—", "25.0%", "45.0%"]
    assert [cell.detail for cell in row(table, "pass@1")[3:]] == ["± 5.0", "± 5.0"]


def test_mean_centred_over_different_tasks_has_no_best(made):
    made.score(capitals={"accuracy": 0.7, "chance": 0.25}, sums={"accuracy": 0.9, "chance": 0.0})
    for step, mean in (("eval_base", 0.3), ("eval_sft", 0.8)):
        made.edit(step, "scores.json", mean_centered=mean)
    made.edit("eval_base", "scores.json", tasks={"capitals": {"accuracy": 0.3, "chance": 0.25}})
    table = metric_table(made.report())
    assert not any(cell.is_best for cell in row(table, "mean centred"))
    assert any("not comparable" in note for note in table.notes)


def test_forms_are_rows_where_form_costs(made):
    made.score(sums={"accuracy": 0.2, "right_number": 0.7, "right_form": 0.3},
               letters={"accuracy": 0.4, "right_number": 0.4, "right_form": 0.6})  # fmt: skip
    table = metric_table(made.report())
    assert words(table, "sums: right number")[3] == "70.0%"
    assert words(table, "sums: right form")[3] == "30.0%"
    assert not any(row[0].text.startswith("letters:") for row in table.rows)


def test_core_and_third_party_models(made):
    """A third-party model is a column, and the answers are about ours."""
    task = {"kind": "multiple_choice", "accuracy": 0.4, "baseline": 0.25, "chance": 0.25, "num_questions": 100}
    core = {"core": 0.2, "stderr": 0.0123, "tasks": {"copa": task}}
    made.edit("eval_base", "scores.json", core=core, bpb={"val": 0.8123})
    made.edit("eval_mid", "scores.json", core={**core, "core": 0.3}, bpb={"val": 0.7}, checkpoint="gpt2")
    plan = json.loads((made.run / "plan.json").read_text())
    for step in plan["steps"]:
        step["inputs"] = {} if step["step"] == "eval_mid" else step["inputs"]
    (made.run / "plan.json").write_text(json.dumps(plan))
    report = made.report()
    table = metric_table(report)
    assert set(table.header[1:]) == {"BASE", "gpt2", "SFT", "RL"}
    found = dict(zip(table.header, row(table, "CORE"), strict=True))
    assert (found["BASE"].text, found["BASE"].detail, found["gpt2"].text) == ("0.2000", "± 0.0123", "0.3000")
    assert row(core_table(report), "copa")[1] == "multiple choice"
    assert "Held-out text takes 0.812 bits per byte" in answers(report)[0][1]


def test_the_four_answers(made):
    made.score(
        spelling={"accuracy": 0.929, "chance": 0.0, "stderr": 0.011},
        trivia={"accuracy": 0.339, "chance": 0.25, "stderr": 0.021},
        dice={"accuracy": 0.18, "chance": 0.17, "stderr": 0.02},
    )
    learnt, well, cost, then = (answer for _, answer in answers(made.report()))
    assert learnt.startswith("Step pretrain trained a ")
    assert learnt.endswith("After rl, 2 of 3 tasks are clearly above chance: spelling and trivia.")
    assert "Best at spelling (92.9% ± 1.1), worst at dice (18.0% ± 2.0)." in well
    assert " of computing on " in cost
    assert then.endswith(f"`mlxchat chat {made.folders['rl'].name}`")


@pytest.mark.parametrize(("bpb", "verdict"), [(1.0, "Yes"), (2.5, "Partly"), (3.3, "Hardly")])
def test_learning_is_judged_by_the_baselines(made, bpb, verdict):
    made.edit("eval_base", "scores.json", bpb={"val": bpb, "ngram_order2": 2.3, "untrained": 3.2})
    assert f" {verdict}: held-out text takes {bpb:.3f}" in answers(made.report())[0][1]


FALLING = {x: 4 - x / 100 for x in range(0, 101, 5)}


@pytest.mark.parametrize(
    ("losses", "accuracy", "advice"),
    [
        (FALLING, 0.6, "Train longer: validation still fell at the end of sft (by 7.7% over its last quarter)"),
        (FALLING, 0.99, ""),  # all is solved
        ({x: max(y, 3.26) for x, y in FALLING.items()}, 0.6, ""),
        # One noisy value at the end of a flat curve is no trend.
        ({x: 3.0 if x < 100 else 2.8 for x in FALLING}, 0.6, ""),
        ({x: abs(x - 40) / 100 + 2 for x in FALLING}, 0.6, "lowest at iteration 40 and rose since: train it less"),
        ({x: 2 - abs(x - 60) / 100 for x in FALLING}, 0.6, "sft did not lower its validation"),
    ],
    ids=["falls", "solved", "flat", "noise", "rises", "never fell"],
)
def test_advice_follows_from_the_validation_curve(made, losses, accuracy, advice):
    made.drop("pretrain", "midtrain", "rl", "eval_base", "eval_mid", "eval_rl")
    made.write_lines("sft", "metrics.jsonl", [{"iteration": i, "val_loss": loss} for i, loss in losses.items()])
    made.score(towns={"accuracy": accuracy, "chance": 0.0})
    found = dict(answers(made.report()))["What next?"].partition("Talk to it")[0]
    assert advice in found
    assert bool(advice) == bool(found.strip())


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"reached_target": 1, "iterations": 30, "seconds_to_target": 30.0}, "after 30 iterations, 30.0s of training."),
        ({"reached_target": 0}, "It did not reach its target."),
    ],
)
def test_report_says_when_the_target_was_reached(made, metrics, said):
    made.edit("pretrain", "manifest.json", metrics=metrics)
    assert said in dict(answers(made.report()))["Did it learn?"]


def test_good_bad_and_typical_answers_are_shown(made):
    rows = [
        {"task": task, "index": i, "seed": None, "prompt": f"{task} {i}?", "output": output, "expected": "#### 8",
         "verdict": verdict, "tokens": 1, "details": {}}
        for task, share in (("easy", 9), ("middle", 6), ("hard", 1))
        for i in range(10)
        for verdict, output in ((i < share, f"It is {'8' * i}"),)
    ]  # fmt: skip
    write_examples(made.folders["eval_rl"] / "examples.parquet", rows)
    made.score(**{task: {"accuracy": share} for task, share in (("easy", 0.9), ("middle", 0.6), ("hard", 0.1))})
    step, found = telling_examples(made.report())
    assert step.name == "eval_rl"
    assert {name: (each.task, each.is_right) for name, each in found.items()} == {
        "Good": ("easy", True), "Bad": ("hard", False), "Typical": ("middle", True)
    }  # fmt: skip
    assert found["Good"].output == "It is 8888", "the one of median length"
    rows = [{**rows[-1], "output": "It is 8."}]
    write_examples(made.folders["eval_rl"] / "examples.parquet", rows)
    assert "hard, **wrong form**, expected #### 8" in render_markdown(document(made.report())).replace("\\", "")


def test_files_of_a_repository_are_one_row(made):
    files = [{"url": f"hf://datasets/karpathy/fineweb/shard_{i}.parquet", "revision": "a" * 40} for i in range(240)]
    made.edit("corpus", "manifest.json", externals=files)
    assert source_table(made.report()).rows[0] == ["karpathy/fineweb", "a" * 12, "—", "corpus"]


def training(rid: str, step: str = "pretrain", last: float = 3.0) -> StepReport:
    records = [{"iteration": i, "loss": last + 1 / (i + 1), "val_bpb": last + 1 / (i + 1)} for i in range(5)]
    return StepReport(
        name=step, stage=step, kind="checkpoint", artifact=f"{step}-{rid}", key=rid, rid=rid, inputs={}, outcome="run",
        manifest={"metrics": {"val_bpb": last}, "derived": {"total_flops": 1e10}}, records=records,
    )  # fmt: skip


def test_shared_steps_are_drawn_once():
    first = [training("a"), training("a"), training("b", last=2.0)]
    jobs = [
        RunReport(name=f"seed={n + 1}", folder=Path("20261121-1"), steps=[one, training(f"s{n}", "sft", last=n)])
        for n, one in enumerate(first)
    ]
    charts = {chart.name: chart for chart in comparison_charts(jobs)}
    assert "seed=1: 3.200, seed=3: 2.200." in charts["pretrain-val_bpb"].alt
    assert "seed=2: 1.457" in charts["sft-loss"].alt


def test_the_hub_reads_a_models_own_scores(made, tmp_path):
    made.edit("eval_sft", "scores.json", tasks={"capitals": {"accuracy": 0.446, "chance": 0.25}})
    card = render_card(
        Store(made.outputs), made.folders["sft"], target="mlx", how={"trust": ""}, notes=[], sha256="0" * 64, chats=True
    )
    (tmp_path / "README.md").write_text(card)
    told = ModelCard.load(tmp_path / "README.md").data
    assert (told.model_name, told.language, told.library_name) == (made.folders["sft"].name, "en", "mlx")
    found = [(result.dataset_type, result.metric_type, result.metric_value) for result in told.eval_results]
    assert found == [("capitals", "accuracy", 0.446)]
