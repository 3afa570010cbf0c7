"""DPO and ORPO, and their gradients as one weight for each answer.

Both losses depend on the model only through the sums s of the answers' log-probabilities. So their gradient is
Σ (∂ loss / ∂ s) × ∇ s, which is what `TrainStep` computes for rows whose tokens have the weights −∂ loss / ∂ s, as in
RL. Micro-batches may therefore separate the two answers of a pair. Arrays are (P, 2): pairs by chosen, rejected.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxchat.config.schema import PreferenceConfig
from mlxchat.rl.loss import Floats

_LARGEST_MEAN = -1e-6  # the odds of an answer of probability 1 are infinite


@dataclass(frozen=True, kw_only=True)
class PairLoss:
    """A loss, its derivatives, and the model's preferences."""

    values: Floats
    """(P,): the loss of each pair; that of a batch is their mean."""
    weights: Floats
    """(P, 2): −∂ mean of values / ∂ sum of an answer's log-probabilities."""
    margins: Floats
    """(P,): above 0 where the chosen answer is preferred. DPO: β × (log-ratio to the reference of chosen − of
    rejected); ORPO: the log odds ratio."""


def pair_loss(sums: Floats, lengths: Floats, reference: Floats | None, config: PreferenceConfig) -> PairLoss:
    """Return the loss of each pair with its derivatives.

    Args:
        sums: (P, 2): Σ log p over an answer's tokens, in nats.
        lengths: (P, 2): numbers of these tokens.
        reference: `sums` under the model that training starts from; None: the loss is ORPO.
        config: loss, beta, label_smoothing, odds_weight.
    """
    if config.loss == "orpo":
        return _orpo(sums, lengths, config.odds_weight)
    assert reference is not None, "DPO compares with the reference"
    return _dpo(sums - reference, config.beta, config.label_smoothing)


def needs_reference(config: PreferenceConfig) -> bool:
    """Return True if the loss compares with the model that training starts from."""
    return config.loss == "dpo"


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
    found: Floats = np.exp(-np.logaddexp(0, -values))
    return found
