"""Impossible values of the section `rl`; `validation.py` looks at its schedule and counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from mlxchat.config import RewardConfig, RLConfig
from mlxchat.errors import ConfigError, suggest
from mlxchat.parts import load_part
from mlxchat.tasks import find_item_problems

_CHOICES = {
    "advantages": ("mean", "z_score", "leave_one_out"),
    "ratio": ("token", "sequence"),
    "loss_divisor": ("tokens", "answers", "longest"),
}
_REWARDS = ("exact", "format", "length", "function")


def find_rl_problems(rl: RLConfig) -> Iterator[str]:
    """Yield a line for every value that cannot be, with what was expected."""
    yield from find_item_problems("rl", {"task": rl.task}, training=True)
    yield from find_item_problems("rl", {"evaluation": rl.evaluation}, training=False)
    if rl.temperature <= 0:
        yield f"rl.temperature is {rl.temperature}, expected more than 0: equal samples teach nothing"
    if rl.samples_per_question < 2:
        yield f"rl.samples_per_question is {rl.samples_per_question}, expected at least 2: the mean is the baseline"
    if rl.top_k is not None and rl.top_k < 1:
        yield f"rl.top_k is {rl.top_k}, expected at least 1, or null for all"
    for key, known in _CHOICES.items():
        if (value := getattr(rl, key)) not in known:
            yield f'rl.{key} is "{value}", expected {" or ".join(known)}.{suggest(value, known)}'
    if rl.clip_low is not None and not 0 < rl.clip_low <= 1:
        yield f"rl.clip_low is {rl.clip_low}, expected above 0 and at most 1, or null for no bound"
    if rl.clip_high is not None and not rl.clip_high > 0:
        yield f"rl.clip_high is {rl.clip_high}, expected above 0, or null for no bound"
    if not rl.kl_coefficient >= 0:
        yield f"rl.kl_coefficient is {rl.kl_coefficient}, expected at least 0 (no divergence)"
    if rl.rollout_bits not in (None, 8, 4):
        yield f"rl.rollout_bits is {rl.rollout_bits}, expected 8, 4, or null for the model's own weights"
    if not rl.rollout_correction >= 1:
        yield f"rl.rollout_correction is {rl.rollout_correction}, expected at least 1 (no token counts more than once)"
    parts, questions = rl.minibatches_per_rollout, rl.questions_per_iteration
    if parts >= 1 and questions % parts:
        yield f"rl.questions_per_iteration={questions} must be a multiple of rl.minibatches_per_rollout={parts}"
    if not rl.table_lr_frac >= 0:
        yield f"rl.table_lr_frac is {rl.table_lr_frac}, expected at least 0"
    if rl.resample_rounds < 0:
        yield f"rl.resample_rounds is {rl.resample_rounds}, expected at least 0 (none)"
    for name, reward in rl.rewards.items():
        yield from _reward(f"rl.rewards.{name}", reward)


def _reward(where: str, reward: RewardConfig) -> Iterator[str]:
    if reward.kind not in _REWARDS:
        yield f'{where}.kind is "{reward.kind}", expected {" or ".join(_REWARDS)}.{suggest(reward.kind, _REWARDS)}'
    if reward.kind == "format":
        try:
            re.compile(reward.pattern or "")
        except re.error as error:
            yield f"{where}.pattern is no regular expression: {error}"
        if not reward.pattern:
            yield f"{where}.pattern has no value, expected a regular expression"
    free, most = reward.free_tokens, reward.most_tokens
    if reward.kind == "length" and (free is None or most is None or not 0 <= free < most):
        yield f"{where}: free_tokens is {_shown(free)} and most_tokens {_shown(most)}, expected 0 <= free < most"
    if reward.timeout_seconds is not None and not reward.timeout_seconds > 0:
        yield f"{where}.timeout_seconds is {reward.timeout_seconds}, expected more than 0, or null for no bound"
    if reward.failure_value is not None and not math.isfinite(reward.failure_value):
        yield f"{where}.failure_value is {reward.failure_value}, expected a finite number, or null to end there"
    if reward.kind == "function":
        try:
            load_part(reward.function or "")
        except ConfigError as error:
            yield f"{where}.function: {error}"


def _shown(value: int | None) -> str:
    return "null" if value is None else str(value)
