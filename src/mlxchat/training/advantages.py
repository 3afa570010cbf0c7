"""Rewards compared with those of the other answers to the same question."""

from __future__ import annotations

from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

# Added to the standard deviation, as TRL does: rewards that differ little are not made large.
_LEAST_DEVIATION = 1e-4


def advantages_of(rewards: Floats, kind: str) -> Floats:
    """Return the advantages (questions, samples) of rewards.

    Args:
        rewards: (questions, samples).
        kind: mean, z_score or leave_one_out.
    """
    found: Floats
    centred = centre_rewards(rewards)
    if kind == "z_score":
        found = centred / (rewards.std(axis=1, ddof=1, keepdims=True) + _LEAST_DEVIATION)
        return found
    if kind == "leave_one_out":
        # r − mean of the others = (r − mean of all) × n / (n − 1).
        samples = rewards.shape[1]
        found = centred * (samples / (samples - 1))
        return found
    return centred


def centre_rewards(rewards: Floats) -> Floats:
    """Return the advantages (questions, samples): rewards less the mean of their question's, not rescaled."""
    centred: Floats = rewards - rewards.mean(axis=1, keepdims=True)
    # Equal rewards that are no sums of powers of two leave a rounding error, which a z-score would take for a signal.
    centred[(rewards == rewards[:, :1]).all(axis=1)] = 0.0
    return centred
