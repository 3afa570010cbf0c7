"""One step of decoding: a token of each row through the model, on all cores.

The same arithmetic as `GPT.hidden`, arranged for few rows: queries, keys and values are one product, and every lane
multiplies with its own part of each weight (`lane_weights.py`). What the lanes add to the stream crosses over twice a
layer. Each row stands at a position of its own, so rows of any lengths go together.

Shapes: B rows, C width, H query heads, K key/value heads, G = H / K, S cached tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.cpu.kernels import EXP_UNIT, masked_exp_of_units
from mlxchat.engine.kv_format import KVFormat
from mlxchat.engine.lane_weights import key_value_heads, lane_weights
from mlxchat.engine.quantise import multiply, weight_bytes
from mlxchat.model.gpt import GPT
from mlxchat.model.sizes import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS
from mlxchat.ops.compiled import compiled
from mlxchat.ops.cross_entropy import soft_cap
from mlxchat.ops.device import backend
from mlxchat.ops.lanes import make_lanes
from mlxchat.ops.linear import Activation
from mlxchat.ops.normalisation import RMS_NORM_EPSILON

Caches = list[list[tuple[mx.array, ...]]]
"""For each lane and layer what is kept of its keys, then of its values (`kv_format.py`); () where it has no heads."""
Array = np.ndarray[Any, Any]


class Decoder:
    """A model's weights arranged for decoding, and the step."""

    def __init__(self, model: GPT, *, bits: int | None = None, packed: bool = True, kv_bits: int | None = None) -> None:
        """Arrange the weights of `model` as they are now; `bits` and `packed` as in `lane_weights`.

        Raises:
            ConfigError: keys and values cannot be kept in `kv_bits`.
        """
        self.sizes, self.bits, self._packed = model.sizes, bits, packed
        self.format = KVFormat(model.sizes.head_width, kv_bits)
        self.lanes = make_lanes()
        self._parts: list[dict[str, Any]] = []
        self._shared: dict[str, mx.array] = {}
        count = len(self.lanes)
        self.kv_heads = key_value_heads(self.sizes, count)
        self.arrange(model)
        self._windows = self.sizes.windows()
        self._cos, self._sin = _angles(self.sizes.head_width, self.sizes.rope_theta)
        self._compiled = compiled(self._build)

    def arrange(self, model: GPT) -> None:
        """Take the weights of a model of the same sizes as they are now; what was compiled stays."""
        self.release()  # or there would be two copies for a while
        self._parts = lane_weights(model, len(self.lanes), self.bits, packed=self._packed)
        self._shared = _shared_weights(model)
        self._activation = model.transformer["h"][0].mlp.activation

    def release(self) -> None:
        """Forget the weights; `arrange` takes them anew."""
        self._parts, self._shared = [], {}

    def bytes_per_step(self) -> int:
        """Return how many bytes of weights a step reads, the few rows of embeddings left out."""
        tables = [layer["values"] for part in self._parts for layer in part["layers"] if "values" in layer]
        return weight_bytes(self._parts) - weight_bytes(tables)

    def step(self, ids: Array, previous: Array, positions: Array, caches: Caches) -> Array:
        """Return logits (B, V) in float32 of what follows `ids`; `caches` has them added then.

        Args:
            ids: (B,) the token of each row.
            previous: (B,) the token before it; whatever at position 0.
            positions: (B,) where the tokens stand in their rows, from 0.
            caches: with room for them: a layer with a window may have less room, and then rotates.
        """
        while positions.max() >= len(self._cos):
            self._cos, self._sin = _angles(self.sizes.head_width, self.sizes.rope_theta, 2 * len(self._cos))
        rooms = [_room(caches, layer) for layer in range(self.sizes.num_layers)]
        kinds = set(zip(rooms, self._windows, strict=True))
        places = {kind: (mx.array(positions % kind[0]), mx.array(_visible(positions, *kind))) for kind in kinds}
        given = {
            "ids": mx.array(ids), "previous": mx.array(previous),
            "has_previous": mx.array((positions > 0).astype(np.float32)[:, None]),
            "cos": mx.array(self._cos[positions][:, None]), "sin": mx.array(self._sin[positions][:, None]),
            "places": [places[kind] for kind in zip(rooms, self._windows, strict=True)],
        }  # fmt: skip
        held = [list(lane) for lane in caches]
        # Nobody else holds the old arrays while the new ones are computed, so that they are written in place.
        caches.clear()
        with self.lanes.sharing(len(self.lanes)):
            logits, made = self._compiled(given, held, self._parts, self._shared)
            del held
            caches.extend(made)
            mx.eval(logits, made)
        return np.concatenate([np.asarray(part) for part in logits], axis=1)[:, : self.sizes.vocab_size]

    def _build(
        self, given: dict[str, Any], caches: Caches, parts: list[dict[str, Any]], shared: dict[str, mx.array]
    ) -> tuple[list[mx.array], Caches]:
        sizes, streams = self.sizes, self.lanes.streams
        made: Caches = [[] for _ in parts]
        lanes = range(len(parts))

        def each(work: Any) -> list[Any]:
            found = []
            for lane in lanes:
                with mx.stream(streams[lane]):
                    found.append(work(lane))
            return found

        xs = each(lambda lane: self._embedded(given, shared))
        firsts, middles = xs, xs
        for layer in range(sizes.num_layers):
            if sizes.residual_scalars:
                stay, again = shared["resid_lambdas"][layer], shared["x0_lambdas"][layer]
                xs = each(lambda lane, a=stay, b=again: a * xs[lane] + b * firsts[lane])  # noqa: B023
            updates = []
            for lane in lanes:
                if "qkv" not in parts[lane]["layers"][layer]:
                    made[lane].append(())
                    continue
                with mx.stream(streams[lane]):
                    weights = parts[lane]["layers"][layer]
                    update, past = self._attend(
                        xs[lane], weights, caches[lane][layer], given, layer, self.kv_heads[lane]
                    )
                updates.append(update)
                made[lane].append(past)
            xs = each(lambda lane: xs[lane] + _sum(updates))  # noqa: B023
            updates = each(lambda lane: _mlp(xs[lane], parts[lane]["layers"][layer], self._activation))  # noqa: B023
            xs = each(lambda lane: xs[lane] + _sum(updates))  # noqa: B023
            if layer == sizes.num_layers // 2:
                middles = xs
        if sizes.backout:
            xs = each(lambda lane: xs[lane] - shared["backout_lambda"] * middles[lane])
        return each(lambda lane: soft_cap(multiply(_norm(xs[lane]), parts[lane]["head"]))), made

    def _embedded(self, given: dict[str, Any], shared: dict[str, mx.array]) -> mx.array:
        x: mx.array = _norm(shared["wte"][given["ids"]])
        if not self.sizes.smear:
            return x
        before = _norm(shared["wte"][given["previous"]]) * given["has_previous"].astype(x.dtype)
        gate = shared["smear_lambda"] * mx.sigmoid(x[:, :SMEAR_GATE_CHANNELS] @ shared["smear_gate"])
        smeared: mx.array = x + gate * before
        return smeared

    def _attend(
        self,
        x: mx.array,
        weights: dict[str, Any],
        past: tuple[mx.array, ...],
        given: dict[str, Any],
        layer: int,
        kv: slice,
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        """Return what a lane's heads add to the stream (B, C), and their keys and values with the new ones."""
        sizes, rows = self.sizes, x.shape[0]
        kv_heads, width = kv.stop - kv.start, sizes.head_width
        group = sizes.num_heads // sizes.num_kv_heads
        heads = group * kv_heads
        x = _norm(x)
        joint = multiply(x, weights["qkv"]).reshape(rows, heads + 2 * kv_heads, width)
        turned = _rotated_norm(joint[:, : heads + kv_heads], given["cos"], given["sin"], sizes.query_key_scale)
        q, k, v = turned[:, :heads], turned[:, heads:], joint[:, heads + kv_heads :]
        if "values" in weights:
            gate = 3.0 * mx.sigmoid(x[:, :VALUE_GATE_CHANNELS] @ weights["gate"])
            v = v + gate[..., None] * weights["values"][given["ids"]].reshape(v.shape)
        slots, visible = given["places"][layer]
        new = [*self.format.pack(k[:, :, None]), *self.format.pack(v[:, :, None])]
        kept = tuple(_written(old, slots, more) for old, more in zip(past, new, strict=True))
        keys, values = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        q = q.reshape(rows, kv_heads, group, width)
        if backend() == "cpu" or self.format.bits is not None:
            scores = self.format.scores(q * (width**-0.5 / EXP_UNIT), keys)
            weight = _masked_exp(scores, visible[:, None, None])
            out = _scaled(self.format.mixed(weight, values), (1 / weight.sum(-1))[..., None])
        else:
            q = q.reshape(rows, heads, 1, width)
            out = mx.fast.scaled_dot_product_attention(
                q, keys[0], values[0], scale=width**-0.5, mask=visible[:, None, None] > 0
            )
        return multiply(out.reshape(rows, heads * width), weights["attention_out"]), kept


def _shared_weights(model: GPT) -> dict[str, mx.array]:
    """Return the small weights that every lane reads, and the embedding."""
    sizes = model.sizes
    shared = {"wte": model.transformer["wte"].weight}
    if sizes.residual_scalars:
        shared |= {"resid_lambdas": model.resid_lambdas, "x0_lambdas": model.x0_lambdas}
    if sizes.smear:
        shared |= {"smear_lambda": model.smear_lambda, "smear_gate": mx.contiguous(model.smear_gate.weight.T)}
    if sizes.backout:
        shared["backout_lambda"] = model.backout_lambda
    mx.eval(shared)
    return shared


def _angles(width: int, theta: float, tokens: int = 1024) -> tuple[Array, Array]:
    """Return tables (T, 2, D / 2) as `ops/normalisation.py` has them."""
    frequencies = 1 / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    angles = np.arange(tokens, dtype=np.float32)[:, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([cos, cos], axis=1), np.stack([sin, -sin], axis=1)


def _visible(positions: Array, room: int, window: int | None) -> Array:
    """Return (B, S) float32: 1 for slots that hold tokens which the new ones see, themselves included."""
    age = (positions[:, None] - np.arange(room)) % room
    seen = positions if window is None else np.minimum(positions, window)
    return (age <= seen[:, None]).astype(np.float32)


def _room(caches: Caches, layer: int) -> int:
    return next(lane[layer][1].shape[2] for lane in caches if lane[layer])


def _written(kept: mx.array, slots: mx.array, new: mx.array) -> mx.array:
    """Return an array (B, K, S, …) with the tokens (B, K, 1, …) of all rows in their slots (B,)."""
    at = mx.broadcast_to(slots[:, None, None, None], new.shape)
    return mx.put_along_axis(kept, at, new.astype(kept.dtype), axis=2)


def _mlp(x: mx.array, weights: dict[str, Any], activation: Activation) -> mx.array:
    return multiply(activation(multiply(_norm(x), weights["up"])), weights["down"])


def _sum(parts: list[mx.array]) -> mx.array:
    return sum(parts[1:], parts[0])


def _norm(x: mx.array) -> mx.array:
    """Return `rms_norm`, by MLX's own sum: that of a row does not depend on how many rows there are, BLAS's does."""
    wide = x.astype(mx.float32)
    factor = mx.rsqrt(_square(wide).sum(-1) * (1 / x.shape[-1]) + RMS_NORM_EPSILON)
    normalised: mx.array = _scaled(wide, factor[..., None]).astype(x.dtype)
    return normalised


def _rotated_norm(x: mx.array, cos: mx.array, sin: mx.array, scale: float) -> mx.array:
    """Return heads (B, H, D) rotated, normalised and scaled as `rotate_and_normalise` does it."""
    rows, heads, width = x.shape
    x = x.astype(mx.float32)
    factor = scale * mx.rsqrt(_square(x).sum(-1) * (1 / width) + RMS_NORM_EPSILON)
    halves = x.reshape(rows, heads, 2, width // 2)
    return _rotate(halves, halves[..., ::-1, :], cos, sin, factor[..., None, None]).reshape(x.shape)


@compiled
def _rotate(halves: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array, factor: mx.array) -> mx.array:
    return (halves * cos + swapped * sin) * factor


_square = compiled(lambda x: x * x)
_scaled = compiled(lambda x, factor: x * factor)
_masked_exp = compiled(masked_exp_of_units)
