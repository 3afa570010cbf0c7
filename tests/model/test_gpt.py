"""The model equals nanochat's of October 2025, written down once more in numpy.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.model import gpt
from mlxchat.model.gpt import GPT, rms_norm
from mlxchat.model.sizing import GPTSizes, sizes_from_depth
from mlxchat.model.weights import flatten_parameters, init_weights
from mlxchat.ops.cross_entropy import token_losses

MakeModel = Callable[..., GPT]


def numpy_norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + np.finfo(np.float32).eps)


def numpy_rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """y1 = x1 cos + x2 sin, y2 = −x1 sin + x2 cos over the two halves of each head; x is (B, T, H, D)."""
    tokens, half = x.shape[1], x.shape[3] // 2
    angle = np.outer(np.arange(tokens), theta ** (-np.arange(half) / half))[None, :, None]
    x1, x2 = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([x1 * cos + x2 * sin, -x1 * sin + x2 * cos], axis=-1)


def numpy_logits(model: GPT, ids: np.ndarray) -> np.ndarray:
    """Return nanochat's logits (B, T, V), in float64."""
    sizes = model.sizes
    w = {name: np.asarray(value, dtype=np.float64) for name, value in flatten_parameters(model).items()}
    batch, tokens = ids.shape
    x = numpy_norm(w["transformer.wte.weight"][ids])
    for layer in range(sizes.num_layers):
        name = f"transformer.h.{layer}"
        y = numpy_norm(x)
        q, k, v = (
            (y @ w[f"{name}.attn.{part}.weight"].T).reshape(batch, tokens, -1, sizes.head_width)
            for part in ("c_q", "c_k", "c_v")
        )
        q, k = (numpy_norm(numpy_rotate(part, sizes.rope_theta)) for part in (q, k))
        groups = sizes.num_heads // sizes.num_kv_heads
        k, v = k.repeat(groups, axis=2), v.repeat(groups, axis=2)
        scores = np.einsum("bthd,bshd->bhts", q, k) / math.sqrt(sizes.head_width)
        scores = np.where(np.tril(np.ones((tokens, tokens), dtype=bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("bhts,bshd->bthd", weights, v).reshape(batch, tokens, -1)
        x = x + out @ w[f"{name}.attn.c_proj.weight"].T
        inside = np.maximum(numpy_norm(x) @ w[f"{name}.mlp.c_fc.weight"].T, 0) ** 2
        x = x + inside @ w[f"{name}.mlp.c_proj.weight"].T
    return 15 * np.tanh(numpy_norm(x) @ w["lm_head.weight"].T / 15)


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 280, shape)


@pytest.mark.parametrize("tokens", [1, 40, 150])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_logits_equal_nanochat_in_numpy(make_model: MakeModel, num_heads: int, num_kv_heads: int, tokens: int) -> None:
    model = make_model(num_heads, num_kv_heads)
    ids = random_ids(2, tokens)
    # The agreement that nanochat's own float32 has with float64 on models of this kind.
    np.testing.assert_allclose(np.asarray(model(mx.array(ids))), numpy_logits(model, ids), atol=2e-4)


@pytest.mark.parametrize("theta", [100.0, 100_000.0])
def test_the_base_of_the_rotation_is_the_one_of_the_sizes(make_model: MakeModel, theta: float) -> None:
    model, ids = make_model(rope_theta=theta), random_ids(1, 60)
    np.testing.assert_allclose(np.asarray(model(mx.array(ids))), numpy_logits(model, ids), atol=2e-4)


def test_logits_are_float32_within_the_soft_cap(make_model: MakeModel) -> None:
    model = make_model()
    model.lm_head.weight = model.lm_head.weight * 1000
    logits = model(mx.array(random_ids(1, 20)))
    assert logits.dtype == mx.float32
    assert float(mx.abs(logits).max().item()) <= 15 * (1 + 1e-6)


def test_a_later_token_changes_no_earlier_logit(make_model: MakeModel) -> None:
    model, ids = make_model(), random_ids(1, 150)
    before = np.asarray(model(mx.array(ids)))
    ids[0, 130] = (ids[0, 130] + 1) % 280
    after = np.asarray(model(mx.array(ids)))
    np.testing.assert_array_equal(after[:, :130], before[:, :130])
    assert np.abs(after[:, 130:] - before[:, 130:]).max() > 1e-2


def test_the_norm_has_the_epsilon_of_float32() -> None:
    """At a mean square of 1e-7 an epsilon of 1e-5, as other ports have, would shrink the result tenfold."""
    x = np.full((1, 8), 1e-7**0.5, dtype=np.float32)
    np.testing.assert_allclose(np.asarray(rms_norm(mx.array(x))), numpy_norm(x.astype(np.float64)), rtol=1e-5)


def test_parameters_bear_nanochats_names(make_model: MakeModel) -> None:
    expected = {"transformer.wte.weight", "lm_head.weight"}
    for layer in range(3):
        expected |= {f"transformer.h.{layer}.attn.{part}.weight" for part in ("c_q", "c_k", "c_v", "c_proj")}
        expected |= {f"transformer.h.{layer}.mlp.{part}.weight" for part in ("c_fc", "c_proj")}
    assert set(flatten_parameters(make_model())) == expected


# Initial weights


@pytest.fixture(scope="module")
def fresh() -> GPT:
    """A model as training begins with it: d2, with a vocabulary of 1,000."""
    model = GPT(
        sizes_from_depth(
            2, vocab_size=1000, aspect_ratio=64, head_width=32, num_kv_heads=1, context_tokens=64, rope_theta=1e4
        )
    )
    init_weights(model, seed=1)
    return model


def test_projections_into_the_stream_and_the_head_start_at_zero(fresh: GPT) -> None:
    zero = {name for name, value in flatten_parameters(fresh).items() if not mx.any(value != 0).item()}
    assert zero == {
        "lm_head.weight",
        *(f"transformer.h.{layer}.{part}.c_proj.weight" for layer in (0, 1) for part in ("attn", "mlp")),
    }


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [("wte", 0, 0), ("h.0.attn.c_q", 128, 128), ("h.1.attn.c_k", 32, 128), ("h.1.mlp.c_fc", 512, 128)],
)
def test_initial_weights_are_normal_with_nanochats_deviation(fresh: GPT, name: str, rows: int, columns: int) -> None:
    weight = np.asarray(flatten_parameters(fresh)[f"transformer.{name}.weight"])
    deviation = 1.0 if name == "wte" else min(1, math.sqrt(rows / columns)) / math.sqrt(columns)
    # Four standard errors of the mean and of the deviation of so many draws.
    assert abs(weight.mean()) < 4 * deviation / math.sqrt(weight.size)
    assert weight.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * weight.size))


def test_a_seed_gives_the_same_weights_and_another_seed_others(fresh: GPT) -> None:
    same, other = GPT(fresh.sizes), GPT(fresh.sizes)
    init_weights(same, seed=1)
    init_weights(other, seed=2)
    first, again, different = (flatten_parameters(model) for model in (fresh, same, other))
    assert all(mx.array_equal(first[name], again[name]).item() for name in first)
    assert not mx.array_equal(first["transformer.wte.weight"], different["transformer.wte.weight"]).item()


def test_no_two_matrices_share_their_draws(fresh: GPT) -> None:
    weights = flatten_parameters(fresh)
    q, k = weights["transformer.h.0.attn.c_q.weight"], weights["transformer.h.1.attn.c_q.weight"]
    assert abs(float(np.corrcoef(np.asarray(q).ravel(), np.asarray(k).ravel())[0, 1])) < 0.05


def test_the_first_loss_is_the_logarithm_of_the_vocabulary(fresh: GPT) -> None:
    ids = mx.array(np.random.default_rng(0).integers(0, 1000, (2, 64)))
    losses = token_losses(fresh.hidden(ids).reshape(-1, 128), fresh.lm_head.weight, ids.reshape(-1))
    np.testing.assert_allclose(np.asarray(losses), math.log(1000), rtol=1e-6)


def test_sizes_reach_the_model(fresh: GPT) -> None:
    assert fresh.sizes == GPTSizes(
        vocab_size=1000, num_layers=2, num_heads=4, num_kv_heads=1, width=128, context_tokens=64, rope_theta=1e4
    )
