"""Products and gradients of adapters: against NumPy in float64 and mlx-lm's layers."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.config.schema import AdapterConfig
from mlxchat.model.forward import Dropping, draw_keys, dropped, dropping, fold
from mlxchat.model.lora import LAYERS, LoRALinear

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
    sizes = AdapterConfig(kind=kind, rank=RANK, scale=SCALE, bits=bits, group_size=GROUP, dropout=dropout)
    layer = LAYERS[kind](mx.array(numbers["w"].astype(np.float32)), sizes, mx.float32, key=mx.random.key(0), place=3)
    numbers["w"] = np.asarray(layer.base).astype(np.float64)
    layer.lora_a, layer.lora_b = (mx.array(numbers[name].astype(np.float32)) for name in ("a", "b"))
    if kind == "dora":
        layer.m = mx.array(numbers["m"].astype(np.float32))
    return Made(layer, numbers)


def expected(kind: str, x: np.ndarray, numbers: Numbers, *, lengths_of: Numbers | None = None) -> np.ndarray:
    """Return the papers' formula; the rows' lengths, which have no gradient, may come from other numbers."""
    adapted_weight = numbers["w"] + SCALE * (numbers["a"] @ numbers["b"]).T
    if kind == "dora":
        of = lengths_of or numbers
        lengths = np.linalg.norm(of["w"] + SCALE * (of["a"] @ of["b"]).T, axis=1)
        adapted_weight = (numbers["m"] / lengths)[:, None] * adapted_weight
    return x @ adapted_weight.T


@pytest.mark.parametrize(("kind", "bits"), [("lora", None), ("lora", 4), ("dora", None), ("dora", 8)])
def test_product_equals_the_papers(path, kind, bits):
    made = make(kind, bits)
    x = np.random.default_rng(1).normal(0, 1, (2, 5, IN))
    out = made.layer(mx.array(x.astype(np.float32)))
    np.testing.assert_allclose(np.asarray(out), expected(kind, x, made.numbers), atol=2e-4)


@pytest.mark.parametrize(("kind", "bits"), [("lora", None), ("lora", 4), ("dora", None), ("dora", 4)])
def test_gradients_equal_finite_differences(path, kind, bits):
    made, rng = make(kind, bits), np.random.default_rng(2)
    x, cotangent = rng.normal(0, 1, (2, 3, IN)), rng.normal(0, 1, (2, 3, OUT))
    names = {"a": "lora_a", "b": "lora_b", **({"m": "m"} if kind == "dora" else {})}

    def loss(x: mx.array, *small: mx.array) -> mx.array:
        for name, value in zip(names.values(), small, strict=True):
            made.layer[name] = value
        return (made.layer(x) * mx.array(cotangent.astype(np.float32))).sum()

    given = [mx.array(x.astype(np.float32)), *(made.layer[name] for name in names.values())]
    found = mx.grad(loss, argnums=tuple(range(len(given))))(*given)
    for (name, slope), direction_seed in zip(zip(["x", *names], found, strict=True), range(9), strict=False):
        direction = np.random.default_rng(direction_seed).normal(0, 1, slope.shape)

        def moved(by: float, name: str = name, direction: np.ndarray = direction) -> float:
            numbers = {**made.numbers, "x": x}
            numbers[name] = numbers[name] + by * direction
            out = expected(kind, numbers["x"], numbers, lengths_of=made.numbers)
            return float((out * cotangent).sum())

        difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
        assert float((np.asarray(slope) * direction).sum()) == pytest.approx(difference, rel=1e-4, abs=1e-3), name


def test_dropout_applies_only_to_the_adapters_input(path):
    made, n = make("lora", dropout=0.4), make("lora").numbers
    x, cotangent = (np.random.default_rng(6).normal(0, 1, (2, 3, width)) for width in (IN, OUT))
    present = Dropping(0.0, mx.array(draw_keys(1, 2, rows=2)))
    seen = np.asarray(dropped(mx.array(x.astype(np.float32)), fold(present.keys, 3), 0.4)).astype(np.float64)
    given = mx.array(x.astype(np.float32))
    with dropping(present):
        out, slopes = mx.vjp(made.layer, [given], [mx.array(cotangent.astype(np.float32))])
    np.testing.assert_allclose(np.asarray(out[0]), x @ n["w"].T + SCALE * seen @ n["a"] @ n["b"], atol=1e-4)
    kept = seen / np.where(x == 0, 1, x)  # 0 or the scale of dropout
    expected_slopes = cotangent @ n["w"] + kept * (SCALE * cotangent @ n["b"].T @ n["a"].T)
    np.testing.assert_allclose(np.asarray(slopes[0]), expected_slopes, atol=1e-4)
    np.testing.assert_allclose(np.asarray(made.layer(given)), expected("lora", x, n), atol=1e-4)
