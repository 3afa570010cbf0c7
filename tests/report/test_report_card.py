"""nanochat's report card: CORE with its error, third-party models, examples."""

from mlxchat.evals.examples import write_examples
from mlxchat.report.document import document, render_html, render_markdown
from mlxchat.report.examples import read_examples, telling_examples
from mlxchat.report.summary import answers, facts
from mlxchat.report.tables import core_table, metric_table


def row(table, first):
    return next(row for row in table.rows if getattr(row[0], "text", row[0]) == first)


def core_of(value):
    """Return CORE as evals/core.py writes it, of one task."""
    task = {"kind": "multiple_choice", "accuracy": 0.4, "baseline": 0.25, "chance": 0.25, "num_questions": 100}
    return {"core": value, "stderr": 0.0123, "tasks": {"copa": task}}


def test_third_party_models_are_columns_and_not_among_the_facts(make):
    fake = make(gpt2={"stage": "outside"})
    fake.edit_json("eval_base", "scores.json", core=core_of(0.2), bpb={"val": 0.8123})
    fake.write_json("gpt2", "scores.json", {"checkpoint": "gpt2", "core": core_of(0.3), "bpb": {"val": 0.7}})
    report = fake.read()
    table = metric_table(report)
    assert set(table.header[1:]) == {"BASE", "MID", "SFT", "RL", "gpt2"}
    core = dict(zip(table.header, row(table, "CORE"), strict=True))
    assert (core["BASE"].text, core["BASE"].detail, core["gpt2"].text) == ("0.2000", "± 0.0123", "0.3000")
    assert row(core_table(report), "copa")[1] == "multiple choice"
    own = dict(facts(report))
    assert (own["CORE"], own["val bpb"]) == ("0.2000", "0.812")
    assert "Held-out text takes 0.812 bits per byte" in answers(report)[0][1]


def test_one_right_and_one_wrong_example_per_task(make):
    fake = make()
    rows = [
        {"task": task, "index": i, "seed": None, "prompt": f"What?\n<b>{task}</b>", "output": "It is 2.",
         "expected": "2", "verdict": i in (2, 3), "tokens": 5, "details": {}}
        for task in ("mmlu", "sums")
        for i in range(5)
    ]  # fmt: skip
    write_examples(fake.folder("eval_sft") / "examples.parquet", rows)
    found = [(each.task, each.is_right) for each in read_examples(fake.folder("eval_sft"))]
    assert found == [(task, right) for task in ("mmlu", "sums") for right in (True, False)]
    page = render_html("x", document(fake.read()))
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


def test_report_names_a_wrong_form(make):
    fake = make()
    row = {"task": "sums", "index": 0, "seed": None, "prompt": "?", "output": "It is 8.", "expected": "#### 8",
           "verdict": False, "tokens": 1, "details": {}}  # fmt: skip
    write_examples(fake.folder("eval_rl") / "examples.parquet", [row])
    assert "sums, **wrong form**, expected #### 8" in render_markdown(document(fake.read())).replace("\\", "")
