"""Answers sampled with quantised weights: how far these are from the model itself, and what makes up for it.

The rounded model μ draws, the model π learns. So each token's part of the loss is multiplied by π / μ of the token when
it was drawn, cut at a cap (truncated importance sampling: Ionides 2008, `tis` in verl). Both are of the whole
distribution at temperature 1, as all log-probabilities of RL are.
"""

from __future__ import annotations

import math

import numpy as np

from mlxchat.config import RLConfig
from mlxchat.data.conversation import render_conversation
from mlxchat.data.packing import IGNORED, Row
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Completion
from mlxchat.errors import StepFailed
from mlxchat.evals.quantised import MOST_CHANGE
from mlxchat.tasks.base import Task
from mlxchat.training.policy_batch import Floats, sampled_mask

_CHECKED_CONVERSATIONS = 64


def correct(sampled: Floats, completions: list[Completion], config: RLConfig) -> tuple[Floats, dict[str, float]]:
    """Return what each token's part of the loss is multiplied by (B, L), and what is logged of it.

    Where the loss has one ratio for a whole answer, so has this: the geometric mean of its tokens'.

    Args:
        sampled: (B, L) log-probabilities under the model when the tokens were sampled.
        completions: with the log-probabilities under the rounded model that drew the tokens.
        config: ratio, rollout_bits, rollout_correction.

    Returns:
        factors, and 'rollout_kl' (mean of log μ / π over the drawn tokens: nats per token), 'rollout_capped' (share of
        the tokens whose factor was truncated).
    """
    mask, drawn = sampled_mask(completions), np.zeros(sampled.shape)
    for row, completion in enumerate(completions):
        drawn[row, : len(completion.log_probabilities)] = completion.log_probabilities
    apart, count = np.where(mask > 0, sampled - drawn, 0.0), max(1.0, mask.sum())
    numbers = {"rollout_kl": -float(apart.sum() / count)}
    if config.ratio == "sequence":
        means = apart.sum(axis=1) / np.maximum(1.0, mask.sum(axis=1))
        apart = np.broadcast_to(means[:, None], apart.shape)
    cap = math.log(config.rollout_correction)
    numbers["rollout_capped"] = float(((apart > cap) * mask).sum() / count)
    return np.exp(np.minimum(apart, cap)), numbers


def refuse_if_apart(numbers: dict[str, float], config: RLConfig, iteration: int) -> None:
    """Look at what `correct` measured.

    Raises:
        StepFailed: the rounded model has become another one than the model that learns from it.
    """
    apart = numbers["rollout_kl"]
    if math.isfinite(apart) and apart <= MOST_CHANGE:
        return
    instead = "rl.rollout_bits=8 or rl.rollout_bits=null" if config.rollout_bits == 4 else "rl.rollout_bits=null"
    raise StepFailed(
        f"iteration {iteration} of RL: with weights of {config.rollout_bits} bits the model is another one by now, "
        f"{apart:.2f} nats per token away from itself; most is {MOST_CHANGE:.2f}. What such weights draw teaches it "
        f"nothing. Begin anew with {instead}"
    )


def conversation_rows(tokenizer: Tokenizer, task: Task) -> list[Row]:
    """Return some of a task's conversations, whole, as rows whose targets are what the assistant says."""
    count = min(len(task), _CHECKED_CONVERSATIONS)
    said = [render_conversation(tokenizer, task[index]) for index in range(count)]
    width = max(len(ids) for ids, _ in said)
    rows = []
    for ids, mask in said:
        padded = np.full(width, tokenizer.assistant_end, dtype=np.int32)
        targets = np.full(width, IGNORED, dtype=np.int32)
        padded[: len(ids)], targets[: len(ids)] = ids, np.where(mask, ids, IGNORED)
        rows.append((padded[:-1], targets[1:]))
    return rows
