"""Estimates of steps come from similar artifacts only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mlxchat.runner.reasons import estimate_steps


def made(label: str, epochs: int, seconds: float) -> dict[str, Any]:
    return {
        "name": f"sft-{label}-{'a' * 16}", "config": {"sft": {"num_epochs": epochs}}, "version": 1,
        "inputs": {}, "seed": 1, "published": "2026", "seconds": seconds, "outputs": [{"bytes": 7}],
    }  # fmt: skip


def estimated(label: str, history: list[dict[str, Any]]) -> Any:
    step: Any = SimpleNamespace(
        name="sft", stage=SimpleNamespace(name="sft"), done=False, title=f"sft-{label}",
        identity={"sft": {"num_epochs": 2}},
    )  # fmt: skip
    store: Any = SimpleNamespace(recent=lambda stage: iter(history))
    return estimate_steps([step], store)["sft"]


def test_estimate_comes_from_the_nearest_artifact() -> None:
    found = estimated("d4", [made("d4", 9, 1.0), made("d4", 2, 5.0)])
    assert (found.seconds, found.bytes) == (5.0, 7)


def test_estimate_needs_the_same_model_size() -> None:
    assert estimated("d20", [made("d2", 2, 5.0)]) is None
