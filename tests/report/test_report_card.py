"""nanochat's report card: CORE and ChatCORE with their errors, published rows beside it, examples, costs."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mlxchat.evals.examples import write_examples
from mlxchat.report.collect import collect_steps, entries_of_artifacts
from mlxchat.report.document import document, render_html, render_markdown
from mlxchat.report.examples import read_examples, telling_examples
from mlxchat.report.summary import answers, facts
from mlxchat.report.tables import metric_table, published_tables, references

_SPEC = importlib.util.spec_from_file_location("report_speedrun", Path(__file__).with_name("speedrun.py"))
speedrun = importlib.util.module_from_spec(_SPEC)
sys.modules["report_speedrun"] = speedrun
_SPEC.loader.exec_module(speedrun)


def row(table, first):
    return next(row for row in table.rows if row[0].text == first)


@pytest.fixture
def whole_recipe(make):
    return speedrun.make_speedrun(make)


def test_core_has_its_standard_error(whole_recipe):
    scores = json.loads((whole_recipe.folder("eval_base") / "scores.json").read_text())["core"]
    centered = [task["centered"] for task in scores["tasks"].values()]
    cell = row(metric_table(whole_recipe.read()), "CORE")[1]
    assert cell.text == f"{sum(centered) / 22:.4f}"
    assert cell.detail == f"± {scores['stderr']:.4f}"


def test_published_d20_is_compared_with_its_recipe(whole_recipe):
    ((name, table),) = published_tables(whole_recipe.read())
    assert table.header == ["Published elsewhere", "BASE", "MID", "SFT", "RL"]
    assert row(table, "CORE")[1].text == "0.2219"
    assert row(table, "CORE")[1].detail.startswith("(here 0.")
    assert row(table, "gsm8k")[4].text == "7.6%"
    assert "Nothing of it was measured here" in table.notes[0]
    assert name.startswith("nanochat d20")
    assert row(table, "wall clock")[1].text == "3h51m"


def test_chatcore_of_other_tasks_is_not_compared(make):
    ((_, table),) = published_tables(speedrun.make_speedrun(make, tasks=6).read())
    assert row(table, "ChatCORE")[2].detail == ""
    assert any("over 5 tasks, here over 6: not comparable" in note for note in table.notes)


def set_long_prompts(fake, **counts):
    """Count prompts longer than the context in one task of CORE."""
    core = json.loads((fake.folder("eval_base") / "scores.json").read_text())["core"]
    core["tasks"]["squad"] |= {"extended": 0, "cropped": 0, **counts}
    fake.edit_json("eval_base", "scores.json", core=core | {"context_tokens": 2048})


def test_published_core_is_compared_only_under_the_same_rule(whole_recipe):
    """Guards against a CORE of cut prompts beside nanochat's, which computes them whole."""
    set_long_prompts(whole_recipe, extended=3)
    note = "CORE of BASE: 3 prompts longer than the context of 2,048 tokens computed beyond it"
    assert any(each.startswith(note) for each in metric_table(whole_recipe.read()).notes)
    set_long_prompts(whole_recipe, cropped=3)
    note = "CORE of BASE: 3 prompts longer than the context of 2,048 tokens lost"
    assert any(each.startswith(note) for each in metric_table(whole_recipe.read()).notes)
    ((_, table),) = published_tables(whole_recipe.read())
    assert (row(table, "CORE")[1].text, row(table, "CORE")[1].detail) == ("0.2219", "")
    assert any("eval.core.long_prompts=extend" in note for note in table.notes)


def test_published_gsm8k_is_compared_under_nanochats_verdict(whole_recipe):
    """Guards against published rows beside scores of another verdict: both are recorded, like stands beside like."""
    scores = json.loads((whole_recipe.folder("eval_sft") / "scores.json").read_text())
    scores["tasks"]["gsm8k"] |= {"accuracy": 0.2, "nanochat_accuracy": 0.1234, "nanochat_stderr": 0.01}
    whole_recipe.edit_json("eval_sft", "scores.json", **scores)
    report = whole_recipe.read()
    ((_, table),) = published_tables(report)
    assert row(table, "gsm8k")[3].detail == "(here 12.3% ± 1.0)"
    assert row(table, "gsm8k")[2].detail == "", "scores without nanochat's verdicts are not compared"
    assert row(metric_table(report), "gsm8k")[3].text == "20.0%"
    chat = scores["chatcore"]
    assert row(table, "ChatCORE")[3].detail == f"(here {chat['nanochat_value']:.4f} ± {chat['nanochat_stderr']:.4f})"
    assert any("by nanochat's verdicts, as there" in note for note in table.notes)


@pytest.mark.parametrize(
    ("step", "changes"),
    [
        ("pretrain", {"derived": {"num_layers": 4}}),
        ("pretrain", {"full_config": {"architecture": {"name": "oct2025"}, "pretrain": {"tokens_per_parameter": 8}}}),
        ("pretrain", {"full_config": {"architecture": {"name": "jul2026"}, "pretrain": {"tokens_per_parameter": 20}}}),
        ("corpus", {"full_config": {"corpus": {"hub": None}}}),
        ("pretrain", {"full_config": {"pretrain": {"num_iterations": 20}}}),
    ],
)
def test_other_recipes_are_not_compared_with_published_ones(whole_recipe, step, changes):
    manifest = json.loads((whole_recipe.folder(step) / "manifest.json").read_text())
    if changes.get("full_config", {}).get("pretrain", {}).get("num_iterations"):  # the recipe, cut short
        changes = {"full_config": manifest["full_config"]}
        changes["full_config"]["pretrain"]["num_iterations"] = 20
    whole_recipe.edit_json(step, "manifest.json", **changes)
    assert references(whole_recipe.read()) == []


def test_third_party_models_are_columns(make):
    report = speedrun.make_speedrun(make, outside=3).read()
    table = metric_table(report)
    assert set(table.header[1:]) == {"BASE", "MID", "SFT", "RL", "gpt2_0", "gpt2_1", "gpt2_2"}
    assert all(cell.text != "—" for cell, name in zip(row(table, "CORE"), table.header, strict=True) if "gpt2" in name)
    own = dict(facts(report))
    assert own["CORE"] == row(table, "CORE")[table.header.index("BASE")].text
    assert own["val bpb"] == "0.812"
    assert "Held-out text takes 0.812 bits per byte" in answers(report)[0][1]


def test_reports_of_artifacts_compare_third_party_models(make):
    fake = speedrun.make_speedrun(make, outside=2)
    for step, entry in fake.pipeline.items():
        manifest = json.loads((fake.folder(step) / "manifest.json").read_text())
        manifest |= {"rid": fake.rid(step), "kind": "scores" if entry["stage"] == "outside" else "checkpoint"}
        manifest["step"] = step.partition("_0")[0].partition("_1")[0]  # the pipeline of outside models ran twice
        fake.write_json(step, "manifest.json", manifest)
    places = [fake.folder(step) for step in ("eval_base", "outside_0", "outside_1")]
    report = collect_steps(fake.root, "all", entries_of_artifacts(fake.root, places), fake.root)
    assert metric_table(report).header == ["Metric", "BASE", "gpt2_0", "gpt2_1"]


def test_one_right_and_one_wrong_example_per_task(whole_recipe):
    found = read_examples(whole_recipe.folder("eval_sft"))
    tasks = list(speedrun.CHAT_TASKS)[:5]
    assert [(e.task, e.is_right) for e in found] == [(task, right) for task in tasks for right in (True, False)]
    page = render_html("x", document(whole_recipe.read()))
    assert "&lt;b&gt;mmlu&lt;/b&gt;" in page
    assert "<b>mmlu" not in page


def test_good_bad_and_typical_answers_are_shown(make):
    fake = make()
    rows = [
        {"task": task, "index": i, "seed": None, "prompt": f"{task}?", "output": output, "expected": "e",
         "verdict": verdict, "tokens": 1, "details": {}}
        for task, share in (("easy", 9), ("middle", 6), ("hard", 1))
        for i in range(10)
        for verdict, output in ((i < share, f"answer {'x' * i}"),)
    ]  # fmt: skip
    write_examples(fake.folder("eval_rl") / "examples.parquet", rows)
    tasks = {task: {"accuracy": share} for task, share in (("easy", 0.9), ("middle", 0.6), ("hard", 0.1))}
    fake.edit_json("eval_rl", "scores.json", tasks=tasks)
    step, found = telling_examples(fake.read())
    assert step.name == "eval_rl"
    assert {name: (each.task, each.is_right) for name, each in found.items()} == {
        "Good": ("easy", True), "Bad": ("hard", False), "Typical": ("middle", True)
    }  # fmt: skip
    assert found["Good"].output == "answer xxxx", "the one of median length"


@pytest.mark.parametrize(("right", "names"), [(2, ["Good", "Typical"]), (1, ["Good"])])
def test_good_and_typical_answers_are_of_different_questions(make, right, names):
    fake = make()
    rows = [
        {"task": "sums", "index": i, "seed": None, "prompt": f"{i}?", "output": "It is 8.", "expected": "8",
         "verdict": True, "tokens": 1, "details": {}}
        for i in range(right)
    ]  # fmt: skip
    write_examples(fake.folder("eval_rl") / "examples.parquet", rows)
    _, found = telling_examples(fake.read())
    assert list(found) == names
    assert len({each.prompt for each in found.values()}) == len(names)


def test_report_names_a_wrong_form(make):
    fake = make()
    row = {"task": "sums", "index": 0, "seed": None, "prompt": "?", "output": "It is 8.", "expected": "#### 8",
           "verdict": False, "tokens": 1, "details": {}}  # fmt: skip
    write_examples(fake.folder("eval_rl") / "examples.parquet", [row])
    assert "sums, **wrong form**, expected #### 8" in render_markdown(document(fake.read())).replace("\\", "")
