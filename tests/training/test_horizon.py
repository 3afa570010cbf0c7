"""How long to train: nanochat's numbers of iterations, by each of the three horizons."""

from __future__ import annotations

from typing import Any

import pytest

from mlxchat.config import BatchConfig, PretrainConfig
from mlxchat.model.sizing import GPTSizes, flops_per_token, sizes_from_depth
from mlxchat.training.horizon import count_iterations, derive_numbers


def sizes(depth: int) -> GPTSizes:
    return sizes_from_depth(
        depth, vocab_size=65_536, aspect_ratio=64, head_width=128, num_kv_heads=None, context_tokens=2048,
        rope_theta=10_000.0,
    )  # fmt: skip


def config(tokens: int = 524_288, **horizon: Any) -> PretrainConfig:
    horizons = {"num_iterations": None, "target_flops": None, "tokens_per_parameter": None} | horizon
    return PretrainConfig(batch=BatchConfig(tokens=tokens, row_tokens=2048), **horizons)


@pytest.mark.parametrize(
    ("depth", "iterations"),
    [(4, 1400), (8, 3520), (12, 7080), (20, 21_400), (26, 41_275), (30, 60_225), (32, 71_680), (34, 84_575)],
)
def test_twenty_tokens_per_parameter_take_the_published_iterations(depth: int, iterations: int) -> None:
    assert count_iterations(config(tokens_per_parameter=20), sizes(depth)) == iterations


def test_a_number_of_iterations_is_taken_as_it_is() -> None:
    assert count_iterations(config(num_iterations=77), sizes(4)) == 77


def test_a_budget_of_operations_is_rounded_to_iterations() -> None:
    """nanochat: 1e17 operations at d8 are 421 iterations."""
    assert count_iterations(config(target_flops=1e17), sizes(8)) == 421
    assert count_iterations(config(target_flops=1e17), sizes(8)) == round(1e17 / (flops_per_token(sizes(8)) * 524_288))


@pytest.mark.parametrize("horizon", [{"target_flops": 1.0}, {"tokens_per_parameter": 1e-9}])
def test_there_is_at_least_one_iteration(horizon: dict[str, float]) -> None:
    assert count_iterations(config(**horizon), sizes(4)) == 1


def test_a_fraction_of_tokens_per_parameter_is_allowed() -> None:
    assert count_iterations(config(tokens_per_parameter=0.5), sizes(4)) == 36_700_160 // 2 // 524_288


def test_the_derived_numbers_follow_from_each_other() -> None:
    numbers = derive_numbers(config(tokens_per_parameter=20), sizes(20), micro_tokens=32 * 2048)
    assert numbers["num_parameters"] == 560_988_160
    assert numbers["num_iterations"] == 21_400
    assert numbers["total_tokens"] == 21_400 * 524_288 == 11_219_763_200
    assert numbers["num_accumulations"] == 8
    assert numbers["total_flops"] == pytest.approx(3.917e19, rel=1e-3)  # nanochat's speedrun: 3.92e19
    assert numbers["tokens_per_parameter"] == pytest.approx(20, rel=1e-3)


@pytest.mark.parametrize(("micro_tokens", "accumulations"), [(524_288, 1), (300_000, 2), (2048, 256)])
def test_a_rest_takes_one_more_accumulation(micro_tokens: int, accumulations: int) -> None:
    numbers = derive_numbers(config(num_iterations=1), sizes(4), micro_tokens=micro_tokens)
    assert numbers["num_accumulations"] == accumulations
