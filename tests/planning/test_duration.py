"""The time of a pretraining follows from its FLOPs, and from a speed that was reached or is expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlxchat.composition.compose import compose_config
from mlxchat.planning.duration import estimate_trainings
from mlxchat.runner.reasons import Estimate
from mlxchat.store.store import Store
from mlxchat.sweep.job import plan_of

# nanochat's published d20: 3.491758e9 FLOPs per token, 21,400 iterations of 524,288 tokens.
D20_FLOPS = 3.491758e9 * 21_400 * 524_288


def estimate(tmp_path: Path, *overrides: str) -> Estimate | None:
    config = compose_config(["experiment=speedrun_d20", "stage=pretrain", "machine.device=cpu", *overrides]).config
    store = Store(tmp_path / "outputs")
    return estimate_trainings(config, plan_of(config, store), store).get("pretrain")


def made(per_token: float, tokens_per_second: float, backend: str = "cpu") -> dict[str, Any]:
    return {
        "name": f"pretrain-{per_token:g}", "device": {"backend": backend},
        "step": "other", "tokens_per_second": tokens_per_second, "derived": {"flops_per_token": per_token},
    }  # fmt: skip


def test_without_any_speed_a_short_training_is_not_estimated(tmp_path: Path) -> None:
    assert estimate(tmp_path, "experiment=quickstart", "model=d4") is None


def test_without_any_speed_a_long_training_is_estimated_by_the_devices_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxchat.planning.peak.peak_flops", lambda dtype: 1e12)
    found = estimate(tmp_path)
    assert found is not None
    assert found.seconds == pytest.approx(D20_FLOPS / 4e11, rel=1e-4)


def test_the_expected_speed_gives_the_seconds_of_the_published_d20(tmp_path: Path) -> None:
    found = estimate(tmp_path, "machine.training_flops=8e12")
    assert found is not None
    assert found.seconds == pytest.approx(D20_FLOPS / 8e12, rel=1e-4)


def test_a_speed_that_was_reached_goes_before_the_expected_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = [made(1e7, 1e4), made(2e9, 100.0), made(3e9, 5e6, backend="cuda")]
    monkeypatch.setattr(Store, "recent", lambda store, stage: iter(history))
    found = estimate(tmp_path, "machine.training_flops=8e12")
    assert found is not None
    assert found.artifact == "pretrain-2e+09"
    assert found.seconds == pytest.approx(D20_FLOPS / 2e11, rel=1e-4)


def test_the_bytes_are_those_of_weights_and_moments(tmp_path: Path) -> None:
    whole = estimate(tmp_path, "machine.training_flops=8e12")
    weights = estimate(tmp_path, "machine.training_flops=8e12", "pretrain.save_training_state=false")
    assert whole is not None
    assert weights is not None
    tables, matrices = 2 * 65_536 * 1_280, 393_216_000
    assert weights.bytes == 4 * (tables + matrices)
    assert whole.bytes - weights.bytes == pytest.approx(4 * (2 * tables + matrices), rel=1e-3)


def test_later_trainings_of_so_many_iterations_take_their_share(tmp_path: Path) -> None:
    config = compose_config(["experiment=mac_evening", "machine.device=cpu", "machine.training_flops=1e12"]).config
    store = Store(tmp_path / "outputs")
    found = estimate_trainings(config, plan_of(config, store), store)
    assert found["sft"].seconds / found["pretrain"].seconds == pytest.approx(3500 / 13000)
    config.sft.num_iterations = None
    assert list(estimate_trainings(config, plan_of(config, store), store)) == ["pretrain"]
