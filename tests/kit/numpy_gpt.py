"""nanochat's two transformers in NumPy and float64, written after its code: an oracle for ours."""

import math

import numpy as np

from mlxchat.model.gpt import GPT, flatten_parameters
from mlxchat.model.sizes import GPTSizes


def numpy_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + np.finfo(np.float32).eps)


def numpy_rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """y1 = x1 cos + x2 sin, y2 = −x1 sin + x2 cos over the two halves of each head; x is (B, T, H, D)."""
    tokens, half = x.shape[1], x.shape[3] // 2
    angle = np.outer(np.arange(tokens), theta ** (-np.arange(half) / half))[None, :, None]
    x1, x2 = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([x1 * cos + x2 * sin, -x1 * sin + x2 * cos], axis=-1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def numpy_windows(sizes: GPTSizes) -> list[int]:
    """Return how far back each layer sees: a quarter of the context in whole 128s where S stands, never the last.

    October 2025 has no windows; L is `sequence_len` tokens in July 2026, also where the input is longer.
    """
    letters = (sizes.window_pattern * sizes.num_layers)[: sizes.num_layers - 1] + "L"
    long = 10**9 if sizes.architecture == "oct2025" else sizes.context_tokens
    short = sizes.short_window or 128 * math.ceil(sizes.context_tokens / 4 / 128)
    return [long if letter == "L" else short for letter in letters]


def weights_of(model: GPT) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, dtype=np.float64) for name, value in flatten_parameters(model).items()}


def numpy_logits(model: GPT, ids: np.ndarray, weights: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """Return nanochat's logits (B, T, V), in float64; those of July 2026 if the model has its scalars."""
    sizes, w = model.sizes, weights or weights_of(model)
    is_new, scale = "resid_lambdas" in w, 1.2 if "resid_lambdas" in w else 1.0
    batch, tokens = ids.shape
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    x = numpy_norm(w["transformer.wte.weight"][ids])
    if is_new:
        gate = w["smear_lambda"] * sigmoid(x[:, 1:, :24] @ w["smear_gate.weight"].T)
        x = np.concatenate([x[:, :1], x[:, 1:] + gate * x[:, :-1]], axis=1)
    first, middle = x, 0.0
    for layer in range(sizes.num_layers):
        name = f"transformer.h.{layer}"
        if is_new:
            x = w["resid_lambdas"][layer] * x + w["x0_lambdas"][layer] * first
        y = numpy_norm(x)
        q, k, v = (
            (y @ w[f"{name}.attn.{part}.weight"].T).reshape(batch, tokens, -1, sizes.head_width)
            for part in ("c_q", "c_k", "c_v")
        )
        if is_new and (sizes.num_layers - 1 - layer) % 2 == 0:
            embedding = w[f"value_embeds.{layer}.weight"][ids].reshape(v.shape)
            v = v + 3 * sigmoid(y[..., :12] @ w[f"{name}.attn.ve_gate.weight"].T)[..., None] * embedding
        q, k = (scale * numpy_norm(numpy_rotate(part, sizes.rope_theta)) for part in (q, k))
        groups = sizes.num_heads // sizes.num_kv_heads
        k, v = k.repeat(groups, axis=2), v.repeat(groups, axis=2)
        scores = np.einsum("bthd,bshd->bhts", q, k) / math.sqrt(sizes.head_width)
        scores = np.where((distance >= 0) & (distance <= numpy_windows(sizes)[layer]), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("bhts,bshd->bthd", weights, v).reshape(batch, tokens, -1)
        x = x + out @ w[f"{name}.attn.c_proj.weight"].T
        inside = np.maximum(numpy_norm(x) @ w[f"{name}.mlp.c_fc.weight"].T, 0) ** 2
        x = x + inside @ w[f"{name}.mlp.c_proj.weight"].T
        if is_new and layer == sizes.num_layers // 2:
            middle = w["backout_lambda"] * x
    return 15 * np.tanh((numpy_norm(x - middle) @ w["lm_head.weight"].T)[..., : sizes.vocab_size] / 15)
