"""The transformer of nanochat's published speedrun (October 2025), forward only.

Rotary positions, RMS norm without weights, norm of queries and keys after the rotation, squared-ReLU MLP, untied
embedding and head, no biases, soft-capped logits. Counterpart of nanochat/gpt.py; parameters bear its names.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxchat.model.sizing import GPTSizes
from mlxchat.ops.attention import causal_attention
from mlxchat.ops.compiled import compiled, differentiable
from mlxchat.ops.cross_entropy import soft_cap
from mlxchat.ops.device import backend
from mlxchat.ops.formulas import squared_relu

# float32's machine epsilon: what torch's F.rms_norm(eps=None) uses, so what nanochat's weights were trained with.
RMS_NORM_EPSILON = 1.1920929e-07


class LayerCache(Protocol):
    """Keys and values of one layer's past."""

    @property
    def offset(self) -> int:
        """Tokens already cached."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Append k and v (B, K, T, D) and return the attention of q (B, H, T, D) over everything cached."""


def rms_norm(x: mx.array) -> mx.array:
    """Return x divided by the root of its mean square over the last axis."""
    return mx.fast.rms_norm(x, None, RMS_NORM_EPSILON)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, sizes: GPTSizes) -> None:
        """Make the four projections; their weights come from `init_weights`."""
        super().__init__()
        self.num_heads, self.num_kv_heads = sizes.num_heads, sizes.num_kv_heads
        self.rope_theta = sizes.rope_theta
        kv_width = sizes.num_kv_heads * sizes.head_width
        self.c_q = nn.Linear(sizes.width, sizes.width, bias=False)
        self.c_k = nn.Linear(sizes.width, kv_width, bias=False)
        self.c_v = nn.Linear(sizes.width, kv_width, bias=False)
        self.c_proj = nn.Linear(sizes.width, sizes.width, bias=False)

    def __call__(self, x: mx.array, cache: LayerCache | None = None) -> mx.array:
        """Return (B, T, C)."""
        batch, tokens, width = x.shape
        offset = cache.offset if cache is not None else 0
        q = self._split_heads(self.c_q(x), self.num_heads)
        k = self._split_heads(self.c_k(x), self.num_kv_heads)
        v = self._split_heads(self.c_v(x), self.num_kv_heads)
        q, k = rms_norm(self._rotate(q, offset)), rms_norm(self._rotate(k, offset))
        out = causal_attention(q, k, v) if cache is None else cache.attend(q, k, v)
        return self.c_proj(out.transpose(0, 2, 1, 3).reshape(batch, tokens, width))

    def _split_heads(self, x: mx.array, heads: int) -> mx.array:
        """(B, T, H D) → (B, H, T, D)."""
        return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(0, 2, 1, 3)

    def _rotate(self, x: mx.array, offset: int) -> mx.array:
        """Rotate by minus theta, nanochat's sense, which a scale of −1 on the positions gives."""
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=self.rope_theta, scale=-1.0, offset=offset)


class MLP(nn.Module):
    """Two layers, four times as wide inside, with a squared ReLU."""

    def __init__(self, sizes: GPTSizes) -> None:
        """Make the two projections."""
        super().__init__()
        self.c_fc = nn.Linear(sizes.width, 4 * sizes.width, bias=False)
        self.c_proj = nn.Linear(4 * sizes.width, sizes.width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, T, C)."""
        return self.c_proj(_activate(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream and added to it."""

    def __init__(self, sizes: GPTSizes) -> None:
        """Make one layer."""
        super().__init__()
        self.attn = Attention(sizes)
        self.mlp = MLP(sizes)

    def __call__(self, x: mx.array, cache: LayerCache | None = None) -> mx.array:
        """Return (B, T, C)."""
        x = x + self.attn(rms_norm(x), cache)
        return x + self.mlp(rms_norm(x))


class GPT(nn.Module):
    """The whole model. `hidden` gives the states that a loss needs, calling it gives logits."""

    def __init__(self, sizes: GPTSizes) -> None:
        """Make the layers; weights are MLX's defaults until `init_weights` or a checkpoint sets them."""
        super().__init__()
        self.sizes = sizes
        self.transformer: dict[str, Any] = {
            "wte": nn.Embedding(sizes.vocab_size, sizes.width),
            "h": [Block(sizes) for _ in range(sizes.num_layers)],
        }
        self.lm_head = nn.Linear(sizes.width, sizes.vocab_size, bias=False)

    def hidden(self, ids: mx.array, caches: Sequence[LayerCache] | None = None) -> mx.array:
        """Return the final normalised states (B, T, C) of token ids (B, T)."""
        x = rms_norm(self.transformer["wte"](ids))
        for index, block in enumerate(self.transformer["h"]):
            x = block(x, caches[index] if caches is not None else None)
        return rms_norm(x)

    def __call__(self, ids: mx.array, caches: Sequence[LayerCache] | None = None) -> mx.array:
        """Return soft-capped logits (B, T, V) in float32 of token ids (B, T)."""
        return soft_cap(self.lm_head(self.hidden(ids, caches)))


def init_weights(model: GPT, seed: int) -> None:
    """Draw nanochat's initial weights from `seed`, the same on every backend.

    Embedding N(0, 1); linear layers N(0, s²) with s = min(1, sqrt(out/in)) / sqrt(in) (arXiv 2310.17813); the
    projections back into the stream and the head start at zero.
    """
    parameters = flatten_parameters(model)
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    for index, (name, value) in enumerate(parameters.items()):
        if name.endswith("c_proj.weight") or name == "lm_head.weight":
            parameters[name] = mx.zeros_like(value)
            continue
        rows, columns = value.shape
        deviation = 1.0 if "wte" in name else min(1.0, (rows / columns) ** 0.5) / columns**0.5
        parameters[name] = deviation * mx.random.normal(value.shape, key=keys[index])
    set_parameters(model, parameters)


def flatten_parameters(model: nn.Module) -> dict[str, mx.array]:
    """Return a model's parameters by dotted name."""
    return cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))


def set_parameters(model: nn.Module, parameters: Mapping[str, mx.array]) -> None:
    """Replace a model's parameters by dotted name."""
    model.update(tree_unflatten(dict(parameters)))


_squared_relu = compiled(squared_relu)


def _activate(x: mx.array) -> mx.array:
    if backend() == "cpu":
        return _compiled_activation(x)
    return mx.square(nn.relu(x))


@differentiable
def _compiled_activation(x: mx.array) -> mx.array:
    return _squared_relu(x)


@_compiled_activation.vjp
def _activation_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    return _activation_gradient(x, cotangent)


@compiled
def _activation_gradient(x: mx.array, cotangent: mx.array) -> mx.array:
    return (x + mx.abs(x)) * cotangent
