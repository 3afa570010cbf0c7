"""A user's reward function: whatever it does ends in a number, or in one message that says what it did and where."""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mlxchat.config import RewardConfig
from mlxchat.errors import StepFailed
from mlxchat.user_function import function_file, load_function

_SHOWN_CHARS = 300


class UserReward:
    """A function named in the configuration."""

    def __init__(self, name: str, part: RewardConfig) -> None:
        """Import the function.

        Args:
            name: of the part of the reward.
            part: function, timeout_seconds, failure_value.

        Raises:
            ConfigError: it cannot be imported.
        """
        assert part.function is not None, "validation asks for it"
        self._name, self._part = f"rl.rewards.{name}", part
        self._function = load_function(part.function)
        self._file = function_file(part.function)
        self.failures = 0
        """How often `failure_value` stood in for it."""

    def __call__(self, conversation: dict[str, Any], text: str) -> float:
        """Return what the function returns of an answer.

        Raises:
            StepFailed: it raised, took too long or returned no finite number, and there is no failure_value.
        """
        value, said = self._try(conversation, text)
        if said is None:
            return value
        if self._part.failure_value is not None:
            self.failures += 1
            return self._part.failure_value
        shown = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}… ({len(text):,} characters)"
        raise StepFailed(
            f"{self._name}: {self._part.function} {said}.\nThe answer was {shown!r}.\n"
            f"The same command tries it again. When {self._file.name} is changed, which is part of RL's identity, RL "
            f"begins anew. With {self._name}.failure_value such answers have a value, and RL goes on."
        )

    def _try(self, conversation: dict[str, Any], text: str) -> tuple[float, str | None]:
        """Return the function's value, or what is wrong."""
        seconds = self._part.timeout_seconds
        try:
            with _at_most(seconds):
                value = self._function(copy.deepcopy(conversation), text)
        except _TooLong:
            return math.nan, f"took longer than {self._name}.timeout_seconds={seconds:g}"
        except (Exception, SystemExit) as error:  # the user's code may do anything
            return math.nan, f"raised {type(error).__name__}: {error}{self._place(error)}"
        if isinstance(value, str | bytes):
            return math.nan, f"returned {value!r}, a {type(value).__name__}, expected a number"
        try:
            number = float(value)
        except Exception:
            return math.nan, f"returned {value!r}, a {type(value).__name__}, expected a number"
        if not math.isfinite(number):
            return math.nan, f"returned {number}, expected a finite number"
        return number, None

    def _place(self, error: BaseException) -> str:
        """Return the last line of the user's file that led to the error."""
        lines = [
            frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == self._file.name
        ]
        return f" ({self._file.name}, line {lines[-1].lineno})" if lines else ""


class _TooLong(BaseException):
    """Raised in the function; no `except Exception` of it keeps this."""


@contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
    """Raise `_TooLong` in what is done here after some seconds; only Python's main thread can do so."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    ends = time.monotonic() + seconds

    def ring(number: int, frame: FrameType | None) -> None:
        if time.monotonic() >= ends:
            raise _TooLong
        if callable(former):  # an alarm of somebody else, such as a step's time limit
            former(number, frame)

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # and each second again, should the function go on
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former if former is not None else signal.SIG_DFL)
