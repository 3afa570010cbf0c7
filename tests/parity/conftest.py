"""The comparisons of this folder, importable, and a CPU to make them on."""

from __future__ import annotations

import mlxchat  # isort: split

import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from mlxchat.ops.device import backend

assert mlxchat  # imported before MLX, so that a fast BLAS is loaded first

sys.path.append(str(Path(__file__).parent))  # as for `python tests/parity/check.py`


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    backend.cache_clear()
    yield
    mx.set_default_device(before)
    backend.cache_clear()
