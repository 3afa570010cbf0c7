"""Quantised weights: decoding, measured cost, refusal, memory."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.bench.weights import fill_zero_weights
from mlxchat.engine.decode import Decoder
from mlxchat.evals.bpb import SAMPLE, measure_quantised, text_loss
from mlxchat.model.gpt import GPT
from mlxchat.model.lora import packed_copy
from mlxchat.model.parameters import init_weights


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


@pytest.mark.parametrize("bits", [8, 4])
def test_measured_cost_is_that_of_the_sample_text(wide, tokenizer, bits):
    """Against evals/bpb.py and NumPy's divergence, 1e-4."""
    packed, cost = measure_quantised(wide, tokenizer, bits)
    ids = np.array([tokenizer.bos, *tokenizer.encode(SAMPLE)][: wide.sizes.context_tokens + 1], dtype=np.int32)
    models = (wide, packed)
    rows, sizes = [(ids[:-1], ids[1:])], tokenizer.token_bytes
    losses = [text_loss(each, rows, sizes, micro_tokens=10_000).bits_per_byte for each in models]
    logits = [np.asarray(each(mx.array(ids[None, :-1])))[0].astype(np.float64) for each in models]
    exact, rounded = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in logits)
    assert (cost.exact, cost.rounded) == pytest.approx(tuple(losses), rel=1e-4)
    assert cost.divergence == pytest.approx((np.exp(exact) * (exact - rounded)).sum(-1).mean(), abs=1e-4)
    assert not cost.bad
