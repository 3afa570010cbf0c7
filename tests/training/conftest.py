"""Small trainings, and steps with a chosen number of lanes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kit import training
from kit.training import Trained
from mlxchat.cpu import lanes as cpu_lanes


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Trained]:
    """`kit.training.train`; trainings of the same name continue each other."""

    def run(name: str = "run", *arguments: Any, **options: Any) -> Trained:
        return training.train(tmp_path / name, *arguments, **options)

    return run


@pytest.fixture
def set_lanes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give steps this many lanes, whatever the machine and MLXCHAT_CPU say."""
    monkeypatch.delenv("MLXCHAT_CPU", raising=False)

    def choose(count: int) -> None:
        lanes = cpu_lanes.Lanes()
        missing = max(0, count - len(lanes))
        lanes.streams = [*lanes.streams[:count], *(mx.new_stream(mx.cpu) for _ in range(missing))]
        monkeypatch.setattr(cpu_lanes, "Lanes", lambda: lanes)

    return choose
