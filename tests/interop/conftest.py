"""Small models in nanochat's format."""

from collections.abc import Callable
from pathlib import Path

import pytest

from interop.twins import Twin, make_twin


@pytest.fixture
def twin(tmp_path: Path) -> Callable[..., Twin]:
    """Create twins in the test's folder."""
    return lambda name="twin", **options: make_twin(tmp_path / name, **options)
