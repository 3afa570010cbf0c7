"""One decoding step: computes a token of each row with the KV cache. Rows may have different lengths.

Shapes: B rows, C width, H query heads, K key/value heads, G = H / K, S cached tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.engine.quantise import Kept, KVFormat, weight_bytes
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters
from mlxchat.ops.attention import Positions, masked_attention, rms_norm
from mlxchat.ops.device import accelerated, compiled, make_lanes

Caches = list[list[Kept]]
"""Keys, then values, of each lane and layer (`quantise.py`); () for a lane without heads."""
Ints = np.ndarray[Any, np.dtype[np.int32]]
Logits = np.ndarray[Any, np.dtype[np.float32]]
# Tables of rotary embeddings have a multiple of this many tokens.
_TABLE_TOKENS = 1024


@accelerated
def make_decoder(model: GPT, *, packed: bool = True, kv_bits: int | None = None) -> Decoder:
    """Return a decoder of a model.

    Args:
        model: its weights are not copied.
        packed: False allows a decoder to unpack the matrices of a `PackedGPT` if that is faster.
        kv_bits: 8 or 4 quantises keys and values.

    Raises:
        ConfigError: the heads' width does not support `kv_bits`.
    """
    return Decoder(model, kv_bits=kv_bits)


class Decoder:
    """Computes steps by `GPT` itself."""

    def __init__(self, model: GPT, *, kv_bits: int | None) -> None:
        """See `make_decoder`."""
        self.sizes = model.sizes
        self.format = KVFormat(model.sizes.head_width, kv_bits)
        self.lanes = make_lanes()
        # Of each lane.
        self.kv_heads = [slice(0, model.sizes.num_kv_heads)]
        self._windows = model.sizes.windows()
        self._decode = compiled(self._decoded)
        self.model: GPT | None = model
        """Reads prompts; None after `release`."""

    def arrange(self, model: GPT) -> None:
        """Use the current weights of a model of the same sizes."""
        self.model = model

    def release(self) -> None:
        """Drop the weights until `arrange`."""
        self.model = None

    def bytes_per_step(self) -> int:
        """Return the bytes of weights that a step reads, without rows of embeddings."""
        assert self.model is not None
        tables = tuple(f"{name}." for name in self.model.tables())
        weights = flatten_parameters(self.model)
        return weight_bytes([value for name, value in weights.items() if not name.startswith(tables)])

    def step(self, ids: Ints, previous: Ints, positions: Ints, caches: Caches) -> Logits:
        """Return the next tokens' logits (B, V) in float32; `ids` are added to `caches`.

        Args:
            ids: (B,) the current token of each row.
            previous: (B,) the token before it; ignored at position 0.
            positions: (B,) of the current tokens, from 0.
            caches: with room for the tokens; layers with a window may have less room and rotate.
        """
        assert self.model is not None
        kinds = [(room_of(caches, layer), window) for layer, window in enumerate(self._windows)]
        places = {
            (room, window): (mx.array(positions % room), mx.array(visible_slots(positions, room, window) > 0))
            for room, window in set(kinds)
        }
        given = {
            "ids": mx.array(ids)[:, None], "previous": mx.array(previous)[:, None],
            "has_previous": mx.array(positions > 0)[:, None, None], "positions": mx.array(positions)[:, None],
            "places": [places[kind] for kind in kinds],
        }  # fmt: skip
        end = -(-(int(positions.max()) + 1) // _TABLE_TOKENS) * _TABLE_TOKENS
        held = caches.pop()
        # MLX writes in place if there are no other references to the old arrays.
        logits, made = self._decode(end, flatten_parameters(self.model), given, held)
        del held
        caches.append(made)
        mx.eval(logits, made)
        return np.asarray(logits)

    def _decoded(
        self, end: int, parameters: Mapping[str, mx.array], given: dict[str, Any], held: list[Kept]
    ) -> tuple[mx.array, list[Kept]]:
        model = self.model
        assert model is not None
        own = flatten_parameters(model)
        set_parameters(model, parameters)
        before = rms_norm(model.transformer["wte"](given["previous"]))
        before = mx.where(given["has_previous"], before, mx.zeros_like(before))
        past = _Step(held, given["places"], Positions(given["positions"], end), before, self.format)
        hidden = model.hidden(given["ids"], past)[:, 0]
        logits = model.logits(hidden)
        set_parameters(model, own)
        return logits, [layer.kept for layer in past.layers]


class _Step:
    """`model.gpt.Cache` of a decoding step."""

    def __init__(
        self, held: list[Kept], places: list[tuple[mx.array, mx.array]], positions: Positions, before: mx.array,
        format: KVFormat,
    ) -> None:  # fmt: skip
        self.layers = [_LayerStep(kept, *each, positions, format) for kept, each in zip(held, places, strict=True)]
        self._before = before

    def shift(self, x: mx.array) -> mx.array:
        return self._before


class _LayerStep:
    def __init__(self, kept: Kept, slots: mx.array, visible: mx.array, offset: Positions, format: KVFormat) -> None:
        self.kept, self.offset = kept, offset
        self._slots, self._visible, self._format = slots, visible, format

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        new = (*self._format.pack(k), *self._format.pack(v))
        self.kept = tuple(written(old, self._slots, more) for old, more in zip(self.kept, new, strict=True))
        keys, values = self.kept[: len(self.kept) // 2], self.kept[len(self.kept) // 2 :]
        if self._format.bits is None:
            return masked_attention(q, keys[0], values[0], self._visible[:, None]).swapaxes(1, 2)
        batch, heads, _, width = q.shape
        queries = q.reshape(batch, k.shape[1], heads // k.shape[1], width) * width**-0.5
        scores = self._format.scores(queries, keys).astype(mx.float32)
        scores = mx.where(self._visible[:, None, None], scores, -mx.inf)
        weights = mx.softmax(scores, axis=-1).astype(q.dtype)
        return self._format.mixed(weights, values).reshape(q.shape)


def room_of(caches: Caches, layer: int) -> int:
    """Return the number of tokens for which a layer has room."""
    return next(lane[layer][1].shape[2] for lane in caches if lane[layer])


def visible_slots(positions: Ints, room: int, window: int | None) -> Logits:
    """Return (B, S) float32: 1 for slots whose tokens are visible to the new ones, including themselves."""
    age = (positions[:, None] - np.arange(room)) % room
    seen = positions if window is None else np.minimum(positions, window)
    return (age <= seen[:, None]).astype(np.float32)


def written(kept: mx.array, slots: mx.array, new: mx.array) -> mx.array:
    """Return an array (B, K, S, …) with the new tokens (B, K, 1, …) written to their slots (B,)."""
    at = mx.broadcast_to(slots[:, None, None, None], new.shape)
    return mx.put_along_axis(kept, at, new.astype(kept.dtype), axis=2)
