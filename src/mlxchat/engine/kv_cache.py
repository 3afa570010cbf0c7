"""Keys and values of the past, for a batch of prompts of different lengths.

Prompts are padded on the left. Rotary positions count only as differences, so the padding changes no attention, and
every row writes its next token at the same place.

Shapes: B batch, H query heads, K key/value heads, T new tokens, S cached tokens, D head width.
"""

from __future__ import annotations

import mlx.core as mx

_GROWTH_TOKENS = 128


class LayerKVCache:
    """The past of one layer."""

    def __init__(self, starts: mx.array) -> None:
        """Begin empty; `starts` (B,) is the number of padding tokens in front of each row."""
        self.starts = starts
        self.offset = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Append k and v (B, K, T, D) and return the attention of q (B, H, T, D) over everything cached."""
        keys, values = self._append(k, v)
        tokens, total = q.shape[2], keys.shape[2]
        position = mx.arange(total)
        own = mx.arange(total - tokens, total)[:, None]
        # A padding token may see itself, or its row of the softmax would be empty and its values not finite.
        visible = (position <= own) & (position >= self.starts[:, None, None]) | (position == own)
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=q.shape[-1] ** -0.5, mask=visible[:, None])

    def keep_rows(self, rows: mx.array) -> None:
        """Go on with these rows of the batch only."""
        self.starts = self.starts[rows]
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[rows], self._values[rows]

    def _append(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        end = self.offset + k.shape[2]
        if self._keys is None or self._values is None or end > self._keys.shape[2]:
            room = -(-end // _GROWTH_TOKENS) * _GROWTH_TOKENS - self.offset
            self._keys = _extend(self._keys, self.offset, room, k)
            self._values = _extend(self._values, self.offset, room, v)
        self._keys[:, :, self.offset : end] = k
        self._values[:, :, self.offset : end] = v
        self.offset = end
        return self._keys[:, :, :end], self._values[:, :, :end]


def make_caches(num_layers: int, prompt_lengths: list[int]) -> list[LayerKVCache]:
    """Return empty caches for left-padded prompts of these lengths."""
    longest = max(prompt_lengths)
    starts = mx.array([longest - length for length in prompt_lengths])
    return [LayerKVCache(starts) for _ in range(num_layers)]


def _extend(cached: mx.array | None, used: int, room: int, like: mx.array) -> mx.array:
    """Return the `used` tokens of a cache with room for more; a new array each time, since caches are written into."""
    empty = mx.zeros((*like.shape[:2], room, like.shape[3]), dtype=like.dtype)
    return empty if cached is None else mx.concatenate([cached[:, :, :used], empty], axis=2)
