"""The time of a pretraining follows from its FLOPs and from a reached or configured speed."""

from pathlib import Path
from typing import Any

import pytest

from kit.models import composed
from mlxchat.pipeline import plan_of
from mlxchat.planning.forecast import estimate_steps
from mlxchat.runner.reasons import Estimate
from mlxchat.store.store import Store

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
