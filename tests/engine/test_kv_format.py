"""Quantised keys and values: results, distance from the exact cache, memory."""

from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit import models
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.cache import Slots
from mlxchat.engine.generate import Engine
from mlxchat.errors import ConfigError
from mlxchat.model.gpt import GPT

BOTH = pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
make_model = partial(models.make_model, width=128, scale=0.1)  # head width 32
TOKENS = 170  # windows of July 2026 are 128 tokens here


class RoundedLayer:
    """A layer's past that is rounded on arrival, with attention in float64."""

    offset = 0

    def __init__(self, window: int | None, bits: int | None) -> None:
        self.window, self.bits = window, bits

    def attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        if self.bits is not None:
            how = {"group_size": 32, "bits": self.bits}
            k, v = (mx.dequantize(*mx.quantize(x, **how), **how) for x in (k, v))
        wide = [np.asarray(x).astype(np.float64) for x in (q, k, v)]
        keys, values = (np.repeat(x, 2, axis=1) for x in wide[1:])
        scores = wide[0] @ keys.swapaxes(2, 3) / np.sqrt(q.shape[-1])
        age = np.arange(q.shape[2])[:, None] - np.arange(q.shape[2])
        seen = (age >= 0) & (age <= (age.max() if self.window is None else self.window))
        weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
        return mx.array((weights / weights.sum(-1, keepdims=True) @ values).astype(np.float32))


class RoundedCache:
    def __init__(self, model: GPT, bits: int | None) -> None:
        self.layers = [RoundedLayer(window, bits) for window in model.sizes.windows()]

    def shift(self, x: mx.array) -> mx.array:
        return mx.concatenate([mx.zeros_like(x[:, :1]), x[:, :-1]], axis=1)


def decoded(model: GPT, tokenizer: Tokenizer, kv_bits: int | None, ids: list[int], read: list[int]) -> np.ndarray:
    """Return logits after reading pieces of these lengths and decoding the rest one by one."""
    forward = Engine(model, tokenizer, kv_bits=kv_bits).forward()
    past, start, found = None, 0, []
    for size in read:
        past = forward.read(ids[start : start + size], past, ids[start - 1] if start else None)
        start += size
    forward.reserve(1, start + 1)
    forward.fill(0, past)
    for place in range(start, len(ids)):
        forward.reserve(1, place + 1)
        found.append(forward.step([ids[place]], [ids[place - 1]], [place])[0])
    return np.stack(found)


def random_ids() -> list[int]:
    return np.random.default_rng(3).integers(0, 256, TOKENS).tolist()


@BOTH
@pytest.mark.parametrize("read", [[], [64, 64, 12]], ids=str)
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.005), (4, 0.05)])
def test_tokens_attend_to_quantised_keys_and_values(tokenizer, architecture, read, bits, tolerance):
    """The tolerance, for logits with a standard deviation of about 5, is for numbers that round to either side."""
    model, ids = make_model(architecture), random_ids()
    got = decoded(model, tokenizer, bits, ids, read)
    expected = np.asarray(model(mx.array([ids]), RoundedCache(model, bits)))[0, -len(got) :]
    np.testing.assert_allclose(got, expected, atol=tolerance)


@BOTH
@pytest.mark.parametrize(("bits", "most"), [(8, 1e-4), (4, 0.02)])
def test_quantised_cache_is_close_to_the_exact_one(tokenizer, architecture, bits, most):
    """Mean divergence of the next token's distribution, in nats; not zero, since numbers are rounded."""
    model, ids = make_model(architecture), random_ids()
    exact, rounded = (
        (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float64)
        for logits in (decoded(model, tokenizer, each, ids, [130]) for each in (None, bits))
    )
    assert 1e-9 < (np.exp(exact) * (exact - rounded)).sum(-1).mean() < most


@pytest.mark.parametrize(("width", "bits", "share"), [(64, 4, 5 / 32), (32, 8, 10 / 32)])
def test_cache_memory_is_as_predicted(tokenizer, width, bits, share):
    model = make_model("oct2025", width=4 * width)
    held = []
    for each in (None, bits):
        forward: Any = Engine(model, tokenizer, kv_bits=each).forward()
        assert isinstance(forward, Slots)
        mx.clear_cache()
        before = mx.get_active_memory()
        forward.reserve(2, 1000)
        held.append(mx.get_active_memory() - before)
        per_token = model.sizes.num_layers * model.sizes.num_kv_heads * forward.decoder.format.bytes_per_token()
        assert held[-1] == pytest.approx(2 * 1024 * per_token, rel=0.01)
    assert held[1] == pytest.approx(share * held[0], rel=0.01)


def test_unsupported_head_widths_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="head width 12 cannot be quantised: expected a multiple of 32"):
        Engine(make_model("oct2025", width=48), tokenizer, kv_bits=8).forward()
