"""Bits per byte, recomputed from logits in numpy."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.data.packing import IGNORED, Row
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.evals.bpb import TextLoss, mean_loss, text_loss, uniform_bits_per_byte
from mlxchat.model.gpt import GPT


@pytest.fixture
def rows(tokenizer: Tokenizer) -> list[Row]:
    """Seven rows of 20: text, special tokens and bytes that are no UTF-8; some targets are ignored."""
    rng, made = np.random.default_rng(0), []
    for _ in range(7):
        ids = rng.integers(0, tokenizer.vocab_size, 21).astype(np.int32)
        ids[rng.integers(0, 21, 3)] = tokenizer.bos
        targets = np.where(rng.random(20) < 0.3, IGNORED, ids[1:]).astype(np.int32)
        made.append((ids[:-1], targets))
    assert sum(target >= tokenizer.bos for _, targets in made for target in targets) > 5
    return made


def losses(model: GPT, row: Row) -> np.ndarray:
    """Return −log softmax of each target in nats, in float64; 0 where it is ignored."""
    logits = np.asarray(model(mx.array(row[0][None])), dtype=np.float64)[0]
    logsumexp = np.log(np.exp(logits - 15).sum(-1)) + 15
    return np.where(row[1] >= 0, logsumexp - logits[np.arange(20), np.maximum(row[1], 0)], 0)


def raw_bytes(tokenizer: Tokenizer, row: Row) -> np.ndarray:
    """Return the bytes of each target, by spelling it."""
    targets = row[1].tolist()
    return np.array([len(tokenizer.decode_bytes([each])) if 0 <= each < tokenizer.bos else 0 for each in targets])


@pytest.mark.parametrize("micro_tokens", [1, 50, 10_000])
def test_loss_counts_text_only(model, tokenizer, rows, micro_tokens):
    counted = [(losses(model, row), raw_bytes(tokenizer, row)) for row in rows]
    nats = sum((values * (sizes > 0)).sum() for values, sizes in counted)
    found = text_loss(model, rows, tokenizer.token_bytes, micro_tokens=micro_tokens)
    # Losses are float32.
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / sum(s.sum() for _, s in counted), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / sum((s > 0).sum() for _, s in counted)), rel=1e-4)


@pytest.mark.parametrize("micro_tokens", [1, 10_000])
def test_mean_loss_includes_special_tokens(model, rows, micro_tokens):
    expected = sum(losses(model, row).sum() for row in rows) / sum((row[1] >= 0).sum() for row in rows)
    assert mean_loss(model, rows, micro_tokens=micro_tokens) == pytest.approx(expected, rel=1e-5)


def test_zero_head_has_uniform_loss(model, tokenizer, rows):
    model.lm_head.weight = mx.zeros_like(model.lm_head.weight)
    found = text_loss(model, rows, tokenizer.token_bytes, micro_tokens=1000)
    assert found.bits_per_byte == pytest.approx(uniform_bits_per_byte(rows, tokenizer.token_bytes), rel=1e-6)
    assert found.perplexity == pytest.approx(tokenizer.vocab_size, rel=1e-5)


def test_loss_without_bytes_is_infinite(model, tokenizer):
    for target in (IGNORED, tokenizer.bos):
        rows = [(np.zeros(4, np.int32), np.full(4, target, np.int32))]
        assert text_loss(model, rows, tokenizer.token_bytes, micro_tokens=100).bits_per_byte == math.inf
    assert TextLoss(0.0, 0, 0).perplexity == TextLoss(1e6, 10, 1).perplexity == math.inf
