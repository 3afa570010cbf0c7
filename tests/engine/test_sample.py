"""Drawing: exactly the distribution of the logits at a temperature, among the k best."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.engine.sample import sample_tokens, split_keys

NUM_DRAWS = 100_000
LOGITS = np.array([0.5, -1.0, 2.0, 1.0, -3.0, 1.5, 0.0, -0.5], dtype=np.float32)


def draw(logits: np.ndarray, temperature: float, top_k: int | None, seed: int = 0) -> np.ndarray:
    """Return many draws from one row of logits, each made as a row of a batch."""
    batch = mx.broadcast_to(mx.array(logits), (NUM_DRAWS, len(logits)))
    return np.asarray(sample_tokens(batch, temperature=temperature, top_k=top_k, key=mx.random.key(seed)))


def probabilities(logits: np.ndarray, temperature: float, top_k: int | None) -> np.ndarray:
    logits = logits.astype(np.float64)
    if top_k is not None:
        logits = np.where(logits >= np.sort(logits)[-min(top_k, len(logits))], logits, -np.inf)
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize("top_k", [None, 1, 2, 3, 7, 8, 50])
@pytest.mark.parametrize("temperature", [0.3, 0.6, 1.0, 2.0])
def test_draws_have_the_distribution_of_the_logits(temperature: float, top_k: int | None) -> None:
    expected = probabilities(LOGITS, temperature, top_k)
    found = np.bincount(draw(LOGITS, temperature, top_k), minlength=8) / NUM_DRAWS
    assert (found[expected == 0] == 0).all()
    # Five standard errors of each share.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / NUM_DRAWS) + 1e-12).all()


@pytest.mark.parametrize("top_k", [1, 3, 50, 199])
def test_exactly_the_k_best_can_be_drawn(top_k: int) -> None:
    logits = np.random.default_rng(0).permutation(200).astype(np.float32) * 1e-6  # all but equally likely
    assert set(draw(logits, 1.0, top_k).tolist()) == set(np.argsort(logits)[-top_k:].tolist())


@pytest.mark.parametrize("top_k", [None, 1, 5])
def test_temperature_zero_takes_the_best_whatever_the_seed(top_k: int | None) -> None:
    logits = mx.array(np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32))
    for seed in range(3):
        got = sample_tokens(logits, temperature=0, top_k=top_k, key=mx.random.key(seed))
        assert got.tolist() == np.asarray(logits).argmax(-1).tolist()


def test_a_seed_gives_the_same_draws_and_another_seed_others() -> None:
    assert (draw(LOGITS, 1.0, None, seed=1) == draw(LOGITS, 1.0, None, seed=1)).all()
    assert (draw(LOGITS, 1.0, None, seed=1) != draw(LOGITS, 1.0, None, seed=2)).any()


def test_rows_are_drawn_from_their_own_logits() -> None:
    sharp = mx.array(100 * np.eye(6, dtype=np.float32)[[3, 0, 5]])
    assert sample_tokens(sharp, temperature=1.0, top_k=2, key=mx.random.key(0)).tolist() == [3, 0, 5]


@pytest.mark.parametrize("top_k", [None, 3])
def test_with_a_key_of_its_own_a_row_draws_the_same_in_any_batch(top_k: int | None) -> None:
    logits = mx.array(np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32))
    keys = mx.stack([mx.random.key(seed) for seed in (3, 1, 4, 1, 5, 9)])

    def drawn(rows: list[int]) -> list[int]:
        chosen = mx.array(rows)
        return [*sample_tokens(logits[chosen], temperature=1.0, top_k=top_k, key=keys[chosen]).tolist()]

    together = drawn([0, 1, 2, 3, 4, 5])
    assert [drawn([row])[0] for row in range(6)] == together
    assert drawn([4, 2, 0]) == [together[4], together[2], together[0]]


def test_the_keys_of_rows_are_split_one_by_one() -> None:
    keys = mx.stack([mx.random.key(seed) for seed in (3, 7)])
    following, now = split_keys(keys)
    for row, seed in enumerate((3, 7)):
        one, other = split_keys(mx.random.key(seed))
        assert (following[row].tolist(), now[row].tolist()) == (one.tolist(), other.tolist())
