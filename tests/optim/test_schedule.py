"""Schedules of rates and momentum, at their edges and against nanochat's formulas."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.models import composed
from mlxchat.optim.optimizer import lr_multiplier, muon_momentum, rates_at

PRETRAIN = {"warmup_frac": 0.0, "warmdown_frac": 0.2, "final_frac": 0.0}
OCT2025 = {"start": 0.85, "end": 0.95, "warmup_iterations": 300, "final": None, "warmdown_frac": 0.2}
JUL2026 = {"start": 0.85, "end": 0.97, "warmup_iterations": 400, "final": 0.9, "warmdown_frac": 0.65}
SFT = {"warmup_frac": 0.0, "warmdown_frac": 1.0, "final_frac": 0.0}


def nanochat(it: int, n: int, warmup_frac: float, warmdown_frac: float, final_frac: float) -> float:
    """Return base_train's get_lr_multiplier."""
    warmup, warmdown = round(warmup_frac * n), round(warmdown_frac * n)
    if it < warmup:
        return (it + 1) / warmup
    if it <= n - warmdown:
        return 1.0
    progress = (n - it) / warmdown
    return progress * 1.0 + (1 - progress) * final_frac


def test_warmup_reaches_one_at_its_last_iteration():
    rising = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [lr_multiplier(it, 40, warmup_frac=0.1, warmdown_frac=0.0, final_frac=0.0) for it in range(6)] == rising
    assert [lr_multiplier(it, 1000, **PRETRAIN, warmup_iterations=4) for it in range(6)] == rising


@given(
    n=st.integers(1, 3000), place=st.floats(0, 1, exclude_max=True), warmup=st.floats(0, 0.4),
    warmdown=st.floats(0, 0.6), final=st.floats(0, 1),
)  # fmt: skip
def test_multipliers_equal_nanochat(n, place, warmup, warmdown, final):
    it = int(place * n)
    got = lr_multiplier(it, n, warmup_frac=warmup, warmdown_frac=warmdown, final_frac=final)
    assert got == pytest.approx(nanochat(it, n, warmup, warmdown, final), abs=1e-12)
    assert 0 < got <= 1


@pytest.mark.parametrize(
    ("schedule", "iteration", "expected"),
    [
        (OCT2025, 0, 0.85), (OCT2025, 1, 0.85 + 0.1 / 300), (OCT2025, 300, 0.95), (OCT2025, 9999, 0.95),
        (OCT2025 | {"warmup_iterations": 0}, 0, 0.95),
        (JUL2026, 0, 0.85), (JUL2026, 399, 0.97 - 0.12 / 400), (JUL2026, 400, 0.97), (JUL2026, 3500, 0.97),
        (JUL2026, 6750, 0.935), (JUL2026, 10_000, 0.9),
    ],
)  # fmt: skip
def test_momentum_rises_over_its_warmup_and_falls_in_the_warmdown(schedule, iteration, expected):
    assert muon_momentum(iteration, 10_000, **schedule) == pytest.approx(expected)


def test_rise_of_momentum_precedes_its_fall():
    values = [muon_momentum(it, 500, **JUL2026) for it in (399, 400)]
    assert values == pytest.approx([0.97 - 0.12 / 400, 0.97 - 0.07 * (400 - 175) / 325])


# Warmup in iterations, weight decay, and all of it together


@pytest.mark.parametrize("iteration", [0, 39, 40, 500, 999])
def test_jul2026_recipe_has_the_rates_of_nanochat(iteration):
    config = composed("experiment=speedrun_jul2026_d12")
    rates = rates_at(iteration, 1000, config.pretrain.schedule, config.optimizer)
    fall = (1000 - iteration) / 650
    assert rates.lr_factor == pytest.approx(
        (iteration + 1) / 40 if iteration < 40 else 1.0 if fall >= 1 else fall + (1 - fall) * 0.05
    )
    assert rates.momentum == muon_momentum(iteration, 1000, **JUL2026)
    assert rates.weight_decay_factor == pytest.approx(0.5 * (1 + math.cos(math.pi * iteration / 1000)))


def test_stages_have_the_optimizers_momentum_or_their_own():
    config = composed("experiment=speedrun_jul2026_d12")
    for iteration, momentum in ((0, 0.85), (150, 0.9), (300, 0.95), (999, 0.95)):
        rates = rates_at(iteration, 1000, config.sft.schedule, config.optimizer)
        assert (rates.momentum, rates.weight_decay_factor) == (pytest.approx(momentum), 0.0)
    config = composed("experiment=quickstart", "optimizer.momentum_warmup_iterations=300")
    for stage in (config.pretrain, config.midtrain, config.sft, config.rl):
        assert stage.schedule.momentum is None
        assert rates_at(150, 1000, stage.schedule, config.optimizer).momentum == pytest.approx(0.9)


# Along a cosine


def nanogpt(it: int, n: int, warmup: int, final: float) -> float:
    """The published form: a cosine from the end of the warm-up to the end of the training."""
    if it < warmup:
        return (it + 1) / warmup
    decay_ratio = (it - warmup) / (n - warmup)
    return final + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (1 - final)


@given(n=st.integers(2, 3000), place=st.floats(0, 1), warmup=st.floats(0, 0.9), final=st.floats(0, 1))
def test_full_cosine_equals_the_published_form(n, place, warmup, final):
    it, rising = int(place * (n - 1)), int(warmup * n)
    got = lr_multiplier(
        it, n, warmup_frac=0.0, warmup_iterations=rising, warmdown_frac=1.0, final_frac=final, shape="cosine"
    )
    assert got == pytest.approx(nanogpt(it, n, rising, final), abs=1e-12)
    assert 0 <= got <= 1


def test_cosine_of_a_partial_or_absent_warmdown():
    falling = [lr_multiplier(it, 100, **PRETRAIN | {"final_frac": 0.1}, shape="cosine") for it in (80, 85, 90, 95)]
    assert falling == pytest.approx([1.0, 0.55 + 0.45 * 0.5**0.5, 0.55, 0.55 - 0.45 * 0.5**0.5])
    after = [lr_multiplier(it, 100, **PRETRAIN | {"final_frac": 0.1}, shape="cosine") for it in (100, 1000)]
    assert after == pytest.approx([0.1, 0.1])
    values = [lr_multiplier(it, 4, **SFT, warmup_iterations=4, shape="cosine") for it in range(4)]
    assert values == [0.25, 0.5, 0.75, 1.0]


def test_schedule_shape_is_configured():
    config = composed("pretrain.schedule.shape=cosine", "pretrain.schedule.warmdown_frac=1.0")
    rates = rates_at(250, 1000, config.pretrain.schedule, config.optimizer)
    assert rates.lr_factor == pytest.approx(0.5 + 0.5**1.5)
