"""A mixture holds each conversation as often as its task has epochs, in one order that the seed decides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from mlxchat.config import TaskItem
from mlxchat.data.mixture import Mixture, load_item
from mlxchat.errors import ConfigError, DataError


@pytest.fixture
def items(tmp_path: Path) -> dict[str, TaskItem]:
    """Three lines of a file twice over, and five conversations of a bundled task."""
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(3)))
    return {
        "mine": TaskItem(task="jsonl", path=str(path), epochs=2, options={"held_out_frac": 0.0}),
        "spelling": TaskItem(task="spelling", size=5),
    }


def questions(mixture: Mixture) -> list[str]:
    return [mixture[index]["messages"][0]["content"] for index in range(len(mixture))]


def test_each_conversation_occurs_as_often_as_its_task_has_epochs(items: dict[str, TaskItem]) -> None:
    counts = Counter(questions(Mixture(items, seed=0)))
    assert {key: counts.pop(key) for key in ("q0", "q1", "q2")} == {"q0": 2, "q1": 2, "q2": 2}
    assert sum(counts.values()) == 5


def test_tasks_are_mixed_and_not_one_after_the_other(items: dict[str, TaskItem]) -> None:
    mine = [question in ("q0", "q1", "q2") for question in questions(Mixture(items, seed=0))]
    assert mine != sorted(mine)
    assert mine != sorted(mine, reverse=True)


def test_a_seed_gives_the_same_order_and_another_seed_another(items: dict[str, TaskItem]) -> None:
    first, same, other = (questions(Mixture(items, seed=seed)) for seed in (1, 1, 2))
    assert first == same
    assert first != other
    assert sorted(first) == sorted(other)


def test_a_slice_is_the_conversations_of_its_indices(items: dict[str, TaskItem]) -> None:
    mixture = Mixture(items, seed=0)
    assert mixture[2:7] == [mixture[index] for index in range(2, 7)]


def test_an_index_beyond_the_end_ends_an_iteration(items: dict[str, TaskItem]) -> None:
    assert len(list(Mixture(items, seed=0))) == 11


def test_an_empty_mixture_is_refused() -> None:
    with pytest.raises(ConfigError, match="no conversation"):
        Mixture({}, seed=0)


def test_no_epochs_leave_nothing(items: dict[str, TaskItem]) -> None:
    with pytest.raises(ConfigError, match="no conversation"):
        Mixture({"spelling": TaskItem(task="spelling", size=5, epochs=0)}, seed=0)


def test_size_and_options_reach_the_task() -> None:
    assert len(load_item(TaskItem(task="arithmetic", size=7))) == 7


def test_the_test_split_is_another_than_the_training_split() -> None:
    train, test = (load_item(TaskItem(task="spelling", split=split, size=20)) for split in ("train", "test"))
    asked = {conversation["messages"][0]["content"] for conversation in (train[index] for index in range(20))}
    assert not asked & {test[index]["messages"][0]["content"] for index in range(20)}


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="speling"):
        load_item(TaskItem(task="speling"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        load_item(TaskItem(task="jsonl", path=str(tmp_path / "nothing.jsonl")))
