"""Depth to sizes: one dial sets width, heads, parameters and floating-point operations.

Counterpart of the derivations in nanochat's scripts/base_train.py and `GPT.estimate_flops`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GPTSizes:
    """Everything that fixes the shape of a GPT."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    width: int
    context_tokens: int
    rope_theta: float

    @property
    def head_width(self) -> int:
        """Numbers per head."""
        return self.width // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes as plain numbers."""
        return asdict(self)


def sizes_from_depth(
    depth: int,
    *,
    vocab_size: int,
    aspect_ratio: int,
    head_width: int,
    num_kv_heads: int | None,
    context_tokens: int,
    rope_theta: float,
) -> GPTSizes:
    """Return the sizes at a depth: width = depth × aspect_ratio, heads = ceil(width / head_width).

    The caller has checked divisibility (`config.validate`).
    """
    width = depth * aspect_ratio
    num_heads = max(1, math.ceil(width / head_width))
    return GPTSizes(
        vocab_size=vocab_size,
        num_layers=depth,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        width=width,
        context_tokens=context_tokens,
        rope_theta=rope_theta,
    )


def count_parameters(sizes: GPTSizes) -> dict[str, int]:
    """Return the number of parameters: 'embedding', 'head', 'matrices' and 'total'."""
    kv_width = sizes.num_kv_heads * sizes.head_width
    attention = 2 * sizes.width * sizes.width + 2 * sizes.width * kv_width
    matrices = sizes.num_layers * (attention + 8 * sizes.width * sizes.width)
    table = sizes.vocab_size * sizes.width
    return {"embedding": table, "head": table, "matrices": matrices, "total": matrices + 2 * table}


def flops_per_token(sizes: GPTSizes) -> int:
    """Return training FLOPs per token, 6 (N − N_embedding) + 12 L H Q T (PaLM appendix B, as nanochat counts)."""
    counts = count_parameters(sizes)
    attention = 12 * sizes.num_layers * sizes.num_heads * sizes.head_width * sizes.context_tokens
    return 6 * (counts["total"] - counts["embedding"]) + attention
