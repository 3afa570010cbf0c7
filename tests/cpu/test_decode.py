"""The CPU's decoder equals the model."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.models import make_model
from mlxchat.cpu.decode import CPUDecoder, computes_the_same, make_decoder, multiply, part_of
from mlxchat.engine.cache import Slots
from mlxchat.engine.decode import Decoder
from mlxchat.model import gpt
from mlxchat.model.lora import FrozenLinear
from mlxchat.model.sizes import AdapterSizes


@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_the_decoder_agrees_with_the_model(architecture):
    assert isinstance(make_decoder(make_model(architecture)), CPUDecoder)


@pytest.mark.parametrize("place", ["MLP", "Attention", "Block"])
def test_changed_model_is_decoded_through_itself(place, monkeypatch):
    """After an edit of `model/gpt.py` the decoder must not sample from the old formulas."""
    layer = getattr(gpt, place)
    former = layer.__call__

    def changed(self: Any, x: mx.array, *more: Any) -> mx.array:
        return former(self, x, *more) + 0.1 * mx.tanh(x)

    monkeypatch.setattr(layer, "__call__", changed)
    computes_the_same.cache_clear()
    model = make_model()
    try:
        with pytest.warns(UserWarning, match="decoded through the model itself"):
            decoder = make_decoder(model)
    finally:
        computes_the_same.cache_clear()
    assert isinstance(decoder, Decoder)
    slots = Slots(decoder)
    slots.reserve(1, 1)
    logits = slots.step([5], [0], [0])[0]
    np.testing.assert_allclose(logits, np.asarray(model(mx.array([[5]])))[0, 0], atol=1e-5)


@pytest.mark.parametrize("vocab_size", [16, 100, 127, 280])
def test_logits_of_vocabularies_of_any_size(vocab_size):
    """A core's part of the vocabulary need not be a multiple of 64."""
    model = make_model(vocab_size=vocab_size)
    slots = Slots(make_decoder(model))
    slots.reserve(1, 1)
    logits = slots.step([5], [0], [0])[0]
    np.testing.assert_allclose(logits, np.asarray(model(mx.array([[5]])))[0, 0], atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_part_of_a_packed_matrix_has_its_numbers(bits):
    """The middle of three groups of columns; against the unpacked matrix, atol 1e-4 for float32 sums of 32 products."""
    rng = np.random.default_rng(0)
    weight, x = (mx.array(rng.normal(size=shape).astype(np.float32)) for shape in ((64, 96), (2, 32)))
    layer = FrozenLinear(weight, AdapterSizes("lora", 1, 1.0, (), bits=bits, group_size=32), mx.float32)
    rows, columns = slice(8, 40), slice(32, 64)
    part = part_of(layer, rows, columns, packed=True)
    assert len(part) == 3, "stays packed"
    expected = np.asarray(x) @ np.asarray(layer.matrix)[rows, columns].T
    np.testing.assert_allclose(np.asarray(multiply(x, part)), expected, atol=1e-4)
