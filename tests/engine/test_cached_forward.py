"""Decoding with a cache equals the forward pass over the whole row: both architectures, in any pieces, any batch.

The short windows of July 2026 are 128 tokens here, so that rows of 300 tokens cross their border.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from kit import models
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.engine.kv_cache import KVCache
from mlxchat.model.gpt import GPT, flatten_parameters, set_parameters

make_model = partial(models.make_model, num_layers=4, scale=0.3)  # windows: short, short, short, long
BOTH = pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
HEADS = pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
# Float32 logits within ±15 through four layers.
TOLERANCE = 1e-4


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, shape)


def cached_logits(model: GPT, cache: KVCache, ids: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Feed ids (B, T) in pieces of these sizes; return the logits of all of them."""
    borders = np.cumsum([0, *sizes])
    pieces = [model(mx.array(ids[:, start:stop]), cache) for start, stop in pairwise(borders)]
    return np.concatenate([np.asarray(piece) for piece in pieces], axis=1)


@pytest.mark.parametrize(
    "sizes",
    [
        [300],
        [1] * 140,
        [100, 60, 60, 80],  # the second piece crosses the border
        [128, 1, 1, 1, 169],
        [129, *[1] * 10],
        [1, 200, 1, 98],
        [250, *[1] * 12],  # the cache grows
    ],
    ids=["at once", "one by one", "across", "at the border", "behind the border", "mixed", "growing"],
)
@BOTH
def test_pieces_give_the_logits_of_the_whole(architecture: str, sizes: list[int]) -> None:
    model, ids = make_model(architecture), random_ids(3, sum(sizes))
    got = cached_logits(model, KVCache(model.sizes, [300] * 3), ids, sizes)
    np.testing.assert_allclose(got, np.asarray(model(mx.array(ids))), atol=TOLERANCE)


@BOTH
@HEADS
def test_grouped_heads_give_the_logits_of_the_whole(architecture: str, num_kv_heads: int) -> None:
    model, ids = make_model(architecture, num_kv_heads=num_kv_heads), random_ids(2, 150)
    got = cached_logits(model, KVCache(model.sizes, [150] * 2), ids, [70, 60, *[1] * 20])
    np.testing.assert_allclose(got, np.asarray(model(mx.array(ids))), atol=TOLERANCE)


@pytest.mark.parametrize("lengths", [[7, 1, 30, 12], [140, 2, 127, 128], [300, 150]], ids=str)
@BOTH
def test_rows_of_different_lengths_give_the_logits_of_each_alone(architecture: str, lengths: list[int]) -> None:
    model, longest, more = make_model(architecture), max(lengths), 20
    rows = [random_ids(index + 1, length + more)[index] for index, length in enumerate(lengths)]
    ids = np.stack([np.pad(row, (longest + more - len(row), 0), constant_values=256) for row in rows])
    got = cached_logits(model, KVCache(model.sizes, lengths), ids, [longest, *[1] * more])
    for row, alone in zip(got, rows, strict=True):
        np.testing.assert_allclose(row[-len(alone) :], np.asarray(model(mx.array(alone[None])))[0], atol=TOLERANCE)


@BOTH
def test_rows_that_go_on_give_the_logits_of_each_alone(architecture: str) -> None:
    model, lengths, kept = make_model(architecture), [125, 3, 60], [0, 2]
    rows = [random_ids(index + 1, length + 20)[index] for index, length in enumerate(lengths)]
    ids = np.stack([np.pad(row, (145 - len(row), 0), constant_values=256) for row in rows])
    cache = KVCache(model.sizes, lengths)
    cached_logits(model, cache, ids[:, :130], [125, *[1] * 5])
    cache.keep_rows(mx.array(kept))
    got = cached_logits(model, cache, ids[kept, 130:], [1] * 15)
    for row, index in zip(got, kept, strict=True):
        np.testing.assert_allclose(row, np.asarray(model(mx.array(rows[index][None])))[0, -15:], atol=TOLERANCE)


@pytest.mark.parametrize(("num_layers", "pattern"), [(1, "S"), (2, "S"), (3, "LS")])
def test_any_pattern_of_windows_gives_the_logits_of_the_whole(num_layers: int, pattern: str) -> None:
    model, ids = make_model("jul2026", num_layers=num_layers, window_pattern=pattern), random_ids(2, 180)
    got = cached_logits(model, KVCache(model.sizes, [180] * 2), ids, [120, 15, *[1] * 45])
    np.testing.assert_allclose(got, np.asarray(model(mx.array(ids))), atol=TOLERANCE)


@pytest.mark.parametrize("feature", ["smear_lambda", "backout_lambda", "x0_lambdas"])
def test_the_comparison_depends_on_each_scalar(feature: str) -> None:
    """Otherwise a cache that forgets the previous token would pass."""
    model, ids = make_model("jul2026"), random_ids(1, 20)
    before = np.asarray(model(mx.array(ids)))
    set_parameters(model, {feature: mx.zeros_like(flatten_parameters(model)[feature])})
    assert np.abs(np.asarray(model(mx.array(ids))) - before).max() > 100 * TOLERANCE


@BOTH
def test_greedy_decoding_across_the_border_is_that_of_the_whole_row(tokenizer: Tokenizer, architecture: str) -> None:
    model, prompts = make_model(architecture), [random_ids(2, length)[1].tolist() for length in (124, 5, 131, 252, 300)]
    head = np.array(model.lm_head.weight)
    head[tokenizer.bos :] = 0  # no row ends
    model.lm_head.weight = mx.array(head)
    completions = Engine(model, tokenizer).complete(prompts, max_new_tokens=10)
    for completion, prompt in zip(completions, prompts, strict=True):
        ids = list(prompt)
        for _ in range(10):
            ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1]).item()))
        assert completion.ids == ids[len(prompt) :]
