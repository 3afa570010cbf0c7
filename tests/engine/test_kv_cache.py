"""The cache: attention over what was cached equals attention over everything, padded and unpadded, at every size.

Shapes: B batch, H query heads, K key/value heads, T tokens, D head width.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.engine.kv_cache import KVCache, LayerKVCache
from mlxchat.model.gpt import GPT

# Float32 softmax over at most 300 keys of width 8.
TOLERANCE = 1e-5


def random_heads(batch: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(tokens)
    return tuple(rng.normal(size=(batch, heads, tokens, 8)).astype(np.float32) for heads in (4, 2, 2))  # type: ignore[return-value]


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return causal softmax attention in float64."""
    q, k, v = q.astype(np.float64), k.repeat(2, axis=1).astype(np.float64), v.repeat(2, axis=1).astype(np.float64)
    tokens = q.shape[2]
    scores = np.where(np.tril(np.ones((tokens, tokens), dtype=bool)), q @ k.swapaxes(2, 3) / np.sqrt(8), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def attend(cache: LayerKVCache, *heads: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Feed heads in pieces of these sizes; return the attention of all of them."""
    outs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        outs.append(np.asarray(cache.attend(*(mx.array(x[:, :, part]) for x in heads))))
        start += size
    return np.concatenate(outs, axis=2)


@pytest.mark.parametrize(
    "sizes",
    [
        [1],
        [5],
        [1] * 10,
        [120, *[1] * 20],  # grows at its border of 128
        [127, 1, 1, 1],
        [128, 1],
        [129, 1],
        [100, 100, 100],
        [256, 1, 40, 1],
    ],
    ids=str,
)
def test_pieces_attend_like_the_whole(sizes: list[int]) -> None:
    q, k, v = random_heads(2, sum(sizes))
    got = attend(LayerKVCache(mx.array([0, 0])), q, k, v, sizes=sizes)
    np.testing.assert_allclose(got, reference(q, k, v), atol=TOLERANCE)


@pytest.mark.parametrize("sizes", [[20], [12, *[1] * 8], [120, *[1] * 20]], ids=str)
def test_padding_in_front_of_a_row_changes_nothing_in_it(sizes: list[int]) -> None:
    starts = [0, 3, 11]
    q, k, v = random_heads(3, sum(sizes))
    got = attend(LayerKVCache(mx.array(starts)), q, k, v, sizes=sizes)
    for row, start in enumerate(starts):
        alone = reference(*(x[row : row + 1, :, start:] for x in (q, k, v)))
        np.testing.assert_allclose(got[row : row + 1, :, start:], alone, atol=TOLERANCE)


def test_padding_itself_stays_finite() -> None:
    q, k, v = random_heads(2, 10)
    assert np.isfinite(attend(LayerKVCache(mx.array([0, 9])), q, k, v, sizes=[10])).all()


@pytest.mark.parametrize("kept", [[0, 2], [2], [1, 2], [0, 1, 2]])
def test_rows_that_go_on_attend_as_before(kept: list[int]) -> None:
    q, k, v = random_heads(3, 20)
    cache = LayerKVCache(mx.array([0, 2, 5]))
    attend(cache, q[:, :, :15], k[:, :, :15], v[:, :, :15], sizes=[15])
    cache.keep_rows(mx.array(kept))
    got = attend(cache, *(x[kept, :, 15:] for x in (q, k, v)), sizes=[1] * 5)
    for row, index in enumerate(kept):
        start = [0, 2, 5][index]
        alone = reference(*(x[index : index + 1, :, start:] for x in (q, k, v)))
        np.testing.assert_allclose(got[row : row + 1], alone[:, :, -5:], atol=TOLERANCE)


def test_the_offset_counts_the_cached_tokens() -> None:
    cache, heads = LayerKVCache(mx.array([0])), random_heads(1, 130)
    attend(cache, *heads, sizes=[126, 1, 3])
    assert cache.offset == 130


def test_every_layer_has_a_cache_of_its_own_with_the_padding_of_each_prompt(model: GPT) -> None:
    cache = KVCache(model.sizes, [4, 9, 1])
    assert len({id(layer) for layer in cache.layers}) == 3
    assert [layer.starts.tolist() for layer in cache.layers] == [[5, 0, 8]] * 3
