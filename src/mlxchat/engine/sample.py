"""Drawing the next token from logits."""

from __future__ import annotations

import mlx.core as mx


def sample_tokens(logits: mx.array, *, temperature: float, top_k: int | None, key: mx.array) -> mx.array:
    """Return a token id per row (B,).

    Args:
        logits: (B, V), unnormalised.
        temperature: 0 takes the most likely token; above 0 logits are divided by it.
        top_k: draw among the k most likely tokens only; None: among all.
        key: of MLX's random generator.
    """
    if temperature == 0:
        return mx.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        best = mx.argpartition(-logits, top_k - 1, axis=-1)[:, :top_k]
        drawn = mx.random.categorical(mx.take_along_axis(logits, best, axis=-1), key=key)
        return mx.take_along_axis(best, drawn[:, None], axis=-1)[:, 0]
    return mx.random.categorical(logits, key=key)
