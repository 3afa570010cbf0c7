"""nanochat's transformer in its two published architectures. Counterpart of nanochat/gpt.py, with its parameter names.

October 2025: rotary embedding, RMS norm without weights, QK norm, squared-ReLU MLP, untied embedding and head, no
biases, soft-capped logits. July 2026 adds, each optional in `GPTSizes`: gated value embeddings, sliding windows, learnt
residual scalars, smear and backout.

Training, evaluation, chat and serving run this file, and it needs nothing but MLX: model folders carry it as their
`model_file`, from which mlx-lm builds the model. A cache has one object per layer with mlx-lm's interface (`offset`,
`update_and_fetch`, `make_mask`), and after these, if the model smears, one with the last embedding.

Shapes: B batch, T tokens, S cached tokens, C width, H query heads, K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from mlxchat.model.sizes import GPTSizes

# float32's machine epsilon: what torch's F.rms_norm(eps=None) uses, so what nanochat's weights were trained with.
RMS_NORM_EPSILON = 1.1920929e-07
SOFT_CAP = 15.0
Mask = mx.array | str | None
"""An array that is added to the scores, or booleans; 'causal'; None: everything is visible."""


def dropout(x: mx.array, place: int) -> mx.array:
    """Return x. The package replaces this by `ops.dropout.dropout`, which acts while a training asks for it."""
    return x


def rms_norm(x: mx.array) -> mx.array:
    """Return x divided by the root of its mean square over the last axis."""
    return mx.fast.rms_norm(x, None, RMS_NORM_EPSILON)


def rotate_and_normalise(x: mx.array, *, offset: int | mx.array, theta: float) -> mx.array:
    """Return heads (B, H, T, D), RMS-normalised and rotated by minus their position's angles.

    nanochat rotates by −θ, halves x1, x2 → x1 cos + x2 sin, x2 cos − x1 sin, and normalises afterwards, which is the
    same except for rounding: a rotation keeps the mean square. `x` are projected queries or keys (B, T, H, D), `offset`
    the position of the first token, of the batch or of each row (B,), `theta` the base of the wavelengths.
    """
    heads = rms_norm(x).swapaxes(1, 2)
    # A scale of −1 on the positions turns MLX's rotation by θ into nanochat's.
    return mx.fast.rope(heads, heads.shape[-1], traditional=False, base=theta, scale=-1.0, offset=offset)


def window_mask(tokens: int, window: int | None, dtype: mx.Dtype) -> Mask:
    """Return the mask of a row of tokens in which each sees itself and `window` earlier ones (None: all).

    As an array it is additive (T, T): booleans would become a (B, H, T, T) array per layer on CUDA.
    """
    if window is None or window >= tokens:
        return "causal"
    query, key = mx.arange(tokens)[:, None], mx.arange(tokens)
    return mx.where((key <= query) & (key >= query - window), 0.0, -mx.inf).astype(dtype)


def attention(q: mx.array, k: mx.array, v: mx.array, mask: Mask, scale: float) -> mx.array:
    """Return softmax(scale × q kᵀ + mask) v (B, T, H, D) of q (B, H, T, D), k and v (B, K, S, D); K divides H."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask).swapaxes(1, 2)


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """Return x Wᵀ (…, C) of x (…, F) and W (C, F)."""
    return x @ weight.T


@partial(mx.compile, shapeless=True)
def squared_relu(x: mx.array) -> mx.array:
    """Return max(x, 0)²."""
    return mx.square(mx.maximum(x, 0))


# Fused, and in float32: in bfloat16 a scalar of 1.15 would be 1.1484, and the sum of its gradient coarse.


@partial(mx.compile, shapeless=True)
def blend(x: mx.array, first: mx.array, stay: mx.array | float, again: mx.array) -> mx.array:
    """Return stay × x + again × first, in the dtype of x."""
    return (x.astype(mx.float32) * stay + first.astype(mx.float32) * again).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def add_gated(x: mx.array, more: mx.array, gate: mx.array, factor: mx.array | float) -> mx.array:
    """Return x + factor × sigmoid(gate) × more, in the dtype of x."""
    return (x.astype(mx.float32) + factor * mx.sigmoid(gate.astype(mx.float32)) * more).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def soft_cap(logits: mx.array) -> mx.array:
    """Return 15 tanh(logits / 15) in float32, nanochat's soft cap."""
    return SOFT_CAP * mx.tanh(logits.astype(mx.float32) / SOFT_CAP)


class Linear(nn.Linear):
    """A linear layer without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Return x Wᵀ (…, C) of x (…, F)."""
        return linear(x, self.weight)

    @property
    def matrix(self) -> mx.array:
        """W (C, F)."""
        weight: mx.array = self.weight
        return weight


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, sizes: GPTSizes, layer: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.scale = sizes.query_key_scale**2 * sizes.head_width**-0.5
        self.c_q = Linear(sizes.width, sizes.width)
        self.c_k = Linear(sizes.width, sizes.kv_width)
        self.c_v = Linear(sizes.width, sizes.kv_width)
        self.c_proj = Linear(sizes.width, sizes.width)
        if layer in sizes.value_embedding_layers:
            self.ve_gate = nn.Linear(sizes.value_gate_channels, sizes.num_kv_heads, bias=False)

    def __call__(self, x: mx.array, value_embedding: mx.array | None, mask: Mask, past: Any = None) -> mx.array:
        """Return (B, T, C) of x (B, T, C), the tokens' value embeddings (B, T, K D) and the layer's cache."""
        (B, T, C), sizes = x.shape, self.sizes
        q = self.c_q(x).reshape(B, T, -1, sizes.head_width)  # (B, T, H, D)
        k = self.c_k(x).reshape(B, T, -1, sizes.head_width)  # (B, T, K, D)
        v = self.c_v(x).reshape(B, T, -1, sizes.head_width)
        if value_embedding is not None:
            gate = self.ve_gate(x[..., : sizes.value_gate_channels])  # (B, T, K)
            v = add_gated(v, value_embedding.reshape(v.shape), gate[..., None], 3.0)
        offset = 0 if past is None else past.offset
        q = rotate_and_normalise(q, offset=offset, theta=sizes.rope_theta)  # (B, H, T, D)
        k = rotate_and_normalise(k, offset=offset, theta=sizes.rope_theta)  # (B, K, T, D)
        v = v.swapaxes(1, 2)
        if past is not None:
            k, v = past.update_and_fetch(k, v)  # (B, K, S, D)
        return self.c_proj(attention(q, k, v, mask, self.scale).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers, four times as wide inside."""

    def __init__(self, sizes: GPTSizes) -> None:
        super().__init__()
        self.c_fc = Linear(sizes.width, 4 * sizes.width)
        self.c_proj = Linear(4 * sizes.width, sizes.width)

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, T, C)."""
        return self.c_proj(squared_relu(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream and added to it."""

    def __init__(self, sizes: GPTSizes, layer: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(sizes, layer), MLP(sizes)
        self.layer = layer

    def __call__(self, x: mx.array, value_embedding: mx.array | None, mask: Mask, past: Any = None) -> mx.array:
        """Return (B, T, C); arguments as for `Attention`, but x is not normalised."""
        x = x + dropout(self.attn(rms_norm(x), value_embedding, mask, past), place=2 * self.layer + 1)
        return x + dropout(self.mlp(rms_norm(x)), place=2 * self.layer + 2)


class GPT(nn.Module):
    """The whole model. Calling it returns logits; `hidden` returns the final states, for losses."""

    run_layer = staticmethod(lambda layer, *inputs: layer(*inputs))
    """How a layer is called; `recompute.recomputed` keeps only its inputs for the gradient."""

    def __init__(self, sizes: GPTSizes) -> None:
        """Create the layers; weights are MLX's defaults until `init_weights` or a checkpoint sets them."""
        super().__init__()
        self.sizes = sizes
        layers, rows = range(sizes.num_layers), sizes.padded_vocab_size
        self.transformer: dict[str, Any] = {
            "wte": nn.Embedding(rows, sizes.width),
            "h": [Block(sizes, layer) for layer in layers],
        }
        self.lm_head = Linear(sizes.width, rows)
        if sizes.value_embedding_layers:  # a list with gaps, so that each table keeps its layer's number
            with_table = sizes.value_embedding_layers
            self.value_embeds = [
                nn.Embedding(rows, sizes.kv_width) if layer in with_table else nn.Identity() for layer in layers
            ]
        if sizes.residual_scalars:
            self.resid_lambdas, self.x0_lambdas = mx.ones(sizes.num_layers), mx.zeros(sizes.num_layers)
        if sizes.smear:
            self.smear_gate, self.smear_lambda = nn.Linear(sizes.smear_gate_channels, 1, bias=False), mx.zeros(1)
        if sizes.backout:
            self.backout_lambda = mx.zeros(1)

    def __call__(self, ids: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Return soft-capped logits (B, T, V) in float32 of token ids (B, T), which follow the cached ones."""
        return self.logits(self.hidden(ids, cache))

    def hidden(self, ids: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Return the final normalised states (B, T, C) of token ids (B, T), which follow the cached ones."""
        sizes, middle = self.sizes, None
        x = self.embed(ids)
        if sizes.smear:
            x = self.smeared(x, None if cache is None else cache[-1])
        x = first = dropout(x, place=0)
        masks = self.masks(x, cache)
        if sizes.residual_scalars:
            stay, again = mx.split(self.resid_lambdas, sizes.num_layers), mx.split(self.x0_lambdas, sizes.num_layers)
        for layer, block in enumerate(self.transformer["h"]):
            if sizes.residual_scalars:
                x = blend(x, first, stay[layer], again[layer])
            value_embedding = self.value_embeds[layer](ids) if layer in sizes.value_embedding_layers else None
            x = self.run_layer(block, x, value_embedding, masks[layer], None if cache is None else cache[layer])
            if layer == sizes.num_layers // 2:
                middle = x
        if sizes.backout and middle is not None:
            x = blend(x, middle, 1.0, -self.backout_lambda)
        return rms_norm(x)

    def logits(self, hidden: mx.array) -> mx.array:
        """Return soft-capped logits (…, V) in float32 of final states (…, C)."""
        logits = self.lm_head(hidden)
        return soft_cap(logits[..., : self.sizes.vocab_size])

    def embed(self, ids: mx.array) -> mx.array:
        """Return the normalised embeddings (…, C) of token ids."""
        return rms_norm(self.transformer["wte"](ids))

    def smeared(self, x: mx.array, past: Any) -> mx.array:
        """Return x (B, T, C) plus a gated share of the embedding before each; a row's first has none before it."""
        if past is not None and (real := past.make_mask(x.shape[1])) is not None:
            x = mx.where(real[..., None], x, 0)  # padding stands before nothing
        last = mx.zeros_like(x[:, :1]) if past is None or past[0] is None else past[0]
        ahead = mx.concatenate([last.astype(x.dtype), x], axis=1)
        if past is not None:
            if past.lengths is None:
                past[0] = ahead[:, -1:]
            else:  # the last real embedding of each row
                ends = mx.clip(past.lengths, 0, x.shape[1])
                past[0] = mx.take_along_axis(ahead, ends[:, None, None], axis=1)
            past.advance(x.shape[1])
        gate = self.smear_gate(x[..., : self.sizes.smear_gate_channels])  # (B, T, 1)
        return add_gated(x, ahead[:, :-1], gate, self.smear_lambda)

    def masks(self, x: mx.array, cache: list[Any] | None) -> list[Mask]:
        """Return the mask of each layer for x (B, T, C); layers with equal windows share one."""
        windows, tokens = list(self.sizes.windows), x.shape[1]
        made: dict[int | None, Mask] = {}
        for layer, window in enumerate(windows):
            if window in made:
                continue
            if cache is None:
                made[window] = window_mask(tokens, window, x.dtype)
            else:  # mlx-lm's windows include the token itself
                made[window] = cache[layer].make_mask(tokens, window_size=None if window is None else window + 1)
        return [made[window] for window in windows]

    def tables(self) -> list[str]:
        """Return the names of the embedding modules."""
        return ["transformer.wte", *(f"value_embeds.{layer}" for layer in self.sizes.value_embedding_layers)]

    @property
    def head_weight(self) -> mx.array:
        """The head (V, C) without padding rows."""
        weight: mx.array = self.lm_head.matrix
        return weight if len(weight) == self.sizes.vocab_size else weight[: self.sizes.vocab_size]

    # What mlx-lm asks of a model file

    @property
    def layers(self) -> list[Block]:
        """The blocks."""
        blocks: list[Block] = self.transformer["h"]
        return blocks

    @property
    def args(self) -> GPTSizes:
        """The sizes."""
        return self.sizes

    def make_cache(self) -> list[Any]:
        """Return mlx-lm's caches of an empty row."""
        from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

        windows = self.sizes.windows
        caches = [KVCache() if window is None else RotatingKVCache(window + 1) for window in windows]
        return [*caches, ArraysCache(1)] if self.sizes.smear else caches


class ModelArgs(SimpleNamespace):
    """What config.json says under 'sizes': every attribute of `GPTSizes` that this file reads."""

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """Return the sizes of a config.json; mlx-lm calls this."""
        return cls(**config["sizes"], model_type=config["model_type"])


Model = GPT
