"""Keys and values of the past, for a batch of prompts of different lengths.

Prompts are padded on the left. Rotary positions count only as differences, so the padding changes no attention, and
every row writes its next token at the same place.

Shapes: B batch, H query heads, K key/value heads, T new tokens, S cached tokens, D head width.
"""

from __future__ import annotations

import mlx.core as mx

from mlxchat.model.sizes import GPTSizes

_GROWTH_TOKENS = 128


class LayerKVCache:
    """The past of one layer."""

    def __init__(self, starts: mx.array, window: int | None = None) -> None:
        """Begin empty.

        Args:
            starts: (B,) number of padding tokens in front of each row.
            window: earlier tokens that one sees besides itself; None: all.
        """
        self.starts, self.window = starts, window
        self.offset = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Append k and v (B, K, T, D) and return the attention of q (B, H, T, D) over everything cached."""
        keys, values = self._append(k, v)
        tokens, total = q.shape[2], keys.shape[2]
        # What the first new token no longer sees, no new token sees.
        first = 0 if self.window is None else max(0, total - tokens - self.window)
        position = mx.arange(first, total)
        own = mx.arange(total - tokens, total)[:, None]
        # A padding token may see itself, or its row of the softmax would be empty and its values not finite.
        visible = (position <= own) & (position >= self.starts[:, None, None]) | (position == own)
        if self.window is not None:
            visible = visible & (position >= own - self.window)
        return mx.fast.scaled_dot_product_attention(
            q, keys[:, :, first:], values[:, :, first:], scale=q.shape[-1] ** -0.5, mask=visible[:, None]
        )

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


class KVCache:
    """The past of a batch of left-padded prompts: keys and values of every layer, and the smear's last token."""

    def __init__(self, sizes: GPTSizes, prompt_lengths: list[int]) -> None:
        """Begin empty, for prompts of these lengths."""
        longest = max(prompt_lengths)
        self.starts = mx.array([longest - length for length in prompt_lengths])
        self.layers = [LayerKVCache(self.starts, window) for window in sizes.windows()]
        self._last: mx.array | None = None

    @property
    def offset(self) -> int:
        """Tokens already cached."""
        return self.layers[0].offset

    def shift(self, x: mx.array) -> mx.array:
        """Return for each token of x (B, T, C) the one before it, across calls; zeros before a row's first."""
        last = mx.zeros_like(x[:, :1]) if self._last is None else self._last
        self._last = x[:, -1:]
        before = mx.concatenate([last, x[:, :-1]], axis=1)
        position = mx.arange(self.offset, self.offset + x.shape[1])
        return mx.where((position > self.starts[:, None])[..., None], before, 0)

    def keep_rows(self, rows: mx.array) -> None:
        """Go on with these rows of the batch only."""
        self.starts = self.starts[rows]
        for layer in self.layers:
            layer.keep_rows(rows)
        if self._last is not None:
            self._last = self._last[rows]


def _extend(cached: mx.array | None, used: int, room: int, like: mx.array) -> mx.array:
    """Return the `used` tokens of a cache with room for more; a new array each time, since caches are written into."""
    empty = mx.zeros((*like.shape[:2], room, like.shape[3]), dtype=like.dtype)
    return empty if cached is None else mx.concatenate([cached[:, :, :used], empty], axis=2)
