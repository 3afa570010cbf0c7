"""Outputs folders in which sweeps run."""

from pathlib import Path

import pytest

from sweep.swept import Swept


@pytest.fixture(scope="session")
def short(tiny: tuple[str, ...]) -> tuple[str, ...]:
    """Overrides that end after a pretraining of one iteration."""
    return (*tiny, "stage=pretrain", "pretrain.num_iterations=1")


@pytest.fixture
def swept(outputs: Path) -> Swept:
    """A finished run's outputs folder, in which sweeps may run."""
    return Swept(outputs)
