"""The schema of how steps are executed, whom to tell, and what is told. None of it is part of any identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlxchat.missing import MISSING


@dataclass(kw_only=True)
class RetryConfig:
    """Another try for errors that may pass: a network that is down, a hub that is busy. Any other error ends a step."""

    attempts: int = MISSING
    """How often a step is tried; 1: once."""
    seconds: float = MISSING
    """Seconds before the second try; twice as many before each further one."""


@dataclass(kw_only=True)
class HooksConfig:
    """Whom to tell. An http(s) address gets JSON, a command (text for the shell, or a list) MLXCHAT_STEP and others."""

    on_start: Any = MISSING
    """When a step starts; null: nobody."""
    on_success: Any = MISSING
    """When its artifact is there."""
    on_failure: Any = MISSING
    """When it has failed."""


@dataclass(kw_only=True)
class ReportConfig:
    """What the report says besides what was measured."""

    cost_per_hour: float | None = MISSING
    """What an hour of this machine costs, in US dollars; null: nothing is said of costs."""
