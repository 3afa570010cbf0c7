"""Scaling laws: exponents of the published loss surface, intervals of least squares."""

import math
from typing import Any

import numpy as np
import pytest

from mlxchat.planning.scaling import Training, fit_power_law, fit_scaling_laws, table_of

# Hoffmann et al. 2022 (arXiv 2203.15556), equation 10: L = E + A / N^α + B / D^β.
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28


def training(parameters: float, flops: float, bpb: float | None = None) -> Training:
    tokens = flops / (6 * parameters)
    loss = E + A / parameters**ALPHA + B / tokens**BETA
    kinds = {"matrices": round(parameters), "embedding": 7, "value_embeddings": 0, "head": 0, "scalars": 1}
    return Training(
        name=f"{parameters:.3g}-{flops:.3g}",
        depth=4,
        width=64,
        parameters={**kinds, "total": round(parameters) + 8},
        horizon_parameters=round(parameters),
        num_iterations=10,
        tokens=round(tokens),
        flops=flops,
        bpb=loss if bpb is None else bpb,
    )


def best_parameters(flops: float) -> float:
    return (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (flops / 6) ** (BETA / (ALPHA + BETA))


def grid() -> list[Training]:
    """Seven sizes within a factor of two around the best one, at five budgets."""
    return [
        training(best_parameters(flops) * factor, flops)
        for flops in np.geomspace(1e18, 1e22, 5).tolist()
        for factor in np.geomspace(0.5, 2, 7)
    ]


def test_laws_are_those_of_the_loss_surface():
    """N* grows as C^(β/(α+β)), D* as C^(α/(α+β)): within 0.005, the parabola's error over a factor of four."""
    laws: Any = fit_scaling_laws(grid())
    assert laws.parameters.exponent == pytest.approx(BETA / (ALPHA + BETA), abs=0.005)
    assert laws.tokens.exponent == pytest.approx(ALPHA / (ALPHA + BETA), abs=0.005)
    assert laws.parameters.exponent + laws.tokens.exponent == pytest.approx(1, abs=1e-6)
    assert laws.bpb.exponent < 0
    for one in laws.budgets:
        best = best_parameters(one.flops)
        assert one.best_parameters == pytest.approx(best, rel=0.02)
        assert one.best_tokens == pytest.approx(one.flops / 6 / best, rel=0.02)
        assert one.best_bpb == pytest.approx(training(best, one.flops).bpb, rel=1e-4)


def test_interval_of_an_exponent_is_that_of_least_squares():
    """NumPy's covariance of a line, times 2.776, Student's t of four degrees of freedom at 97.5 %."""
    x = np.geomspace(1, 100, 6)
    y = 3 * x**0.5 * np.exp(np.array([0.1, -0.2, 0.05, 0.15, -0.1, 0.02]))
    law: Any = fit_power_law(list(x), list(y))
    (slope, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert law.exponent == pytest.approx(slope, rel=1e-12)
    assert law.half_width == pytest.approx(2.776 * math.sqrt(covariance[0, 0]), rel=1e-4)
    assert law(10.0) == pytest.approx(float(np.exp(np.polyval(np.polyfit(np.log(x), np.log(y), 1), math.log(10)))))


@pytest.mark.parametrize("slope", [-0.1, 0.1])
def test_minimum_outside_the_models_gives_no_best_size(slope):
    sizes = np.geomspace(1e6, 1e8, 5)
    rising = [1 + slope * math.log(size) + 0.001 * math.log(size / 1e7) ** 2 for size in sizes]
    found = [training(size, flops, bpb) for flops in (1e15, 1e16) for size, bpb in zip(sizes, rising, strict=True)]
    laws: Any = fit_scaling_laws(found)
    assert laws.parameters is None
    assert [one.best_parameters for one in laws.budgets] == [None, None]


def test_table_has_nanochats_columns():
    """The header that nanochat's scaling_laws.sh of January 2026 writes, and its miniseries' tokens per parameter."""
    (row,) = table_of([training(1e6, 1.2e14)])
    assert list(row) == [
        "flops_budget", "depth", "model_dim", "params_transformer", "params_wte", "params_value_embeds",
        "params_lm_head", "params_scalars", "params_total", "num_iterations", "tokens_trained", "param_data_ratio",
        "val_bpb", "core_score", "train_time_sec",
    ]  # fmt: skip
    assert row["flops_budget"] == "1.2e+14"
    assert row["param_data_ratio"] == 20.0
    assert row["core_score"] == ""
