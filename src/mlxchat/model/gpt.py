"""nanochat's transformer in its two published architectures. Counterpart of nanochat/gpt.py, with its parameter names.

October 2025: rotary embedding, RMS norm without weights, QK norm after the rotation, squared-ReLU MLP, untied embedding
and head, no biases, soft-capped logits. July 2026 adds, each optional in `GPTSizes`: gated value embeddings, sliding
windows, learnt residual scalars, smear and backout.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxchat.errors import ConfigError
from mlxchat.model.recompute import recomputed
from mlxchat.model.sizes import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, GPTSizes, count_parameters
from mlxchat.ops.attention import Positions, causal_attention, rms_norm, rotate_and_normalise
from mlxchat.ops.dropout import dropout
from mlxchat.ops.linear import Activation, identity, linear, squared_relu
from mlxchat.ops.loss import soft_cap


class LayerCache(Protocol):
    """Keys and values of one layer's past."""

    @property
    def offset(self) -> int | Positions:
        """Number of cached tokens, or the position of each new token."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Append k and v (B, K, T, D) and return the attention of q (B, H, T, D) over everything cached."""


class Cache(Protocol):
    """The KV cache of a batch."""

    @property
    def layers(self) -> list[Any]:
        """A `LayerCache` for each layer."""

    def shift(self, x: mx.array) -> mx.array:
        """Return the previous token of each in x (B, T, C), across calls; zeros before a row's first."""


class Linear(nn.Linear):
    """A linear layer without bias. It applies the activation of its input, so that the gradient can recompute it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def __call__(self, x: mx.array, activation: Activation = identity) -> mx.array:
        """Return activation(x) Wᵀ (…, C) of x (…, F)."""
        return linear(x, self.weight, activation)

    @property
    def matrix(self) -> mx.array:
        """W (C, F)."""
        weight: mx.array = self.weight
        return weight


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, sizes: GPTSizes, layer: int) -> None:
        super().__init__()
        self.sizes, self.window = sizes, sizes.windows()[layer]
        self.c_q = Linear(sizes.width, sizes.width)
        self.c_k = Linear(sizes.width, sizes.kv_width)
        self.c_v = Linear(sizes.width, sizes.kv_width)
        self.c_proj = Linear(sizes.width, sizes.width)
        if sizes.has_value_embedding(layer):
            self.ve_gate = nn.Linear(VALUE_GATE_CHANNELS, sizes.num_kv_heads, bias=False)

    def __call__(
        self, x: mx.array, value_embedding: mx.array | None = None, past: LayerCache | None = None
    ) -> mx.array:
        """Return (B, T, C) of x (B, T, C) and the tokens' value embeddings (B, T, K D)."""
        (B, T, C), D = x.shape, self.sizes.head_width
        q = self.c_q(x).reshape(B, T, -1, D)  # (B, T, H, D)
        k = self.c_k(x).reshape(B, T, -1, D)  # (B, T, K, D)
        v = self.c_v(x).reshape(B, T, -1, D)
        if value_embedding is not None:
            gate = 3.0 * mx.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))  # (B, T, K)
            v = v + gate[..., None] * value_embedding.reshape(v.shape)
        offset = 0 if past is None else past.offset
        q, k = self.rotate(q, offset), self.rotate(k, offset)  # (B, H, T, D), (B, K, T, D)
        v = mx.contiguous(v.swapaxes(1, 2))  # (B, K, T, D)
        out = causal_attention(q, k, v, self.window) if past is None else past.attend(q, k, v).swapaxes(1, 2)
        return self.c_proj(out.reshape(B, T, C))

    def rotate(self, heads: mx.array, offset: int | Positions) -> mx.array:
        """Return heads (B, T, H, D) rotated by their positions and normalised: (B, H, T, D)."""
        sizes = self.sizes
        return rotate_and_normalise(heads, offset=offset, theta=sizes.rope_theta, scale=sizes.query_key_scale)


class MLP(nn.Module):
    """Two layers, four times as wide inside."""

    activation = staticmethod(squared_relu)

    def __init__(self, sizes: GPTSizes) -> None:
        super().__init__()
        self.c_fc = Linear(sizes.width, 4 * sizes.width)
        self.c_proj = Linear(4 * sizes.width, sizes.width)

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, T, C)."""
        return self.c_proj(self.c_fc(x), self.activation)


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream and added to it."""

    def __init__(self, sizes: GPTSizes, layer: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(sizes, layer), MLP(sizes)
        self.layer = layer

    def __call__(
        self, x: mx.array, value_embedding: mx.array | None = None, past: LayerCache | None = None
    ) -> mx.array:
        """Return (B, T, C); arguments as for `Attention`, but x is not normalised."""
        x = x + dropout(self.attn(rms_norm(x), value_embedding, past), place=2 * self.layer + 1)
        return x + dropout(self.mlp(rms_norm(x)), place=2 * self.layer + 2)


class GPT(nn.Module):
    """The whole model. Calling it returns logits; `hidden` returns the final states, for losses."""

    recompute = False
    """Gradient checkpointing: keep only each layer's input and recompute the rest, with equal results."""

    def __init__(self, sizes: GPTSizes) -> None:
        """Create the layers; weights are MLX's defaults until `init_weights` or a checkpoint sets them."""
        super().__init__()
        self.sizes = sizes
        self.transformer: dict[str, Any] = {
            "wte": nn.Embedding(sizes.padded_vocab_size, sizes.width),
            "h": [Block(sizes, layer) for layer in range(sizes.num_layers)],
        }
        self.lm_head = Linear(sizes.width, sizes.padded_vocab_size)
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

    def hidden(self, ids: mx.array, cache: Cache | None = None) -> mx.array:
        """Return the final normalised states (B, T, C) of token ids (B, T), which follow the cached ones."""
        sizes, middle = self.sizes, None
        x = rms_norm(self.transformer["wte"](ids))
        if sizes.smear:
            before = mx.concatenate([mx.zeros_like(x[:, :1]), x[:, :-1]], axis=1) if cache is None else cache.shift(x)
            gate = mx.sigmoid(self.smear_gate(x[..., :SMEAR_GATE_CHANNELS]))  # (B, T, 1)
            x = x + self.smear_lambda.astype(x.dtype) * gate * before
        x = first = dropout(x, place=0)
        for layer, block in enumerate(self.transformer["h"]):
            if sizes.residual_scalars:
                x = self.resid_lambdas[layer].astype(x.dtype) * x + self.x0_lambdas[layer].astype(x.dtype) * first
            value_embedding = self.value_embeds[str(layer)](ids) if sizes.has_value_embedding(layer) else None
            if cache is not None:
                x = block(x, value_embedding, cache.layers[layer])
            elif self.recompute:
                x = recomputed(block, x, value_embedding)
            else:
                x = block(x, value_embedding)
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

    @property
    def head_weight(self) -> mx.array:
        """The head (V, C) without padding rows."""
        weight: mx.array = self.lm_head.weight
        return weight if len(weight) == self.sizes.vocab_size else weight[: self.sizes.vocab_size]

    def tables(self) -> list[str]:
        """Return the names of the embedding modules."""
        return ["transformer.wte", *(f"value_embeds.{layer}" for layer in getattr(self, "value_embeds", {}))]


class LookedUp(nn.Module):
    """Replaces an embedding by the rows (B, T, …) of the current tokens, so that gradients are of these rows."""

    def __init__(self, rows: mx.array) -> None:
        super().__init__()
        self.rows = rows

    def __call__(self, ids: mx.array) -> mx.array:
        """Return the rows."""
        return self.rows


# Initial weights

Draw = Callable[[tuple[int, ...], int, mx.array], mx.array]
"""(shape, width of the model, key) → initial values."""


def constant(value: float) -> Draw:
    """Return an initializer with a constant."""
    return lambda shape, width, key: mx.full(shape, value)


def normal(deviation: float) -> Draw:
    """Return an initializer with N(0, deviation²)."""
    return lambda shape, width, key: deviation * mx.random.normal(shape, key=key)


def normal_by_fan(shape: tuple[int, ...], width: int, key: mx.array) -> mx.array:
    """Draw a matrix (out, in) from N(0, s²) with s = min(1, sqrt(out / in)) / sqrt(in) (arXiv 2310.17813)."""
    rows, columns = shape
    return normal(min(1.0, (rows / columns) ** 0.5) / columns**0.5)(shape, width, key)


def uniform(low: float, high: float) -> Draw:
    """Return an initializer with U(low, high)."""
    return lambda shape, width, key: mx.random.uniform(low, high, shape, key=key)


def uniform_by_width(factor: float = 1.0) -> Draw:
    """Return an initializer with U(±b), b = factor × sqrt(3 / width); its deviation is factor / sqrt(width)."""

    def draw(shape: tuple[int, ...], width: int, key: mx.array) -> mx.array:
        bound = factor * (3.0 / width) ** 0.5
        return mx.random.uniform(-bound, bound, shape, key=key)

    return draw


def falling(first: float, last: float) -> Draw:
    """Return an initializer with one number per layer, linear from `first` to `last`."""

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
"""nanochat's initial weights: architecture → pattern of parameter names → initializer."""


def init_weights(model: GPT, seed: int) -> None:
    """Initialise a model by `INITIAL_WEIGHTS`, equally on every backend.

    Each parameter's random key depends only on the seed and its name, so that new parameters do not change others.

    Raises:
        ConfigError: a parameter has no rule, or several, or is not counted in `sizes.count_parameters`.
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
            f"(mlxchat/model/gpt.py): {'; '.join(problems)}. Add, for example, "
            f'"{problems[0].split()[0]}": constant(1.0)'
        )
    real, counted = sum(value.size for value in drawn.values()), count_parameters(model.sizes)["total"]
    if real != counted:
        raise ConfigError(
            f"init_weights: the model has {real:,} parameters, but count_parameters (mlxchat/model/sizes.py) counts "
            f"{counted:,}, and memory, FLOPs and iterations follow from it. Count the new matrices there"
        )
    set_parameters(model, drawn)


def key_of(seed: int, name: str) -> mx.array:
    """Return the random key of a parameter, which depends only on the seed and its name."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))


# Parameters by name


def flatten_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return a model's parameters by dotted name."""
    parameters: Any = model.parameters()
    return cast(dict[str, mx.array], tree_flatten(parameters, destination={}))


def trained_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return the trained parameters by dotted name: all, or only the adapters if the model has some."""
    parameters: Any = model.trainable_parameters()
    return cast(dict[str, mx.array], tree_flatten(parameters, destination={}))


def lengthen_context(model: GPT, context_tokens: int) -> GPT:
    """Return a model with the same weights and a longer context; up to the old one it computes the same logits."""
    longer = GPT(model.sizes.lengthened(context_tokens))
    set_parameters(longer, flatten_parameters(model))
    return longer


def cast_parameters(parameters: Mapping[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return parameters in a dtype, except packed numbers and DoRA's magnitudes."""
    return {
        name: value if value.dtype == mx.uint32 or name.endswith(".m") else value.astype(dtype)
        for name, value in parameters.items()
    }


@contextmanager
def computing_in(model: nn.Module, dtype: mx.Dtype) -> Iterator[None]:
    """Compute in a dtype within the body; afterwards the model has its original parameters."""
    own = flatten_parameters(model)
    cast = cast_parameters(own, dtype)
    if all(value.dtype == own[name].dtype for name, value in cast.items()):
        yield
        return
    set_parameters(model, cast)
    mx.eval(cast)
    try:
        yield
    finally:
        set_parameters(model, own)


def set_parameters(model: nn.Module, parameters: Mapping[str, mx.array | nn.Module]) -> None:
    """Replace a model's parameters or modules by dotted name; others stay.

    Raises:
        KeyError: the model has no such parameter.
    """
    for name, value in parameters.items():
        parent, _, last = name.rpartition(".")
        place = module_at(model, parent)
        if last not in place:
            raise KeyError(name)
        place[last] = value


def module_at(model: nn.Module, name: str) -> Any:
    """Return the module with a dotted name; the empty name is the model's."""
    place: Any = model
    for key in name.split(".") if name else ():
        place = place[int(key)] if isinstance(place, list) else place[key]
    return place
