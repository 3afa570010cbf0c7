"""Muon of July 2026 equals nanochat's formulas on singular values, in NumPy."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from kit import models
from kit.training import move, optimizer_config
from mlxchat.model.gpt import flatten_parameters
from mlxchat.optim.muon import POLAR_EXPRESS, normuon_update, polar_express
from mlxchat.optim.optimizer import Optimizer, Rates

SHAPES = [(16, 16), (8, 32), (32, 8), (2, 12)]
make_model = partial(models.make_model, vocab_size=50, context_tokens=8, seed=0, scale=1.0)


def random_matrices(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def relative_norm(got: object, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got) - expected) / np.linalg.norm(expected))


def polar_of_singular_values(matrix: np.ndarray) -> np.ndarray:
    """Balance the rows, then apply the five quintics to the singular values."""
    matrix = matrix.astype(np.float64)
    target = np.linalg.norm(matrix) / np.sqrt(len(matrix))
    matrix = matrix * target / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-6)
    u, s, v = np.linalg.svd(matrix / (np.linalg.norm(matrix) * 1.01 + 1e-6), full_matrices=False)
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v


class Reference:
    """One matrix under nanochat's rule, in float64."""

    def __init__(self, weight: np.ndarray, lr: float, weight_decay: float) -> None:
        self.weight, self.lr, self.weight_decay = weight.astype(np.float64), lr, weight_decay
        rows, columns = weight.shape
        self.axis = 1 if rows >= columns else 0
        self.momentum, self.variance = np.zeros_like(self.weight), 0.0

    def step(self, gradient: np.ndarray, momentum: float) -> None:
        rows, columns = self.weight.shape
        self.momentum = momentum * self.momentum + (1 - momentum) * gradient
        g = polar_of_singular_values((1 - momentum) * gradient + momentum * self.momentum)
        g *= np.sqrt(min(rows, columns)) / max(np.linalg.norm(g), 1e-6)
        mean = (g**2).mean(self.axis, keepdims=True)
        self.variance = 0.9 * self.variance + 0.1 * mean
        scale = 1 / np.sqrt(np.maximum(self.variance, 1e-10))
        g = g * scale * np.linalg.norm(g) / max(np.linalg.norm(g * scale), 1e-10)
        lr = self.lr * np.sqrt(max(1, rows / columns))
        self.weight = self.weight - lr * g - lr * self.weight_decay * self.weight * (g * self.weight >= 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_equals_quintics_of_singular_values(shape):
    matrices = random_matrices(3, *shape)
    matrices[1] *= 1000
    got = polar_express(mx.array(matrices), 5, mx.float32)
    assert relative_norm(got, np.stack([polar_of_singular_values(matrix) for matrix in matrices])) < 1e-4
    singular = np.linalg.svd(np.asarray(got), compute_uv=False)
    # Five quintics bring values above a thousandth of the norm within 0.2 of 1.
    assert singular.min() > 0.8
    assert singular.max() < 1.2


def test_zero_matrix_stays_zero():
    zeros = mx.zeros((2, 4, 6))
    direction, scale, _, _ = normuon_update(zeros, zeros, mx.zeros((2, 1, 6)), mx.array(0.9), 0.9, 5, mx.float32)
    np.testing.assert_array_equal(np.asarray(direction * scale), 0)


def test_bfloat16_is_within_a_tenth():
    matrices = random_matrices(2, 16, 24)
    got = polar_express(mx.array(matrices), 5, mx.bfloat16)
    assert got.dtype == mx.float32
    assert relative_norm(got, np.asarray(polar_express(mx.array(matrices), 5, mx.float32))) < 0.1


def test_three_updates_equal_nanochat():
    """Of every matrix of jul2026, including gates, with varying momentum and weight decay."""
    model, config = make_model("jul2026"), optimizer_config("muon_jul2026")
    optimizer = Optimizer(model, config, width=32, batch_lr_scale=0.5, weight_decay=0.4)
    parameters = flatten_parameters(model)
    references = {name: Reference(np.asarray(value), 0.01, 0.0) for name, value in parameters.items() if ".h." in name}
    start = {name: np.asarray(value) for name, value in parameters.items()}
    assert any("ve_gate" in name for name in references)
    for iteration, (lr_factor, momentum, decay) in enumerate([(1.0, 0.85, 1.0), (0.5, 0.9, 0.7), (0.25, 0.95, 0.2)]):
        rng = np.random.default_rng(iteration)
        gradients = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in parameters.items()}
        parameters = move(optimizer, parameters, gradients, Rates(lr_factor, momentum, decay))
        for name, reference in references.items():
            reference.lr, reference.weight_decay = 0.01 * lr_factor, 0.4 * decay
            reference.step(gradients[name], momentum)
    for name, reference in references.items():
        moved, expected = np.asarray(parameters[name]) - start[name], reference.weight - start[name]
        assert relative_norm(moved, expected) < 2e-4, name
