"""Dropout: masks against a hash in plain Python, their statistics, and the gradient."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxchat.ops.dropout import draw_keys, dropped, fold


def lowbias32(word: int) -> int:
    """Chris Wellons' hash, as published: https://github.com/skeeto/hash-prospector."""
    word ^= word >> 16
    word = word * 0x7FEB352D & 0xFFFFFFFF
    word ^= word >> 15
    word = word * 0x846CA68B & 0xFFFFFFFF
    return word ^ word >> 16


def expected_mask(key: tuple[int, int], count: int, rate: float) -> np.ndarray:
    """Return which numbers of a row stay: two of each word, the low half first."""
    words = [lowbias32(lowbias32(place ^ key[0]) + key[1] & 0xFFFFFFFF) for place in range(-(-count // 2))]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return np.array(halves[:count]) >= round(rate * 65536)


def mask_of(keys: np.ndarray, shape: tuple[int, ...], rate: float) -> np.ndarray:
    return np.asarray(dropped(mx.ones((len(keys), *shape)), mx.array(keys), rate)) > 0


@pytest.mark.parametrize(("tokens", "width", "rate"), [(1, 1, 0.1), (3, 5, 0.99), (4, 6, 0.001)])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_masks_equal_a_hash_in_python(seed, tokens, width, rate):
    keys = draw_keys(seed, 3, rows=2)
    masks = mask_of(keys, (tokens, width), rate)
    for mask, (first, second) in zip(masks, keys.tolist(), strict=True):
        np.testing.assert_array_equal(mask.reshape(-1), expected_mask((first, second), tokens * width, rate))


@pytest.mark.parametrize("rate", [0.001, 0.5, 0.9])
def test_dropped_share_is_the_rate_and_the_mean_is_kept(rate):
    """Of 2.1 million numbers: within five standard deviations of a binomial draw."""
    out = np.asarray(dropped(mx.ones((16, 256, 512)), mx.array(draw_keys(1, 2, rows=16)), rate))
    deviation = (rate * (1 - rate) / out.size) ** 0.5
    assert abs((out == 0).mean() - rate) < 5 * deviation + 1 / 65536
    assert out.mean(dtype=np.float64) == pytest.approx(1, abs=5 * deviation / (1 - rate) + 1e-7)
    assert len(np.unique(out)) == 2


def test_masks_are_uncorrelated():
    """Correlations of 2^17 bits within five standard deviations, of whole masks and of each with itself shifted."""
    of_rows = [mx.array(draw_keys(5, iteration, rows=3)) for iteration in (0, 1, 2)]
    keys = [np.asarray(fold(rows, place)) for rows in of_rows for place in (0, 1)]
    masks = mask_of(np.concatenate(keys), (256, 512), 0.5).reshape(18, -1) * 2.0 - 1
    correlations = masks @ masks.T / masks.shape[1] - np.eye(18)
    bound = 5 / masks.shape[1] ** 0.5
    assert np.abs(correlations).max() < bound
    for shift in (1, 2, 3, 4, 512, 1024, 65536):
        assert np.abs((masks * np.roll(masks, shift, axis=1)).mean(1)).max() < bound


def test_keys_depend_on_seed_iteration_row_and_place():
    keys = draw_keys(7, 11, rows=8)
    assert keys.dtype == np.uint32
    np.testing.assert_array_equal(draw_keys(7, 11, rows=3), keys[:3])
    of_rows = np.concatenate([keys, draw_keys(7, 12, rows=8), draw_keys(8, 11, rows=8)])
    folded = np.concatenate([np.asarray(fold(mx.array(of_rows), place)) for place in range(5)])
    np.testing.assert_array_equal(np.asarray(fold(mx.array(of_rows[:3]), 1)), folded[24:27])
    assert len(np.unique(folded)) == folded.size, "240 words of 32 bits"


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_gradient_has_the_mask_of_the_output(dtype):
    rng = np.random.default_rng(0)
    x, slopes = (mx.array(rng.normal(size=(4, 8, 6)).astype(np.float32)).astype(dtype) for _ in range(2))
    keys = mx.array(draw_keys(0, 0, rows=4))
    (out,), (gradient,) = mx.vjp(lambda x: dropped(x, keys, 0.3), [x], [slopes])
    mask = mask_of(np.asarray(keys), (8, 6), 0.3)
    scale = 65536 / (65536 - round(0.3 * 65536))
    assert out.dtype == gradient.dtype == dtype
    for found, source in ((out, x), (gradient, slopes)):
        wanted = mx.array(np.asarray(source.astype(mx.float32)) * np.float32(scale) * mask).astype(dtype)
        assert mx.array_equal(found, wanted)


def test_rate_zero_returns_its_input():
    x = mx.ones((2, 3))
    assert dropped(x, mx.zeros((2, 2), dtype=mx.uint32), 0.0) is x
