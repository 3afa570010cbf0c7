"""The context that a stage gives to the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit import training
from mlxchat.runner.context import Context


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., Context]:
    """Contexts of the same name continue each other."""

    def make(name: str = "run", stop_signal: Callable[[], int | None] = lambda: None, **changes: Any) -> Context:
        return training.make_context(tmp_path / name, stop_signal=stop_signal, **changes)

    return make
