"""Sampling of the next token, in NumPy and float64, from the row's random generator.

A draw depends only on the row's logits, settings and seed. In this order: logit bias, penalties, temperature, top-k,
top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# The maxima of blocks give a lower bound of the k-th largest logit in one pass.
_BLOCK = 64
# Minimum divisor of logits: smaller ones overflow float32, and are greedy in any case.
_LEAST_DIVISOR = 1e-15


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings; None is off."""

    temperature: float = 0.0
    """0 takes the most likely token; above 0 logits are divided by it."""
    top_k: int | None = None
    """Draw among the k most likely."""
    top_p: float | None = None
    """Draw among the fewest most likely tokens whose probabilities, after top_k, add up to this."""
    min_p: float | None = None
    """Draw among tokens with at least this fraction of the highest probability."""
    repetition_penalty: float | None = None
    """Divides positive logits of tokens in the prompt or the answer, and multiplies negative ones."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each occurrence in the answer, as in OpenAI's API."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token in the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, number added to its logit)."""
    seed: int = 0
    """Seed of the row's draws."""

    def problems(self) -> list[str]:
        """Return a message for each impossible value."""
        found = []
        if not 0 <= self.temperature < float("inf"):
            found.append(f"temperature is {self.temperature}; expected a number from 0")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k is {self.top_k}; expected at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                found.append(f"{name} is {value}; expected more than 0 and at most 1")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < float("inf"):
            found.append(f"repetition_penalty is {self.repetition_penalty}; expected more than 0")
        return found


def sample_token(
    logits: Array, sampling: Sampling, draws: np.random.Generator, said: Sequence[int] = (), prompt_tokens: int = 0
) -> int:
    """Return the token drawn by the logits (V,).

    `draws` advances by one number, unless the temperature is 0. `said` are the tokens of the prompt (the first
    `prompt_tokens`) and the answer, for the penalties.
    """
    if sampling.temperature == 0:
        return int(np.argmax(_adjusted(logits, sampling, said, prompt_tokens)))
    ids, probabilities = distribution(logits, sampling, said, prompt_tokens)
    sums = np.cumsum(probabilities)
    place = min(int(np.searchsorted(sums, draws.random() * sums[-1], side="right")), len(sums) - 1)
    return place if ids is None else int(ids[place])


def distribution(
    logits: Array, sampling: Sampling, said: Sequence[int] = (), prompt_tokens: int = 0
) -> tuple[Array | None, Array]:
    """Return the tokens (N,) that may be drawn, or None for all in order, and their probabilities (N,).

    The temperature must be above 0. Among equally likely tokens at a limit, lower ids are taken.
    """
    logits = _adjusted(logits, sampling, said, prompt_tokens)
    ids = None
    if sampling.top_k is not None and sampling.top_k < len(logits):
        ids = _best(logits, sampling.top_k)
        logits = logits[ids]
    scores = (logits / np.float32(max(sampling.temperature, _LEAST_DIVISOR))).astype(np.float64)
    weights = np.exp(scores - scores.max())
    if sampling.top_p is not None and sampling.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        sums = np.cumsum(weights[order])
        order = np.sort(order[: int(np.searchsorted(sums, sampling.top_p * sums[-1] * (1 - 1e-12))) + 1])
        ids, weights = order if ids is None else ids[order], weights[order]
    if sampling.min_p is not None:
        enough = np.flatnonzero(weights >= sampling.min_p * weights.max())
        ids, weights = enough if ids is None else ids[enough], weights[enough]
    return ids, weights / weights.sum()


def log_probability(logits: Array, token: int, most: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the log-probability of a token, and the `most` likely tokens with theirs, the likeliest first.

    They are computed from the model's logits (V,), without sampling settings.
    """
    scores = logits.astype(np.float64)
    scores -= scores.max() + np.log(np.exp(scores - scores.max()).sum())
    best = _best(logits, min(most, len(logits))) if most else np.empty(0, dtype=int)
    best = best[np.argsort(-scores[best], kind="stable")]
    return float(scores[token]), [(int(each), float(scores[each])) for each in best]


def _best(logits: Array, count: int) -> Array:
    """Return the ids of the `count` largest logits, in order of ids."""
    blocks = len(logits) // _BLOCK
    if blocks < 2 * count:
        bound = np.partition(logits, len(logits) - count)[len(logits) - count]
    else:
        tops = logits[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        bound = np.partition(tops, blocks - count)[blocks - count]
    candidates = np.flatnonzero(logits >= bound)
    if len(candidates) < count:  # with NaN, which a partition puts last
        candidates = np.arange(len(logits))
    order = np.argsort(-logits[candidates], kind="stable")[:count]
    return np.sort(candidates[order])


def _adjusted(logits: Array, sampling: Sampling, said: Sequence[int], prompt_tokens: int) -> Array:
    """Return the logits after `logit_bias` and penalties; the same array if there are none."""
    penalty = sampling.repetition_penalty
    repeated = penalty is not None and penalty != 1
    counted = bool(sampling.frequency_penalty or sampling.presence_penalty)
    if not (repeated or counted or sampling.logit_bias):
        return logits
    logits = logits.copy()
    for token, more in sampling.logit_bias:
        logits[token] += more
    if repeated:
        assert penalty is not None
        tokens = np.unique(np.asarray(said, dtype=np.int64))
        found = logits[tokens]
        logits[tokens] = np.where(found > 0, found / max(penalty, _LEAST_DIVISOR), found * penalty)
    if counted:
        tokens, counts = np.unique(np.asarray(said[prompt_tokens:], dtype=np.int64), return_counts=True)
        logits[tokens] -= counts * sampling.frequency_penalty + sampling.presence_penalty
    return logits
