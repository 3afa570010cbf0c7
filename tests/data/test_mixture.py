"""Mixtures: epochs, weights, slices, order by seed."""

import json
from collections import Counter
from pathlib import Path

import pytest

from mlxchat.config.schema import TaskItem
from mlxchat.data.tokens import Mixture
from mlxchat.errors import ConfigError


def write_questions(folder: Path, count: int) -> str:
    """Write a file of the questions q0, q1, …; return its path."""
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) + "\n" for i in range(count)))
    return str(path)


@pytest.fixture
def items(tmp_path: Path) -> dict[str, TaskItem]:
    """Three lines of a file twice over, and five conversations of a bundled task."""
    path = write_questions(tmp_path, 3)
    return {
        "mine": TaskItem(task="jsonl", path=path, epochs=2, options={"held_out_frac": 0.0}),
        "sums": TaskItem(task="arithmetic", size=5),
    }


def questions(mixture: Mixture) -> list[str]:
    return [mixture[index]["messages"][0]["content"] for index in range(len(mixture))]


def test_epochs_repeat_conversations_and_the_seed_shuffles_them(items):
    first, same, other = (questions(Mixture(items, seed=seed)) for seed in (1, 1, 2))
    counts = Counter(first)
    assert {key: counts.pop(key) for key in ("q0", "q1", "q2")} == {"q0": 2, "q1": 2, "q2": 2}
    assert sum(counts.values()) == 5
    assert first == same != other
    assert sorted(first) == sorted(other)
    mine = [question in ("q0", "q1", "q2") for question in first]
    assert mine not in (sorted(mine), sorted(mine, reverse=True)), "tasks are mixed"


def test_empty_slices_are_refused(tmp_path):
    item = TaskItem(task="identity_conversations", path=write_questions(tmp_path, 1), start=5)
    with pytest.raises(ConfigError, match="no conversation of mine is left"):
        Mixture({"mine": item, "sums": TaskItem(task="arithmetic", size=5)}, seed=0)


def test_weights_divide_the_total_size(tmp_path):
    mine = TaskItem(task="identity_conversations", path=write_questions(tmp_path, 4), weight=3.0)
    mixture = Mixture({"mine": mine, "sums": TaskItem(task="arithmetic", size=12, weight=1.0)}, seed=0)
    assert mixture.counts() == {"mine": 12, "sums": 4}
    asked = Counter(questions(mixture))
    assert [asked[f"q{i}"] for i in range(4)] == [3, 3, 3, 3]


def test_a_given_order_learns_one_task_after_the_other(items):
    for order in (["sums", "mine"], ["mine", "sums"]):
        mixture = Mixture(items, seed=0, order=order)
        tasks = [mixture.task_of(index) for index in range(len(mixture))]
        assert tasks == [name for name in order for _ in range({"mine": 6, "sums": 5}[name])]
        asked = [question for question in questions(mixture) if question.startswith("q")]
        assert asked == 2 * asked[:3], "twice in the task's own order"
        assert sorted(asked[:3]) == ["q0", "q1", "q2"]
