"""Decoding with quantised weights."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.bench.weights import fill_zero_weights
from mlxchat.engine.decode import Decoder
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
