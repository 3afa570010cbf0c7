"""Muon of October 2025 and of July 2026 equal nanochat's formulas on singular values, in NumPy."""

import mlx.core as mx
import numpy as np
import pytest

from kit import models
from kit.training import move, optimizer_config
from mlxchat.model.parameters import flatten_parameters
from mlxchat.optim.muon import POLAR_EXPRESS, aspect_factor, muon_update, orthogonalise
from mlxchat.optim.optimizer import Optimizer, Rates

SHAPES = [(16, 16), (8, 32), (32, 8), (64, 16), (1, 7)]


def newton_schulz_of_singular_values(matrix: np.ndarray) -> np.ndarray:
    """Apply nanochat's quintic five times to the singular values."""
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


def random_matrices(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def relative_norm(got: mx.array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("shape", SHAPES)
def test_three_updates_of_oct2025_equal_nanochat(shape):
    momenta, expected_momenta = mx.zeros((2, *shape)), np.zeros((2, *shape))
    for iteration, momentum in enumerate([0.85, 0.9, 0.95]):
        gradients = random_matrices(2, *shape, seed=iteration)
        gradients[1] *= 1000  # matrices of a stack are independent of each other and of scale
        direction, momenta = muon_update(mx.array(gradients), momenta, mx.array(momentum), 5, mx.float32)
        # torch: buffer.lerp_(gradient, 1 - momentum); gradient.lerp_(buffer, momentum)
        expected_momenta = momentum * expected_momenta + (1 - momentum) * gradients
        ahead = (1 - momentum) * gradients + momentum * expected_momenta
        expected = np.stack([newton_schulz_of_singular_values(matrix) for matrix in ahead])
        assert relative_norm(direction, expected) < 1e-4
        # Rounding of 0.4 %, amplified most at small singular values; nanochat also computes in bfloat16.
        assert relative_norm(orthogonalise(mx.array(ahead), 5, mx.bfloat16), expected) < 0.1
        assert relative_norm(momenta, expected_momenta) < 1e-6
    assert aspect_factor(momenta) == np.sqrt(max(1, shape[0] / shape[1]))


@pytest.mark.parametrize(
    ("shape", "smallest"), [((128, 32), 1e-7), ((32, 128), 0.0), ((128, 96), 1e-3), ((7, 16), 0.1)]
)
def test_singular_values_of_every_magnitude_follow_the_quintic(shape, smallest, path):
    """On a CPU long matrices use their Gram matrix, which squares the singular values."""
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    rank = min(shape)
    values = np.geomspace(1, smallest, rank) if smallest else np.arange(rank) < 8
    matrix = ((u * values) @ v).astype(np.float32)
    got = orthogonalise(mx.array(matrix[None]), 5, mx.float32)[0]
    assert relative_norm(got, newton_schulz_of_singular_values(matrix)) < 1e-4


# July 2026


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
        g[:, ~gradient.any(axis=0)] = 0  # exactly, as products of float32 give it
        lr = self.lr * np.sqrt(max(1, rows / columns))
        self.weight = self.weight - lr * g - lr * self.weight_decay * self.weight * (g * self.weight >= 0)


def test_three_updates_of_jul2026_equal_nanochat():
    """Of every matrix of jul2026, including gates, with varying momentum and weight decay."""
    model = models.make_model("jul2026", vocab_size=50, context_tokens=8, seed=0, scale=1.0)
    optimizer = Optimizer(model, optimizer_config("muon_jul2026"), width=32, batch_lr_scale=0.5, weight_decay=0.4)
    parameters = flatten_parameters(model)
    references = {name: Reference(np.asarray(value), 0.01, 0.0) for name, value in parameters.items() if ".h." in name}
    start = {name: np.asarray(value) for name, value in parameters.items()}
    assert any("ve_gate" in name for name in references)
    for iteration, (lr_factor, momentum, decay) in enumerate([(1.0, 0.85, 1.0), (0.5, 0.9, 0.7), (0.25, 0.95, 0.2)]):
        rng = np.random.default_rng(iteration)
        gradients = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in parameters.items()}
        for name in references:
            gradients[name][:, 0] = 0  # a unit that never fires still decays
        moved = move(optimizer, model, gradients, Rates(lr_factor, momentum, decay))
        for name, reference in references.items():
            reference.lr, reference.weight_decay = 0.01 * lr_factor, 0.4 * decay
            reference.step(gradients[name], momentum)
    for name, reference in references.items():
        expected = reference.weight - start[name]
        assert relative_norm(moved[name] - start[name], expected) < 2e-4, name
