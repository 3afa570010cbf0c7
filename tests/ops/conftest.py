"""Operations are tested on the CPU, in both of their paths."""

from __future__ import annotations

import mlxchat  # isort: split

from collections.abc import Iterator

import mlx.core as mx
import pytest

from mlxchat.ops import activation, attention, cross_entropy, normalisation
from mlxchat.ops.device import backend

assert mlxchat  # imported before MLX, so that a fast BLAS is loaded first


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    backend.cache_clear()
    yield
    mx.set_default_device(before)
    backend.cache_clear()


@pytest.fixture(params=["cpu", "gpu"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two code paths computes; the GPU's is run on the CPU, where its products are exact."""
    for module in (activation, attention, cross_entropy, normalisation):
        monkeypatch.setattr(module, "backend", lambda: request.param)
    return str(request.param)
