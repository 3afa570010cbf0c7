"""The reward of a completion: the task's own, or a weighted sum of the parts that `rl.rewards` names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from mlxchat.config.parts import load_part
from mlxchat.config.schema import RewardConfig
from mlxchat.errors import StepFailed
from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.base import Task

Part = Callable[[Conversation, str, int], float]


class Reward:
    """Σ weight × value over the parts; without parts, the task's reward."""

    def __init__(self, task: Task, parts: dict[str, RewardConfig]) -> None:
        """Import the users' functions among the parts."""
        self._task = task
        parts = dict(sorted(parts.items()))  # the order of the configuration must not change a sum's last bits
        self._weights = {name: part.weight for name, part in parts.items()}
        self._parts = {name: _make_part(name, part, task) for name, part in parts.items()}

    def __call__(self, conversation: Conversation, text: str, num_tokens: int) -> tuple[float, dict[str, float]]:
        """Return the reward of a completion and the unweighted value of each part; StepFailed if a function failed.

        `num_tokens` are the sampled tokens, without forced ones; `text` lacks the token that ended it.
        """
        if not self._parts:
            return self._task.reward(conversation, text), {}
        values = {name: part(conversation, text, num_tokens) for name, part in self._parts.items()}
        return sum(self._weights[name] * value for name, value in values.items()), values


def _make_part(name: str, part: RewardConfig, task: Task) -> Part:
    """Return a part as a function; which fields its kind needs is checked with the configuration."""
    if part.kind == "format":
        pattern = re.compile(part.pattern or "", re.DOTALL)
        return lambda conversation, text, num_tokens: float(pattern.search(text) is not None)
    if part.kind == "length":
        free, most = part.free_tokens or 0, part.most_tokens or 0
        return lambda conversation, text, num_tokens: overlong_penalty(num_tokens, free_tokens=free, most_tokens=most)
    if part.kind == "exact":
        return lambda conversation, text, num_tokens: task.reward(conversation, text)
    title, function = f"rl.rewards.{name}: {part.function}", load_part(part.function or "")

    def call(conversation: Conversation, text: str, num_tokens: int) -> float:
        try:
            value = float(function(conversation, text))
        except (Exception, SystemExit) as error:  # a user's code may raise anything
            raise StepFailed(f"{title} raised {type(error).__name__}: {error}. The answer was {text!r}") from error
        if not math.isfinite(value):
            raise StepFailed(f"{title} returned {value}, expected a finite number. The answer was {text!r}")
        return value

    return call


def overlong_penalty(num_tokens: int, *, free_tokens: int, most_tokens: int) -> float:
    """Return 0 up to `free_tokens`, −1 from `most_tokens` on, linear in between (DAPO, arXiv 2503.14476, eq. 13)."""
    return -min(1.0, max(0, num_tokens - free_tokens) / (most_tokens - free_tokens))
