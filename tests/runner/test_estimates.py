"""What a step will take is told by artifacts like the one to be made, and by no others."""

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


def test_the_nearest_artifact_of_the_same_size_of_model_tells() -> None:
    found = estimated("d4", [made("d4", 9, 1.0), made("d4", 2, 5.0)])
    assert (found.seconds, found.bytes) == (5.0, 7)


def test_what_a_small_model_took_is_not_told_of_a_large_one() -> None:
    """A plan of the speedrun once said that midtraining takes 25 s, which the rehearsal had taken."""
    assert estimated("d20", [made("d2", 2, 5.0)]) is None
