"""The KV cache of a batch (`Slots`), and caches of earlier requests for prefix reuse (`KeptPasts`).

Layers with a sliding window rotate within a fixed size; others grow by blocks. A row's first token is always in slot 0,
so that a row's results do not depend on other rows.

Shapes: B rows, K key/value heads, S cached tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.engine.decode import Caches, Decoder
from mlxchat.engine.quantise import Kept, KVFormat
from mlxchat.model.gpt import GPT
from mlxchat.ops.attention import causal_attention, masked_attention, rms_norm
from mlxchat.ops.machine import BATCH_ROWS, KV_TOKENS

# Looking up shorter prefixes costs more than reading them.
_LEAST_TOKENS = 16
# Prompts with fewer tokens are read by one lane.
_SHARED_TOKENS = 64
# Tokens whose logits are in memory at a time.
_SCORED_TOKENS = 128


class Past:
    """Immutable keys and values of a row's prefix."""

    def __init__(self, layers: list[Kept], tokens: int) -> None:
        """`layers` have keys, then values (1, K, ≥ tokens, …)."""
        self.layers, self.tokens = layers, tokens

    def begun(self, tokens: int) -> Past:
        """Return the first `tokens`."""
        return Past([tuple(part[:, :, :tokens] for part in layer) for layer in self.layers], tokens)


class _Reading:
    """`model.gpt.Cache` of a prompt that is read in chunks."""

    def __init__(self, model: GPT, past: Past | None, format: KVFormat) -> None:
        layers, offset = (past.layers, past.tokens) if past else ([None] * model.sizes.num_layers, 0)
        pairs = zip(model.sizes.windows(), layers, strict=True)
        self.layers = [_LayerReading(window, layer, format, offset) for window, layer in pairs]
        self.last: mx.array | None = None

    def shift(self, x: mx.array) -> mx.array:
        last = mx.zeros_like(x[:, :1]) if self.last is None else self.last
        self.last = x[:, -1:]
        return mx.concatenate([last, x[:, :-1]], axis=1)


class _LayerReading:
    def __init__(self, window: int | None, past: Kept | None, format: KVFormat, offset: int) -> None:
        self.window, self.past, self.format, self.offset = window, past, format, offset

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        self.offset += k.shape[2]
        new = (*self.format.pack(k), *self.format.pack(v))
        if self.past is None:
            self.past = new
            return causal_attention(q, *self._unpacked(0), self.window).swapaxes(1, 2)
        self.past = tuple(mx.concatenate(list(parts), axis=2) for parts in zip(self.past, new, strict=True))
        tokens, total = q.shape[2], self.past[0].shape[2]
        first = 0 if self.window is None else max(0, total - tokens - self.window)
        keys, values = self._unpacked(first)
        own, position = mx.arange(total - tokens, total)[:, None], mx.arange(first, total)
        visible = position <= own
        if self.window is not None:
            visible = visible & (position >= own - self.window)
        return masked_attention(q, keys, values, visible[None]).swapaxes(1, 2)

    def _unpacked(self, first: int) -> tuple[mx.array, mx.array]:
        """Return keys and values from token `first` on."""
        kept = tuple(part[:, :, first:] for part in self.past or ())
        return self.format.unpack(kept[: len(kept) // 2]), self.format.unpack(kept[len(kept) // 2 :])


class Slots:
    """The rows of a batch, each free or with a KV cache."""

    def __init__(self, decoder: Decoder) -> None:
        """Start without rows."""
        self.decoder = decoder
        self._most = [None if window is None else _blocks(window + 1) for window in decoder.sizes.windows()]
        self._caches: Caches = []
        self.rows, self.room = 0, 0

    @property
    def model(self) -> GPT:
        """The decoder's model, which reads prompts."""
        assert self.decoder.model is not None, "not released"
        return self.decoder.model

    def read(self, ids: list[int], past: Past | None, last: int | None) -> Past:
        """Return the past of a row of `past`, whose last token is `last`, followed by `ids`.

        Each lane reads a part of the tokens; a layer of a part depends only on the same layer's keys and values of the
        part before.
        """
        cache = _Reading(self.model, past, self.decoder.format)
        if past is not None and last is not None and self.model.sizes.smear:
            cache.last = rms_norm(self.model.transformer["wte"](mx.array([[last]])))
        lanes = self.decoder.lanes
        parts = lanes.deal(len(ids)) if len(ids) >= _SHARED_TOKENS else [slice(0, len(ids))]

        def read_part(part: slice) -> None:
            self.model.hidden(mx.array([ids[part]]), cache)

        with lanes.sharing(len(parts)):
            lanes.run([partial(read_part, part) for part in parts])
            layers = [layer.past for layer in cache.layers if layer.past is not None]
            mx.eval(layers)
        return Past(layers, cache.layers[0].offset)

    def score(self, ids: list[int]) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the logits (V,) after each of `ids`, at the beginning of a row."""
        hidden = self.model.hidden(mx.array([ids]))[0]
        for start in range(0, len(ids), _SCORED_TOKENS):
            yield from np.asarray(self.model.logits(hidden[start : start + _SCORED_TOKENS]))

    def reserve(self, rows: int, tokens: int) -> None:
        """Grow to at least this many rows and tokens per row."""
        rows, room = max(self.rows, batch_rows(rows)), max(self.room, _blocks(tokens))
        if (rows, room) != (self.rows, self.room):
            self._remake(list(range(self.rows)), rows, room)

    def keep(self, kept: list[int], tokens: int) -> None:
        """Keep only these rows, renumbered from 0, with room for `tokens`."""
        self._remake(kept, batch_rows(len(kept)), _blocks(tokens))

    def clear(self) -> None:
        """Remove all rows."""
        self._caches, self.rows, self.room = [], 0, 0

    def fill(self, row: int, past: Past | None) -> None:
        """Set the past of a row; None: empty."""
        if past is None:
            return
        for kv, lane in zip(self.decoder.kv_heads, self._caches, strict=True):
            for layer, cached in enumerate(lane):
                if not cached:
                    continue
                size = cached[0].shape[2]
                held = tuple(_rotated(part[:, kv], past.tokens, size) for part in past.layers[layer])
                arrays = list(cached)
                lane[layer] = ()
                del cached
                for place, part in enumerate(held):
                    arrays[place][row : row + 1, :, : part.shape[2]] = part
                lane[layer] = tuple(arrays)
        mx.eval(self._caches)

    def past_of(self, row: int, tokens: int) -> Past | None:
        """Return the past of a row's first tokens, or None if a window has dropped some of them."""
        if any(most is not None and tokens > most for most in self._most):
            return None
        layers = []
        for layer in range(len(self._most)):
            held = [lane[layer] for lane in self._caches if lane[layer]]
            # Gathered, since a slice would keep the whole batch's arrays in memory.
            parts = ([part[:, :, :tokens][mx.array([row])] for part in lanes] for lanes in zip(*held, strict=True))
            layers.append(tuple(mx.concatenate(lanes, axis=1) for lanes in parts))
        mx.eval(layers)
        return Past(layers, tokens)

    def step(self, ids: list[int], previous: list[int], positions: list[int]) -> np.ndarray[Any, Any]:
        """Return logits (B, V) after one more token of each row; rows beyond the given ones are free."""
        free = self.rows - len(ids)
        now, before, places = (np.array([*each, *[0] * free], dtype=np.int32) for each in (ids, previous, positions))
        return self.decoder.step(now, before, places, self._caches)

    def _remake(self, kept: list[int], rows: int, room: int) -> None:
        widths = 2 * self.decoder.format.widths(self.model.transformer["wte"].weight.dtype)
        old, self._caches = self._caches, []
        for number, kv in enumerate(self.decoder.kv_heads):
            lane: list[tuple[mx.array, ...]] = []
            for layer, most in enumerate(self._most):
                heads, size = kv.stop - kv.start, room if most is None else min(room, most)
                before = old[number][layer] if old else ()
                made = (
                    _moved(before, part, kept, (rows, heads, size, width), dtype)
                    for part, (width, dtype) in enumerate(widths)
                )
                lane.append(tuple(made) if heads else ())
                mx.eval(lane[layer])
                if old:  # free it layer by layer, to limit the peak memory
                    old[number][layer] = before = ()
            self._caches.append(lane)
        self.rows, self.room = rows, room


def batch_rows(rows: int) -> int:
    """Return the batch size that is allocated for `rows`."""
    return next((size for size in BATCH_ROWS if size >= rows), -(-rows // BATCH_ROWS[-1]) * BATCH_ROWS[-1])


def _blocks(tokens: int) -> int:
    return -(-max(tokens, 1) // KV_TOKENS) * KV_TOKENS


def _rotated(part: mx.array, tokens: int, size: int) -> mx.array:
    """Return the contents of a rotating cache of `size` slots: token p of (1, K, ≥ tokens, D) in slot p modulo size."""
    if tokens <= size:
        return part[:, :, :tokens]
    slots = np.arange(size)
    return part[:, :, mx.array(tokens - 1 - (tokens - 1 - slots) % size)]


def _moved(
    before: tuple[mx.array, ...], part: int, kept: list[int], shape: tuple[int, ...], dtype: mx.Dtype
) -> mx.array:
    made = mx.zeros(shape, dtype=dtype)
    if before and kept:
        tokens = min(shape[2], before[part].shape[2])
        made[: len(kept), :, :tokens] = before[part][mx.array(kept), :, :tokens]
    return made


@dataclass
class _Kept:
    """A prefix and its keys and values."""

    ids: list[int]
    past: Past
    exact: int
    """Number of first tokens that were read as a prompt; decoded tokens differ from these by rounding."""


class KeptPasts:
    """An LRU cache of prefixes with at most `max_tokens` together."""

    def __init__(self, max_tokens: int) -> None:
        """Start empty."""
        self.max_tokens = max_tokens
        self.num_found = 0
        """Tokens found so far, which were not read again."""
        self._kept: list[_Kept] = []  # least recently used first

    @property
    def num_tokens(self) -> int:
        """Number of cached tokens."""
        return sum(len(each.ids) for each in self._kept)

    def find(self, prompt: list[int], piece_tokens: int, *, exactly: bool) -> tuple[Past | None, int, int]:
        """Return (past, its tokens, its exact tokens) of the longest common prefix; (None, 0, 0): none.

        Args:
            prompt: token ids, of which the last is never taken from the cache.
            piece_tokens: chunk size of reading prompts. Only whole chunks are bit-identical in all prompts.
            exactly: return exact tokens only.
        """
        best, most, exact = None, _LEAST_TOKENS - 1, 0
        for each in self._kept:
            same = common_length(prompt[:-1], each.ids)
            whole = min(same, each.exact) // piece_tokens * piece_tokens
            tokens = whole if exactly else same
            if tokens > most:
                best, most, exact = each, tokens, whole
        if best is None:
            return None, 0, 0
        past = best.past.begun(most)
        if past is None:
            return None, 0, 0
        self._kept.remove(best)
        self._kept.append(best)
        self.num_found += most
        return past, most, exact

    def keep(self, ids: list[int], past: Past, exact: int) -> None:
        """Add a prefix, which replaces its own prefixes; the least recently used ones are dropped."""
        if not _LEAST_TOKENS <= len(ids) <= self.max_tokens:
            return
        for each in list(self._kept):
            same = common_length(ids, each.ids)
            if same == len(ids) and each.exact >= exact:  # cached already
                return
            if same == len(each.ids) and each.exact <= exact:
                self._kept.remove(each)
        self._kept.append(_Kept(ids, past, exact))
        while self.num_tokens > self.max_tokens:
            del self._kept[0]


def common_length(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix of two lists."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return next(place for place in range(most) if a[place] != b[place])
