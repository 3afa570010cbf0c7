"""A batch of rows with their KV cache: reads prompts, and computes a step of one token in every row.

Keys and values of a layer are one array for all rows, with room for the longest, which grows by blocks. While all rows
have the same length, as with one row or with samples of one question, a step needs no mask.

Shapes: B rows, K key/value heads, S tokens with room, D head width, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.model.gpt import GPT, Mask
from mlxchat.ops.device import round_tokens
from mlxchat.ops.machine import KV_TOKENS, round_up

Layer = tuple[mx.array, mx.array]  # keys and values (B, K, S, D)
Past = list[Layer]  # one row's keys and values in every layer, which never change


def tokens_of(past: Past | None) -> int:
    """Return the number of tokens of a past; None is empty."""
    return int(past[0][0].shape[2]) if past else 0


class Reading:
    """The cache of one layer while prompts are read: the new keys and values follow those of the past."""

    def __init__(self, past: Layer | None, offset: int) -> None:
        self.past, self.offset = past, offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Layer:
        """Add keys and values (B, K, T, D) and return all."""
        if self.past is not None:
            keys, values = (mx.concatenate([*pair], axis=2) for pair in zip(self.past, (keys, values), strict=True))
        self.past, self.offset = (keys, values), keys.shape[2]
        return keys, values

    def make_mask(self, tokens: int, window_size: int | None = None) -> Mask:
        """Return the mask of new tokens; a window includes the token itself."""
        total = self.offset + tokens
        if window_size is None or total <= window_size:
            return "causal" if tokens > 1 else None
        query, key = mx.arange(self.offset, total)[:, None], mx.arange(total)
        return (key <= query) & (key > query - window_size)


class LastEmbedding(list[Any]):
    """The state of the smear, in mlx-lm's interface: item 0 is the embedding (B, 1, C) before the next one, or None."""

    lengths = None

    def make_mask(self, tokens: int) -> None:
        """Nothing is padded on the left."""

    def advance(self, tokens: int) -> None:
        """Positions are not counted here."""


class _Step:
    """The cache of one layer in a decoding step."""

    def __init__(self, decoder: Decoder, layer: int) -> None:
        self.decoder, self.layer, self.offset = decoder, layer, decoder.positions

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Layer:
        """Write keys and values (B, K, 1, D) and return those that the new tokens may see."""
        layers, window = self.decoder.layers, self.decoder.model.sizes.windows[self.layer]
        pairs = zip(layers[self.layer], (keys, values), strict=True)
        layers[self.layer] = tuple(self._written(held, new) for held, new in pairs)
        first = max(0, self.offset - window) if isinstance(self.offset, int) and window is not None else 0
        return tuple(part[:, :, first : self.decoder.end] for part in layers[self.layer])

    def _written(self, held: mx.array, new: mx.array) -> mx.array:
        if isinstance(self.offset, int):
            held[:, :, self.offset : self.offset + 1] = new
            return held
        at = mx.broadcast_to(self.offset[:, None, None, None], new.shape)
        return mx.put_along_axis(held, at, new, axis=2)

    def make_mask(self, tokens: int, window_size: int | None = None) -> Mask:
        """Return which cached tokens each row's new one sees; None if all rows have the same length."""
        if isinstance(self.offset, int):
            return None
        position, slot = self.offset[:, None], mx.arange(self.decoder.end)
        visible = slot <= position
        if window_size is not None:
            visible = visible & (slot > position - window_size)
        dtype = self.decoder.layers[self.layer][0].dtype
        return mx.where(visible, 0.0, -mx.inf).astype(dtype)[:, None, None]


def extend_caches(model: GPT, ids: np.ndarray[Any, Any], cache: list[Any]) -> None:
    """Read tokens (B, T) into a `Reading` of each layer and, last, a `LastEmbedding`."""
    model.hidden(mx.array(ids), cache)
    mx.eval([layer.past for layer in cache[:-1]])


class Decoder:
    """A model and the rows that it continues."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.layers: list[Any] = []
        self.lengths = np.zeros(0, dtype=np.int64)  # tokens of each row that have keys and values
        self.room = 0
        self.last = LastEmbedding([None])
        self.positions: int | mx.array = 0  # of the tokens of the present step: one number if all are equal, else (B,)
        self.end = 0

    def read(self, prompts: Sequence[Sequence[int]], past: Past | None = None, last: int | None = None) -> list[Past]:
        """Return the past of each prompt, of which shorter ones are padded on the right while they are read.

        A single prompt may continue a `past`, whose `last` token is then given.
        """
        width, start = round_tokens(max(map(len, prompts))), tokens_of(past)
        ids = np.array([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], dtype=np.int32)
        layers: list[Any] = past or [None] * self.model.sizes.num_layers
        cache = [Reading(layer, start) for layer in layers]
        before = None if last is None or not self.model.sizes.smear else self.model.embed(mx.array([[last]]))
        extend_caches(self.model, ids, [*cache, LastEmbedding([before])])
        read = [layer.past for layer in cache if layer.past is not None]
        return [
            [(k[row : row + 1, :, : start + len(prompt)], v[row : row + 1, :, : start + len(prompt)]) for k, v in read]
            for row, prompt in enumerate(prompts)
        ]

    def resize(self, kept: Sequence[int], rows: int, tokens: int) -> None:
        """Keep these rows, renumbered from 0, in a batch of `rows` with room for `tokens`."""
        room = round_up(max(tokens, 1), KV_TOKENS)
        kept = list(kept)
        if kept == list(range(len(self.lengths))) and (rows, room) == (len(self.lengths), self.room):
            return
        sizes, dtype = self.model.sizes, self.model.transformer["wte"].weight.dtype
        shape = (rows, sizes.num_kv_heads, room, sizes.head_width)
        old: list[Any] = self.layers or [(None, None)] * sizes.num_layers
        self.layers = []
        for layer, parts in enumerate(old):
            self.layers.append(tuple(resized(part, kept, shape, dtype) for part in parts))
            mx.eval(self.layers[layer])
            old[layer], parts = None, ()  # freed layer by layer, to limit the peak memory
        lengths, self.lengths, self.room = self.lengths, np.zeros(rows, dtype=np.int64), room
        self.lengths[: len(kept)] = lengths[kept]
        if sizes.smear:
            self.last[0] = resized(self.last[0], kept, (rows, 1, sizes.width), dtype)

    def fill(self, first: int, pasts: Sequence[Past | None], last: Sequence[int]) -> None:
        """Set the pasts of consecutive rows from `first`; `last` are their last tokens, ignored where there is none."""
        rows = slice(first, first + len(pasts))
        self.lengths[rows] = [tokens_of(past) for past in pasts]
        if self.last[0] is not None:
            has_past = mx.array([past is not None for past in pasts])[:, None, None]
            self.last[0][rows] = mx.where(has_past, self.model.embed(mx.array(list(last))[:, None]), 0)
        for row, past in enumerate(pasts, first):
            for layer, parts in enumerate(past or ()):
                for held, part in zip(self.layers[layer], parts, strict=True):
                    held[row : row + 1, :, : part.shape[2]] = part
        mx.eval(self.layers, self.state())

    def past_of(self, row: int, tokens: int) -> Past:
        """Return the past of a row's first tokens."""
        # Gathered, since a slice would keep the whole batch's arrays in memory.
        past: Past = [(k[mx.array([row]), :, :tokens], v[mx.array([row]), :, :tokens]) for k, v in self.layers]
        mx.eval(past)
        return past

    def step(self, tokens: mx.array, advances: Sequence[bool]) -> mx.array:
        """Return logits (B, V) in float32, not yet evaluated, after one more token (B,) of each row that `advances`.

        Other rows are free: what they compute is not kept.
        """
        lengths = self.lengths
        used = lengths[(lengths > 0) | np.array(advances)]
        self.positions = int(used[0]) if (used == used[0]).all() else mx.array(lengths.astype(np.int32))
        self.end = int(lengths.max()) + 1
        cache = [*(_Step(self, layer) for layer in range(self.model.sizes.num_layers)), self.last]
        logits = self.model.logits(self.model.hidden(tokens[:, None], cache)[:, -1])
        self.lengths = lengths + np.array(advances, dtype=np.int64)
        return logits

    def state(self) -> list[mx.array]:
        """Return what a step leaves for the next one besides keys and values, to be evaluated with its logits."""
        return [] if self.last[0] is None else [self.last[0]]


def resized(array: mx.array | None, kept: list[int], shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return some rows of an array, cropped or padded with zeros to a shape; None has no rows."""
    if array is None:
        return mx.zeros(shape, dtype)
    part = array if kept == list(range(len(array))) else array[mx.array(kept, dtype=mx.int32)]
    part = part[tuple(slice(0, size) for size in shape)]
    return mx.pad(part, [(0, size - has) for size, has in zip(shape, part.shape, strict=True)])
