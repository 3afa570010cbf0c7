"""Every parameter has one rule and one rate, and is updated by it."""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from kit import models
from kit.training import move, optimizer_config
from mlxchat.errors import ConfigError
from mlxchat.model.gpt import GPT, flatten_parameters
from mlxchat.optim.optimizer import Optimizer, Rates, clip_factor, sum_squares

make_model = partial(models.make_model, vocab_size=50, context_tokens=8, seed=0, scale=1.0)
OPTIONS = ["muon_oct2025", "muon_jul2026", "adamw"]
TABLES = {"transformer.wte.weight", "lm_head.weight"}


@pytest.fixture
def model() -> GPT:
    return make_model(num_heads=2, num_kv_heads=1, width=16)


def random_gradients(model: GPT) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {name: rng.normal(size=value.shape).astype(np.float32) for name, value in flatten_parameters(model).items()}


def all_names(model: GPT) -> list[str]:
    return list(flatten_parameters(model))


def updated(
    optimizer: Optimizer, model: GPT, gradients: dict[str, np.ndarray], lr_factor: float = 1.0
) -> dict[str, np.ndarray]:
    new = move(optimizer, flatten_parameters(model), gradients, Rates(lr_factor, 0.9, 1.0))
    return {name: np.asarray(value) for name, value in new.items()}


@pytest.mark.parametrize(
    ("architecture", "option"),
    [("oct2025", "muon_oct2025"), ("oct2025", "muon_jul2026"), ("jul2026", "muon_jul2026"), ("jul2026", "adamw")],
)
def test_any_optimizer_updates_every_parameter_of_any_architecture(architecture, option):
    """Each parameter has one rule, is in one share, and owns its moments."""
    model = make_model(architecture)
    optimizer = Optimizer(model, optimizer_config(option), width=32)
    names = sorted(all_names(model))
    grouped = [*optimizer.adamw_rules, *(name for group in optimizer.muon_shapes.values() for name in group)]
    assert sorted(grouped) == names
    for parts in (1, 3, 50):
        shares = optimizer.share(parts)
        assert len(shares) == parts
        assert sorted(name for share in shares for name in share) == names
    moments = {name: optimizer.state_names([name]) for name in names}
    assert all(key.endswith(f".{name}") for name, own in moments.items() for key in own)
    assert sorted(key for own in moments.values() for key in own) == sorted(optimizer.state.keys() - {"count"})
    assert not any(mx.any(value != 0).item() for value in optimizer.state.values())
    new = updated(optimizer, model, random_gradients(model))
    assert new.keys() == set(names)
    for name, value in flatten_parameters(model).items():
        assert new[name].shape == value.shape
        assert np.isfinite(new[name]).all()
        assert (new[name] != np.asarray(value)).mean() > 0.9, name


def test_jul2026_has_the_rates_of_nanochat_at_d4():
    """As computed by nanochat for width 256 and 262,144 tokens per iteration."""
    optimizer = Optimizer(make_model("jul2026"), optimizer_config("muon_jul2026"), width=256, batch_lr_scale=0.5**0.5)
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
        assert optimizer.adamw_rules[name] == (pytest.approx(lr, rel=1e-12), betas, weight_decay), name
    assert optimizer.muon_lr == pytest.approx(0.014142135623730952, rel=1e-12)


@pytest.mark.parametrize("name", ["lambdas", "transformer.h.0.attn.bias", "transformer.value_embeds.weight"])
def test_parameter_without_group_is_refused(model, name):
    class Foreign(nn.Module):
        def trainable_parameters(self) -> dict[str, object]:
            return {**flatten_parameters(model), name: mx.zeros(3)}

    with pytest.raises(ConfigError, match=name):
        Optimizer(Foreign(), optimizer_config(), width=16)


@pytest.mark.parametrize(("width", "scale"), [(768, 1.0), (192, 2.0)])
def test_width_scales_table_rates_and_lr_frac_all(model, width, scale):
    optimizer = Optimizer(model, optimizer_config(), width=width, lr_frac=0.1)
    assert {name: rule.lr for name, rule in optimizer.adamw_rules.items()} == {
        "transformer.wte.weight": pytest.approx(0.02 * scale),
        "lm_head.weight": pytest.approx(0.0004 * scale),
    }
    assert optimizer.muon_lr == pytest.approx(0.002)
    assert not Optimizer(model, optimizer_config(kind="adamw"), width=16).muon_shapes


def test_tables_follow_adam_and_matrices_muon(model):
    gradients = random_gradients(model)
    new = updated(Optimizer(model, optimizer_config(), width=768), model, gradients, lr_factor=0.5)
    for name, value in flatten_parameters(model).items():
        moved, gradient = new[name] - np.asarray(value), gradients[name].astype(np.float64)
        if name in TABLES:
            lr = 0.2 if "wte" in name else 0.004
            expected = -0.5 * lr * np.sign(gradient)
        else:
            u, s, v = np.linalg.svd(gradient, full_matrices=False)
            s /= np.linalg.norm(s)
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            expected = -0.5 * 0.02 * np.sqrt(max(1, gradient.shape[0] / gradient.shape[1])) * (u * s) @ v
        # A parameter of order one carries a rounding of 6e-8, which is up to 1e-5 of these steps.
        assert np.linalg.norm(moved - expected) < 2e-4 * np.linalg.norm(expected), name


# Parts of an update


def test_state_has_the_names_of_parameters(model):
    optimizer = Optimizer(model, optimizer_config("muon_jul2026"), width=16)
    kinds = {name: ("first", "second") if name in TABLES else ("momentum", "variance") for name in all_names(model)}
    assert set(optimizer.state) == {"count", *(f"{kind}.{name}" for name in kinds for kind in kinds[name])}


# Weight decay


@pytest.mark.parametrize("option", OPTIONS)
def test_weight_decay_shrinks_only_matrices(option):
    """By rate × weight_decay; jul2026's applies only where it agrees with the update's sign."""
    model, gradients = make_model(), random_gradients(make_model())
    groups = {
        name: replace(group, weight_decay=0.5 if name == "matrices" else 0.0)
        for name, group in optimizer_config(option).adamw_groups.items()
    }
    with_decay, without = (
        updated(
            Optimizer(model, optimizer_config(option, weight_decay=decay, adamw_groups=groups if decay else {
                name: replace(group, weight_decay=0.0) for name, group in groups.items()
            }), width=32),
            model, gradients,
        )
        for decay in (0.5, 0.0)
    )  # fmt: skip
    lr = optimizer_config(option).matrix_lr
    for name, value in flatten_parameters(model).items():
        weight, step = np.asarray(value), without[name] - np.asarray(value)
        if name in TABLES:
            np.testing.assert_array_equal(with_decay[name], without[name])
            continue
        rate = lr if option == "adamw" else lr * max(1, weight.shape[0] / weight.shape[1]) ** 0.5
        expected = rate * 0.5 * weight * ((step * weight <= 0) if option == "muon_jul2026" else 1)
        np.testing.assert_allclose(without[name] - with_decay[name], expected, atol=1e-6, err_msg=name)


# Clipping


def arrays(*values: list[float]) -> dict[str, mx.array]:
    return {str(index): mx.array(value) for index, value in enumerate(values)}


def clipped(gradients: dict[str, mx.array], limit: float) -> dict[str, mx.array]:
    factor = clip_factor(mx.sqrt(sum_squares(gradients)), limit)
    return {name: gradient * factor for name, gradient in gradients.items()}


def test_norm_is_exact_for_millions_of_numbers_and_adds_over_parts():
    """A plain float32 sum of them is off by a percent; lanes add the squares of their parts."""
    rng = np.random.default_rng(0)
    values = {str(index): rng.normal(size=shape) for index, shape in enumerate([(3,), (2048, 1024), (2, 3, 4), (1, 1)])}
    gradients = {name: mx.array(value.astype(np.float32)) for name, value in values.items()}
    exact = sum((value**2).sum() for value in values.values())
    assert sum_squares(gradients).item() == pytest.approx(exact, rel=2e-6)
    parts = [sum_squares({name: gradients[name] for name in names}).item() for names in ("02", "13")]
    assert sum(parts) == pytest.approx(exact, rel=2e-6)
    assert sum_squares({}).item() == 0


def test_clipping_scales_gradients_above_the_limit():
    found = clipped(arrays([0.3], [0.4]), 1.0)
    assert (found["0"].item(), found["1"].item()) == (np.float32(0.3), np.float32(0.4)), "below the limit: unchanged"
    found = clipped(arrays([3.0, -0.0], [4.0]), 1.0)
    np.testing.assert_allclose(
        [*np.asarray(found["0"]), *np.asarray(found["1"])], np.array([3, 0, 4]) / (5 + 1e-6), rtol=1e-6
    )
    for norm in (0.0, 0.5, 1.0, 2.0, 1e20):
        assert clip_factor(mx.array(norm), 1.0).item() == pytest.approx(min(1.0, 1.0 / (norm + 1e-6)), rel=1e-6)
