"""What an answer is worth: the task's verdict, or a weighted sum of parts that the configuration names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxchat.config import RewardConfig
from mlxchat.errors import StepFailed
from mlxchat.tasks.base import Task
from mlxchat.user_function import load_function


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
        self._parts = {name: _part(name, part, task) for name, part in parts.items()}
        self._task = task

    def __call__(self, answer: Answer) -> tuple[float, dict[str, float]]:
        """Return the reward and the value of each part, without its weight.

        Raises:
            StepFailed: a function raised an error or returned something else than a finite number.
        """
        if not self._parts:
            return self._task.reward(answer.conversation, answer.text), {}
        values = {name: part(answer) for name, part in self._parts.items()}
        return sum(self._weights[name] * value for name, value in values.items()), values


def _part(name: str, part: RewardConfig, task: Task) -> Part:
    if part.kind == "format":
        assert part.pattern is not None, "validation asks for it"
        pattern = re.compile(part.pattern, re.DOTALL)
        return lambda answer: float(pattern.search(answer.text) is not None)
    if part.kind == "length":
        assert part.free_tokens is not None, "validation asks for it"
        assert part.most_tokens is not None, "validation asks for it"
        free, most = part.free_tokens, part.most_tokens
        return lambda answer: overlong_penalty(answer.num_tokens, free_tokens=free, most_tokens=most)
    if part.kind == "function":
        assert part.function is not None, "validation asks for it"
        function, label = load_function(part.function), f"rl.rewards.{name}: {part.function}"
        return lambda answer: _call(function, label, answer)
    return lambda answer: task.reward(answer.conversation, answer.text)


def overlong_penalty(num_tokens: int, *, free_tokens: int, most_tokens: int) -> float:
    """Return 0 up to `free_tokens`, −1 from `most_tokens` on, evenly falling between (arXiv 2503.14476, eq. 13)."""
    return -min(1.0, max(0, num_tokens - free_tokens) / (most_tokens - free_tokens))


def _call(function: Callable[..., Any], label: str, answer: Answer) -> float:
    try:
        value = function(answer.conversation, answer.text)
    except Exception as error:  # the user's code may raise anything
        raise StepFailed(f"{label} raised {type(error).__name__}: {error}\nof the answer {answer.text!r}") from error
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise StepFailed(f"{label} returned {value!r}, expected a finite number, of the answer {answer.text!r}")
    return number
