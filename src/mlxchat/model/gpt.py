"""The transformer of nanochat, in its two published forms, forward only.

October 2025: rotary positions, RMS norm without weights, norm of queries and keys after the rotation, squared-ReLU
MLP, untied embedding and head, no biases, soft-capped logits. July 2026 adds, each one switchable in `GPTSizes`:
value embeddings behind gates, sliding windows, learnt residual scalars, the smear and the backout. Counterpart of
nanochat/gpt.py; parameters bear its names.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxchat.errors import ConfigError
from mlxchat.model.linear import NUM_MATRICES, AdapterDropout, project
from mlxchat.model.recompute import recomputed
from mlxchat.model.sizes import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, GPTSizes
from mlxchat.ops.activation import gated_sum
from mlxchat.ops.attention import causal_attention
from mlxchat.ops.cross_entropy import soft_cap
from mlxchat.ops.dropout import Dropout, dropped
from mlxchat.ops.normalisation import Positions, rms_norm, rotate_and_normalise

_EMBEDDING, _VALUE_EMBEDDING = "transformer.wte.weight", "value_embeds.{}.weight"


class LayerCache(Protocol):
    """Keys and values of one layer's past."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Append k and v (B, K, T, D) and return the attention of q (B, H, T, D) over everything cached."""


class Cache(Protocol):
    """The past of a batch of rows, as the model needs it."""

    @property
    def offset(self) -> int | Positions:
        """Tokens already cached; or where each new token stands."""

    @property
    def layers(self) -> list[Any]:
        """A `LayerCache` for each layer."""

    def shift(self, x: mx.array) -> mx.array:
        """Return for each token of x (B, T, C) the one before it, across calls; zeros before a row's first."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, sizes: GPTSizes, layer: int) -> None:
        """Make the projections; their weights come from `init_weights`."""
        super().__init__()
        self.sizes, self.window = sizes, sizes.windows()[layer]
        self.c_q = nn.Linear(sizes.width, sizes.width, bias=False)
        self.c_k = nn.Linear(sizes.width, sizes.kv_width, bias=False)
        self.c_v = nn.Linear(sizes.width, sizes.kv_width, bias=False)
        self.c_proj = nn.Linear(sizes.width, sizes.width, bias=False)
        if sizes.has_value_embedding(layer):
            self.ve_gate = nn.Linear(VALUE_GATE_CHANNELS, sizes.num_kv_heads, bias=False)

    def __call__(
        self,
        x: mx.array,
        value_embedding: mx.array | None = None,
        *,
        offset: int | Positions = 0,
        cache: LayerCache | None = None,
        unseen: AdapterDropout | None = None,
    ) -> mx.array:
        """Return (B, T, C).

        Args:
            x: (B, T, C), normalised.
            value_embedding: (B, T, K D), what the layer's table says of each token.
            offset: position of the first token, or of each one.
            cache: the past.
            unseen: what adapters do not see; None: they see all.
        """
        sizes = self.sizes
        batch, tokens, width = x.shape
        v = project(self.c_v, x, unseen, 2).reshape(batch, tokens, sizes.num_kv_heads, sizes.head_width)
        if value_embedding is not None:
            gate = self.ve_gate(x[..., :VALUE_GATE_CHANNELS])
            v = gated_sum(v, gate[..., None], value_embedding.reshape(v.shape), scale=3.0)
        q, k = (
            rotate_and_normalise(
                project(projection, x, unseen, place).reshape(batch, tokens, heads, sizes.head_width),
                offset=offset, theta=sizes.rope_theta, scale=sizes.query_key_scale,
            )
            for place, (projection, heads) in enumerate(((self.c_q, sizes.num_heads), (self.c_k, sizes.num_kv_heads)))
        )  # fmt: skip
        v = mx.contiguous(v.swapaxes(1, 2))
        out = causal_attention(q, k, v, self.window) if cache is None else cache.attend(q, k, v).swapaxes(1, 2)
        return project(self.c_proj, out.reshape(batch, tokens, width), unseen, 3)


class MLP(nn.Module):
    """Two layers, four times as wide inside, with a squared ReLU."""

    def __init__(self, sizes: GPTSizes) -> None:
        """Make the two projections."""
        super().__init__()
        self.c_fc = nn.Linear(sizes.width, 4 * sizes.width, bias=False)
        self.c_proj = nn.Linear(4 * sizes.width, sizes.width, bias=False)

    def __call__(self, x: mx.array, unseen: AdapterDropout | None = None) -> mx.array:
        """Return (B, T, C); `unseen` is `Attention`'s."""
        return project(self.c_proj, project(self.c_fc, x, unseen, 4), unseen, 5, squared_relu=True)


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream and added to it."""

    def __init__(self, sizes: GPTSizes, layer: int) -> None:
        """Make one layer."""
        super().__init__()
        self.attn = Attention(sizes, layer)
        self.mlp = MLP(sizes)

    def __call__(
        self,
        x: mx.array,
        value_embedding: mx.array | None = None,
        *,
        offset: int | Positions = 0,
        cache: LayerCache | None = None,
        dropout_keys: mx.array | None = None,
        dropout_rate: float = 0.0,
        adapter_keys: mx.array | None = None,
        adapter_rate: float = 0.0,
    ) -> mx.array:
        """Return (B, T, C).

        Args:
            x: (B, T, C).
            value_embedding: `Attention`'s, as the next two are.
            offset: position of the first token, or of each one.
            cache: the past.
            dropout_keys: (B, 2, 2), for what attention and MLP add to the stream; None: nothing is left out.
            dropout_rate: share of it that is left out.
            adapter_keys: (B, 6, 2), for what the adapters of the layer's matrices see; None: all.
            adapter_rate: share that they do not see.
        """
        unseen = None if adapter_keys is None else AdapterDropout(adapter_rate, adapter_keys)
        update = self.attn(rms_norm(x), value_embedding, offset=offset, cache=cache, unseen=unseen)
        if dropout_keys is None:
            x = x + update
            return x + self.mlp(rms_norm(x), unseen)
        x = x + dropped(update, dropout_keys[:, 0], dropout_rate)
        return x + dropped(self.mlp(rms_norm(x), unseen), dropout_keys[:, 1], dropout_rate)


class GPT(nn.Module):
    """The whole model. `hidden` gives the states that a loss needs, calling it gives logits."""

    def __init__(self, sizes: GPTSizes) -> None:
        """Make the layers; weights are MLX's defaults until `init_weights` or a checkpoint sets them."""
        super().__init__()
        self.sizes = sizes
        self.transformer: dict[str, Any] = {
            "wte": nn.Embedding(sizes.padded_vocab_size, sizes.width),
            "h": [Block(sizes, layer) for layer in range(sizes.num_layers)],
        }
        self.lm_head = nn.Linear(sizes.width, sizes.padded_vocab_size, bias=False)
        if sizes.value_embeddings:
            self.value_embeds = {
                str(layer): nn.Embedding(sizes.padded_vocab_size, sizes.kv_width)
                for layer in range(sizes.num_layers)
                if sizes.has_value_embedding(layer)
            }
        if sizes.residual_scalars:
            self.resid_lambdas, self.x0_lambdas = mx.ones(sizes.num_layers), mx.zeros(sizes.num_layers)
        if sizes.smear:
            self.smear_gate, self.smear_lambda = nn.Linear(SMEAR_GATE_CHANNELS, 1, bias=False), mx.zeros(1)
        if sizes.backout:
            self.backout_lambda = mx.zeros(1)

    @property
    def head_weight(self) -> mx.array:
        """The head (V, C) without the rows that only pad it."""
        weight = self.lm_head.weight
        return weight if len(weight) == self.sizes.vocab_size else weight[: self.sizes.vocab_size]

    def table_names(self) -> list[str]:
        """Return the names of the parameters of which tokens read one row each: the tables of embeddings."""
        return [_EMBEDDING, *(_VALUE_EMBEDDING.format(layer) for layer in getattr(self, "value_embeds", {}))]

    @property
    def dropout_places(self) -> int:
        """How many places of a row dropout has keys for: the embedding, and two in each layer."""
        return 1 + 2 * self.sizes.num_layers

    @property
    def adapter_places(self) -> int:
        """How many places of a row adapters' dropout has keys for: each matrix of each layer."""
        return NUM_MATRICES * self.sizes.num_layers

    def hidden(
        self,
        ids: mx.array,
        cache: Cache | None = None,
        *,
        recompute: bool = False,
        table_rows: Mapping[str, mx.array] | None = None,
        dropout: Dropout | None = None,
        adapter_dropout: Dropout | None = None,
    ) -> mx.array:
        """Return the final normalised states (B, T, C) of token ids (B, T).

        Args:
            ids: tokens.
            cache: the past.
            recompute: a gradient keeps each layer's input alone and computes the rest of the layer again: less memory,
                more time, the same numbers.
            table_rows: by `table_names`, what the tables say of ids (B, T, …), if that has been looked up already: a
                gradient is then taken in these rows instead of in whole tables.
            dropout: what to leave out of the embedding and of what each attention and MLP adds to the stream, with keys
                for `dropout_places` places; None: nothing.
            adapter_dropout: what adapters do not see, with keys for `adapter_places` places; None: they see all.
        """
        sizes, middle = self.sizes, None
        offset = cache.offset if cache is not None else 0
        x = rms_norm(self.transformer["wte"](ids) if table_rows is None else table_rows[_EMBEDDING])
        if sizes.smear:
            x = self._smear(x, cache)
        if dropout is not None:
            x = dropped(x, dropout.keys[:, 0], dropout.rate)
        first = x
        for layer, block in enumerate(self.transformer["h"]):
            if sizes.residual_scalars:
                x = self.resid_lambdas[layer].astype(x.dtype) * x + self.x0_lambdas[layer].astype(x.dtype) * first
            value_embedding = None
            if sizes.has_value_embedding(layer):
                table = self.value_embeds[str(layer)]
                value_embedding = table(ids) if table_rows is None else table_rows[_VALUE_EMBEDDING.format(layer)]
            keys = None if dropout is None else dropout.keys[:, 2 * layer + 1 : 2 * layer + 3]
            rate = 0.0 if dropout is None else dropout.rate
            inputs = {"value_embedding": value_embedding, "dropout_keys": keys}
            rates = {"dropout_rate": rate}
            if adapter_dropout is not None:
                inputs["adapter_keys"] = adapter_dropout.keys[:, NUM_MATRICES * layer : NUM_MATRICES * (layer + 1)]
                rates["adapter_rate"] = adapter_dropout.rate
            if recompute:
                given = {name: value for name, value in {"x": x, **inputs}.items() if value is not None}
                x = recomputed(block, given, **rates)
            else:
                past = cache.layers[layer] if cache is not None else None
                x = block(x, offset=offset, cache=past, **inputs, **rates)
            if layer == sizes.num_layers // 2:
                middle = x
        if sizes.backout and middle is not None:
            x = x - self.backout_lambda.astype(x.dtype) * middle
        return rms_norm(x)

    def logits(self, hidden: mx.array) -> mx.array:
        """Return soft-capped logits (…, V) in float32 of final states (…, C)."""
        return soft_cap(hidden @ self.head_weight.T)

    def __call__(self, ids: mx.array, cache: Cache | None = None) -> mx.array:
        """Return soft-capped logits (B, T, V) in float32 of token ids (B, T)."""
        return self.logits(self.hidden(ids, cache))

    def _smear(self, x: mx.array, cache: Cache | None) -> mx.array:
        before = mx.concatenate([mx.zeros_like(x[:, :1]), x[:, :-1]], axis=1) if cache is None else cache.shift(x)
        gate = self.smear_lambda.astype(x.dtype) * mx.sigmoid(self.smear_gate(x[..., :SMEAR_GATE_CHANNELS]))
        return x + gate * before


# Initial weights

Draw = Callable[[tuple[int, ...], int, mx.array], mx.array]
"""(shape, width of the model, key) → initial values."""


def constant(value: float) -> Draw:
    """Return the draw of equal numbers."""
    return lambda shape, width, key: mx.full(shape, value)


def normal(deviation: float) -> Draw:
    """Return the draw of N(0, deviation²)."""
    return lambda shape, width, key: deviation * mx.random.normal(shape, key=key)


def normal_by_fan(shape: tuple[int, ...], width: int, key: mx.array) -> mx.array:
    """Draw a matrix (out, in) from N(0, s²) with s = min(1, sqrt(out / in)) / sqrt(in), after arXiv 2310.17813."""
    rows, columns = shape
    return normal(min(1.0, (rows / columns) ** 0.5) / columns**0.5)(shape, width, key)


def uniform(low: float, high: float) -> Draw:
    """Return the draw of U(low, high)."""
    return lambda shape, width, key: mx.random.uniform(low, high, shape, key=key)


def uniform_by_width(factor: float = 1.0) -> Draw:
    """Return the draw of U(±b) with b = factor × sqrt(3 / width), whose deviation is factor / sqrt(width)."""

    def draw(shape: tuple[int, ...], width: int, key: mx.array) -> mx.array:
        bound = factor * (3.0 / width) ** 0.5
        return mx.random.uniform(-bound, bound, shape, key=key)

    return draw


def falling(first: float, last: float) -> Draw:
    """Return the draw of one number a layer, from `first` to `last` in equal steps."""

    def draw(shape: tuple[int, ...], width: int, key: mx.array) -> mx.array:
        fractions = np.arange(shape[0], dtype=np.float32) / max(shape[0] - 1, 1)
        return mx.array(first + (last - first) * fractions)

    return draw


_FEATURES: dict[str, Draw] = {
    "value_embeds.*.weight": uniform_by_width(),
    "transformer.h.*.attn.ve_gate.weight": uniform(0.0, 0.02),
    "resid_lambdas": falling(1.15, 1.05),
    "x0_lambdas": falling(0.20, 0.05),
    "smear_gate.weight": uniform(0.0, 0.02),
    "smear_lambda": constant(0.0),
    "backout_lambda": constant(0.2),
}
INITIAL_WEIGHTS: dict[str, dict[str, Draw]] = {
    "oct2025": {
        "transformer.wte.weight": normal(1.0),
        "transformer.h.*.attn.c_[qkv].weight": normal_by_fan,
        "transformer.h.*.mlp.c_fc.weight": normal_by_fan,
        "transformer.h.*.c_proj.weight": constant(0.0),
        "lm_head.weight": constant(0.0),
        **_FEATURES,
    },
    "jul2026": {
        "transformer.wte.weight": normal(0.8),
        "transformer.h.*.attn.c_[qkv].weight": uniform_by_width(),
        "transformer.h.*.mlp.c_fc.weight": uniform_by_width(0.4),
        "transformer.h.*.c_proj.weight": constant(0.0),
        "lm_head.weight": normal(0.001),
        **_FEATURES,
    },
}
"""nanochat's initial weights: for each architecture what is drawn, by a pattern of parameters' names."""


def init_weights(model: GPT, seed: int) -> None:
    """Draw a model's initial weights by `INITIAL_WEIGHTS`, the same on every backend.

    Each parameter's key follows from the seed and its name, so a new parameter leaves the others as they were.

    Raises:
        ConfigError: a parameter has no rule, or several.
    """
    rules = INITIAL_WEIGHTS[model.sizes.architecture]
    drawn, problems = {}, []
    for name, value in flatten_parameters(model).items():
        fitting = [pattern for pattern in rules if fnmatchcase(name, pattern)]
        if len(fitting) != 1:
            problems.append(f"{name} {value.shape} matches {' and '.join(fitting) or 'no pattern'}")
            continue
        drawn[name] = rules[fitting[0]](value.shape, model.sizes.width, key_of(seed, name))
    if problems:
        raise ConfigError(
            f"init_weights: each parameter needs one rule in INITIAL_WEIGHTS[{model.sizes.architecture!r}] "
            f"(mlxchat/model/gpt.py): {'; '.join(problems)}. Add for example "
            f'"{problems[0].split()[0]}": constant(1.0)'
        )
    set_parameters(model, drawn)


def key_of(seed: int, name: str) -> mx.array:
    """Return the random key of a parameter, which depends on the seed and its name alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))


# Parameters by name


def flatten_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return a model's parameters by dotted name."""
    parameters: Any = model.parameters()
    return cast(dict[str, mx.array], tree_flatten(parameters, destination={}))


def trained_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return by dotted name the parameters that training moves: all, or where a model has adapters these alone."""
    parameters: Any = model.trainable_parameters()
    return cast(dict[str, mx.array], tree_flatten(parameters, destination={}))


def cast_parameters(parameters: Mapping[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return parameters in what is computed in; packed numbers and the lengths of DoRA's rows stay as they are."""
    return {
        name: value if value.dtype == mx.uint32 or name.endswith(".m") else value.astype(dtype)
        for name, value in parameters.items()
    }


def set_parameters(model: nn.Module, parameters: Mapping[str, mx.array]) -> None:
    """Replace a model's parameters by dotted name; what is not named stays.

    Raises:
        KeyError: the model has no such parameter.
    """
    for name, value in parameters.items():
        *path, last = name.split(".")
        place: Any = model
        for key in path:
            place = place[int(key)] if isinstance(place, list) else place[key]
        if last not in place:
            raise KeyError(name)
        place[last] = value
