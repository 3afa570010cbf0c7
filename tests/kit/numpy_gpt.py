"""nanochat's transformers in NumPy and float64: an oracle for ours, written after nanochat/gpt.py."""

import math
from typing import Any

import numpy as np

from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters
from mlxchat.model.sizes import GPTSizes

Array = np.ndarray[Any, np.dtype[Any]]


def norm(x: Array) -> Array:
    """Return x (…, C) divided by its root mean square."""
    normalised: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + np.finfo(np.float32).eps)
    return normalised


def rotate(x: Array, theta: float) -> Array:
    """Return heads x (B, T, H, D) rotated by minus their positions: (x1 cos + x2 sin, x2 cos − x1 sin) by halves."""
    tokens, half = x.shape[1], x.shape[3] // 2
    angle = np.outer(np.arange(tokens), theta ** (-np.arange(half) / half))[None, :, None]
    x1, x2 = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    return np.concatenate([x1 * cos + x2 * sin, -x1 * sin + x2 * cos], axis=-1)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _windows(sizes: GPTSizes) -> list[int]:
    """Return the number of earlier tokens that each layer sees; the last layer is never short."""
    letters = (sizes.window_pattern * sizes.num_layers)[: sizes.num_layers - 1] + "L"
    long = 10**9 if sizes.architecture == "oct2025" else sizes.context_tokens
    short = sizes.short_window or 128 * math.ceil(sizes.context_tokens / 4 / 128)
    return [long if letter == "L" else short for letter in letters]


def weights_of(model: GPT) -> dict[str, Array]:
    return {name: np.asarray(value, dtype=np.float64) for name, value in flatten_parameters(model).items()}


def numpy_logits(model: GPT, ids: Array, weights: dict[str, Array] | None = None) -> Array:
    """Return nanochat's soft-capped logits (B, T, V) of ids (B, T), in float64."""
    sizes, weight = model.sizes, (weights or weights_of(model)).__getitem__
    batch, tokens = ids.shape
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    x = norm(weight("transformer.wte.weight")[ids])
    if sizes.smear:
        gate = weight("smear_lambda") * _sigmoid(x[:, 1:, :24] @ weight("smear_gate.weight").T)
        x = np.concatenate([x[:, :1], x[:, 1:] + gate * x[:, :-1]], axis=1)
    first, middle = x, np.zeros(1, x.dtype)
    for layer, window in enumerate(_windows(sizes)):
        name = f"transformer.h.{layer}"
        if sizes.residual_scalars:
            x = weight("resid_lambdas")[layer] * x + weight("x0_lambdas")[layer] * first
        y = norm(x)
        q, k, v = (
            (y @ weight(f"{name}.attn.{part}.weight").T).reshape(batch, tokens, -1, sizes.head_width)
            for part in ("c_q", "c_k", "c_v")
        )
        if sizes.value_embeddings and (sizes.num_layers - 1 - layer) % 2 == 0:
            embedding = weight(f"value_embeds.{layer}.weight")[ids].reshape(v.shape)
            v = v + 3 * _sigmoid(y[..., :12] @ weight(f"{name}.attn.ve_gate.weight").T)[..., None] * embedding
        q, k = (sizes.query_key_scale * norm(rotate(part, sizes.rope_theta)) for part in (q, k))
        groups = sizes.num_heads // sizes.num_kv_heads
        k, v = k.repeat(groups, axis=2), v.repeat(groups, axis=2)
        scores = np.einsum("bthd,bshd->bhts", q, k) / math.sqrt(sizes.head_width)
        scores = np.where((distance >= 0) & (distance <= window), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        out = np.einsum("bhts,bshd->bthd", shares, v).reshape(batch, tokens, -1)
        x = x + out @ weight(f"{name}.attn.c_proj.weight").T
        inside = np.maximum(norm(x) @ weight(f"{name}.mlp.c_fc.weight").T, 0) ** 2
        x = x + inside @ weight(f"{name}.mlp.c_proj.weight").T
        if sizes.backout and layer == sizes.num_layers // 2:
            middle = weight("backout_lambda") * x
    return 15 * np.tanh((norm(x - middle) @ weight("lm_head.weight").T)[..., : sizes.vocab_size] / 15)
