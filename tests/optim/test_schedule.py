"""Schedules of rates and momentum, at their edges and against nanochat's formulas."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.models import composed
from mlxchat.config.schema import MomentumConfig, ScheduleConfig
from mlxchat.optim.optimizer import lr_multiplier, muon_momentum, rates_at

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
