"""Products and gradients of adapters: against NumPy in float64 and mlx-lm's layers."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.model.lora import LAYERS, LoRALinear, row_lengths
from mlxchat.model.sizes import AdapterSizes
from mlxchat.ops import linear
from mlxchat.ops.dropout import Dropping, draw_keys, dropped, dropping, fold
from mlxchat.ops.linear import identity
from mlxchat.ops.linear import squared_relu as relu_squared

IN, OUT, RANK, SCALE, GROUP = 64, 48, 4, 1.7, 32
Numbers = dict[str, np.ndarray]


@dataclass
class Made:
    """A layer with an adapter, and its nonzero numbers in float64."""

    layer: LoRALinear
    numbers: Numbers


def make(kind: str, bits: int | None = None, *, seed: int = 0, dropout: float = 0.0) -> Made:
    rng = np.random.default_rng(seed)
    numbers = {
        "w": rng.normal(0, 0.2, (OUT, IN)), "a": rng.normal(0, 0.2, (IN, RANK)), "b": rng.normal(0, 0.3, (RANK, OUT)),
        "m": rng.uniform(1, 3, OUT),
    }  # fmt: skip
    sizes = AdapterSizes(kind, RANK, SCALE, (), bits, GROUP, dropout)
    layer = LAYERS[kind](mx.array(numbers["w"].astype(np.float32)), sizes, mx.float32, key=mx.random.key(0), place=3)
    numbers["w"] = np.asarray(linear.unpacked(layer.base)).astype(np.float64)
    layer.lora_a, layer.lora_b = (mx.array(numbers[name].astype(np.float32)) for name in ("a", "b"))
    if kind == "dora":
        layer.m = mx.array(numbers["m"].astype(np.float32))
    return Made(layer, numbers)


def expected(
    kind: str, x: np.ndarray, numbers: Numbers, *, squared_relu: bool, lengths_of: Numbers | None = None
) -> np.ndarray:
    """Return the papers' formula; the rows' lengths, which have no gradient, may come from other numbers."""
    seen = np.maximum(x, 0) ** 2 if squared_relu else x
    adapted_weight = numbers["w"] + SCALE * (numbers["a"] @ numbers["b"]).T
    if kind == "dora":
        of = lengths_of or numbers
        lengths = np.linalg.norm(of["w"] + SCALE * (of["a"] @ of["b"]).T, axis=1)
        adapted_weight = (numbers["m"] / lengths)[:, None] * adapted_weight
    return seen @ adapted_weight.T


@pytest.mark.parametrize(
    ("kind", "bits", "squared_relu"),
    [("lora", None, False), ("lora", 4, True), ("dora", None, True), ("dora", 8, False)],
)
def test_product_equals_the_papers(path, kind, bits, squared_relu):
    made = make(kind, bits)
    x = np.random.default_rng(1).normal(0, 1, (2, 5, IN))
    out = made.layer(mx.array(x.astype(np.float32)), relu_squared if squared_relu else identity)
    np.testing.assert_allclose(np.asarray(out), expected(kind, x, made.numbers, squared_relu=squared_relu), atol=2e-4)


@pytest.mark.parametrize(
    ("kind", "bits", "squared_relu"),
    [("lora", None, True), ("lora", 4, False), ("dora", None, False), ("dora", 4, True)],
)
def test_gradients_equal_finite_differences(path, kind, bits, squared_relu):
    made, rng = make(kind, bits), np.random.default_rng(2)
    x, cotangent = rng.normal(0, 1, (2, 3, IN)), rng.normal(0, 1, (2, 3, OUT))
    names = {"a": "lora_a", "b": "lora_b", **({"m": "m"} if kind == "dora" else {})}

    def loss(x: mx.array, *small: mx.array) -> mx.array:
        for name, value in zip(names.values(), small, strict=True):
            made.layer[name] = value
        return (
            made.layer(x, relu_squared if squared_relu else identity) * mx.array(cotangent.astype(np.float32))
        ).sum()

    given = [mx.array(x.astype(np.float32)), *(made.layer[name] for name in names.values())]
    found = mx.grad(loss, argnums=tuple(range(len(given))))(*given)
    for (name, slope), direction_seed in zip(zip(["x", *names], found, strict=True), range(9), strict=False):
        direction = np.random.default_rng(direction_seed).normal(0, 1, slope.shape)

        def moved(by: float, name: str = name, direction: np.ndarray = direction) -> float:
            numbers = {**made.numbers, "x": x}
            numbers[name] = numbers[name] + by * direction
            out = expected(kind, numbers["x"], numbers, squared_relu=squared_relu, lengths_of=made.numbers)
            return float((out * cotangent).sum())

        difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert float((np.asarray(slope) * direction).sum()) == pytest.approx(difference, rel=1e-4, abs=1e-3), name


def test_dropout_applies_only_to_the_adapters_input(path):
    made = make("lora", dropout=0.4)
    x, cotangent = (np.random.default_rng(6).normal(0, 1, (2, 3, width)) for width in (IN, OUT))
    present = Dropping(0.0, mx.array(draw_keys(1, 2, rows=2)))
    seen = np.asarray(dropped(mx.array(x.astype(np.float32)), fold(present.keys, 3), 0.4)).astype(np.float64)
    kept = seen / np.where(x == 0, 1, x)  # 0 or the scale of dropout
    n = made.numbers
    right = x @ n["w"].T + SCALE * seen @ n["a"] @ n["b"]

    def loss(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        made.layer.lora_a, made.layer.lora_b = a, b
        with dropping(present):
            return (made.layer(x) * mx.array(cotangent.astype(np.float32))).sum()

    given = [mx.array(value.astype(np.float32)) for value in (x, n["a"], n["b"])]
    with dropping(present):
        np.testing.assert_allclose(np.asarray(made.layer(given[0])), right, atol=1e-4)
    np.testing.assert_allclose(np.asarray(made.layer(given[0])), expected("lora", x, n, squared_relu=False), atol=1e-4)
    d_x, d_a, d_b = (np.asarray(slope) for slope in mx.grad(loss, argnums=(0, 1, 2))(*given))
    d_inner = SCALE * cotangent @ n["b"].T
    np.testing.assert_allclose(d_x, cotangent @ n["w"] + kept * (d_inner @ n["a"].T), atol=1e-4)
    np.testing.assert_allclose(d_a, np.einsum("bti,btr->ir", seen, d_inner), atol=1e-4)
    np.testing.assert_allclose(d_b, SCALE * np.einsum("btr,bto->ro", seen @ n["a"], cotangent), atol=1e-4)


def test_doras_factor_is_computed_in_float32():
    rng = np.random.default_rng(1)
    x = mx.array(rng.uniform(1, 2, (4096, 3)).astype(np.float32)).astype(mx.bfloat16)
    factor = mx.array([1.0, 1.011, 0.98])
    (total, slopes) = mx.value_and_grad(lambda it: (linear.scale_columns(x, it).astype(mx.float32)).sum(0).sum())(
        factor
    )
    out, plain = linear.scale_columns(x, factor), np.asarray(x.astype(mx.float32)).astype(np.float64)
    assert out.dtype == mx.bfloat16
    means = np.asarray(out.astype(mx.float32)).mean(0) / plain.mean(0)
    np.testing.assert_allclose(means, np.asarray(factor), atol=1e-3)  # in bfloat16 it would be 1.0078
    np.testing.assert_allclose(np.asarray(slopes), plain.sum(0), rtol=1e-3)
    assert np.isfinite(float(total))


@pytest.mark.parametrize("bits", [None, 4])
def test_rows_of_zeros_stay_zero_with_dora(path, bits):
    zero = slice(0, 8)
    weight = mx.array(make("dora").numbers["w"].astype(np.float32))
    weight[zero] = 0
    sizes = AdapterSizes("dora", RANK, SCALE, (), bits, GROUP)
    layer = LAYERS["dora"](weight, sizes, mx.float32, key=mx.random.key(0), place=3)
    np.testing.assert_allclose(np.asarray(layer.m), np.asarray(row_lengths(weight)), atol=0.2 if bits else 1e-6)
    x = mx.array(np.random.default_rng(2).normal(0, 1, (2, 3, IN)).astype(np.float32))
    total, slopes = mx.value_and_grad(lambda it: mx.square(layer(it)).sum())(x)
    matrix = layer.matrix
    assert np.isfinite(np.asarray(slopes)).all()
    assert np.isfinite(float(total))
    assert float(mx.abs(layer(x)[..., zero]).max()) == float(mx.abs(matrix[zero]).max()) == 0
    assert float(mx.abs(matrix[8:]).max(1).min()) > 0
