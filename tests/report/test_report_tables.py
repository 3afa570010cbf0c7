"""Which rows and columns the tables have, and what the headline says."""

import json
import math
from typing import Any

import pytest

from mlxchat.report.summary import answers
from mlxchat.report.tables import (
    artifact_table,
    machine_table,
    metric_table,
    source_table,
)


def row(table, first):
    return next(row for row in table.rows if row[0].text == first)


def words(table, first):
    return [cell.text for cell in row(table, first)]


def set_accuracy(fake, step, task, accuracy, **more):
    tasks = json.loads((fake.folder(step) / "scores.json").read_text())["tasks"]
    tasks[task] |= {"accuracy": accuracy, **more}
    fake.edit_json(step, "scores.json", tasks=tasks)


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
def test_best_is_marked_only_beyond_the_errors_and_chance(whole, accuracy, others, stderr, is_best):
    """Guards against facts_mc 26 ± 4 shaded as best beside 24 ± 4, where guessing scores 25."""
    for step in ("eval_base", "eval_mid", "eval_rl"):
        set_accuracy(whole, step, "capitals", others, stderr=stderr)
    set_accuracy(whole, "eval_sft", "capitals", accuracy, stderr=stderr)
    capitals = row(metric_table(whole.read()), "capitals")
    assert [cell.is_best for cell in capitals] == [False, False, False, is_best, False]


def test_pass_at_k_and_the_mean_have_standard_errors(whole):
    """Guards against rows without ± beside others that have it."""
    table = metric_table(whole.read())
    assert [r[0].text for r in table.rows if "@" in r[0].text] == ["pass@1", "pass@2", "pass@4", "pass@8"]
    assert words(table, "pass@1") == ["pass@1", "—", "—", "25.0%", "53.9%"]
    assert [cell.detail for cell in row(table, "pass@1")[3:]] == ["± 5.0", "± 5.0"]
    tasks = json.loads((whole.folder("eval_sft") / "scores.json").read_text())["tasks"].values()
    error = math.sqrt(sum((task["stderr"] / (1 - task["chance"])) ** 2 for task in tasks)) / len(tasks)
    assert row(table, "mean centred")[3].detail == f"± {error:.3f}"


def test_mean_centred_over_different_tasks_has_no_best(whole):
    whole.edit_json("eval_base", "scores.json", tasks={"capitals": {"accuracy": 0.3, "chance": 0.25}})
    table = metric_table(whole.read())
    assert not any(cell.is_best for cell in row(table, "mean centred"))
    assert any("not comparable" in note for note in table.notes)


def test_summary_of_a_run(whole):
    learnt, well, cost, then = (answer for _, answer in answers(whole.read()))
    assert learnt == (
        "Step pretrain trained a 12.6M-parameter model of 4 layers on 52.4M tokens in 14m22s. Yes: held-out text takes "
        "1.119 bits per byte (order-2 n-gram 2.31, untrained model 3.25). After rl, 4 of 4 tasks are clearly above "
        "chance."
    )
    assert "Best at spelling (92.9% ± 1.1), worst at trivia (33.9% ± 2.1)." in well
    assert cost.startswith("23m28s of computing on Apple M3 Max (metal, 16 cores), at most 9.8 GB of memory.")
    assert "2 of 10 steps came from the cache" in cost
    assert then.endswith(f"`mlxchat chat {whole.artifact('rl')}`")


@pytest.mark.parametrize(("bpb", "verdict"), [(1.0, "Yes"), (2.5, "Partly"), (3.3, "Hardly")])
def test_learning_is_judged_by_the_baselines(whole, bpb, verdict):
    whole.edit_json("eval_base", "scores.json", bpb={"val": bpb, "ngram_order2": 2.3, "untrained": 3.2})
    assert f" {verdict}: held-out text takes {bpb:.3f}" in answers(whole.read())[0][1]


FALLING = {x: 4 - x / 100 for x in range(0, 101, 5)}


def next_steps(make: Any, losses: dict[int, float], accuracy: float | None = None) -> str:
    """Return the advice after an SFT with this curve, whose evaluation has this accuracy."""
    without = ["pretrain", "midtrain", "rl", "eval_base", "eval_mid", "eval_rl"]
    fake = make(without=without, absent=["eval_sft"] if accuracy is None else [], sft={"stage": "sft"})
    lines = [{"iteration": i, "val_loss": loss} for i, loss in losses.items()]
    fake.write_lines(fake.folder("sft") / "metrics.jsonl", lines)
    if accuracy is not None:
        fake.edit_json("eval_sft", "scores.json", tasks={"towns": {"accuracy": accuracy, "chance": 0.0}})
    return dict(answers(fake.read()))["What next?"]


@pytest.mark.parametrize(
    ("losses", "advice"),
    [
        (FALLING, "Train longer: validation still fell at the end of sft (by 7.7% over its last quarter)"),
        ({x: max(y, 3.26) for x, y in FALLING.items()}, ""),
        # One noisy value at the end of a flat curve is no trend.
        ({x: 3.0 if x < 100 else 2.8 for x in FALLING}, ""),
        ({x: abs(x - 40) / 100 + 2 for x in FALLING}, "lowest at iteration 40 and rose since: train it less"),
        ({x: 2 - abs(x - 60) / 100 for x in FALLING}, "sft did not lower its validation"),
    ],
)  # fmt: skip
def test_advice_follows_from_the_validation_curve(make, losses, advice):
    found = next_steps(make, losses).partition("Talk to it")[0]
    assert advice in found
    assert bool(advice) == bool(found.strip())
    assert "Train longer" in advice or "Train longer" not in found


@pytest.mark.parametrize(("accuracy", "is_advised"), [(0.99, False), (0.6, True)])
def test_nearly_perfect_model_needs_no_longer_training(make, accuracy, is_advised):
    assert ("Train longer" in next_steps(make, FALLING, accuracy)) is is_advised


def test_input_from_another_artifact_than_planned_is_named(whole):
    other = {"checkpoint": {"step": "midtrain", "artifact": "midtrain-old-1"}}
    whole.edit_json("sft", "manifest.json", inputs=other)
    (found,) = (row for row in artifact_table(whole.read()).rows if row[0] == "sft")
    assert found[-1] == "checkpoint: midtrain-old-1"


def test_shares_of_numbers_and_forms_are_rows_where_form_costs(whole):
    tasks = {"sums": {"accuracy": 0.2, "right_number": 0.7, "right_form": 0.3},
             "letters": {"accuracy": 0.4, "right_number": 0.4, "right_form": 0.6}}  # fmt: skip
    whole.edit_json("eval_sft", "scores.json", tasks=tasks)
    table = metric_table(whole.read())
    assert words(table, "sums: right number")[3] == "70.0%"
    assert words(table, "sums: right form")[3] == "30.0%"
    assert not any(row[0].text.startswith("letters:") for row in table.rows)
    assert any("right number" in note for note in table.notes)


def test_machine_facts_that_differ_are_listed(whole):
    whole.edit_json("rl", "manifest.json", versions={"mlx": "0.33.0"})
    table = machine_table(whole.read())
    assert table.rows[0] == ["device", "Apple M3 Max"]
    assert ["mlx", "0.32.4; 0.33.0"] in table.rows
    assert ["git commit", "0123456789ab; 0123456789ab with uncommitted changes"] in table.rows


def test_files_of_a_repository_are_one_row(whole):
    files = [{"url": f"hf://datasets/karpathy/fineweb/shard_{i}.parquet", "revision": "a" * 40} for i in range(240)]
    whole.edit_json("corpus", "manifest.json", externals=files)
    assert source_table(whole.read()).rows == [["karpathy/fineweb", "a" * 12, "—", "corpus"]]


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"reached_target": 1, "iterations": 30, "seconds_to_target": 30.0}, "after 30 iterations, 30.0s of training."),
        ({"reached_target": 0}, "It did not reach its target."),
        ({}, ""),
    ],
)
def test_report_says_when_the_target_was_reached(whole, metrics, said):
    whole.edit_json("pretrain", "manifest.json", metrics=metrics)
    learnt = dict(answers(whole.read()))["Did it learn?"]
    assert said in learnt
    assert ("target" in learnt) is bool(said)
