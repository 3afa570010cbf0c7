"""Operations are tested on the CPU, in both of their paths."""

from __future__ import annotations

import pytest

from mlxchat.ops import attention, cross_entropy, linear, normalisation


@pytest.fixture(params=["cpu", "gpu"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two code paths computes; the GPU's is run on the CPU, where its products are exact."""
    for module in (attention, cross_entropy, linear, normalisation):
        monkeypatch.setattr(module, "backend", lambda: request.param)
    return str(request.param)
