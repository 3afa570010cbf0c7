"""Scaling laws of a sweep: exponents of the published loss surface, what is written."""

import math
from typing import Any

import numpy as np
import pytest

from mlxchat.sweep.scaling import (
    Training,
    describe_laws,
    fit_power_law,
    fit_scaling_laws,
)

# Hoffmann et al. 2022 (arXiv 2203.15556), equation 10: L = E + A / N^α + B / D^β.
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28


def training(size: float, flops: float, bpb: float | None = None) -> Training:
    tokens = flops / (6 * size)
    loss = E + A / size**ALPHA + B / tokens**BETA
    return Training(size=round(size), tokens=round(tokens), flops=flops, bpb=loss if bpb is None else bpb)


def best_size(flops: float) -> float:
    return (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (flops / 6) ** (BETA / (ALPHA + BETA))


def test_laws_are_those_of_the_loss_surface():
    """N* grows as C^(β/(α+β)), D* as C^(α/(α+β)): within 0.005, the parabola's error over a factor of four."""
    budgets = np.geomspace(1e18, 1e22, 5).tolist()
    grid = [training(best_size(c) * factor, c) for c in budgets for factor in np.geomspace(0.5, 2, 7)]
    laws: Any = fit_scaling_laws(grid)
    assert laws.size.exponent == pytest.approx(BETA / (ALPHA + BETA), abs=0.005)
    assert laws.tokens.exponent == pytest.approx(ALPHA / (ALPHA + BETA), abs=0.005)
    assert laws.size.exponent + laws.tokens.exponent == pytest.approx(1, abs=1e-6)
    for one in laws.budgets:
        best = best_size(one.flops)
        assert one.size == pytest.approx(best, rel=0.02)
        assert one.tokens == pytest.approx(one.flops / 6 / best, rel=0.02)
        assert one.bpb == pytest.approx(training(best, one.flops).bpb, rel=1e-4)


def test_standard_error_is_that_of_least_squares():
    x = np.geomspace(1, 100, 6)
    y = 3 * x**0.5 * np.exp(np.array([0.1, -0.2, 0.05, 0.15, -0.1, 0.02]))
    law: Any = fit_power_law(x.tolist(), y.tolist())
    rest = np.log(y) - np.log(law.at_centre * (x / law.centre) ** law.exponent)
    spread = ((np.log(x) - np.log(x).mean()) ** 2).sum()
    assert abs(rest.sum()) < 1e-12, "least squares leave residuals of mean 0"
    assert abs((rest * np.log(x)).sum()) < 1e-12, "and uncorrelated with x"
    assert law.error == pytest.approx(math.sqrt((rest**2).sum() / 4 / spread), rel=1e-9)


def test_budget_without_minimum_suggests_sizes():
    falling = [training(size, 1e12, bpb) for size, bpb in ((10**5, 3.0), (2 * 10**5, 2.9), (4 * 10**5, 2.8))]
    bowl = [training(size, 1e13, bpb) for size, bpb in ((10**5, 2.6), (2 * 10**5, 2.5), (4 * 10**5, 2.6))]
    laws = fit_scaling_laws(falling + bowl)
    assert laws is not None
    text = describe_laws(laws)
    assert "| 1e+12 | 3 | none among these sizes: try larger ones | | | 2.8000 |" in text
    assert "| 1e+13 | 3 | 200,000 | 8,333,333 | 41.7 | 2.5000 |" in text


@pytest.mark.slow
def test_sweep_over_sizes_and_budgets_fits_laws(mlxchat, tmp_path):
    settings = ["experiment=smoke", "stage=pretrain", "model.aspect_ratio=8,16,32", "model.head_width=16"]
    settings += ["pretrain.num_iterations=null", "pretrain.target_flops=1e10,3e10", "pretrain.eval_tokens=2048"]
    done = mlxchat("-m", *settings, f"outputs={tmp_path / 'outputs'}", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "outputs" / "multirun").iterdir()
    assert "## Scaling laws" in (folder / "report.md").read_text()
