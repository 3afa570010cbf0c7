"""Quality cost of quantised weights, and a limit on it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.evals.bpb import text_loss
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import packed_copy

MOST_CHANGE = 0.2
"""Limit in nats per token."""
_MICRO_TOKENS = 2048
SAMPLE = Path(__file__).with_name("quantised_sample.txt").read_text(encoding="utf-8")
"""About 500 tokens on which the cost of quantised weights is measured."""


class QuantisedLoss(NamedTuple):
    """Loss on the sample text with original and with quantised weights."""

    bits: int
    exact: float  # bits per byte with the original weights
    rounded: float  # bits per byte with the quantised weights
    divergence: float  # mean KL of next tokens in nats, which unlike a chat model's loss cannot fall by chance

    @property
    def bad(self) -> bool:
        """True if the divergence exceeds the limit."""
        return not self.divergence <= MOST_CHANGE

    def __str__(self) -> str:
        said = (
            f"weights of {self.bits} bits: {self.rounded:.4f} bits per byte of a sample text, {self.exact:.4f} with "
            f"the original weights; KL divergence {self.divergence:.4f} nats per token"
        )
        if not self.bad:
            return said
        instead = "8 bits or none" if self.bits < 8 else "none"
        return f"warning: {said}. The quantised model behaves differently: choose {instead}"


def measure_quantised(model: GPT, tokenizer: Tokenizer, bits: int) -> tuple[GPT, QuantisedLoss]:
    """Return the quantised model and its cost on about 500 tokens."""
    packed = packed_copy(model, bits)
    ids = np.array([tokenizer.bos, *tokenizer.encode(SAMPLE)][: model.sizes.context_tokens + 1], np.int32)
    rows, sizes = [(ids[:-1], ids[1:])], tokenizer.token_bytes
    exact, rounded = (text_loss(each, rows, sizes, micro_tokens=_MICRO_TOKENS) for each in (model, packed))
    p, q = (each(mx.array(ids[None, :-1]))[0] for each in (model, packed))
    p, q = (each - mx.logsumexp(each, axis=-1, keepdims=True) for each in (p, q))
    divergence = float(np.asarray((mx.exp(p) * (p - q)).sum(-1)).mean())
    return packed, QuantisedLoss(bits, exact.bits_per_byte, rounded.bits_per_byte, divergence)
