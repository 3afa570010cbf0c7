"""Rewards in parts: what each is worth, their sum, and a user's function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mlxchat.compose import compose_config
from mlxchat.config import RewardConfig
from mlxchat.errors import ConfigError, StepFailed
from mlxchat.runner.externals import pin_externals
from mlxchat.training.rewards import Answer, Reward, overlong_penalty

RIGHT = {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}


class Sums:
    def reward(self, conversation: dict[str, Any], response: str) -> float:
        return float(response.endswith("4"))


def judge(text: str, num_tokens: int = 3, **parts: RewardConfig) -> tuple[float, dict[str, float]]:
    reward = Reward(Sums(), parts)  # type: ignore[arg-type]
    return reward(Answer(conversation=RIGHT, text=text, num_tokens=num_tokens))


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with a user's module."""
    file = tmp_path / "judging_of_tests.py"
    file.write_text(
        "LIMIT = 3\n"
        "def brief(conversation, answer): return len(answer) <= LIMIT\n"
        "def lost(conversation, answer): return float('nan')\n"
        "def broken(conversation, answer): raise KeyError('no such thing')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, file.stem, raising=False)
    return file


def test_without_parts_the_task_alone_judges() -> None:
    assert [judge("it is 4"), judge("it is 5")] == [(1.0, {}), (0.0, {})]


def test_the_reward_is_the_weighted_sum_of_its_parts() -> None:
    parts = {
        "right": RewardConfig(kind="exact", weight=2.0),
        "form": RewardConfig(kind="format", pattern="^it.is", weight=0.5),
        "brief": RewardConfig(kind="length", free_tokens=10, most_tokens=20, weight=1.0),
    }
    assert judge("it\nis 4", 15, **parts) == (2.0 + 0.5 - 0.5, {"right": 1.0, "form": 1.0, "brief": -0.5})


def test_long_answers_cost_more_the_longer_they_are() -> None:
    penalties = [overlong_penalty(length, free_tokens=10, most_tokens=20) for length in (0, 10, 12, 20, 99)]
    assert penalties == [0, 0, -0.2, -1, -1]


def test_a_function_of_the_users_folder_judges(functions: Path) -> None:
    part = RewardConfig(kind="function", function="judging_of_tests:brief", weight=3.0)
    assert [judge("abc", own=part)[0], judge("abcd", own=part)[0]] == [3.0, 0.0]


@pytest.mark.parametrize(("name", "said"), [("lost", "returned nan"), ("broken", "raised KeyError")])
def test_a_function_that_gives_no_number_ends_the_step_and_is_named(functions: Path, name: str, said: str) -> None:
    part = RewardConfig(kind="function", function=f"judging_of_tests:{name}")
    with pytest.raises(StepFailed, match=f"rl.rewards.own: judging_of_tests:{name} {said}"):
        judge("abc", own=part)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("{kind: function, function: 'nowhere_at_all:f'}", "there is no module nowhere_at_all"),
        ("{kind: function, function: 'judging_of_tests:absent'}", "has no function absent"),
        ("{kind: function, function: rewards}", "expected module:function"),
        ("{kind: format, pattern: '('}", "is no regular expression"),
        ("{kind: length, free_tokens: 9, most_tokens: 9}", "expected 0 <= free < most"),
        ("{kind: exat}", 'Did you mean "exact"'),
    ],
)
def test_a_part_that_cannot_be_is_told_before_anything_runs(functions: Path, part: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose_config([f"+rl.rewards={{own: {part}}}"])


def test_what_stands_in_the_functions_file_is_part_of_the_identity(functions: Path) -> None:
    rl = compose_config(["+rl.rewards={own: {kind: function, function: 'judging_of_tests:brief'}}"]).config.rl
    before = pin_externals({"rl": rl})
    assert list(before) == ["function judging_of_tests:brief"]
    functions.write_text(functions.read_text().replace("LIMIT = 3", "LIMIT = 4"))
    assert pin_externals({"rl": rl}) != before
