"""The model against nanochat's architectures of October 2025 and July 2026 in NumPy.

Shapes: B batch, T tokens, C width, H query heads, K key/value heads, D head width, V vocabulary.
"""

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from kit import models
from kit.numpy_gpt import numpy_logits, numpy_norm, weights_of
from mlxchat.errors import ConfigError
from mlxchat.model import gpt
from mlxchat.model.gpt import (
    GPT,
    cast_parameters,
    computing_in,
    flatten_parameters,
    init_weights,
    lengthen_context,
    rms_norm,
    set_parameters,
)
from mlxchat.model.sizes import GPTSizes, count_parameters
from mlxchat.ops import loss as cross_entropy
from mlxchat.ops.loss import cross_entropy_sum

make_model = partial(models.make_model, num_layers=3, scale=0.3)


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 280, shape)


@pytest.mark.parametrize(("tokens", "num_kv_heads"), [(1, 4), (300, 2), (150, 1)])
@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_logits_equal_nanochat_in_numpy(path, architecture, num_kv_heads, tokens):
    """The short windows of July 2026 are 128 tokens here, and its tables have 320 rows for 280 tokens."""
    model = make_model(architecture, num_kv_heads=num_kv_heads)
    ids = random_ids(2, tokens)
    # The agreement that nanochat's own float32 has with float64 on models of this kind.
    np.testing.assert_allclose(np.asarray(model(mx.array(ids))), numpy_logits(model, ids), atol=2e-4)


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_bfloat16_logits_are_near_nanochat_in_numpy(monkeypatch, architecture):
    """On the plain path; the oracle is float64. Eight bits of mantissa through three layers, logits within ±15."""
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    model, ids = make_model(architecture), random_ids(2, 150)
    expected = numpy_logits(model, ids)
    with computing_in(model, mx.bfloat16):
        logits = model(mx.array(ids))
        assert model.lm_head.weight.dtype == mx.bfloat16
    assert logits.dtype == model.lm_head.weight.dtype == mx.float32
    difference = np.abs(np.asarray(logits) - expected)
    assert difference.mean() < 0.02 * np.abs(expected).mean()
    assert difference.max() < 0.15 * np.abs(expected).max()


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_bfloat16_gradients_are_near_float32(monkeypatch, architecture):
    """On the plain path. The head's is summed in float32 over chunks of 30 rows and rounded once."""
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    monkeypatch.setattr(cross_entropy, "LOGITS", 30 * 280)
    model, ids = make_model(architecture), random_ids(2, 151)

    def gradients(dtype: mx.Dtype) -> dict[str, np.ndarray]:
        def loss_of(masters: dict[str, mx.array]) -> mx.array:
            set_parameters(model, cast_parameters(masters, dtype))
            hidden = model.hidden(mx.array(ids[:, :-1])).reshape(-1, 32)
            targets = mx.array(ids[:, 1:].reshape(-1))
            return cross_entropy_sum(hidden, model.head_weight, targets, mx.full(300, 1 / 300))

        own = flatten_parameters(model)
        found = mx.grad(loss_of)(own)
        set_parameters(model, own)
        assert all(value.dtype == mx.float32 for value in found.values())
        return {name: np.asarray(value) for name, value in found.items()}

    exact, rounded = gradients(mx.float32), gradients(mx.bfloat16)
    for name, value in exact.items():
        limit = 0.03 if name == "lm_head.weight" else 0.2
        assert np.linalg.norm(rounded[name] - value) <= limit * np.linalg.norm(value), name


@pytest.mark.parametrize(
    ("num_layers", "pattern", "context_tokens"), [(1, "S", 64), (2, "S", 64), (4, "LS", 64), (5, "SSL", 700)]
)
def test_windows_follow_the_pattern(path, num_layers, pattern, context_tokens):
    model = make_model("jul2026", num_layers=num_layers, window_pattern=pattern, context_tokens=context_tokens)
    ids = random_ids(1, 400)
    np.testing.assert_allclose(np.asarray(model(mx.array(ids))), numpy_logits(model, ids), atol=2e-4)


def test_long_windows_of_july_2026_are_limited():
    """Guards against unlimited long windows in inputs longer than the context (64)."""
    ids, logits = random_ids(1, 210), {}
    for architecture in ("oct2025", "jul2026"):
        model = make_model(architecture, num_layers=1, window_pattern="L")
        changed = ids.copy()
        changed[0, 130] = (changed[0, 130] + 1) % 280  # reaches 131 by the smear, which 195 still sees
        logits[architecture] = [np.asarray(model(mx.array(each)))[0] for each in (ids, changed)]
        np.testing.assert_allclose(logits[architecture][1], numpy_logits(model, changed)[0], atol=2e-4)
    before, after = logits["jul2026"]
    np.testing.assert_array_equal(after[196:], before[196:])
    assert np.abs(after[195] - before[195]).max() > 1e-4
    assert np.abs(logits["oct2025"][1][209] - logits["oct2025"][0][209]).max() > 1e-4


def test_longer_context_keeps_the_logits_within_the_old_one(path):
    """Short windows stay at 128, not a quarter of the new context; the last layer's grows from 512 to 2048."""
    model = make_model("jul2026", window_pattern="SSL", context_tokens=512)
    longer, ids = lengthen_context(model, 2048), random_ids(1, 600)
    logits = np.asarray(longer(mx.array(ids)))
    np.testing.assert_allclose(logits[:, :512], numpy_logits(model, ids[:, :512]), atol=2e-4)
    np.testing.assert_allclose(logits, numpy_logits(longer, ids), atol=2e-4)
    assert np.abs(logits - numpy_logits(model, ids))[:, 520:].max() > 1e-3, "beyond it, the whole input is seen"
    assert longer.sizes.windows() == [128, 128, 2048]
    assert longer.sizes.lengthened(4096).windows() == [128, 128, 4096]


def test_short_windows_are_limited():
    """Two layers, the first short: position 200 sees 72 … 200 in it, 71 by the smear."""
    model = make_model("jul2026", num_layers=2, window_pattern="S", context_tokens=512)
    zeros = {"transformer.h.1.attn.c_proj.weight", "transformer.h.1.mlp.c_proj.weight"}
    set_parameters(model, {name: mx.zeros_like(flatten_parameters(model)[name]) for name in zeros})
    ids = random_ids(1, 210)
    before = np.asarray(model(mx.array(ids)))
    ids[0, 70] = (ids[0, 70] + 1) % 280
    after = np.asarray(model(mx.array(ids)))
    np.testing.assert_array_equal(after[:, 200:], before[:, 200:])
    assert np.abs(after[:, 199] - before[:, 199]).max() > 1e-4


@pytest.mark.parametrize("num_kv_heads", [pytest.param(4, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_gradients_equal_central_differences(path, architecture, num_kv_heads):
    """For every parameter, along its gradient and across it; differences of the loss in float64."""
    model, ids = make_model(architecture, num_kv_heads=num_kv_heads), random_ids(1, 141)
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
def test_rope_theta_is_used(theta):
    model, ids = make_model(rope_theta=theta), random_ids(1, 60)
    np.testing.assert_allclose(np.asarray(model(mx.array(ids))), numpy_logits(model, ids), atol=2e-4)


def test_norm_has_float32s_epsilon():
    """At a mean square of 1e-7, an epsilon of 1e-5 would shrink the result tenfold."""
    x = np.full((1, 8), 1e-7**0.5, dtype=np.float32)
    np.testing.assert_allclose(np.asarray(rms_norm(mx.array(x))), numpy_norm(x.astype(np.float64)), rtol=1e-5)


@pytest.fixture(scope="module")
def fresh() -> GPT:
    """A freshly initialised d2 with a vocabulary of 1,000."""
    model = GPT(
        GPTSizes(
            vocab_size=1000, num_layers=2, num_heads=4, num_kv_heads=1, width=128, context_tokens=64, rope_theta=1e4
        )
    )
    init_weights(model, seed=1)
    return model


def test_output_projections_and_head_start_at_zero(fresh):
    zero = {name for name, value in flatten_parameters(fresh).items() if not mx.any(value != 0).item()}
    assert zero == {
        "lm_head.weight",
        *(f"transformer.h.{layer}.{part}.c_proj.weight" for layer in (0, 1) for part in ("attn", "mlp")),
    }


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [("wte", 0, 0), ("h.0.attn.c_q", 128, 128), ("h.1.attn.c_k", 32, 128), ("h.1.mlp.c_fc", 512, 128)],
)
def test_initial_weights_are_normal_with_nanochats_deviation(fresh, name, rows, columns):
    weight = np.asarray(flatten_parameters(fresh)[f"transformer.{name}.weight"])
    deviation = 1.0 if name == "wte" else min(1, math.sqrt(rows / columns)) / math.sqrt(columns)
    # Four standard errors of the mean and of the deviation of so many draws.
    assert abs(weight.mean()) < 4 * deviation / math.sqrt(weight.size)
    assert weight.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * weight.size))


def test_draws_depend_on_the_seed_and_the_name(fresh):
    same, other = GPT(fresh.sizes), GPT(fresh.sizes)
    init_weights(same, seed=1)
    init_weights(other, seed=2)
    first, again, different = (flatten_parameters(model) for model in (fresh, same, other))
    assert all(mx.array_equal(first[name], again[name]).item() for name in first)
    assert not mx.array_equal(first["transformer.wte.weight"], different["transformer.wte.weight"]).item()
    one, two = (np.asarray(first[f"transformer.h.{layer}.attn.c_q.weight"]).ravel() for layer in (0, 1))
    assert abs(float(np.corrcoef(one, two)[0, 1])) < 0.05


def test_new_parameter_does_not_change_other_draws(fresh, monkeypatch):
    monkeypatch.setitem(gpt.INITIAL_WEIGHTS["oct2025"], "*.norm.weight", gpt.constant(1.0))
    wider = GPT(fresh.sizes)
    wider.transformer["h"][0].norm = nn.RMSNorm(128)
    with pytest.raises(ConfigError, match=r"parameters, but count_parameters \(mlxchat/model/sizes.py\) counts"):
        init_weights(wider, seed=1)
    monkeypatch.setattr(gpt, "count_parameters", lambda sizes: {"total": count_parameters(sizes)["total"] + 128})
    init_weights(wider, seed=1)
    before, after = flatten_parameters(fresh), flatten_parameters(wider)
    assert after.keys() - before.keys() == {"transformer.h.0.norm.weight"}
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("value_embeds.1", -0.153, 0.153), ("transformer.h.0.attn.c_q", -0.153, 0.153),
     ("transformer.h.0.mlp.c_fc", -0.0613, 0.0613), ("transformer.h.1.attn.ve_gate", 0, 0.02),
     ("smear_gate", 0, 0.02)],
)  # fmt: skip
def test_initial_weights_of_july_2026_have_nanochats_ranges(name, low, high):
    """The bound of the width 128 is sqrt(3 / 128) = 0.1531, and 0.4 of it in the MLP."""
    model = make_model(architecture="jul2026", width=128, num_layers=2)
    init_weights(model, seed=1)
    weight = np.asarray(flatten_parameters(model)[f"{name}.weight"])
    assert low - 1e-3 <= weight.min() <= low + 0.15 * (high - low)
    assert high - 0.15 * (high - low) <= weight.max() <= high + 1e-3


def test_initial_scalars_of_july_2026_are_nanochats():
    model = make_model("jul2026")
    init_weights(model, seed=1)
    np.testing.assert_allclose(np.asarray(model.resid_lambdas), [1.15, 1.10, 1.05], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(model.x0_lambdas), [0.2, 0.125, 0.05], rtol=1e-6)
    assert float(model.smear_lambda.item()) == 0
    assert float(model.backout_lambda.item()) == pytest.approx(0.2)
