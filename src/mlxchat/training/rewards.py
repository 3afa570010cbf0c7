"""What an answer is worth: the task's verdict, or a weighted sum of parts that the configuration names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxchat.config import RewardConfig
from mlxchat.tasks.base import Task, answer_text
from mlxchat.training.user_reward import UserReward


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is judged."""

    conversation: dict[str, Any]
    text: str
    """Without the token that ended it."""
    num_tokens: int
    """Sampled ones."""


Part = Callable[[Answer], float]


class Reward:
    """The sum of weight × value over the parts of the configuration; without parts, the task's own reward."""

    def __init__(self, task: Task, parts: dict[str, RewardConfig]) -> None:
        """Import the functions that are named.

        Raises:
            ConfigError: one cannot be imported.
        """
        self._weights = {name: part.weight for name, part in parts.items()}
        self._functions = {name: UserReward(name, part) for name, part in parts.items() if part.kind == "function"}
        self._parts = {
            name: _judge(self._functions[name]) if name in self._functions else _part(part, task)
            for name, part in parts.items()
        }
        self._task = task

    def __call__(self, answer: Answer) -> tuple[float, dict[str, float]]:
        """Return the reward and the value of each part, without its weight.

        Raises:
            StepFailed: a function raised an error, took too long or returned something else than a finite number.
        """
        if not self._parts:
            return self._task.reward(answer.conversation, answer.text), {}
        values = {name: part(answer) for name, part in self._parts.items()}
        return sum(self._weights[name] * value for name, value in values.items()), values

    def try_out(self, conversation: dict[str, Any]) -> None:
        """Call the functions with a question and its own answer, so that what fails always fails before the work.

        Raises:
            StepFailed: as when answers are judged.
        """
        for function in self._functions.values():
            function(conversation, answer_text(conversation))

    def failures(self) -> dict[str, int]:
        """Return for each function with a failure_value how often that stood in for it since this was last asked."""
        counts = {name: function.failures for name, function in self._functions.items()}
        for function in self._functions.values():
            function.failures = 0
        return counts


def _judge(function: UserReward) -> Part:
    return lambda answer: function(answer.conversation, answer.text)


def _part(part: RewardConfig, task: Task) -> Part:
    if part.kind == "format":
        assert part.pattern is not None, "validation asks for it"
        pattern = re.compile(part.pattern, re.DOTALL)
        return lambda answer: float(pattern.search(answer.text) is not None)
    if part.kind == "length":
        assert part.free_tokens is not None, "validation asks for it"
        assert part.most_tokens is not None, "validation asks for it"
        free, most = part.free_tokens, part.most_tokens
        return lambda answer: overlong_penalty(answer.num_tokens, free_tokens=free, most_tokens=most)
    return lambda answer: task.reward(answer.conversation, answer.text)


def overlong_penalty(num_tokens: int, *, free_tokens: int, most_tokens: int) -> float:
    """Return 0 up to `free_tokens`, −1 from `most_tokens` on, evenly falling between (arXiv 2503.14476, eq. 13)."""
    return -min(1.0, max(0, num_tokens - free_tokens) / (most_tokens - free_tokens))
