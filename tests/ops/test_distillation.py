"""The distillation loss and its gradients against float64 NumPy."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.cpu import kernels
from mlxchat.ops import loss as cross_entropy
from mlxchat.ops.loss import Mix, cross_entropy_sum, distillation_sum, soft_cap

ROWS, LENGTH, WIDTH, VOCAB = 2, 150, 12, 61
MIXES = [
    Mix(weight=0.5), Mix(weight=0.3, temperature=2.0), Mix(weight=1.0, temperature=0.5),
    Mix(weight=0.7, temperature=1.5, top_k=5), Mix(weight=1.0, top_k=1), Mix(weight=0.4, temperature=3.0, top_k=VOCAB),
]  # fmt: skip
Floats = np.ndarray[Any, np.dtype[np.float64]]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute 32 rows at a time, so that there are several chunks."""
    monkeypatch.setattr(cross_entropy, "LOGITS", 32 * VOCAB)
    monkeypatch.setattr(kernels, "_CHUNK_FLOATS", 32 * VOCAB)
    monkeypatch.setattr(kernels, "_LEAST_ROWS", 32)


class Case:
    """Random states, head, targets, weights (a third of them 0) and teacher's logits."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.x = rng.normal(size=(ROWS, LENGTH, WIDTH))
        self.head = rng.normal(size=(VOCAB, WIDTH))
        self.targets = rng.integers(0, VOCAB, (ROWS, LENGTH))
        self.weights = (rng.random((ROWS, LENGTH)) < 0.67) / 200
        self.logits = rng.normal(scale=4, size=(ROWS, LENGTH, VOCAB))

    def run(self, mix: Mix, dtype: mx.Dtype = mx.float32) -> tuple[list[float], list[Floats]]:
        """Return loss, cross-entropy and divergence, and the gradients in x and the head."""
        logits = mx.array(self.logits.astype(np.float32))

        def loss(x: mx.array, head: mx.array) -> Any:
            return distillation_sum(
                x, head, mx.array(self.targets), mx.array(self.weights.astype(np.float32)),
                lambda part, after: logits[:, part].reshape(-1, VOCAB), mix, capped=False,
            )  # fmt: skip

        values, gradients = mx.value_and_grad(loss, argnums=(0, 1))(
            mx.array(self.x.astype(np.float32)).astype(dtype), mx.array(self.head.astype(np.float32)).astype(dtype)
        )
        assert {value.dtype for value in values} == {mx.float32}
        assert {each.dtype for each in gradients} == {dtype}
        found = [np.asarray(each.astype(mx.float32), dtype=np.float64) for each in gradients]
        return [float(value) for value in values], found

    def expected(self, mix: Mix) -> tuple[list[float], list[Floats]]:
        """Return the same by the formulas and the chain rule, in float64."""
        tanh = np.tanh(self.x @ self.head.T / 15)
        z, soft = 15 * tanh, mix.temperature
        ones = np.eye(VOCAB)[self.targets]
        ce = -(np.log(softmax(z)) * ones).sum(-1)
        p, q = softmax(self.logits / soft), softmax(z / soft)
        if mix.top_k is None:
            top = np.ones_like(p, dtype=bool)
        else:
            top = self.logits >= np.sort(self.logits, -1)[..., -mix.top_k, None]
        rest_p, rest_q = np.where(top, 0, p).sum(-1), np.where(top, 0, q).sum(-1)
        kl = np.where(top, p * np.log(p / q), 0).sum(-1)
        some = rest_p > 0
        kl[some] += rest_p[some] * np.log(rest_p[some] / rest_q[some])
        ratio = np.divide(rest_p, rest_q, out=np.zeros_like(rest_p), where=rest_q > 0)
        aim = np.where(top, p, q * ratio[..., None])
        slope = (1 - mix.weight) * (softmax(z) - ones) + mix.weight * soft * (q - aim)
        slope *= self.weights[..., None] * (1 - tanh**2)
        total = (1 - mix.weight) * ce + mix.weight * soft**2 * kl
        values = [float((each * self.weights).sum()) for each in (total, ce, kl)]
        d_head = slope.reshape(-1, VOCAB).T @ self.x.reshape(-1, WIDTH)
        return values, [slope @ self.head, d_head]


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_loss_and_gradients_equal_the_formulas(mix, path):
    case = Case()
    values, gradients = case.run(mix)
    expected_values, expected_gradients = case.expected(mix)
    np.testing.assert_allclose(values, expected_values, rtol=3e-5)
    for found, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("mix", [MIXES[0], MIXES[3]], ids=str)
def test_bfloat16_rounds_only_products_and_gradients(mix, path):
    case = Case()
    exact, (d_x, d_head) = case.expected(mix)
    values, gradients = case.run(mix, mx.bfloat16)
    # Eight bits of mantissa in states, head and, on the plain path, logits. A rounding of 0.4 % of a logit near 15 is
    # 0.06 in the exponent.
    np.testing.assert_allclose(values, exact, rtol=2e-2)
    for found, expected in zip(gradients, (d_x, d_head), strict=True):
        assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("top_k", [None, 4])
def test_equal_models_have_no_divergence_and_gradient(top_k, path):
    case = Case()
    x, head = mx.array(case.x.astype(np.float32)), mx.array(case.head.astype(np.float32))
    logits = soft_cap(x @ head.T)

    def loss(x: mx.array) -> Any:
        return distillation_sum(
            x, head, mx.array(case.targets), mx.array(case.weights.astype(np.float32)),
            lambda part, after: logits[:, part].reshape(-1, VOCAB), Mix(weight=1, temperature=2, top_k=top_k),
            capped=True,
        )  # fmt: skip

    (total, _, kl), gradient = mx.value_and_grad(loss)(x)
    assert abs(float(total)) < 1e-5
    assert abs(float(kl)) < 1e-5
    assert float(mx.abs(gradient).max()) < 1e-7


def test_cross_entropy_equals_training_without_a_teacher():
    case = Case()
    (total, ce, _), _ = case.run(Mix(weight=1e-9))
    alone = cross_entropy_sum(
        mx.array(case.x.astype(np.float32)).reshape(-1, WIDTH), mx.array(case.head.astype(np.float32)),
        mx.array(case.targets).reshape(-1), mx.array(case.weights.astype(np.float32)).reshape(-1),
    )  # fmt: skip
    assert (total, ce) == pytest.approx((float(alone), float(alone)), rel=1e-6)
