"""Every parameter has one rule and one rate, and is updated by it."""

import math
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import models
from kit.models import composed
from kit.training import move, optimizer_config
from mlxchat.config.schema import MomentumConfig, OptimizerConfig, ScheduleConfig
from mlxchat.errors import ConfigError
from mlxchat.model.gpt import GPT
from mlxchat.model.parameters import flatten_parameters
from mlxchat.optim.optimizer import (
    AdamWRule,
    Optimizer,
    Rates,
    adamw_update,
    lr_multiplier,
    muon_momentum,
    rates_at,
    sum_squares,
)

make_model = partial(models.make_model, vocab_size=50, context_tokens=8, seed=0, scale=1.0)
RATES = Rates(1.0, 0.9, 1.0)


def random_gradients(model: GPT) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {name: rng.normal(size=value.shape).astype(np.float32) for name, value in flatten_parameters(model).items()}


def test_jul2026_has_the_rates_of_nanochat_at_d4():
    """As computed by nanochat for width 256 and 262,144 tokens per iteration; lr_frac scales all of them."""
    config = optimizer_config("muon_jul2026")
    optimizer = Optimizer(make_model("jul2026"), config, width=256, lr_frac=0.1, batch_lr_scale=0.5**0.5)
    expected = {
        "lm_head.weight": (0.009797958971132715, (0.8, 0.96), 0.01),
        "transformer.wte.weight": (0.3674234614174767, (0.8, 0.995), 0.001),
        "value_embeds.1.weight": (0.18371173070873836, (0.8, 0.995), 0.01),
        "resid_lambdas": (0.003535533905932738, (0.8, 0.95), 0.05),
        "x0_lambdas": (0.3535533905932738, (0.96, 0.95), 0.0),
        "smear_gate.weight": (0.2, (0.8, 0.95), 0.0),
        "smear_lambda": (0.2, (0.8, 0.95), 0.0),
        "backout_lambda": (0.2, (0.8, 0.95), 0.0),
    }
    assert optimizer.adamw_rules.keys() == expected.keys()
    for name, (lr, betas, weight_decay) in expected.items():
        assert optimizer.adamw_rules[name] == (pytest.approx(0.1 * lr, rel=1e-12), betas, weight_decay), name
    assert optimizer.muon_lr == pytest.approx(0.0014142135623730952, rel=1e-12)


def test_parameter_without_group_is_refused():
    class Foreign(nn.Module):
        def trainable_parameters(self) -> dict[str, object]:
            return {**flatten_parameters(make_model()), "transformer.h.0.attn.bias": mx.zeros(3)}

    with pytest.raises(ConfigError, match=r"transformer\.h\.0\.attn\.bias"):
        Optimizer(Foreign(), optimizer_config(), width=16)


def config_with_decay(option: str, decay: float) -> OptimizerConfig:
    groups = {
        name: replace(group, weight_decay=decay if name == "matrices" else 0.0)
        for name, group in optimizer_config(option).adamw_groups.items()
    }
    return optimizer_config(option, weight_decay=decay, adamw_groups=groups)


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
@pytest.mark.parametrize("option", ["muon_oct2025", "muon_jul2026", "adamw"])
def test_any_optimizer_moves_all_of_any_architecture_and_decays_matrices(architecture, option):
    """By rate × weight_decay; jul2026's applies only where it agrees with the update's sign."""
    model = make_model(architecture)
    with_decay, without = (
        move(Optimizer(each, config_with_decay(option, decay), width=32), each, random_gradients(model), RATES)
        for decay, each in ((0.5, make_model(architecture)), (0.0, make_model(architecture)))
    )
    lr = optimizer_config(option).matrix_lr
    for name, value in flatten_parameters(model).items():
        weight, step = np.asarray(value), without[name] - np.asarray(value)
        assert (step != 0).mean() > 0.9, name
        if ".h." not in name:
            np.testing.assert_array_equal(with_decay[name], without[name])
            continue
        rate = lr if option == "adamw" else lr * max(1, weight.shape[0] / weight.shape[1]) ** 0.5
        expected = rate * 0.5 * weight * ((step * weight <= 0) if option == "muon_jul2026" else 1)
        np.testing.assert_allclose(without[name] - with_decay[name], expected, atol=1e-6, err_msg=name)


def test_norm_is_exact_for_millions_of_numbers():
    """A plain float32 sum of them is off by a percent; small arrays are summed together."""
    rng = np.random.default_rng(0)
    values = {str(index): rng.normal(size=shape) for index, shape in enumerate([(3,), (4096, 1025), (2, 3, 4), ()])}
    gradients = {name: mx.array(np.float32(value)) for name, value in values.items()}
    assert sum_squares(gradients).item() == pytest.approx(sum((value**2).sum() for value in values.values()), rel=2e-6)


@pytest.mark.parametrize(("epsilon", "weight_decay"), [(1e-10, 0.0), (1e-3, 0.1)])
def test_three_updates_of_adamw_equal_the_published_formula(epsilon, weight_decay):
    """With gradients of all magnitudes, including zero."""
    rng = np.random.default_rng(0)
    (beta1, beta2), value = (0.8, 0.95), rng.normal(size=50)
    ours = [mx.array(each.astype(np.float32)) for each in (value, np.zeros(50), np.zeros(50))]
    rule, first, second = AdamWRule(1.0, (beta1, beta2), weight_decay), 0.0, 0.0
    for count, lr in enumerate([0.2, 0.1, 0.05], 1):
        gradient = rng.normal(size=50) * 10.0 ** rng.integers(-6, 3, 50) * (np.arange(50) > 2)
        given = {"count": mx.array(float(count)), "lr_factor": mx.array(lr), "ok": mx.array(True)}
        ours = list(adamw_update(ours[0], mx.array(np.float32(gradient)), *ours[1:], rule, epsilon=epsilon, **given))
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        step = first / (1 - beta1**count) / (np.sqrt(second / (1 - beta2**count)) + epsilon)
        value = value * (1 - lr * weight_decay) - lr * step
        np.testing.assert_allclose(np.asarray(ours[0]), value, atol=2e-6)  # rounding of numbers of order one


# Schedules of rates and momentum, at their edges and against nanochat's formulas

OCT2025 = MomentumConfig(start=0.85, end=0.95, warmup_iterations=300, final=None)
JUL2026 = MomentumConfig(start=0.85, end=0.97, warmup_iterations=400, final=0.9)


def nanochat(it: int, n: int, warmup_frac: float, warmdown_frac: float, final_frac: float) -> float:
    """Return base_train's get_lr_multiplier."""
    warmup, warmdown = round(warmup_frac * n), round(warmdown_frac * n)
    if it < warmup:
        return (it + 1) / warmup
    if it <= n - warmdown:
        return 1.0
    progress = (n - it) / warmdown
    return progress * 1.0 + (1 - progress) * final_frac


def multiplier(it: int, n: int, warmup: float | int, warmdown: float, final: float, shape: str) -> float:
    """Return the factor after a warmup in iterations (int) or as a share of them (float)."""
    given = {"warmup_iterations": warmup} if isinstance(warmup, int) else {"warmup_frac": warmup}
    return lr_multiplier(it, n, ScheduleConfig(**given, warmdown_frac=warmdown, final_lr_frac=final, shape=shape))


@given(st.integers(1, 3000), st.floats(0, 0.999), st.floats(0, 0.4), st.floats(0, 0.6), st.floats(0, 1))
def test_multipliers_equal_nanochat(n, place, warmup, warmdown, final):
    it = int(place * n)
    got = multiplier(it, n, warmup, warmdown, final, "linear")
    assert got == pytest.approx(nanochat(it, n, warmup, warmdown, final), abs=1e-12)
    assert 0 < got <= 1


@pytest.mark.parametrize(
    ("momentum", "values"),
    [
        (OCT2025, {0: 0.85, 1: 0.85 + 0.1 / 300, 300: 0.95, 9999: 0.95}),
        (JUL2026, {0: 0.85, 399: 0.97 - 0.12 / 400, 400: 0.97, 3500: 0.97, 6750: 0.935, 10_000: 0.9}),
        (replace(OCT2025, warmup_iterations=0), {0: 0.95}),
    ],
)
def test_momentum_rises_over_its_warmup_and_falls_in_the_warmdown(momentum, values):
    for iteration, expected in values.items():
        assert muon_momentum(iteration, 10_000, momentum, 0.65) == pytest.approx(expected)


@pytest.mark.parametrize("iteration", [0, 39, 40, 500, 999])
def test_jul2026_recipe_has_the_rates_of_nanochat(iteration):
    config = composed("experiment=speedrun_jul2026_d12")
    rates = rates_at(iteration, 1000, config.pretrain.schedule, config.optimizer)
    assert rates.lr_factor == pytest.approx(
        (iteration + 1) / 40 if iteration < 40 else nanochat(iteration, 1000, 0.0, 0.65, 0.05)
    )
    assert rates.momentum == muon_momentum(iteration, 1000, JUL2026, 0.65)
    assert rates.weight_decay_factor == pytest.approx(0.5 * (1 + math.cos(math.pi * iteration / 1000)))
    of_sft = rates_at(iteration, 1000, config.sft.schedule, config.optimizer)
    assert of_sft.momentum == pytest.approx(min(0.95, 0.85 + 0.1 * iteration / 300)), "its own"
    assert of_sft.weight_decay_factor == 0


def test_cosine_falls_along_half_a_period_after_the_warmup():
    """With a warmdown of 1 as published: final + (1 − final) × (1 + cos) / 2, from the end of the warmup."""
    values = [multiplier(it, 100, 0, 0.2, 0.1, "cosine") for it in (80, 85, 90, 95, 100, 1000)]
    assert values == pytest.approx([1.0, 0.55 + 0.45 * 0.5**0.5, 0.55, 0.55 - 0.45 * 0.5**0.5, 0.1, 0.1])
    assert [multiplier(it, 12, 4, 1.0, 0.0, "cosine") for it in (0, 3, 4, 8, 12)] == pytest.approx([0.25, 1, 1, 0.5, 0])
