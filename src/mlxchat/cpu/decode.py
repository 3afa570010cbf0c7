"""The CPU's decoder: one token of each row through the model, on all cores.

It computes the same as `GPT.hidden`, arranged for few rows: queries, keys and values are one product, and every lane
(`lanes.py`) multiplies with its part of each weight: some heads of every layer, a slice of each MLP and a slice of the
vocabulary. Lanes exchange their residual updates twice per layer. A step multiplies few rows with every weight once,
so it is memory-bound; `thin.cpp` computes its products.

MLX's quantised product costs the same for each row: 5 times as much as a float32 product for one row, 40 times for 32.
So quantised weights may be unpacked where there are many rows and enough memory.

Shapes: B rows, C width, H query heads, K key/value heads, G = H / K, S cached tokens, D head width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from mlxchat.cpu.kernels import EXP_UNIT, masked_exp, multiply_rows, reciprocal_root, rotate_halves, square
from mlxchat.cpu.lanes import make_lanes
from mlxchat.cpu.runtime import thin_products
from mlxchat.engine.cache import Slots
from mlxchat.engine.decode import Caches, Decoder, Ints, Logits, room_of, visible_slots, written
from mlxchat.engine.quantise import KVFormat, PackedGPT, weight_bytes
from mlxchat.model.gpt import GPT, Linear, flatten_parameters, set_parameters
from mlxchat.model.lora import FrozenLinear
from mlxchat.model.sizes import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, GPTSizes
from mlxchat.ops.device import compiled
from mlxchat.ops.linear import Activation, Packed
from mlxchat.ops.loss import soft_cap

Part = tuple[mx.array, ...]
"""A matrix (out, in); or packed numbers, scales and offsets."""
_ALL = slice(None)
# Packed matrices are cut between quantisation groups; the largest group size.
_GROUP = 64


def make_decoder(model: GPT, *, packed: bool = True, kv_bits: int | None = None) -> Decoder:
    """Return a decoder with a model's weights distributed to the cores.

    If this file does not compute the same as the model's code, the decoder runs the model itself.
    """
    if not computes_the_same(type(model), model.sizes):
        return Decoder(model, kv_bits=kv_bits)
    return CPUDecoder(model, packed=packed, kv_bits=kv_bits)


@cache
def computes_the_same(kind: type[GPT], sizes: GPTSizes) -> bool:
    """Return whether this decoder agrees with a model class's forward pass, and warn if not.

    Both compute three tokens with a tiny random model that has the features of `sizes`.
    """
    kv_heads = 1 if sizes.num_kv_heads < sizes.num_heads else 2
    small = replace(sizes, num_layers=2, width=32, num_heads=2, num_kv_heads=kv_heads, vocab_size=16, vocab_multiple=1)
    model = kind(small)
    names = flatten_parameters(model)
    keys = mx.random.split(mx.random.key(0), len(names))
    set_parameters(
        model, {name: 0.3 * mx.random.normal(names[name].shape, key=key) for name, key in zip(names, keys, strict=True)}
    )
    ids = [3, 14, 7]
    slots = Slots(CPUDecoder(model))
    slots.reserve(1, len(ids))
    steps = [slots.step([token], [ids[at - 1]], [at])[0] for at, token in enumerate(ids)]
    agrees = bool(np.allclose(np.asarray(model(mx.array([ids]))[0]), steps, atol=1e-3))
    if not agrees:
        warnings.warn(
            "mlxchat/cpu/decode.py does not compute the same as mlxchat/model/gpt.py, so answers are decoded through "
            "the model itself, more slowly on a CPU",
            stacklevel=3,
        )
    return agrees


class CPUDecoder(Decoder):
    """A decoder with the model's weights arranged for lanes."""

    _parts: list[dict[str, Any]]
    _shared: dict[str, mx.array]

    def __init__(self, model: GPT, *, packed: bool = True, kv_bits: int | None = None) -> None:
        """Arrange the current weights of `model`; see `make_decoder`.

        Raises:
            ConfigError: `kv_bits` is not supported for this head width.
        """
        self.sizes, self._packed = model.sizes, packed
        self.format = KVFormat(model.sizes.head_width, kv_bits)
        self.lanes = make_lanes()
        self.kv_heads = key_value_heads(self.sizes, len(self.lanes))
        self.arrange(model)
        self._windows = self.sizes.windows()
        self._cos, self._sin = _angles(self.sizes.head_width, self.sizes.rope_theta)
        self._compiled = compiled(self._build)

    def arrange(self, model: GPT) -> None:
        """See `Decoder.arrange`; compiled functions are kept."""
        self.release()  # first, to avoid two copies in memory
        self.model = model
        self._parts = lane_weights(model, len(self.lanes), packed=self._packed)
        self._shared = _shared_weights(model)
        self._activation = model.transformer["h"][0].mlp.activation

    def release(self) -> None:
        """See `Decoder.release`."""
        self.model = None
        self._parts, self._shared = [], {}

    def bytes_per_step(self) -> int:
        """See `Decoder.bytes_per_step`."""
        tables = [layer["values"] for part in self._parts for layer in part["layers"] if "values" in layer]
        return weight_bytes(self._parts) - weight_bytes(tables)

    def step(self, ids: Ints, previous: Ints, positions: Ints, caches: Caches) -> Logits:
        """See `Decoder.step`."""
        while positions.max() >= len(self._cos):
            self._cos, self._sin = _angles(self.sizes.head_width, self.sizes.rope_theta, 2 * len(self._cos))
        rooms = [room_of(caches, layer) for layer in range(self.sizes.num_layers)]
        kinds = set(zip(rooms, self._windows, strict=True))
        places = {kind: (mx.array(positions % kind[0]), mx.array(visible_slots(positions, *kind))) for kind in kinds}
        given = {
            "ids": mx.array(ids), "previous": mx.array(previous),
            "has_previous": mx.array((positions > 0).astype(np.float32)[:, None]),
            "cos": mx.array(self._cos[positions][:, None]), "sin": mx.array(self._sin[positions][:, None]),
            "places": [places[kind] for kind in zip(rooms, self._windows, strict=True)],
        }  # fmt: skip
        held = [list(lane) for lane in caches]
        # Drop all other references to the old arrays, so that MLX writes the new ones in place.
        caches.clear()
        with self.lanes.sharing(len(self.lanes)), thin_products():
            logits, made = self._compiled(given, held, self._parts, self._shared)
            del held
            caches.extend(made)
            mx.eval(logits, made)
        return np.concatenate([np.asarray(part) for part in logits], axis=1)

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
                xs = each(lambda lane, a=stay, b=again: a * xs[lane] + b * firsts[lane])  # noqa: B023  (called at once)
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
            xs = each(lambda lane: xs[lane] + _sum(updates))  # noqa: B023  (called at once)
            updates = each(lambda lane: _mlp(xs[lane], parts[lane]["layers"][layer], self._activation))  # noqa: B023  (called at once)
            xs = each(lambda lane: xs[lane] + _sum(updates))  # noqa: B023  (called at once)
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
        """Return the residual update of a lane's heads (B, C), and their keys and values with the new ones."""
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
        kept = tuple(written(old, slots, more) for old, more in zip(past, new, strict=True))
        keys, values = kept[: len(kept) // 2], kept[len(kept) // 2 :]
        q = q.reshape(rows, kv_heads, group, width)
        scores = self.format.scores(q * (width**-0.5 / EXP_UNIT), keys)
        weight = masked_exp(scores, visible[:, None, None])
        out = multiply_rows(self.format.mixed(weight, values), (1 / weight.sum(-1))[..., None])
        return multiply(out.reshape(rows, heads * width), weights["attention_out"]), kept


def _shared_weights(model: GPT) -> dict[str, mx.array]:
    """Return the embedding and the small weights that every lane reads."""
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


def _angles(width: int, theta: float, tokens: int = 1024) -> tuple[Ints, Ints]:
    """Return tables of cosines and sines (T, 2, D / 2), as in `ops/attention.py`."""
    frequencies = 1 / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    angles = np.arange(tokens, dtype=np.float32)[:, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([cos, cos], axis=1), np.stack([sin, -sin], axis=1)


def _mlp(x: mx.array, weights: dict[str, Any], activation: Activation) -> mx.array:
    return multiply(activation(multiply(_norm(x), weights["up"])), weights["down"])


def _sum(parts: list[mx.array]) -> mx.array:
    return sum(parts[1:], parts[0])


def _norm(x: mx.array) -> mx.array:
    """Return `rms_norm` by MLX's sum, whose result for a row, unlike BLAS's, does not depend on the number of rows."""
    wide = x.astype(mx.float32)
    factor = reciprocal_root(square(wide).sum(-1), x.shape[-1])
    normalised: mx.array = multiply_rows(wide, factor[..., None]).astype(x.dtype)
    return normalised


def _rotated_norm(x: mx.array, cos: mx.array, sin: mx.array, scale: float) -> mx.array:
    """Return heads (B, H, D) rotated, normalised and scaled as by `rotate_and_normalise`."""
    rows, heads, width = x.shape
    x = x.astype(mx.float32)
    factor = scale * reciprocal_root(square(x).sum(-1), width)
    halves = x.reshape(rows, heads, 2, width // 2)
    return rotate_halves(halves, halves[..., ::-1, :], cos, sin, factor[..., None, None]).reshape(x.shape)


# Weights


def lane_weights(model: GPT, lanes: int, *, packed: bool = True) -> list[dict[str, Any]]:
    """Return copies of the weights for each lane; together they need the memory of all weights.

    Keys: 'layers', a list of dicts with 'qkv' (C → (H + 2 K) D) of the lane's heads, 'attention_out' (H D → C), 'up'
    (C → F), 'down' (F → C) and, if the layer has them, 'gate' (channels, K) and 'values' (V, K D); 'head' (C → V).
    A lane without heads has no keys of attention.

    Args:
        model: source of the weights.
        lanes: number of lanes.
        packed: whether matrices of a `PackedGPT` stay packed, to save memory.
    """
    sizes, cut = model.sizes, partial(part_of, packed=packed and isinstance(model, PackedGPT))
    kv_heads = key_value_heads(sizes, lanes)
    inner, vocabulary = _deal(4 * sizes.width, lanes, _GROUP), _deal(sizes.vocab_size, lanes)
    parts = []
    for lane in range(lanes):
        layers = []
        for index in range(sizes.num_layers):
            layers.append(_layer(model, index, kv_heads[lane], inner[lane], cut))
            mx.eval(layers)  # else the unpacked matrices of all layers would be in memory at once
        parts.append({"layers": layers, "head": cut(model.lm_head, vocabulary[lane])})
    mx.eval(parts)
    return parts


def key_value_heads(sizes: GPTSizes, lanes: int) -> list[slice]:
    """Return the slice of key/value heads of each lane."""
    return _deal(sizes.num_kv_heads, lanes)


def _layer(model: GPT, index: int, kv: slice, inner: slice, cut: Callable[..., Part]) -> dict[str, Any]:
    sizes, block = model.sizes, model.transformer["h"][index]
    part: dict[str, Any] = {"up": cut(block.mlp.c_fc, inner), "down": cut(block.mlp.c_proj, _ALL, inner)}
    if kv.start == kv.stop:
        return part
    attention, group = block.attn, sizes.num_heads // sizes.num_kv_heads
    keys = slice(kv.start * sizes.head_width, kv.stop * sizes.head_width)
    queries = slice(keys.start * group, keys.stop * group)
    projections = ((attention.c_q, queries), (attention.c_k, keys), (attention.c_v, keys))
    arrays = zip(*(cut(layer, rows) for layer, rows in projections), strict=True)
    part["qkv"] = tuple(mx.concatenate(list(each)) for each in arrays)
    part["attention_out"] = cut(attention.c_proj, _ALL, queries)
    if sizes.has_value_embedding(index):
        part["gate"] = mx.contiguous(attention.ve_gate.weight[kv].T)
        part["values"] = mx.contiguous(model.value_embeds[str(index)].weight[:, keys])
    return part


def _deal(count: int, lanes: int, multiple: int = 1) -> list[slice]:
    """Return slices of `count` items, as equal as multiples of `multiple` allow; some may be empty."""
    while multiple > 1 and count < lanes * multiple:
        multiple //= 2
    units = -(-count // multiple)
    borders = [min(count, units * lane // lanes * multiple) for lane in range(lanes + 1)]
    return [slice(start, stop) for start, stop in pairwise(borders)]


def part_of(layer: Linear | FrozenLinear, rows: slice, columns: slice = _ALL, *, packed: bool) -> Part:
    """Return some rows and columns of a layer's matrix (out, in).

    With `packed` a packed matrix stays packed if the columns are whole groups.
    """
    base = layer.base if packed and isinstance(layer, FrozenLinear) else None
    if isinstance(base, Packed):
        numbers, scales, offsets, group, bits = base
        first, last, _ = columns.indices(scales.shape[1] * group)
        if first % group == 0 and last % group == 0:
            groups, words = slice(first // group, last // group), slice(first * bits // 32, last * bits // 32)
            parts = (numbers[rows, words], scales[rows, groups], offsets[rows, groups])
            return tuple(mx.contiguous(part) for part in parts)
    return (mx.contiguous(layer.matrix[rows, columns]),)


def multiply(x: mx.array, weight: Part) -> mx.array:
    """Return the product (B, out) of x (B, in) and a part of a matrix."""
    if len(weight) == 1:
        return x @ weight[0].T
    packed, scales, offsets = weight
    inner = x.shape[-1]
    product: mx.array = mx.quantized_matmul(
        x, packed, scales, offsets, transpose=True,
        group_size=inner // scales.shape[-1], bits=32 * packed.shape[-1] // inner,
    )  # fmt: skip
    return product
