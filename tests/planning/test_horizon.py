"""How long to train and with which batch: nanochat's numbers, by each of the three horizons and by its scaling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.config.schema import BatchConfig, Config, PretrainConfig
from mlxchat.model.sizes import GPTSizes, flops_per_token, sizes_of
from mlxchat.planning.horizon import (
    Hyperparameters,
    count_iterations,
    derive_hyperparameters,
    derive_numbers,
    whole_rows,
)

OCT2025 = compose_config(["experiment=speedrun_d20"]).config
JUL2026 = compose_config(["experiment=speedrun_jul2026_d12"]).config
BATCH = 524_288


def sizes(depth: int, recipe: Config = OCT2025) -> GPTSizes:
    return sizes_of(replace(recipe.model, depth=depth), recipe.architecture, recipe.tokenizer.vocab_size)


def config(recipe: Config = OCT2025, tokens: int | None = BATCH, **horizon: Any) -> PretrainConfig:
    horizons = {"num_iterations": None, "target_flops": None, "tokens_per_parameter": None} | horizon
    return replace(recipe.pretrain, batch=BatchConfig(tokens=tokens, row_tokens=2048), **horizons)


def derive(depth: int, recipe: Config = OCT2025, tokens: int | None = BATCH, **horizon: Any) -> Hyperparameters:
    model = replace(recipe.model, depth=depth)
    changed = replace(recipe, model=model, pretrain=config(recipe, tokens, **horizon))
    return derive_hyperparameters(changed, sizes(depth, recipe))


@pytest.mark.parametrize(
    ("depth", "iterations"),
    [(4, 1400), (8, 3520), (12, 7080), (20, 21_400), (26, 41_275), (30, 60_225), (32, 71_680), (34, 84_575)],
)
def test_twenty_tokens_per_parameter_take_the_published_iterations(depth: int, iterations: int) -> None:
    assert derive(depth, tokens_per_parameter=20).num_iterations == iterations


def test_a_number_of_iterations_is_taken_as_it_is() -> None:
    assert derive(4, num_iterations=77).num_iterations == 77


def test_a_budget_of_operations_is_rounded_to_iterations() -> None:
    """nanochat: 1e17 operations at d8 are 421 iterations."""
    assert count_iterations(config(target_flops=1e17), sizes(8), BATCH) == 421
    assert derive(8, target_flops=1e17).num_iterations == round(1e17 / (flops_per_token(sizes(8)) * BATCH))


@pytest.mark.parametrize("horizon", [{"target_flops": 1.0}, {"tokens_per_parameter": 1e-9}])
def test_there_is_at_least_one_iteration(horizon: dict[str, float]) -> None:
    assert derive(4, **horizon).num_iterations == 1


def test_a_fraction_of_tokens_per_parameter_is_allowed() -> None:
    assert derive(4, tokens_per_parameter=0.5).num_iterations == 36_700_160 // 2 // BATCH


def test_the_derived_numbers_follow_from_each_other() -> None:
    numbers = derive_numbers(derive(20, tokens_per_parameter=20), sizes(20), micro_tokens=32 * 2048)
    assert numbers["num_parameters"] == 560_988_160
    assert numbers["num_iterations"] == 21_400
    assert numbers["total_tokens"] == 21_400 * BATCH == 11_219_763_200
    assert numbers["num_accumulations"] == 8
    assert numbers["total_flops"] == pytest.approx(3.917e19, rel=1e-3)  # nanochat's speedrun: 3.92e19
    assert numbers["tokens_per_parameter"] == pytest.approx(20, rel=1e-3)


@pytest.mark.parametrize(("micro_tokens", "accumulations"), [(524_288, 1), (300_000, 2), (2048, 256)])
def test_a_rest_takes_one_more_accumulation(micro_tokens: int, accumulations: int) -> None:
    numbers = derive_numbers(derive(4, num_iterations=1), sizes(4), micro_tokens=micro_tokens)
    assert numbers["num_accumulations"] == accumulations


# Scaling


@pytest.mark.parametrize(
    ("depth", "exponent", "iterations", "weight_decay"),
    [
        (4, 18, 528, 1.8899031293917847), (6, 18, 1062, 0.9396123913724335), (8, 18, 1920, 0.5197231443014819),
        (12, 19, 2520, 0.28), (20, 20, 4980, None), (24, 20, 8352, None), (26, 20, 10_510, None), (32, 21, 9600, None),
    ],
)  # fmt: skip
def test_batch_iterations_and_weight_decay_are_nanochats_at_every_depth(
    depth: int, exponent: int, iterations: int, weight_decay: float | None
) -> None:
    unbounded = replace(
        JUL2026, optimizer=replace(JUL2026.optimizer, scaling=replace(JUL2026.optimizer.scaling, max_weight_decay=None))
    )
    found = derive(depth, unbounded, None, tokens_per_parameter=12)
    assert (found.batch_tokens, found.num_iterations) == (2**exponent, iterations)
    assert found.batch_lr_scale == pytest.approx((2 ** (exponent - 19)) ** 0.5, rel=1e-12)
    if weight_decay is not None:
        assert found.weight_decay == pytest.approx(weight_decay, rel=1e-9)


@pytest.mark.parametrize(("depth", "weight_decay"), [(2, 0.52), (4, 0.52), (8, 0.5197231443014819), (12, 0.28)])
def test_weight_decay_is_bounded_below_depth_eight(depth: int, weight_decay: float) -> None:
    assert derive(depth, JUL2026, None, tokens_per_parameter=12).weight_decay == pytest.approx(weight_decay, rel=1e-9)


@pytest.mark.parametrize("horizon", [{"num_iterations": 77}, {"target_flops": 1e17}])
def test_scaling_goes_by_parameters_whatever_the_horizon(horizon: dict[str, float]) -> None:
    found, usual = derive(8, JUL2026, None, **horizon), derive(8, JUL2026, None, tokens_per_parameter=12)
    assert replace(found, num_iterations=0) == replace(usual, num_iterations=0)


def test_a_given_batch_scales_rates_and_weight_decay() -> None:
    """nanochat, d4 at 32,768 tokens per iteration: rates × 0.25, 4,224 iterations."""
    found = derive(4, JUL2026, 32_768, tokens_per_parameter=12)
    assert (found.batch_lr_scale, found.num_iterations) == (0.25, 4224)


def test_without_scaling_rates_and_weight_decay_are_as_given() -> None:
    found = derive(4, OCT2025, 32_768, tokens_per_parameter=20)
    assert (found.batch_lr_scale, found.weight_decay) == (1.0, 0.0)


@pytest.mark.parametrize(("tokens", "row_tokens", "expected"), [(1024, 256, 1024), (1024, 96, 960), (64, 100, 100)])
def test_a_chosen_batch_is_a_whole_number_of_rows(tokens: int, row_tokens: int, expected: int) -> None:
    assert whole_rows(tokens, row_tokens) == expected
