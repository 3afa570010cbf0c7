"""Decoding with a cache equals the forward pass over whole rows.

The short windows of July 2026 are 128 tokens, so that rows of 300 tokens exceed them.
"""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from kit import models
from mlxchat.engine.cache import Slots
from mlxchat.engine.decode import make_decoder
from mlxchat.engine.generate import Engine
from mlxchat.model.gpt import GPT, cast_parameters, flatten_parameters, set_parameters

make_model = partial(models.make_model, num_layers=4, scale=0.3)  # windows: short, short, short, long
BOTH = pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
# Float32 logits within ±15 through four layers.
TOLERANCE = 1e-4


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, shape)


def decoded_logits(model: GPT, rows: list[list[int]], read: list[int], kv_bits: int | None = None) -> list[np.ndarray]:
    """Read `read` tokens of each row in chunks of 50, decode the rest as a batch; return the decoded tokens' logits."""
    slots = Slots(make_decoder(model, kv_bits=kv_bits))
    slots.reserve(len(rows), max(map(len, rows)))
    for place, (row, count) in enumerate(zip(rows, read, strict=True)):
        past = None
        for start in range(0, count, 50):
            past = slots.read(row[start : min(start + 50, count)], past, row[start - 1] if start else None)
        slots.fill(place, past)
    found: list[list[np.ndarray]] = [[] for _ in rows]
    for step in range(max(len(row) - count for row, count in zip(rows, read, strict=True))):
        places = [min(count + step, len(row) - 1) for row, count in zip(rows, read, strict=True)]
        ids = [row[place] for row, place in zip(rows, places, strict=True)]
        before = [row[place - 1] if place else 0 for row, place in zip(rows, places, strict=True)]
        for logits, each in zip(slots.step(ids, before, places), found, strict=False):
            each.append(np.array(logits))
    return [np.stack(each) for each in found]


@pytest.mark.parametrize("lengths", [[7, 0, 30, 12], [140, 2, 127, 128, 300]], ids=str)
@BOTH
def test_decoded_logits_equal_those_of_whole_rows(path, architecture, lengths):
    """Also beyond the context of 64 tokens, which limits the windows of July 2026."""
    model = make_model(architecture)
    rows = [random_ids(index + 1, length + 20)[index].tolist() for index, length in enumerate(lengths)]
    for row, got, length in zip(rows, decoded_logits(model, rows, lengths), lengths, strict=True):
        np.testing.assert_allclose(got, np.asarray(model(mx.array([row])))[0, length:], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        *((each, {"num_kv_heads": heads}) for each in ("oct2025", "jul2026") for heads in (4, 1)),  # elsewhere 2
        ("jul2026", {"num_layers": 1, "window_pattern": "S", "context_tokens": 300}),
        ("jul2026", {"num_layers": 3, "window_pattern": "LS", "context_tokens": 300}),
    ],
    ids=str,
)
def test_decoded_logits_are_equal_for_all_heads_and_windows(path, architecture, sizes):
    model, row = make_model(architecture, **sizes), random_ids(180).tolist()
    (got,) = decoded_logits(model, [row], [130])
    np.testing.assert_allclose(got, np.asarray(model(mx.array([row])))[0, 130:], atol=TOLERANCE)


@BOTH
def test_bfloat16_decoding_is_near_float32(monkeypatch, architecture):
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    model, row = make_model(architecture), random_ids(60).tolist()
    exact = np.asarray(model(mx.array([row])))[0, 40:]
    half = make_model(architecture)
    set_parameters(half, cast_parameters(flatten_parameters(half), mx.bfloat16))
    (got,) = decoded_logits(half, [row], [40])
    whole = np.asarray(half(mx.array([row])))[0, 40:]
    # Eight bits of mantissa through four layers; float32 logits within ±15.
    assert np.abs(got - exact).mean() < 1.5 * np.abs(whole - exact).mean() + 0.02
    assert np.abs(whole - exact).mean() < 0.3


@pytest.mark.parametrize("feature", ["smear_lambda", "backout_lambda", "x0_lambdas"])
def test_logits_depend_on_each_scalar(feature):
    """Otherwise a cache without the previous token would pass."""
    model, ids = make_model("jul2026"), random_ids(1, 20)
    before = np.asarray(model(mx.array(ids)))
    set_parameters(model, {feature: mx.zeros_like(flatten_parameters(model)[feature])})
    assert np.abs(np.asarray(model(mx.array(ids))) - before).max() > 100 * TOLERANCE


@BOTH
def test_greedy_decoding_equals_the_whole_row(path, tokenizer, architecture):
    model, prompts = make_model(architecture), [random_ids(2, length)[1].tolist() for length in (126, 5)]
    head = np.array(model.lm_head.weight)
    head[tokenizer.bos :] = 0  # no row ends
    model.lm_head.weight = mx.array(head)
    completions = Engine(model, tokenizer).complete(prompts, max_new_tokens=5)
    for completion, prompt in zip(completions, prompts, strict=True):
        ids = list(prompt)
        for _ in range(5):
            ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1]).item()))
        assert completion.ids == ids[len(prompt) :]
