"""The losses of the GRPO family as weights of each token's cross-entropy.

Every loss here is a function of the sampled tokens' log-probabilities alone, so its gradient is Σ slope × ∇ log p with
slope = ∂ loss / ∂ log p, one number for each token. That is what `TrainStep` computes of weighted rows, with weights
−slope. So pretraining, fine-tuning and every RL loss share one compiled step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxchat.config import RLConfig

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """A loss and its slopes."""

    weights: Floats
    """(B, T): −∂ loss / ∂ log p of each token, 0 where nothing was sampled."""
    value: float
    """The loss; without log-probabilities, as if every ratio were 1."""
    numbers: dict[str, float]
    """What is logged: kl, ratio, clip_frac, as far as they can be known."""


def policy_loss(
    mask: Floats,
    advantages: Floats,
    config: RLConfig,
    *,
    now: Floats | None = None,
    sampled: Floats | None = None,
    reference: Floats | None = None,
    correction: Floats | None = None,
) -> PolicyLoss:
    """Return the loss of answers and its slopes.

    Args:
        mask: (B, T), 1 where a token was sampled and is trained.
        advantages: (B,).
        config: ratio, clip_low, clip_high, loss_divisor, kl_coefficient, max_new_tokens.
        now: (B, T) log-probabilities of the tokens under the policy that is trained; None: as when they were sampled.
        sampled: (B, T) those under the policy that sampled them, None where `now` is.
        reference: (B, T) those under the frozen reference; None: no divergence is taken.
        correction: (B, T) factors of the tokens' parts of the loss, where another policy drew them.
    """
    divisors = _divisors(mask, config)
    per_token = advantages / divisors
    numbers: dict[str, float] = {}
    count = max(1.0, mask.sum())
    if now is None or sampled is None:
        weights: Floats = mask * per_token[:, None]
        return PolicyLoss(weights=weights, value=-float(weights.sum()), numbers=numbers)
    counted: Floats = mask if correction is None else mask * correction
    ratio, clipped = _ratios(np.where(mask > 0, now - sampled, 0.0), mask, advantages, config)
    weights = np.where(clipped, 0.0, counted * per_token[:, None] * ratio)
    low, high = 1 - (config.clip_low or np.inf), 1 + (config.clip_high or np.inf)
    value = -float((counted * per_token[:, None] * np.where(clipped, np.clip(ratio, low, high), ratio)).sum())
    numbers |= {
        "ratio": float((ratio * mask).sum() / count),
        "clip_frac": float((clipped * mask).sum() / count),
    }
    if reference is not None:
        apart = np.where(mask > 0, reference - now, 0.0)
        divergence = np.expm1(apart) - apart
        scale = counted * (config.kl_coefficient / divisors)[:, None]
        weights = weights + scale * np.expm1(apart)
        value += float((scale * divergence).sum())
        numbers["kl"] = float((divergence * mask).sum() / count)
    return PolicyLoss(weights=weights, value=value, numbers=numbers)


def _divisors(mask: Floats, config: RLConfig) -> Floats:
    """Return what the sum over an answer's tokens is divided by (B,)."""
    answers, lengths = len(mask), np.maximum(1.0, mask.sum(axis=1))
    if config.loss_divisor == "answers":
        found: Floats = answers * lengths
        return found
    if config.loss_divisor == "longest":
        return np.full(answers, float(answers * config.max_new_tokens))
    return np.full(answers, max(1.0, mask.sum()))


def _ratios(log_ratio: Floats, mask: Floats, advantages: Floats, config: RLConfig) -> tuple[Floats, Floats]:
    """Return each token's ratio (B, T), and where the bound holds so that it teaches nothing."""
    if config.ratio == "sequence":
        means = log_ratio.sum(axis=1) / np.maximum(1.0, mask.sum(axis=1))
        log_ratio = np.broadcast_to(means[:, None], log_ratio.shape)
    ratio: Floats = np.exp(log_ratio)
    good, clipped = advantages[:, None] > 0, np.zeros(ratio.shape, dtype=bool)
    if config.clip_high is not None:
        clipped |= good & (ratio > 1 + config.clip_high)
    if config.clip_low is not None:
        clipped |= (advantages[:, None] < 0) & (ratio < 1 - config.clip_low)
    return ratio, clipped
