"""Muon equals nanochat's formulas on singular values, in NumPy."""

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.optim.muon import muon_update, orthogonalise

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


def test_bfloat16_is_within_a_tenth():
    matrices = random_matrices(2, 16, 24)
    got = orthogonalise(mx.array(matrices), 5, mx.bfloat16)
    assert got.dtype == mx.float32
    # Rounding of 0.4 %, amplified most at small singular values; nanochat also computes in bfloat16.
    assert relative_norm(got, np.asarray(orthogonalise(mx.array(matrices), 5, mx.float32))) < 0.1


def test_matrices_of_a_stack_are_independent_of_each_other_and_of_scale():
    matrices = random_matrices(4, 8, 12)
    alone = np.asarray(orthogonalise(mx.array(matrices), 5, mx.float32))
    matrices[1] *= 1000
    matrices[2] = 0
    together = np.asarray(orthogonalise(mx.array(matrices), 5, mx.float32))
    np.testing.assert_allclose(together[[0, 1, 3]], alone[[0, 1, 3]], atol=1e-5)
    np.testing.assert_array_equal(together[2], 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_three_updates_equal_nanochat(shape):
    momenta, expected_momenta = mx.zeros((2, *shape)), np.zeros((2, *shape))
    for iteration, momentum in enumerate([0.85, 0.9, 0.95]):
        gradients = random_matrices(2, *shape, seed=iteration)
        direction, momenta = muon_update(mx.array(gradients), momenta, mx.array(momentum), 5, mx.float32)
        # torch: buffer.lerp_(gradient, 1 - momentum); gradient.lerp_(buffer, momentum)
        expected_momenta = momentum * expected_momenta + (1 - momentum) * gradients
        ahead = (1 - momentum) * gradients + momentum * expected_momenta
        factor = np.sqrt(max(1, shape[0] / shape[1]))
        expected = factor * np.stack([newton_schulz_of_singular_values(matrix) for matrix in ahead])
        assert relative_norm(direction, expected) < 1e-4
        assert relative_norm(momenta, expected_momenta) < 1e-6


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
