"""A tiny pipeline up to pretraining, and helpers to read sweep folders."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlxchat.store.files import Records


@dataclass(frozen=True)
class Swept:
    """An outputs folder in which sweeps ran."""

    outputs: Path

    def started(self) -> Counter[str]:
        """Return how often each step was started in any run."""
        logs = (self.outputs / "runs").glob("*/events.jsonl")
        return Counter(
            event["step"] for log in logs for event in Records(log).read() if event["event"] == "step_started"
        )

    @property
    def folder(self) -> Path:
        """Return the folder of the latest sweep."""
        return max((self.outputs / "multirun").iterdir())

    def rows(self) -> list[dict[str, Any]]:
        """Return its table."""
        rows: list[dict[str, Any]] = json.loads((self.folder / "table.json").read_text())
        return rows


@pytest.fixture(scope="session")
def short(tiny: tuple[str, ...]) -> tuple[str, ...]:
    """Overrides that end after a pretraining of one iteration."""
    return (*tiny, "stage=pretrain", "pretrain.num_iterations=1")


@pytest.fixture
def swept(tmp_path: Path) -> Swept:
    """An outputs folder that is not there yet."""
    return Swept(tmp_path / "outputs")
