"""The reward of a completion: the task's own, or a weighted sum of the parts that `rl.rewards` names."""

from __future__ import annotations

import copy
import math
import re
import reprlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mlxchat.config.parts import load_part, part_file
from mlxchat.config.schema import RewardConfig
from mlxchat.errors import StepFailed
from mlxchat.tasks.answers import Conversation, answer_text
from mlxchat.tasks.base import Task

Part = Callable[[Conversation, str, int], float]

_SHOWN_CHARS = 300


class Reward:
    """Σ weight × value over the parts; without parts, the task's reward."""

    def __init__(self, task: Task, parts: dict[str, RewardConfig]) -> None:
        """Import the users' functions among the parts.

        Raises:
            ConfigError: a function cannot be imported.
        """
        self._task = task
        parts = dict(sorted(parts.items()))  # the order of the configuration must not change a sum's last bits
        self._weights = {name: part.weight for name, part in parts.items()}
        self._functions = {name: UserReward(name, part) for name, part in parts.items() if part.kind == "function"}
        self._parts = {name: self._functions.get(name) or _make_part(part, task) for name, part in parts.items()}

    def __call__(self, conversation: Conversation, text: str, num_tokens: int) -> tuple[float, dict[str, float]]:
        """Return the reward and the unweighted value of each part.

        Args:
            conversation: the task's, with the expected answer.
            text: of the completion, without the token that ended it.
            num_tokens: sampled tokens, without forced ones.

        Raises:
            StepFailed: a user's function failed and has no failure_value.
        """
        if not self._parts:
            return self._task.reward(conversation, text), {}
        values = {name: part(conversation, text, num_tokens) for name, part in self._parts.items()}
        return sum(self._weights[name] * value for name, value in values.items()), values

    def try_out(self, conversation: Conversation) -> None:
        """Call the users' functions on the expected answer, so that a broken one fails before anything is sampled.

        Raises:
            StepFailed: as `__call__`.
        """
        for function in self._functions.values():
            function(conversation, answer_text(conversation), 0)

    def pop_failures(self) -> dict[str, int]:
        """Return how often each user's function was replaced by its failure_value since the last call."""
        counts = {name: function.failures for name, function in self._functions.items()}
        for function in self._functions.values():
            function.failures = 0
        return counts


def _make_part(part: RewardConfig, task: Task) -> Part:
    if part.kind == "format":
        pattern = re.compile(part.pattern or "", re.DOTALL)
        return lambda conversation, text, num_tokens: float(pattern.search(text) is not None)
    if part.kind == "length":
        free, most = part.free_tokens, part.most_tokens
        assert free is not None, "checked with the configuration"
        assert most is not None, "checked with the configuration"
        return lambda conversation, text, num_tokens: overlong_penalty(num_tokens, free_tokens=free, most_tokens=most)
    return lambda conversation, text, num_tokens: task.reward(conversation, text)


def overlong_penalty(num_tokens: int, *, free_tokens: int, most_tokens: int) -> float:
    """Return 0 up to `free_tokens`, −1 from `most_tokens` on, linear in between (DAPO, arXiv 2503.14476, eq. 13)."""
    return -min(1.0, max(0, num_tokens - free_tokens) / (most_tokens - free_tokens))


class UserReward:
    """A user's function. Whatever it does, the caller gets a finite number or a StepFailed that names the function."""

    def __init__(self, name: str, part: RewardConfig) -> None:
        """Import the function of the part `name`.

        Raises:
            ConfigError: it cannot be imported.
        """
        assert part.function is not None, "checked with the configuration"
        self._name, self._part = f"rl.rewards.{name}", part
        self._function, self._file = load_part(part.function), part_file(part.function)
        self.failures = 0
        """Calls that were worth `failure_value`."""

    def __call__(self, conversation: Conversation, text: str, num_tokens: int) -> float:
        """Return the function's value of a completion.

        Raises:
            StepFailed: it raised, exceeded its time or returned no finite number, and there is no failure_value.
        """
        del num_tokens
        value, problem = self._call(conversation, text)
        if problem is None:
            return value
        if self._part.failure_value is not None:
            self.failures += 1
            return self._part.failure_value
        shown = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}… ({len(text):,} characters)"
        raise StepFailed(
            f"{self._name}: {self._part.function} {problem}.\nThe answer was {shown!r}.\n"
            f"Run the same command to try again. {self._file.name} is part of RL's identity: if you change it, RL "
            f"starts from the beginning. To continue, set {self._name}.failure_value, the value of such answers."
        )

    def _call(self, conversation: Conversation, text: str) -> tuple[float, str | None]:
        """Return the function's value and None, or NaN and what went wrong."""
        seconds = self._part.timeout_seconds
        try:
            with _time_limit(seconds):
                value = self._function(copy.deepcopy(conversation), text)
        except _TimeLimitExceeded:
            return math.nan, f"took longer than {self._name}.timeout_seconds={seconds:g}"
        except (Exception, SystemExit) as error:  # a user's code may raise anything
            return math.nan, f"raised {type(error).__name__}: {error}{self._location(error)}"
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except Exception:  # a user's object may raise anything in __float__
            number = math.nan
        if math.isfinite(number):
            return number, None
        if isinstance(value, float):
            return math.nan, f"returned {value}, expected a finite number"
        return math.nan, f"returned {reprlib.repr(value)}, a {type(value).__name__}, expected a finite number"

    def _location(self, error: BaseException) -> str:
        """Return the last line of the user's file in the traceback."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).name == self._file.name]
        return f" ({self._file.name}, line {lines[-1]})" if lines else ""


class _TimeLimitExceeded(BaseException):
    """Derives from BaseException so that `except Exception` in the user's function does not catch it."""


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `_TimeLimitExceeded` in the block after `seconds`; only possible in Python's main thread."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = time.monotonic() + seconds

    def on_alarm(number: int, frame: FrameType | None) -> None:
        if time.monotonic() >= ends:
            raise _TimeLimitExceeded
        if callable(previous):  # another alarm, such as the time limit of the step
            previous(number, frame)

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # repeats each second, in case a `finally` continues
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous if previous is not None else signal.SIG_DFL)
