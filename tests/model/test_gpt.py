"""The model equals nanochat's of October 2025 and of July 2026, written down once more in numpy.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.model.gpt import GPT, rms_norm
from mlxchat.model.sizing import GPTSizes, sizes_from_depth
from mlxchat.model.weights import flatten_parameters, init_weights, set_parameters
from mlxchat.ops.cross_entropy import cross_entropy_sum, token_losses

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


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def numpy_windows(sizes: GPTSizes) -> list[int]:
    """Return how far back each layer sees: a quarter of the context in whole 128s where S stands, never the last."""
    letters = (sizes.window_pattern * sizes.num_layers)[: sizes.num_layers - 1] + "L"
    return [10**9 if letter == "L" else 128 * math.ceil(sizes.context_tokens / 4 / 128) for letter in letters]


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


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 280, shape)


@pytest.mark.parametrize("tokens", [1, 40, 150, 300])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_logits_equal_nanochat_in_numpy(
    make_model: MakeModel, architecture: str, num_heads: int, num_kv_heads: int, tokens: int
) -> None:
    """The short windows of July 2026 are 128 tokens here, and its tables have 320 rows for 280 tokens."""
    model = make_model(num_heads, num_kv_heads, architecture=architecture)
    ids = random_ids(2, tokens)
    # The agreement that nanochat's own float32 has with float64 on models of this kind.
    np.testing.assert_allclose(np.asarray(model(mx.array(ids))), numpy_logits(model, ids), atol=2e-4)


@pytest.mark.parametrize(
    ("num_layers", "pattern", "context_tokens"), [(1, "S", 64), (2, "S", 64), (4, "LS", 64), (5, "SSL", 700)]
)
def test_windows_follow_the_pattern_of_any_depth(
    make_model: MakeModel, num_layers: int, pattern: str, context_tokens: int
) -> None:
    model = make_model(
        architecture="jul2026", num_layers=num_layers, window_pattern=pattern, context_tokens=context_tokens
    )
    ids = random_ids(1, 400)
    np.testing.assert_allclose(np.asarray(model(mx.array(ids))), numpy_logits(model, ids), atol=2e-4)


def test_a_token_beyond_the_window_reaches_a_short_layer_no_more(make_model: MakeModel) -> None:
    """Two layers, the first short: its outcome at 200 sees 72 … 200, the smear one more, the second layer all."""
    model = make_model(architecture="jul2026", num_layers=2, window_pattern="S")
    zeros = {"transformer.h.1.attn.c_proj.weight", "transformer.h.1.mlp.c_proj.weight"}
    set_parameters(model, {name: mx.zeros_like(flatten_parameters(model)[name]) for name in zeros})
    ids = random_ids(1, 210)
    before = np.asarray(model(mx.array(ids)))
    ids[0, 70] = (ids[0, 70] + 1) % 280
    after = np.asarray(model(mx.array(ids)))
    np.testing.assert_array_equal(after[:, 200:], before[:, 200:])
    assert np.abs(after[:, 199] - before[:, 199]).max() > 1e-4


@pytest.mark.parametrize("num_kv_heads", [4, 1])
@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_gradients_of_the_loss_equal_central_differences(
    make_model: MakeModel, architecture: str, num_kv_heads: int
) -> None:
    """Of every parameter, along its gradient and across it; differences are those of the loss in float64."""
    model, ids = make_model(4, num_kv_heads, architecture=architecture), random_ids(1, 141)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    weights, rng, parameters = weights_of(model), np.random.default_rng(1), flatten_parameters(model)

    def loss_of(masters: dict[str, mx.array]) -> mx.array:
        set_parameters(model, masters)
        hidden = model.hidden(mx.array(inputs)).reshape(-1, 32)
        return cross_entropy_sum(hidden, model.head_weight, mx.array(targets.reshape(-1)), mx.full(140, 1 / 140))

    def numpy_loss(name: str, value: np.ndarray) -> float:
        logits = numpy_logits(model, inputs, weights | {name: value})[0]
        losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[0][:, None], axis=-1)[:, 0]
        return float(losses.mean())

    gradients = mx.grad(loss_of)(parameters)
    set_parameters(model, parameters)
    for name, gradient in gradients.items():
        own = np.asarray(gradient, dtype=np.float64)
        norm, across = float(np.linalg.norm(own)), rng.normal(size=own.shape)
        direction = own / norm + across / np.linalg.norm(across)
        step = 1e-5
        ahead, behind = (numpy_loss(name, weights[name] + sign * step * direction) for sign in (1, -1))
        # Gradients in float32 through three layers agree with float64 to a few millionths.
        assert (ahead - behind) / (2 * step) == pytest.approx(float((own * direction).sum()), abs=1e-4 * norm), name


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
