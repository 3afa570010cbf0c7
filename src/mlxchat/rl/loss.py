"""From rewards or preferences to the gradient: the GRPO family, DPO and ORPO as weights of tokens.

Each loss here depends on the model only through the log-probabilities of the answers' tokens. So its gradient is
Σ (∂ loss / ∂ log p) × ∇ log p, which is what `TrainStep` computes for rows with weights −∂ loss / ∂ log p. Pretraining,
fine-tuning and every loss here therefore share one compiled step. Arrays are (B, T): rows by targets.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxchat.config.schema import PreferenceConfig, RLConfig
from mlxchat.errors import StepFailed

Floats = np.ndarray[Any, np.dtype[np.float64]]

MOST_CHANGE = 0.2  # KL of quantised rollouts from the policy, in nats per token
_EPSILON = 1e-4  # added to the standard deviation, as in TRL
_LARGEST_MEAN = -1e-6  # the odds of an answer of probability 1 are infinite


def advantages_of(rewards: Floats, kind: str) -> Floats:
    """Return the advantages (groups, samples) of rewards (groups, samples): mean, z_score or leave_one_out."""
    advantages: Floats = rewards - rewards.mean(axis=1, keepdims=True)
    # Subtracting the mean of equal rewards may leave a rounding error, which a z-score would blow up.
    advantages[(rewards == rewards[:, :1]).all(axis=1)] = 0.0
    if kind == "z_score":
        advantages = advantages / (rewards.std(axis=1, ddof=1, keepdims=True) + _EPSILON)
    elif kind == "leave_one_out":
        samples = rewards.shape[1]  # r − mean of the others = (r − mean of all) × n / (n − 1)
        advantages = advantages * (samples / (samples - 1))
    return advantages


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """A loss and its derivatives."""

    weights: Floats  # (B, T): −∂ loss / ∂ log p, 0 where no token was sampled
    value: float
    numbers: dict[str, float]  # means over the trained tokens, for the log: ratio, clip_frac and, with a reference, kl


def policy_loss(
    mask: Floats, advantages: Floats, config: RLConfig, *, log_probs: Floats | None = None,
    old_log_probs: Floats | None = None, ref_log_probs: Floats | None = None, importance: Floats | None = None,
) -> PolicyLoss:  # fmt: skip
    """Return −Σ min(ratio × A, clip(ratio) × A) + kl_coefficient × KL to the reference, divided by `loss_divisor`.

    `mask` is 1 where a token was sampled and is trained; advantages are (B,). Log-probabilities of the sampled tokens
    are those of the trained policy (`log_probs`; None: as when it sampled, so every ratio is 1), of the policy when it
    sampled (`old_…`), and of the frozen reference (`ref_…`; None: no KL term). `importance` are factors of the tokens'
    terms, where other weights sampled them (`importance_weights`).
    """
    divisors, num_tokens = _divisors(mask, config), max(1.0, mask.sum())
    scale = mask if importance is None else mask * importance
    gain = scale * (advantages / divisors)[:, None]
    ratio, clipped = np.ones(mask.shape), np.zeros(mask.shape, dtype=bool)
    if log_probs is not None and old_log_probs is not None:
        ratio, clipped = _ratios(np.where(mask > 0, log_probs - old_log_probs, 0.0), mask, advantages, config)
    low, high = 1 - (config.clip_low or np.inf), 1 + (config.clip_high or np.inf)
    weights = np.where(clipped, 0.0, gain * ratio)
    value = -float((gain * np.where(clipped, np.clip(ratio, low, high), ratio)).sum())
    numbers = {name: float((of * mask).sum() / num_tokens) for name, of in (("ratio", ratio), ("clip_frac", clipped))}
    if ref_log_probs is not None and log_probs is not None:
        # k3: exp(x) − 1 − x with x = log π_ref − log π, an unbiased and non-negative estimate of KL(π, π_ref).
        apart = np.where(mask > 0, ref_log_probs - log_probs, 0.0)
        kl = np.expm1(apart) - apart
        kl_scale = scale * (config.kl_coefficient / divisors)[:, None]
        weights = weights + kl_scale * np.expm1(apart)
        value += float((kl_scale * kl).sum())
        numbers["kl"] = float((kl * mask).sum() / num_tokens)
    return PolicyLoss(weights=weights, value=value, numbers=numbers)


def _divisors(mask: Floats, config: RLConfig) -> Floats:
    lengths = mask.sum(axis=1)
    if config.loss_divisor == "passes":
        question, answer = np.divmod(np.arange(len(mask)), config.samples_per_question)
        passes_per_question = -(-config.samples_per_question // config.answers_per_pass)
        number = question * passes_per_question + answer // config.answers_per_pass  # of each row's pass
        tokens = np.bincount(number, weights=lengths)
        divisors: Floats = len(tokens) * np.maximum(1.0, tokens[number])
    elif config.loss_divisor == "answers":
        divisors = len(mask) * np.maximum(1.0, lengths)
    elif config.loss_divisor == "longest":
        divisors = np.full(len(mask), float(len(mask) * config.max_new_tokens))
    else:
        divisors = np.full(len(mask), max(1.0, mask.sum()))
    return divisors


def _ratios(log_ratio: Floats, mask: Floats, advantages: Floats, config: RLConfig) -> tuple[Floats, Any]:
    """Return the ratio π / π_old of each token, and where the clipped term is the minimum and has no gradient."""
    ratio: Floats = np.exp(_per_sequence(log_ratio, mask) if config.ratio == "sequence" else log_ratio)
    too_high = ratio > 1 + (np.inf if config.clip_high is None else config.clip_high)
    too_low = ratio < 1 - (np.inf if config.clip_low is None else config.clip_low)
    sign = np.sign(advantages)[:, None]
    return ratio, (too_high & (sign > 0)) | (too_low & (sign < 0))


def _per_sequence(log_ratio: Floats, mask: Floats) -> Floats:
    """Return each row's mean over its tokens in place of the tokens' values (GSPO)."""
    means = log_ratio.sum(axis=1) / np.maximum(1.0, mask.sum(axis=1))
    return np.broadcast_to(means[:, None], log_ratio.shape)


# Quantised rollouts: the rounded model μ samples, the policy π learns. Each token's term is multiplied by π / μ at the
# time of sampling, truncated at a cap (truncated importance sampling: Ionides 2008; `tis` in verl). Both distributions
# are the whole ones at temperature 1, as all log-probabilities of RL are.


def importance_weights(
    old_log_probs: Floats, rollout_log_probs: Floats, mask: Floats, config: RLConfig
) -> tuple[Floats, dict[str, float]]:
    """Return min(π / μ, rollout_correction) of each token, and rollout_kl and rollout_capped for the log.

    `old_log_probs` are log π of the sampled tokens, `rollout_log_probs` log μ; `mask` is 1 where a token was sampled.
    With `ratio: sequence` a row has one weight: the geometric mean of its tokens'.
    """
    log_ratio, num_tokens = np.where(mask > 0, old_log_probs - rollout_log_probs, 0.0), max(1.0, mask.sum())
    numbers = {"rollout_kl": -float(log_ratio.sum() / num_tokens)}  # KL(μ, π) in nats per token
    if config.ratio == "sequence":
        log_ratio = _per_sequence(log_ratio, mask)
    cap = math.log(config.rollout_correction)
    numbers["rollout_capped"] = float(((log_ratio > cap) * mask).sum() / num_tokens)
    return np.exp(np.minimum(log_ratio, cap)), numbers


def check_rollout_drift(rollout_kl: float, config: RLConfig, iteration: int) -> None:
    """Raise StepFailed if the rounded model no longer resembles the policy."""
    if math.isfinite(rollout_kl) and rollout_kl <= MOST_CHANGE:
        return
    instead = "rl.rollout_bits=8 or rl.rollout_bits=null" if config.rollout_bits == 4 else "rl.rollout_bits=null"
    raise StepFailed(
        f"iteration {iteration} of RL: {config.rollout_bits}-bit rollouts drifted from the policy "
        f"(KL {rollout_kl:.2f} nats per token, accepted: at most {MOST_CHANGE:.2f}). Restart with {instead}"
    )


# Preferences: both losses depend on the sums s of the answers' log-probabilities, so all tokens of an answer have the
# weight −∂ loss / ∂ s, and micro-batches may separate the two answers of a pair. Arrays are (P, 2): pairs by chosen,
# rejected.


@dataclass(frozen=True, kw_only=True)
class PairLoss:
    """A loss, its derivatives, and the model's preferences."""

    values: Floats  # (P,): the loss of each pair; that of a batch is their mean
    weights: Floats  # (P, 2): −∂ mean of values / ∂ sum of an answer's log-probabilities
    margins: Floats
    """(P,): above 0 where the chosen answer is preferred. DPO: β × (log-ratio to the reference of chosen − of
    rejected); ORPO: the log odds ratio."""


def pair_loss(sums: Floats, lengths: Floats, reference: Floats | None, config: PreferenceConfig) -> PairLoss:
    """Return the loss of each pair with its derivatives.

    `sums` (P, 2) are Σ log p over an answer's tokens in nats, `lengths` (P, 2) the numbers of these tokens, `reference`
    the sums under the model that training starts from, which only DPO needs.
    """
    if config.loss == "orpo":
        return _orpo(sums, lengths, config.odds_weight)
    assert reference is not None, "DPO compares with the reference"
    return _dpo(sums - reference, config.beta, config.label_smoothing)


def _dpo(log_ratios: Floats, beta: float, smoothing: float) -> PairLoss:
    """Return −(1 − ε) log σ(m) − ε log σ(−m) with m = β × (log-ratio of chosen − of rejected).

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7; with ε (the assumed share of wrong labels) cDPO, Mitchell 2023.
    """
    margins = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    slopes = beta * ((1 - smoothing) * _sigmoid(-margins) - smoothing * _sigmoid(margins)) / len(margins)
    return PairLoss(
        values=(1 - smoothing) * np.logaddexp(0, -margins) + smoothing * np.logaddexp(0, margins),
        weights=np.stack([slopes, -slopes], axis=1),
        margins=margins,
    )


def _orpo(sums: Floats, lengths: Floats, odds_weight: float) -> PairLoss:
    """Return −log p(chosen) − λ log σ(log odds ratio), where p is the geometric mean of an answer's probabilities.

    Hong et al. 2024, arXiv 2403.07691, eq. 6; d log odds / d log p = 1 / (1 − p).
    """
    means = np.minimum(sums / lengths, _LARGEST_MEAN)
    others = -np.expm1(means)  # 1 − p
    log_odds = means - np.log(others)
    margins = log_odds[:, 0] - log_odds[:, 1]
    slopes = odds_weight * _sigmoid(-margins)[:, None] / others * np.array([1.0, -1.0]) + np.array([1.0, 0.0])
    return PairLoss(
        values=-means[:, 0] + odds_weight * np.logaddexp(0, -margins),
        weights=slopes / lengths / len(margins),
        margins=margins,
    )


def _sigmoid(values: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0, -values)))
