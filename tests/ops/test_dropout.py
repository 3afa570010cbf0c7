"""Dropout: statistics of the masks, and what they depend on."""

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.ops.dropout import draw_keys, dropped, fold


@pytest.mark.parametrize("rate", [0.001, 0.5, 0.9])
def test_dropped_share_is_the_rate_and_the_mean_is_kept(rate):
    """Of 2.1 million numbers: within five standard deviations of a binomial draw."""
    out = np.asarray(dropped(mx.ones((16, 256, 512)), mx.array(draw_keys(1, 2, rows=16)), rate))
    deviation = (rate * (1 - rate) / out.size) ** 0.5
    assert abs((out == 0).mean() - rate) < 5 * deviation
    assert out.mean(dtype=np.float64) == pytest.approx(1, abs=5 * deviation / (1 - rate) + 1e-7)


def test_masks_of_iterations_rows_and_places_are_uncorrelated():
    """Correlations of 2^17 bits are within five standard deviations of 0; fewer rows have the same keys."""
    np.testing.assert_array_equal(draw_keys(7, 11, rows=3), draw_keys(7, 11, rows=8)[:3])
    of_rows = [mx.array(draw_keys(5, iteration, rows=3)) for iteration in (0, 1, 2)]
    keys = mx.concatenate([fold(rows, place) for rows in of_rows for place in (0, 1)])
    masks = (np.asarray(dropped(mx.ones((18, 256, 512)), keys, 0.5)) > 0).reshape(18, -1) * 2.0 - 1
    correlations = masks @ masks.T / masks.shape[1] - np.eye(18)
    assert np.abs(correlations).max() < 5 / masks.shape[1] ** 0.5
