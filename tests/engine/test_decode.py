"""Decoding with a cache equals the forward pass over whole rows.

The short windows of July 2026 are 128 tokens, so that rows of 300 tokens exceed them.
"""

from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from kit import models
from mlxchat.bench.train import fill_zero_weights
from mlxchat.engine.decode import Decoder, Past
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import packed_copy
from mlxchat.model.parameters import cast_parameters, flatten_parameters, init_weights, set_parameters

make_model = partial(models.make_model, num_layers=4, scale=0.3)  # windows: short, short, short, long
BOTH = pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
# Float32 logits within ±15 through four layers.
TOLERANCE = 1e-4


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, shape)


def decoded_logits(model: GPT, rows: list[list[int]], read: list[int]) -> list[np.ndarray]:
    """Read `read` tokens of each row in chunks of 50, decode the rest as a batch; return the decoded tokens' logits."""
    decoder = Decoder(model)
    decoder.resize([], len(rows), max(map(len, rows)))
    for place, (row, count) in enumerate(zip(rows, read, strict=True)):
        past: Past | None = None
        for start in range(0, count, 50):
            (past,) = decoder.read([row[start : min(start + 50, count)]], past, row[start - 1] if start else None)
        decoder.fill(place, [past], [row[count - 1] if count else 0])
    found: list[list[np.ndarray]] = [[] for _ in rows]
    for step in range(max(len(row) - count for row, count in zip(rows, read, strict=True))):
        going = [count + step < len(row) for row, count in zip(rows, read, strict=True)]
        ids = [row[min(count + step, len(row) - 1)] for row, count in zip(rows, read, strict=True)]
        logits = np.asarray(decoder.step(mx.array(ids), going))
        for row, on in enumerate(going):
            found[row] += [logits[row]] if on else []  # the others wait
    return [np.stack(each) for each in found]


@pytest.mark.parametrize("lengths", [[7, 0, 30, 12], [140, 2, 127, 128, 300], [40, 40]], ids=str)
@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [("oct2025", {}), ("oct2025", {"num_kv_heads": 4}), ("jul2026", {}), ("jul2026", {"num_kv_heads": 1}),
     ("jul2026", {"num_layers": 3, "window_pattern": "LS", "context_tokens": 300})],
    ids=str,
)  # fmt: skip
def test_decoded_logits_equal_those_of_whole_rows(path, architecture, sizes, lengths):
    """Also beyond the context of 64 tokens, which limits the windows of July 2026; rows end one after the other."""
    model = make_model(architecture, **sizes)
    rows = [random_ids(index + 1, length + 20 - 3 * index)[index].tolist() for index, length in enumerate(lengths)]
    for row, got, length in zip(rows, decoded_logits(model, rows, lengths), lengths, strict=True):
        np.testing.assert_allclose(got, np.asarray(model(mx.array([row])))[0, length:], atol=TOLERANCE)


@BOTH
def test_bfloat16_decoding_is_near_float32(monkeypatch, architecture):
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    model, row = make_model(architecture), random_ids(60).tolist()
    exact = np.asarray(model(mx.array([row])))[0, 40:]
    set_parameters(model, cast_parameters(flatten_parameters(model), mx.bfloat16))
    (got,) = decoded_logits(model, [row], [40])
    whole = np.asarray(model(mx.array([row])))[0, 40:]
    # Eight bits of mantissa through four layers; float32 logits within ±15.
    assert np.abs(got - exact).mean() < 1.5 * np.abs(whole - exact).mean() + 0.02
    assert np.abs(whole - exact).mean() < 0.3


# Decoding with quantised weights


@pytest.fixture
def wide(model: GPT) -> GPT:
    """Return a model whose rows have whole groups also if divided over two lanes."""
    wide = GPT(replace(model.sizes, width=128))
    init_weights(wide, 0)
    fill_zero_weights(wide, 1)
    return wide


@pytest.mark.parametrize("bits", [8, 4])
def test_decoding_uses_the_quantised_weights(path, wide, bits):
    prompt = list(range(40))
    decoder = Decoder(packed_copy(wide, bits))
    decoder.resize([], 1, len(prompt))
    steps = [np.asarray(decoder.step(mx.array([token]), [True])) for token in prompt]
    wanted = np.asarray(packed_copy(wide, bits)(mx.array([prompt])))[0]
    # Float32 through three layers, other orders of summation.
    np.testing.assert_allclose(np.concatenate(steps), wanted, atol=2e-4)
