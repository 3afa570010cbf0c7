"""Items of mixtures and suites: nanochat's exact ones, and problems found without reading data."""

import re
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import TaskItem
from mlxchat.tasks import find_item_problems

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


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"task": "gsm8q"}, 'task is "gsm8q", expected one of .* Did you mean "gsm8k"'),
        ({"task": "mmlu"}, 'split of task mmlu is "train", expected auxiliary_train or test or validation or dev'),
        ({"task": "mmlu", "split": "test"}, "held-out conversations are never trained on. Train on auxiliary_train"),
        ({**MMLU, "split": "test", "source": {"subset": "auxiliary_train"}}, "only the split auxiliary_train, not te"),
        ({**GSM8K, "source": {"revison": "x"}}, 'task gsm8k has no source "revison".* Did you mean "revision"'),
        ({**GSM8K, "options": {"sede": 1.0}}, 'task gsm8k has no option "sede".* Did you mean "seed"'),
        ({"task": "identity_conversations", "source": {"url": "me.jsonl"}}, "expected an address .* path=FILE"),
        ({"task": "arithmetic", "options": {"steps": 3.0}}, "steps of task arithmetic is 3.0, expected 1 or 2"),
        ({"task": "jsonl"}, "task jsonl has no path"),
        ({"task": "jsonl", "path": "/no/such.jsonl"}, "no file /no/such.jsonl"),
        ({**GSM8K, "weight": 0.0}, "all weights are 0"),
    ],
)
def test_problems_are_found_without_data(line, expected):
    found = list(find_item_problems("sft.mixture", {"mine": TaskItem(**line)}, training=True))
    assert re.search(f"^sft.mixture.*{expected}", found[0]), found[0]
