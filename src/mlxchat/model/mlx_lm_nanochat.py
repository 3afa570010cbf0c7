"""nanochat's transformer for mlx-lm, with whatever config.json switches on beyond October 2025.

mlx-lm's own `nanochat` is the model of October 2025 alone. This file travels with every other one as its `model_file`,
so mlx-lm builds it from here when it is told to trust the folder; it needs mlx and mlx-lm and nothing of mlxchat, which
never imports it.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

# Of nanochat: PyTorch's epsilon of a float32 norm, the cap of the logits, the channels that the gates look at.
_EPSILON, _SOFT_CAP, _VALUE_GATE_CHANNELS, _SMEAR_GATE_CHANNELS = 1.1920928955078125e-07, 15.0, 12, 24
_WINDOW_TILE = 128


@dataclass
class ModelArgs(BaseModelArgs):
    """What config.json says; the features default to October 2025."""

    architecture: str = "oct2025"
    model_type: str = "nanochat"
    hidden_size: int = 1280
    num_hidden_layers: int = 20
    num_attention_heads: int = 10
    num_key_value_heads: int = 10
    vocab_size: int = 65536
    max_position_embeddings: int = 2048
    intermediate_size: int = 5120
    rope_theta: float = 10000.0
    vocab_multiple: int = 1
    window_pattern: str = "L"
    short_window: int | None = None
    query_key_scale: float = 1.0
    value_embeddings: bool = False
    residual_scalars: bool = False
    smear: bool = False
    backout: bool = False

    def windows(self) -> list[int | None]:
        """Return for each layer how many tokens one sees, itself included; None: all of them."""
        long = None if self.architecture == "oct2025" else self.max_position_embeddings + 1
        short = (self.short_window or -(-self.max_position_embeddings // 4 // _WINDOW_TILE) * _WINDOW_TILE) + 1
        kinds = [self.window_pattern[layer % len(self.window_pattern)] for layer in range(self.num_hidden_layers)]
        return [short if kind == "S" else long for kind in kinds[:-1]] + [long]

    def has_value_embedding(self, layer: int) -> bool:
        """Tell whether a layer has a value embedding: every second one, the last included."""
        return self.value_embeddings and layer % 2 == (self.num_hidden_layers - 1) % 2


def _norm(x: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, None, _EPSILON)


class Attention(nn.Module):
    """Causal self-attention; queries and keys are rotated by minus the angle, then normalised."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        """Make the projections."""
        super().__init__()
        self.num_heads, self.num_kv_heads = args.num_attention_heads, args.num_key_value_heads
        self.head_width = args.hidden_size // args.num_attention_heads
        self.query_key_scale = args.query_key_scale
        kv_width = self.num_kv_heads * self.head_width
        self.c_q = nn.Linear(args.hidden_size, args.hidden_size, bias=False)
        self.c_k = nn.Linear(args.hidden_size, kv_width, bias=False)
        self.c_v = nn.Linear(args.hidden_size, kv_width, bias=False)
        self.c_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=False)
        if args.has_value_embedding(layer):
            self.ve_gate = nn.Linear(_VALUE_GATE_CHANNELS, self.num_kv_heads, bias=False)
        half = mx.arange(0, self.head_width, 2, dtype=mx.float32) / self.head_width
        self._wavelengths = -(args.rope_theta**half)

    def __call__(self, x: mx.array, value_embedding: mx.array | None, mask: Any, cache: Any) -> mx.array:
        """Return (B, T, C) of x (B, T, C) and what the layer's table says of each token (B, T, K D)."""
        batch, tokens, width = x.shape
        values = self.c_v(x).reshape(batch, tokens, self.num_kv_heads, self.head_width)
        if value_embedding is not None:
            gate = 3 * mx.sigmoid(self.ve_gate(x[..., :_VALUE_GATE_CHANNELS]))
            values = values + gate[..., None] * value_embedding.reshape(values.shape)
        offset = cache.offset if cache is not None else 0
        queries, keys = (
            self._rotate(projection(x).reshape(batch, tokens, heads, self.head_width).swapaxes(1, 2), offset)
            for projection, heads in ((self.c_q, self.num_heads), (self.c_k, self.num_kv_heads))
        )
        values = values.swapaxes(1, 2)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.head_width**-0.5, mask=mask
        )  # fmt: skip
        return self.c_proj(out.swapaxes(1, 2).reshape(batch, tokens, width))

    def _rotate(self, x: mx.array, offset: Any) -> mx.array:
        x = mx.fast.rope(
            x, self.head_width, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._wavelengths
        )
        return self.query_key_scale * _norm(x)


class MLP(nn.Module):
    """Two layers, four times as wide inside, with a squared ReLU."""

    def __init__(self, args: ModelArgs) -> None:
        """Make the two projections."""
        super().__init__()
        self.c_fc = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.c_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Return (B, T, C)."""
        return self.c_proj(nn.relu2(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each on the normalised stream and added to it."""

    def __init__(self, args: ModelArgs, layer: int) -> None:
        """Make one layer."""
        super().__init__()
        self.attn, self.mlp = Attention(args, layer), MLP(args)

    def __call__(self, x: mx.array, value_embedding: mx.array | None, mask: Any, cache: Any) -> mx.array:
        """Return (B, T, C)."""
        x = x + self.attn(_norm(x), value_embedding, mask, cache)
        return x + self.mlp(_norm(x))


class Model(nn.Module):
    """The whole model; `cache` is what `make_cache` returns."""

    def __init__(self, args: ModelArgs) -> None:
        """Make the layers."""
        super().__init__()
        self.args, self.model_type = args, args.model_type
        rows = -(-args.vocab_size // args.vocab_multiple) * args.vocab_multiple
        num_layers, kv_width = args.num_hidden_layers, args.hidden_size // args.num_attention_heads
        kv_width *= args.num_key_value_heads
        self.transformer: dict[str, Any] = {
            "wte": nn.Embedding(rows, args.hidden_size),
            "h": [Block(args, layer) for layer in range(num_layers)],
        }
        self.lm_head = nn.Linear(args.hidden_size, rows, bias=False)
        if args.value_embeddings:  # a list with gaps, so that each table keeps its layer's number
            self.value_embeds = [
                nn.Embedding(rows, kv_width) if args.has_value_embedding(layer) else nn.Identity()
                for layer in range(num_layers)
            ]
        if args.residual_scalars:
            self.resid_lambdas, self.x0_lambdas = mx.ones(num_layers), mx.zeros(num_layers)
        if args.smear:
            self.smear_gate, self.smear_lambda = nn.Linear(_SMEAR_GATE_CHANNELS, 1, bias=False), mx.zeros(1)
        if args.backout:
            self.backout_lambda = mx.zeros(1)

    @property
    def layers(self) -> list[Block]:
        """The blocks."""
        blocks: list[Block] = self.transformer["h"]
        return blocks

    def make_cache(self) -> list[Any]:
        """Return the past of each layer, and last the smear's: the embedding before the next one."""
        past = [KVCache() if window is None else RotatingKVCache(window) for window in self.args.windows()]
        return [*past, ArraysCache(1)] if self.args.smear else past

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Return soft-capped logits (B, T, V) in float32 of token ids (B, T)."""
        args, middle = self.args, None
        x = _norm(self.transformer["wte"](inputs))
        past = cache if cache is not None else [None] * (len(self.layers) + 1)
        if args.smear:
            x = self._smear(x, past[-1])
        first, masks = x, self._masks(x, past)
        for layer, block in enumerate(self.layers):
            if args.residual_scalars:
                x = self.resid_lambdas[layer].astype(x.dtype) * x + self.x0_lambdas[layer].astype(x.dtype) * first
            value_embedding = self.value_embeds[layer](inputs) if args.has_value_embedding(layer) else None
            x = block(x, value_embedding, masks[layer], past[layer])
            if layer == args.num_hidden_layers // 2:
                middle = x
        if args.backout and middle is not None:
            x = x - self.backout_lambda.astype(x.dtype) * middle
        logits = self.lm_head(_norm(x))[..., : args.vocab_size].astype(mx.float32)
        return _SOFT_CAP * mx.tanh(logits / _SOFT_CAP)

    def _masks(self, x: mx.array, past: list[Any]) -> list[Any]:
        """Return each layer's mask; layers of a kind share one."""
        windows = self.args.windows()
        made = {
            window: create_attention_mask(x, past[windows.index(window)], window_size=window) for window in set(windows)
        }
        return [made[window] for window in windows]

    def _smear(self, x: mx.array, past: Any) -> mx.array:
        """Add to each embedding a gated share of the one before it; a row's first has none before it."""
        kept = past.make_mask(x.shape[1]) if past is not None else None
        if kept is not None:
            x = mx.where(kept[..., None], x, 0)  # what pads a batch of rows stands before nothing
        last = past[0] if past is not None and past[0] is not None else mx.zeros_like(x[:, :1])
        before = mx.concatenate([last.astype(x.dtype), x[:, :-1]], axis=1)
        if past is not None:
            ends = mx.full((len(x),), x.shape[1])
            if past.lengths is not None:
                ends = mx.clip(past.lengths, 0, x.shape[1])
            # The last real embedding of each row, or, if it had none here, what was kept before.
            past[0] = mx.take_along_axis(mx.concatenate([last.astype(x.dtype), x], axis=1), ends[:, None, None], axis=1)
            past.advance(x.shape[1])
        gate = self.smear_lambda.astype(x.dtype) * mx.sigmoid(self.smear_gate(x[..., :_SMEAR_GATE_CHANNELS]))
        return x + gate * before
