"""The soft-capped cross-entropy equals its formula in float64, in values and gradients.

Shapes: N rows (tokens), C width, V vocabulary.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.cpu import kernels
from mlxchat.ops import loss as cross_entropy
from mlxchat.ops.loss import cross_entropy_sum, soft_cap, token_losses

WIDTH, VOCABULARY = 16, 50
# Rows on both sides of the chunks of 64 that `small_chunks` makes.
NUM_ROWS = [1, 64, 65, 200]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CHUNK_FLOATS", 1)  # so 64 rows, the minimum of a chunk
    monkeypatch.setattr(kernels, "_LEAST_ROWS", 64)
    monkeypatch.setattr(cross_entropy, "LOGITS", 64 * VOCABULARY)


def example(num_rows: int, *, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return hidden states, head, targets and weights; logits reach the nonlinear range of the cap."""
    rng = np.random.default_rng(num_rows)
    x = (scale * rng.normal(size=(num_rows, WIDTH))).astype(np.float32)
    weight = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    targets = rng.integers(0, VOCABULARY, num_rows).astype(np.int32)
    return x, weight, targets, rng.normal(size=num_rows).astype(np.float32)


def reference_losses(x: np.ndarray, weight: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = 15 * np.tanh(x.astype(np.float64) @ weight.astype(np.float64).T / 15)
    top = logits.max(-1, keepdims=True)
    logsumexp = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
    return logsumexp - logits[np.arange(len(targets)), targets]


def reference_gradients(
    x: np.ndarray, weight: np.ndarray, targets: np.ndarray, row_weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    tanh = np.tanh(x @ weight.T / 15)
    probabilities = np.exp(15 * tanh) / np.exp(15 * tanh).sum(-1, keepdims=True)
    probabilities[np.arange(len(targets)), targets] -= 1
    d_logits = probabilities * row_weights[:, None] * (1 - tanh**2)
    return d_logits @ weight, d_logits.T @ x


def gradients(
    x: np.ndarray, weight: np.ndarray, targets: np.ndarray, row_weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    d_x, d_weight = mx.grad(cross_entropy_sum, argnums=(0, 1))(
        mx.array(x), mx.array(weight), mx.array(targets), mx.array(row_weights)
    )
    return np.asarray(d_x), np.asarray(d_weight)


def assert_close_in_norm(got: np.ndarray, expected: np.ndarray) -> None:
    """Within 2e-5 of the norm: the formulas' 5e-6 and float32 sums of 200 terms."""
    assert np.linalg.norm(got - expected) <= 2e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_weighted_sum_equals_the_reference(path, num_rows):
    x, weight, targets, row_weights = example(num_rows)
    got = cross_entropy_sum(mx.array(x), mx.array(weight), mx.array(targets), mx.array(row_weights)).item()
    losses = reference_losses(x, weight, targets) * row_weights
    # Weights of both signs cancel, so the error is measured against the sum of magnitudes.
    assert abs(got - losses.sum()) <= 2e-6 * np.abs(losses).sum()


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_gradients_equal_the_reference(path, num_rows):
    inputs = example(num_rows)
    assert (inputs[3] < 0).any() or num_rows == 1
    for got, expected in zip(gradients(*inputs), reference_gradients(*inputs), strict=True):
        assert_close_in_norm(got, expected)


def test_rows_of_weight_zero_are_ignored(path):
    x, weight, targets, row_weights = example(100)
    row_weights[::3] = 0
    kept = row_weights != 0
    d_x, d_weight = gradients(x, weight, targets, row_weights)
    assert (d_x[~kept] == 0).all()
    fewer = reference_gradients(x[kept], weight, targets[kept], row_weights[kept])
    assert_close_in_norm(d_x[kept], fewer[0])
    assert_close_in_norm(d_weight, fewer[1])


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_huge_hidden_states_give_finite_losses_and_gradients(path, scale):
    x, weight, targets, _ = example(70, scale=scale)
    ones = np.ones(70, dtype=np.float32)
    loss = cross_entropy_sum(mx.array(x), mx.array(weight), mx.array(targets), mx.array(ones)).item()
    # Every logit is at the cap, ±15, so a loss is known by counting.
    assert loss == pytest.approx(reference_losses(x, weight, targets).sum(), rel=1e-5)
    assert all(np.isfinite(gradient).all() for gradient in gradients(x, weight, targets, ones))


@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 50), (63, 1), (64, 50), (65, 1 << 30), (1000, 1)])
def test_chunks_cover_the_rows_once_in_order(rows, vocab_size):
    chunks = cross_entropy.split_positions(mx.zeros((1, rows, 1)), vocab_size)
    assert [row for chunk in chunks for row in range(rows)[chunk]] == list(range(rows))
    assert all(0 < chunk.stop - chunk.start <= 64 for chunk in chunks)


@pytest.mark.parametrize("num_rows", [64, 65])
def test_bfloat16_gives_float32_losses_and_bfloat16_gradients(path, num_rows):
    x, weight, targets, row_weights = example(num_rows, scale=1.0)
    x, weight = (mx.array(value).astype(mx.bfloat16) for value in (x, weight))
    exact = [np.asarray(value.astype(mx.float32)) for value in (x, weight)]
    loss, got = mx.value_and_grad(cross_entropy_sum, argnums=(0, 1))(
        x, weight, mx.array(targets), mx.array(row_weights)
    )
    assert loss.dtype == token_losses(x, weight, mx.array(targets)).dtype == mx.float32
    losses = reference_losses(*exact, targets) * row_weights
    # Eight bits of mantissa in gradients, and in the GPU path's logits, which come from a product in bfloat16.
    assert loss.item() == pytest.approx(losses.sum(), abs=1e-2 * np.abs(losses).sum())
    for gradient, expected in zip(got, reference_gradients(*exact, targets, row_weights), strict=True):
        assert gradient.dtype == mx.bfloat16
        error = np.linalg.norm(np.asarray(gradient.astype(mx.float32)) - expected)
        assert error < 2e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_token_losses_equal_the_reference(path, num_rows):
    x, weight, targets, _ = example(num_rows)
    got = token_losses(mx.array(x), mx.array(weight), mx.array(targets))
    # Losses reach 30 nats; their float32 sums of exponentials are within 5e-6 relative, so of the loss absolutely.
    np.testing.assert_allclose(np.asarray(got), reference_losses(x, weight, targets), atol=2e-5)


def test_token_losses_of_negative_targets_are_zero(path):
    x, weight, targets, _ = example(70)
    targets[[0, 5, 64, 69]] = -1
    got = np.asarray(token_losses(mx.array(x), mx.array(weight), mx.array(targets)))
    assert set(np.flatnonzero(got == 0)) == {0, 5, 64, 69}


def test_soft_cap_bounds_logits_at_fifteen(path):
    logits = mx.array([-1e30, -20.0, -0.1, 0.0, 2.0, 1e30]).astype(mx.bfloat16)
    got = soft_cap(logits)
    assert got.dtype == mx.float32
    exact = 15 * np.tanh(np.asarray(logits.astype(mx.float32), dtype=np.float64) / 15)
    np.testing.assert_allclose(np.asarray(got), exact, rtol=1e-6)
