"""The activation and its gradient against numpy, on the paths of both kinds of device."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.ops import activation


@pytest.mark.parametrize("path", ["cpu", "gpu"])
def test_the_activation_and_its_gradient_are_those_of_the_squared_relu(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation, "backend", lambda: path)
    x, cotangent = np.random.default_rng(0).normal(size=(2, 1000)).astype(np.float32)
    _, gradients = mx.vjp(activation.squared_relu, [mx.array(x)], [mx.array(cotangent)])
    np.testing.assert_allclose(np.asarray(activation.squared_relu(mx.array(x))), np.maximum(x, 0) ** 2, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(gradients[0]), 2 * np.maximum(x, 0) * cotangent, rtol=1e-6)
