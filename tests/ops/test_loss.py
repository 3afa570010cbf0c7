"""Cross-entropy and distillation equal their formulas in float64, in values and gradients.

Shapes: B rows, T tokens, C width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.config.schema import TeacherConfig
from mlxchat.cpu import kernels
from mlxchat.model import gpt, parameters  # noqa: F401  (puts the CPU's kernels in place)
from mlxchat.ops import loss
from mlxchat.ops.loss import cross_entropy_sum, distillation_sum, token_scores

ROWS, TOKENS, WIDTH, VOCAB = 2, 150, 12, 61
CROSS_ENTROPY = TeacherConfig(weight=0.0)
MIXES = [
    CROSS_ENTROPY,
    TeacherConfig(weight=0.5),
    TeacherConfig(weight=0.3, temperature=2.0),
    TeacherConfig(weight=1.0, temperature=0.5),
]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute 32 tokens at a time, so that there are several chunks."""
    monkeypatch.setattr(loss, "LOGITS", 32 * VOCAB)
    monkeypatch.setattr(kernels, "_CHUNK_FLOATS", 32 * VOCAB)
    monkeypatch.setattr(kernels, "_LEAST_ROWS", 32)


def floats(values: Any, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.asarray(values, dtype=np.float32)).astype(dtype)


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


class Case:
    """Random states, head, targets, weights of both signs (a third of them 0) and teacher's logits."""

    def __init__(self, scale: float = 1.0) -> None:
        rng = np.random.default_rng(5)
        self.x = (scale * rng.normal(size=(ROWS, TOKENS, WIDTH))).astype(np.float32).astype(np.float64)
        self.head = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32).astype(np.float64)
        self.targets = rng.integers(0, VOCAB, (ROWS, TOKENS))
        self.weights = (rng.random((ROWS, TOKENS)) < 0.67) * rng.choice([1.0, 1.0, -0.5], (ROWS, TOKENS)) / 200
        self.logits = rng.normal(scale=3, size=(ROWS, TOKENS, VOCAB))  # below the cap

    def loss(self, mix: TeacherConfig) -> Callable[[mx.array, mx.array], Any]:
        targets, weights, logits = mx.array(self.targets), floats(self.weights), floats(self.logits)
        if mix is CROSS_ENTROPY:
            flat = targets.reshape(-1), weights.reshape(-1)
            return lambda x, head: (cross_entropy_sum(x.reshape(-1, WIDTH), head, *flat),)

        def teacher(part: slice, after: list[mx.array]) -> mx.array:
            return logits[:, part].reshape(-1, VOCAB)

        return lambda x, head: distillation_sum(x, head, targets, weights, teacher, mix)

    def run(self, mix: TeacherConfig, dtype: mx.Dtype = mx.float32) -> tuple[list[float], list[Floats]]:
        """Return the loss (and cross-entropy and divergence), and the gradients in x and the head."""
        given = floats(self.x, dtype), floats(self.head, dtype)
        values, gradients = mx.value_and_grad(self.loss(mix), argnums=(0, 1))(*given)
        assert {value.dtype for value in values} == {mx.float32}
        assert {each.dtype for each in gradients} == {dtype}
        found = [np.asarray(each.astype(mx.float32), dtype=np.float64) for each in gradients]
        return [float(value) for value in values], found

    def losses(self) -> Floats:
        """Return each token's cross-entropy."""
        z = 15 * np.tanh(self.x @ self.head.T / 15)
        top = z.max(-1)
        chosen: Floats = np.take_along_axis(z, self.targets[..., None], -1)[..., 0]
        return np.log(np.exp(z - top[..., None]).sum(-1)) + top - chosen

    def expected(self, mix: TeacherConfig) -> tuple[list[float], list[Floats]]:
        """Return what `run` returns, by the formulas and the chain rule."""
        tanh = np.tanh(self.x @ self.head.T / 15)
        z, soft = 15 * tanh, mix.temperature
        p, q = softmax(self.logits / soft), softmax(z / soft)
        kl = (p * np.log(p / q)).sum(-1)
        slope = (1 - mix.weight) * (softmax(z) - np.eye(VOCAB)[self.targets]) + mix.weight * soft * (q - p)
        slope *= self.weights[..., None] * (1 - tanh**2)
        ce = self.losses()
        sums = [(1 - mix.weight) * ce + mix.weight * soft**2 * kl, ce, kl]
        values = [float((each * self.weights).sum()) for each in sums]
        d_head = slope.reshape(-1, VOCAB).T @ self.x.reshape(-1, WIDTH)
        return values[: 1 if mix is CROSS_ENTROPY else 3], [slope @ self.head, d_head]


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize(("dtype", "of_values", "of_gradients"), [(mx.float32, 3e-5, 2e-5), (mx.bfloat16, 3e-2, 2e-2)])
def test_losses_and_gradients_equal_the_formulas(mix, dtype, of_values, of_gradients, path):
    """Eight bits of mantissa, also in the plain path's logits: 0.4 % of a logit near 15 is 0.06 in the exponent."""
    case = Case()
    values, gradients = case.run(mix, dtype)
    expected_values, expected_gradients = case.expected(mix)
    np.testing.assert_allclose(values, expected_values, rtol=of_values)
    for found, expected in zip(gradients, expected_gradients, strict=True):
        assert np.linalg.norm(found - expected) < of_gradients * np.linalg.norm(expected)
    assert (gradients[0][case.weights == 0] == 0).all()


@pytest.mark.parametrize("scale", [3.0, 1e30])
def test_losses_of_states_of_any_size(path, scale):
    """At the cap every logit is ±15. Sums of exponentials are within 5e-6, so losses are within that absolutely."""
    case = Case(scale)
    targets, expected = case.targets.reshape(-1).copy(), case.losses().reshape(-1)
    targets[3::7], expected[3::7] = -1, 0
    (losses,) = token_scores(floats(case.x).reshape(-1, WIDTH), floats(case.head), mx.array(targets), ("losses",))
    np.testing.assert_allclose(np.asarray(losses), expected, atol=2e-5)
    assert all(np.isfinite(gradient).all() for gradient in case.run(CROSS_ENTROPY)[1])
