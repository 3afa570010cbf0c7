"""Items of mixtures and suites: nanochat's exact ones, and problems found without reading data."""

import re
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import TaskItem
from mlxchat.tasks import find_item_problems, load_item

SMOLTALK, GSM8K = {"task": "smoltalk"}, {"task": "gsm8k"}
MMLU = {"task": "mmlu", "split": "auxiliary_train"}
# Written from scripts/mid_train.py, chat_sft.py and chat_eval.py of both snapshots.
MIXTURES: dict[str, dict[str, dict[str, Any]]] = {
    "oct2025_mid": {
        "smoltalk": SMOLTALK, "mmlu": {**MMLU, "source": {"subset": "auxiliary_train"}}, "gsm8k": GSM8K,
        "identity": {"task": "identity_conversations", "epochs": 2},
        "simple_spelling": {"task": "simple_spelling", "size": 200_000},
        "spelling_bee": {"task": "spelling_bee", "size": 80_000},
    },
    "oct2025_sft": {
        "arc_easy": {"task": "arc_easy"}, "arc_challenge": {"task": "arc_challenge"}, "gsm8k": GSM8K,
        "smoltalk": {**SMOLTALK, "stop": 10_000}, "identity": {"task": "identity_conversations"},
        "simple_spelling": {"task": "simple_spelling", "size": 300},
        "spelling_bee": {"task": "spelling_bee", "size": 300},
    },
    "jul2026_sft": {"smoltalk": SMOLTALK, "mmlu": {**MMLU, "epochs": 3}, "gsm8k": {**GSM8K, "epochs": 4}},
}  # fmt: skip
VALIDATION: dict[str, dict[str, dict[str, Any]]] = {
    "oct2025_mid_validation": {
        "smoltalk": {**SMOLTALK, "split": "test"}, "mmlu": {"task": "mmlu", "split": "test", "stop": 5200},
        "gsm8k": {**GSM8K, "split": "test", "stop": 420},
    },
    "oct2025_sft_validation": {"smoltalk": {**SMOLTALK, "split": "test"}},
}  # fmt: skip
VALIDATION["jul2026_sft_validation"] = VALIDATION["oct2025_mid_validation"]
FIVE = {name: {"task": name, "split": "test"} for name in ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval")}
SUITES = {
    "chatcore": {**FIVE, "spelling_bee": {"task": "spelling_bee", "split": "test", "size": 256}},
    "chatcore_jul2026": FIVE,
}


def items(lines: dict[str, dict[str, Any]]) -> dict[str, TaskItem]:
    return {name: TaskItem(**line) for name, line in lines.items()}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        *((f"mixture@sft.mixture={name}", lines) for name, lines in MIXTURES.items()),
        *((f"mixture@sft.validation={name}", lines) for name, lines in VALIDATION.items()),
        *((f"suite={name}", lines) for name, lines in SUITES.items()),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_mixtures_and_suites_are_nanochats(choice, expected):
    config = compose_config([choice]).config
    found = {"sft.mixture": config.sft.mixture, "sft.validation": config.sft.validation, "suite": config.suite}
    assert found[choice.partition("=")[0].rpartition("@")[2]] == items(expected)


@pytest.mark.parametrize("name", [*MIXTURES, *VALIDATION])
def test_the_default_subsets_and_seeds_are_nanochats(name):
    lines = items({**MIXTURES, **VALIDATION}[name])
    tasks = [load_item(line) for line in lines.values() if line.task in ("smoltalk", "gsm8k", "arc_easy")]
    assert {task.seed for task in tasks} == {42}
    assert {need.pattern.split("/")[0] for task in tasks for need in task.needs()} <= {"data", "main", "ARC-Easy"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"task": "gsm8q"}, 'task is "gsm8q", expected one of .* Did you mean "gsm8k"'),
        ({"task": "mmlu"}, r'split is "train", expected auxiliary_train or test or validation or dev'),
        ({"task": "mmlu", "split": "test"}, "held-out conversations are never trained on. Train on auxiliary_train"),
        ({"task": "humaneval", "split": "test"}, "held-out conversations are never trained on"),
        ({**GSM8K, "source": {"revison": "x"}}, 'source: task gsm8k has no "revison".* Did you mean "revision"'),
        ({**GSM8K, "options": {"sede": 1.0}}, r'options: task gsm8k has no "sede".* Did you mean "seed"'),
        ({**GSM8K, "source": {"subset": "mian"}}, 'subset of task gsm8k is "mian".* Did you mean "main"'),
        ({**GSM8K, "fields": ["capital"]}, 'task gsm8k has no "fields"'),
        ({"task": "facts", "source": {"url": "http://x"}}, r'source: task facts has no "url"'),
        ({"task": "identity_conversations", "source": {"url": "me.jsonl"}}, "expected an address .* path=FILE"),
        ({"task": "spelling_bee", "source": {"words": "w.txt"}}, "expected an address .* or bundled"),
        ({**GSM8K, "start": -1}, "start is -1, expected at least 0"),
        ({**GSM8K, "step": 0}, "step is 0, expected at least 1"),
        ({**GSM8K, "start": 7, "stop": 7}, r"stop is 7, expected more than start \(7\): no conversation is left"),
        ({**GSM8K, "size": 7, "start": 7}, r"start is 7, expected less than size \(7\): no conversation is left"),
        ({**GSM8K, "weight": -0.5}, "weight is -0.5, expected at least 0"),
        ({**GSM8K, "weight": 0.0}, "all weights are 0"),
    ],
)
def test_each_problem_is_one_message(line, expected):
    problems = list(find_item_problems("sft.mixture", {"mine": TaskItem(**line)}, training=True))
    assert len(problems) == 1
    assert re.search(expected, problems[0]), problems[0]
    assert problems[0].startswith("sft.mixture")


def test_all_problems_of_all_items_are_reported():
    lines = items({"a": {**GSM8K, "size": 0, "epochs": 0}, "b": {"task": "mmlu", "split": "x", "stop": 0}})
    assert len(list(find_item_problems("suite", lines, training=False))) == 4


def test_weights_are_for_all_items_or_none():
    lines = items({"a": {**GSM8K, "weight": 1.0}, "b": SMOLTALK})
    assert list(find_item_problems("m", lines, training=True)) == [
        "m: a has a weight, b has none: give every task one, or none"
    ]
