"""Rewards: their parts, and users' functions that raise or return no number."""

import sys
from pathlib import Path
from typing import Any

import pytest

from mlxchat.config.schema import RewardConfig
from mlxchat.errors import StepFailed
from mlxchat.rl.rollouts import Reward

RIGHT = {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}


class Sums:
    def reward(self, conversation: dict[str, Any], response: str) -> float:
        return float(response.endswith("4"))


SUMS: Any = Sums()


def judge(text: str, num_tokens: int = 3, **parts: RewardConfig) -> tuple[float, dict[str, float]]:
    reward = Reward(SUMS, parts)
    return reward(RIGHT, text, num_tokens)


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


def test_reward_is_the_tasks_or_the_weighted_sum_of_parts(functions):
    """Functions are imported from the current folder."""
    assert [judge("it is 4"), judge("it is 5")] == [(1.0, {}), (0.0, {})]
    parts = {
        "right": RewardConfig(kind="exact", weight=2.0),
        "form": RewardConfig(kind="format", pattern="^it.is", weight=0.5),
        "short": RewardConfig(kind="length", free_tokens=10, most_tokens=20, weight=1.0),
    }
    assert judge("it\nis 4", 15, **parts) == (2.0 + 0.5 - 0.5, {"right": 1.0, "form": 1.0, "short": -0.5})
    assert judge("so it is 4", 15, form=parts["form"]) == (0.0, {"form": 0.0})
    own = RewardConfig(kind="function", function="judging_of_tests:brief", weight=3.0)
    assert [judge("abc", own=own)[0], judge("abcd", own=own)[0]] == [3.0, 0.0]


FAILURES = {
    "lost": "returned nan, expected a finite number",
    "broken": "raised KeyError: 'no such thing'",
}


@pytest.mark.parametrize("name", FAILURES)
def test_failing_function_stops_the_step(functions, name):
    part = RewardConfig(kind="function", function=f"judging_of_tests:{name}")
    with pytest.raises(StepFailed, match=f"rl.rewards.own: judging_of_tests:{name} {FAILURES[name]}.*'abc'"):
        judge("abc", own=part)
