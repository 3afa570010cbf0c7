"""What quantising costs a model, and a refusal where it costs too much."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxchat.data.packing import Row
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.quantise import PackedGPT, packed_copy
from mlxchat.errors import DataError
from mlxchat.evals.bpb import mean_loss
from mlxchat.evals.quantised_sample import SAMPLE
from mlxchat.model.gpt import GPT

MOST_CHANGE = 0.2
"""Nats per token beyond which the rounded model is another one."""
_MICRO_TOKENS = 2048


def loss_change(model: GPT, bits: int, rows: list[Row]) -> float:
    """Return by how many nats per token the loss on rows is higher with weights of `bits`."""
    exact, rounded = (mean_loss(each, rows, micro_tokens=_MICRO_TOKENS) for each in (model, packed_copy(model, bits)))
    return rounded - exact


def check_quantised(model: GPT, bits: int, rows: list[Row], *, most: float = MOST_CHANGE) -> float:
    """Return `loss_change`.

    Raises:
        DataError: it is no number, or more than `most`: what the model says with such weights is another model's.
    """
    change = loss_change(model, bits, rows)
    if not math.isfinite(change) or change > most:
        told = f"{change:+.2f} nats per token" if math.isfinite(change) else "no finite loss"
        instead = "Use 8 bits or none" if bits < 8 else "Leave its weights as they are"
        raise DataError(
            f"this model does not bear weights of {bits} bits: {told} on {len(rows)} rows; most is {most:+.2f}. "
            f"{instead}"
        )
    return change


@dataclass(frozen=True, kw_only=True)
class QuantisedLoss:
    """What weights of so many bits cost on the sample text."""

    bits: int
    exact: float
    """Bits per byte of the model's own weights."""
    rounded: float
    """Of the rounded ones."""
    divergence: float
    """Of the next token's distributions, own from rounded: nats per token, never below 0. A chat model's loss on plain
    text may fall by chance; this shows that it has changed."""

    @property
    def bad(self) -> bool:
        """Whether the rounded model is another one."""
        return not self.divergence <= MOST_CHANGE

    def __str__(self) -> str:
        """Say it to people."""
        said = (
            f"weights of {self.bits} bits: {self.rounded:.4f} bits per byte of a sample text, {self.exact:.4f} with "
            f"the model's own; next tokens diverge by {self.divergence:.4f} nats"
        )
        if not self.bad:
            return said
        instead = "8 bits or none" if self.bits < 8 else "none"
        return f"warning: {said}. This is another model than the one that was trained: choose {instead}"


def measure_quantised(model: GPT, tokenizer: Tokenizer, bits: int) -> tuple[PackedGPT, QuantisedLoss]:
    """Return the quantised model, and what it costs: two forward passes of about five hundred tokens."""
    packed = packed_copy(model, bits)
    ids = mx.array([tokenizer.bos, *tokenizer.encode(SAMPLE)][: model.sizes.context_tokens + 1])
    weights = np.asarray(tokenizer.token_bytes)[np.asarray(ids[1:])]
    exact, rounded_ = (_log_probabilities(each, ids[:-1]) for each in (model, packed))
    bits_per_byte = [
        -float((np.asarray(mx.take_along_axis(each, ids[1:, None], axis=-1))[:, 0] * (weights > 0)).sum())
        / (math.log(2) * max(1, int(weights.sum())))
        for each in (exact, rounded_)
    ]
    divergence = float(np.asarray((mx.exp(exact) * (exact - rounded_)).sum(-1)).mean())
    return packed, QuantisedLoss(bits=bits, exact=bits_per_byte[0], rounded=bits_per_byte[1], divergence=divergence)


def _log_probabilities(model: GPT, ids: mx.array) -> mx.array:
    """Return (T, V)."""
    logits = model(ids[None])[0]
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
