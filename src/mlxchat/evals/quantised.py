"""Quality cost of quantised weights, and a limit on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxchat.data.packing import Row
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.quantise import PackedGPT, packed_copy
from mlxchat.errors import DataError
from mlxchat.evals.bpb import mean_loss
from mlxchat.model.gpt import GPT

MOST_CHANGE = 0.2
"""Limit in nats per token."""
_MICRO_TOKENS = 2048
SAMPLE = Path(__file__).with_name("quantised_sample.txt").read_text(encoding="utf-8")
"""About 500 tokens on which the cost of quantised weights is measured."""


def loss_change(model: GPT, bits: int, rows: list[Row]) -> float:
    """Return the increase of the loss on rows with weights of `bits`, in nats per token."""
    exact, rounded = (mean_loss(each, rows, micro_tokens=_MICRO_TOKENS) for each in (model, packed_copy(model, bits)))
    return rounded - exact


def check_quantised(model: GPT, bits: int, rows: list[Row], *, most: float = MOST_CHANGE) -> float:
    """Return `loss_change`.

    Raises:
        DataError: it is not finite, or more than `most`.
    """
    change = loss_change(model, bits, rows)
    if not math.isfinite(change) or change > most:
        told = f"{change:+.2f} nats per token" if math.isfinite(change) else "the loss is not finite"
        instead = "Use 8 bits or none" if bits < 8 else "Do not quantise it"
        raise DataError(
            f"weights of {bits} bits change this model too much: {told} on {len(rows)} rows, at most {most:+.2f}. "
            f"{instead}"
        )
    return change


@dataclass(frozen=True, kw_only=True)
class QuantisedLoss:
    """Loss on the sample text with original and with quantised weights."""

    bits: int
    exact: float
    """Bits per byte with the original weights."""
    rounded: float
    """Bits per byte with the quantised weights."""
    divergence: float
    """Mean KL divergence of the next-token distributions in nats. Unlike the loss of a chat model on plain text, it
    cannot fall by chance."""

    @property
    def bad(self) -> bool:
        """True if the divergence exceeds the limit."""
        return not self.divergence <= MOST_CHANGE

    def __str__(self) -> str:
        """Describe the cost, with a warning if it is bad."""
        said = (
            f"weights of {self.bits} bits: {self.rounded:.4f} bits per byte of a sample text, {self.exact:.4f} with "
            f"the original weights; KL divergence {self.divergence:.4f} nats per token"
        )
        if not self.bad:
            return said
        instead = "8 bits or none" if self.bits < 8 else "none"
        return f"warning: {said}. The quantised model behaves differently: choose {instead}"


def measure_quantised(model: GPT, tokenizer: Tokenizer, bits: int) -> tuple[PackedGPT, QuantisedLoss]:
    """Return the quantised model and its cost on about 500 tokens."""
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
    """Return log-probabilities (T, V) of ids (T,)."""
    logits = model(ids[None])[0]
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
