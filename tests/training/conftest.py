"""Small trainings, and steps with a chosen number of lanes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from kit import training
from kit.training import Trained
from mlxchat.ops.device import Lanes, make_lanes
from mlxchat.training import step as step_module


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Trained]:
    """`kit.training.train`; trainings of the same name continue each other."""

    def run(name: str = "run", *arguments: Any, **options: Any) -> Trained:
        return training.train(tmp_path / name, *arguments, **options)

    return run


@pytest.fixture
def set_lanes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give new steps this many lanes, whatever the machine has."""

    def make(count: int) -> Lanes:
        lanes = make_lanes()
        missing = max(0, count - len(lanes))
        lanes.streams = [*lanes.streams[:count], *(mx.new_stream(mx.cpu) for _ in range(missing))]
        return lanes

    return lambda count: monkeypatch.setattr(step_module, "make_lanes", lambda: make(count))
