"""Rewards: their parts, and users' functions that raise, hang or return anything."""

import sys
from pathlib import Path
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import RewardConfig
from mlxchat.errors import ConfigError, StepFailed
from mlxchat.rl.rewards import Reward

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
        "def silent(conversation, answer): pass\n"
        "def gone(conversation, answer): raise SystemExit(0)\n"
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
    own = RewardConfig(kind="function", function="judging_of_tests:brief", weight=3.0)
    assert [judge("abc", own=own)[0], judge("abcd", own=own)[0]] == [3.0, 0.0]


FAILURES = {
    "lost": "returned nan, expected a finite number",
    "broken": "raised KeyError: 'no such thing'",
    "silent": "raised TypeError",
    "gone": "raised SystemExit: 0",
}


@pytest.mark.parametrize("name", FAILURES)
def test_failing_function_stops_the_step(functions, name):
    part = RewardConfig(kind="function", function=f"judging_of_tests:{name}")
    with pytest.raises(StepFailed, match=f"rl.rewards.own: judging_of_tests:{name} {FAILURES[name]}.*'abc'"):
        judge("abc", own=part)


IMPOSSIBLE = {
    "{kind: function, function: 'nowhere_at_all:f'}": "there is no module nowhere_at_all",
    "{kind: function, function: 'judging_of_tests:absent'}": "judging_of_tests has no absent",
    "{kind: function, function: rewards}": "expected module:name",
    "{kind: format, pattern: '('}": "is not a regular expression",
    "{kind: length, free_tokens: 9, most_tokens: 9}": "expected 0 <= free < most",
    "{kind: exat}": 'Did you mean "exact"',
}


def test_impossible_parts_are_refused_together(functions):
    parts = ", ".join(f"part{number}: {part}" for number, part in enumerate(IMPOSSIBLE))
    with pytest.raises(ConfigError) as caught:
        compose_config([f"+rl.rewards={{{parts}}}"])
    assert [message for message in IMPOSSIBLE.values() if message not in str(caught.value)] == []
