"""AdamW equals the published formula."""

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.optim.optimizer import adamw_update

BETAS = (0.8, 0.95)
LRS = [0.2, 0.1, 0.05]


def gradients() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    # Of all magnitudes, including zero.
    return [(rng.normal(size=50) * 10.0 ** rng.integers(-6, 3, 50) * (np.arange(50) > 2)) for _ in LRS]


def start() -> np.ndarray:
    return np.random.default_rng(1).normal(size=50)


def our_updates(parameter: np.ndarray, *, epsilon: float, weight_decay: float) -> list[np.ndarray]:
    value = mx.array(parameter.astype(np.float32))
    first, second = mx.zeros_like(value), mx.zeros_like(value)
    after = []
    for count, (gradient, lr) in enumerate(zip(gradients(), LRS, strict=True), 1):
        value, first, second = adamw_update(
            value, mx.array(gradient.astype(np.float32)), first, second, count=mx.array(float(count)),
            lr=mx.array(lr), betas=BETAS, epsilon=epsilon, weight_decay=weight_decay,
        )  # fmt: skip
        after.append(np.asarray(value))
    return after


@pytest.mark.parametrize(("epsilon", "weight_decay"), [(1e-10, 0.0), (1e-3, 0.1)])
def test_three_updates_equal_the_published_formula(epsilon, weight_decay):
    value, first, second = start(), 0.0, 0.0
    after: list[np.ndarray] = []
    for count, (gradient, lr) in enumerate(zip(gradients(), LRS, strict=True), 1):
        value = value * (1 - lr * weight_decay)
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        corrected_first, corrected_second = first / (1 - BETAS[0] ** count), second / (1 - BETAS[1] ** count)
        value = value - lr * corrected_first / (np.sqrt(corrected_second) + epsilon)
        after.append(value)
    for got, expected in zip(our_updates(start(), epsilon=epsilon, weight_decay=weight_decay), after, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)  # float32 rounding of parameters of order one
