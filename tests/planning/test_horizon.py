"""Iterations and batch: nanochat's numbers for each horizon and with its scaling."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit.models import composed
from mlxchat.config.schema import BatchConfig, Config
from mlxchat.model.sizes import GPTSizes, sizes_of
from mlxchat.pipeline import plan_of
from mlxchat.planning.forecast import estimate_steps
from mlxchat.planning.horizon import Hyperparameters, derive_hyperparameters, derive_numbers
from mlxchat.runner.plan import Estimate
from mlxchat.store.store import Store

OCT2025 = composed("experiment=speedrun_d20")
JUL2026 = composed("experiment=speedrun_jul2026_d12")
BATCH = 524_288


def sizes(depth: int, recipe: Config = OCT2025) -> GPTSizes:
    return sizes_of(replace(recipe.model, depth=depth), recipe.architecture, recipe.tokenizer.vocab_size)


def derive(depth: int, recipe: Config = OCT2025, tokens: int | None = BATCH, **horizon: Any) -> Hyperparameters:
    horizons = {"num_iterations": None, "target_flops": None, "tokens_per_parameter": None} | horizon
    pretrain = replace(recipe.pretrain, batch=BatchConfig(tokens=tokens, row_tokens=2048), **horizons)
    changed = replace(recipe, model=replace(recipe.model, depth=depth), pretrain=pretrain)
    return derive_hyperparameters(changed, sizes(depth, recipe))


@pytest.mark.parametrize(("depth", "iterations"), [(4, 1400), (12, 7080), (20, 21_400), (32, 71_680), (34, 84_575)])
def test_twenty_tokens_per_parameter_give_the_published_iterations(depth, iterations):
    assert derive(depth, tokens_per_parameter=20).num_iterations == iterations


def test_derived_numbers_follow_from_each_other():
    derived = derive(20, tokens_per_parameter=20)
    numbers = derive_numbers(derived, sizes(20), micro_tokens=32 * 2048)
    assert numbers["num_parameters"] == 560_988_160
    assert numbers["num_iterations"] == 21_400
    assert numbers["total_tokens"] == 21_400 * BATCH == 11_219_763_200
    assert numbers["num_accumulations"] == 8
    assert numbers["total_flops"] == pytest.approx(3.917e19, rel=1e-3)  # nanochat's speedrun: 3.92e19
    assert numbers["tokens_per_parameter"] == pytest.approx(20, rel=1e-3)
    rest = [derive_numbers(derived, sizes(20), micro_tokens=count)["num_accumulations"] for count in (BATCH, 300_000)]
    assert rest == [1, 2], "a rest takes one more"


# Scaling


@pytest.mark.parametrize(
    ("depth", "exponent", "iterations", "weight_decay"),
    [
        (4, 18, 528, 1.8899031293917847), (6, 18, 1062, 0.9396123913724335), (8, 18, 1920, 0.5197231443014819),
        (12, 19, 2520, 0.28), (20, 20, 4980, None), (24, 20, 8352, None), (26, 20, 10_510, None), (32, 21, 9600, None),
    ],
)  # fmt: skip
def test_batch_iterations_and_weight_decay_are_nanochats_at_every_depth(depth, exponent, iterations, weight_decay):
    unbounded = replace(JUL2026, optimizer=replace(JUL2026.optimizer, max_weight_decay=None))
    found = derive(depth, unbounded, None, tokens_per_parameter=12)
    assert (found.batch_tokens, found.num_iterations) == (2**exponent, iterations)
    assert found.batch_lr_scale == pytest.approx((2 ** (exponent - 19)) ** 0.5, rel=1e-12)
    if weight_decay is not None:
        assert found.weight_decay == pytest.approx(weight_decay, rel=1e-9)


@pytest.mark.parametrize(("depth", "weight_decay"), [(2, 0.52), (4, 0.52), (8, 0.5197231443014819), (12, 0.28)])
def test_weight_decay_is_bounded_below_depth_eight(depth, weight_decay):
    assert derive(depth, JUL2026, None, tokens_per_parameter=12).weight_decay == pytest.approx(weight_decay, rel=1e-9)


@pytest.mark.parametrize("horizon", [{"num_iterations": 77}, {"target_flops": 1e17}])
def test_scaling_follows_parameters_whatever_the_horizon(horizon):
    found, usual = derive(8, JUL2026, None, **horizon), derive(8, JUL2026, None, tokens_per_parameter=12)
    assert replace(found, num_iterations=0) == replace(usual, num_iterations=0)


# The time of a pretraining follows from its FLOPs and from a reached or configured speed

# nanochat's published d20: 3.491758e9 FLOPs per token, 21,400 iterations of 524,288 tokens.
D20_FLOPS = 3.491758e9 * 21_400 * 524_288
MADE = [(1e7, 1e4, "cpu"), (2e9, 100.0, "cpu"), (3e9, 5e6, "cuda")]  # FLOPs per token, tokens per second, device


def estimate(tmp_path: Path, *overrides: str) -> Estimate | None:
    config, store = composed("machine.device=cpu", "stage=pretrain", *overrides), Store(tmp_path)
    return estimate_steps(plan_of(config, store), store)["pretrain"]


def test_only_long_trainings_are_estimated_by_the_devices_peak(tmp_path, monkeypatch):
    monkeypatch.setattr("mlxchat.planning.forecast.measure_flops", lambda dtype: 1e12)
    assert estimate(tmp_path, "experiment=quickstart", "model=d4") is None
    assert estimate(tmp_path, "experiment=speedrun_d20").seconds == pytest.approx(D20_FLOPS / 4e11, rel=1e-4)


def test_fixed_time_is_the_estimate_unless_the_horizon_ends_sooner(tmp_path):
    timed = estimate(tmp_path, "experiment=five_minutes_bundled")
    assert (timed.seconds, timed.artifact) == (300, "pretrain.max_seconds")
    recipe = ("experiment=speedrun_d20", "machine.training_flops=8e12")
    assert estimate(tmp_path, *recipe, "pretrain.max_seconds=60").seconds == 60
    assert estimate(tmp_path, *recipe, "pretrain.max_seconds=1e9").seconds == pytest.approx(D20_FLOPS / 8e12, rel=1e-4)


def test_reached_speed_has_priority_over_the_configured_one(tmp_path, monkeypatch):
    """Of the finished pretraining on this kind of device that is nearest in FLOPs per token."""
    recipe = ("experiment=speedrun_d20", "machine.training_flops=8e12")
    assert estimate(tmp_path, *recipe).seconds == pytest.approx(D20_FLOPS / 8e12, rel=1e-4)
    history: list[dict[str, Any]] = [
        {"name": f"pretrain-{per_token:g}", "device": {"backend": device}, "step": "other",
         "tokens_per_second": speed, "derived": {"flops_per_token": per_token}}
        for per_token, speed, device in MADE
    ]  # fmt: skip
    monkeypatch.setattr(Store, "recent", lambda store, stage: iter(history))
    found = estimate(tmp_path, *recipe)
    assert found.artifact == "pretrain-2e+09"
    assert found.seconds == pytest.approx(D20_FLOPS / 2e11, rel=1e-4)
    tables, matrices = 2 * 65_536 * 1_280, 393_216_000
    assert found.bytes == pytest.approx(4 * (3 * tables + 2 * matrices), rel=1e-3), "weights and moments"
