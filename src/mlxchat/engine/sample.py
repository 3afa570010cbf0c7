"""Drawing the next token from logits."""

from __future__ import annotations

import mlx.core as mx


def sample_tokens(logits: mx.array, *, temperature: float, top_k: int | None, key: mx.array) -> mx.array:
    """Return a token id per row (B,).

    Args:
        logits: (B, V), unnormalised.
        temperature: 0 takes the most likely token; above 0 logits are divided by it.
        top_k: draw among the k most likely tokens only; None: among all.
        key: of MLX's random generator; or one for each row (B, 2), so that what a row draws depends on no other row.
    """
    if temperature == 0:
        return mx.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        best = mx.argpartition(-logits, top_k - 1, axis=-1)[:, :top_k]
        drawn = _draw(mx.take_along_axis(logits, best, axis=-1), key)
        return mx.take_along_axis(best, drawn[:, None], axis=-1)[:, 0]
    return _draw(logits, key)


def split_keys(keys: mx.array) -> tuple[mx.array, mx.array]:
    """Return the keys for the draws after this one, and those for this one: of one key, or of one for each row."""
    if keys.ndim == 1:
        following, now = mx.random.split(keys)
        return following, now
    pairs = mx.vmap(mx.random.split)(keys)
    return pairs[:, 0], pairs[:, 1]


def _draw(logits: mx.array, key: mx.array) -> mx.array:
    if key.ndim == 1:
        return mx.random.categorical(logits, key=key)
    drawn: mx.array = mx.vmap(lambda row, own: mx.random.categorical(row, key=own))(logits, key)
    return drawn
