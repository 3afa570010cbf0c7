"""Sampling: distributions against their definitions."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxchat.engine.sample import Sampling, distribution, log_probability, sample_token

NUM_DRAWS = 5_000
LOGITS = np.array([0.5, -1.0, 2.0, 1.0, -3.0, 1.5, 0.0, -0.5], dtype=np.float32)
LIMITS: list[dict[str, Any]] = [
    {}, {"top_k": 1}, {"top_k": 3}, {"top_k": 8}, {"top_k": 50}, {"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 1.0},
    {"min_p": 0.3}, {"min_p": 1.0}, {"top_k": 5, "top_p": 0.7}, {"top_k": 4, "top_p": 0.95, "min_p": 0.2},
]  # fmt: skip


def expected(logits: np.ndarray, temperature: float, **limits: Any) -> np.ndarray:
    """Return the probabilities (V,) by the definitions; only the division is in float32."""
    weights = np.exp((logits / np.float32(temperature)).astype(np.float64))
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    allowed = order[: limits.get("top_k", len(order))]
    if "top_p" in limits:
        shares = np.cumsum(weights[allowed]) / weights[allowed].sum()
        allowed = allowed[: 1 + int((shares < limits["top_p"] - 1e-12).sum())]
    if "min_p" in limits:
        allowed = [token for token in allowed if weights[token] >= limits["min_p"] * weights[allowed[0]]]
    found = np.zeros(len(logits))
    found[allowed] = weights[allowed] / weights[allowed].sum()
    return found


def found(logits: np.ndarray, **how: Any) -> np.ndarray:
    ids, probabilities = distribution(logits, Sampling(**how))
    spread = np.zeros(len(logits))
    spread[slice(None) if ids is None else ids] = probabilities
    return spread


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([10, 300, 5000]), st.floats(0.2, 3), st.sampled_from(LIMITS),
    st.booleans(),
)  # fmt: skip
def test_distributions_equal_their_definitions(seed, size, temperature, limits, ties):
    logits = np.random.default_rng(seed).normal(scale=4, size=size).astype(np.float32)
    logits = np.round(logits) if ties else logits
    wanted = expected(logits, temperature, **limits)
    np.testing.assert_allclose(found(logits, temperature=temperature, **limits), wanted, atol=1e-12)


@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.8}], ids=str)
def test_draws_follow_the_distribution(limits):
    draws, sampling = np.random.default_rng(0), Sampling(temperature=0.8, **limits)
    drawn = [sample_token(LOGITS, sampling, draws) for _ in range(NUM_DRAWS)]
    share, wanted = np.bincount(drawn, minlength=8) / NUM_DRAWS, expected(LOGITS, 0.8, **limits)
    assert (share[wanted == 0] == 0).all()
    # Five standard errors of each share.
    assert (np.abs(share - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / NUM_DRAWS) + 1e-12).all()


def test_temperature_zero_is_greedy_and_draws_nothing():
    draws = np.random.default_rng(0)
    assert sample_token(LOGITS, Sampling(), draws) == 2
    assert draws.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("penalty", [1.5, 0.5])
def test_repetition_penalty(penalty):
    logits = LOGITS.copy()
    logits[[2, 4]] = [2.0 / penalty, -3.0 * penalty]
    got = distribution(LOGITS, Sampling(temperature=1.0, repetition_penalty=penalty), [2, 4, 2, 2])[1]
    np.testing.assert_allclose(got, expected(logits, 1.0), atol=1e-7)


def test_frequency_and_presence_penalties_ignore_the_prompt():
    """OpenAI's rule: minus frequency × count, minus presence once. The prompt is 6, 2."""
    sampling = Sampling(temperature=1.0, frequency_penalty=0.5, presence_penalty=0.25)
    logits = LOGITS.copy()
    logits[2] -= 3 * 0.5 + 0.25
    logits[4] -= 0.5 + 0.25
    got = distribution(LOGITS, sampling, [6, 2, 2, 4, 2, 2], prompt_tokens=2)[1]
    np.testing.assert_allclose(got, expected(logits, 1.0), atol=1e-7)


def test_logit_bias_precedes_all_limits():
    sampling = Sampling(temperature=1.0, top_k=2, logit_bias=((4, 100.0), (2, -100.0)))
    ids, probabilities = distribution(LOGITS, sampling)
    assert ids.tolist() == [4, 5]
    np.testing.assert_allclose(probabilities, [1, 0], atol=1e-12)


def test_log_probabilities_ignore_the_settings():
    own, best = log_probability(LOGITS, 4, 3)
    logs = np.log(expected(LOGITS, 1.0))
    assert own == pytest.approx(logs[4], abs=1e-12)
    assert [token for token, _ in best] == [2, 5, 3]
    np.testing.assert_allclose([value for _, value in best], logs[[2, 5, 3]], atol=1e-12)


def test_all_impossible_settings_are_named():
    bad = Sampling(temperature=-1, top_k=0, top_p=1.5, min_p=0, repetition_penalty=0)
    assert len(bad.problems()) == 5
    assert not Sampling(temperature=2, top_k=1, top_p=1, min_p=1, repetition_penalty=1).problems()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("settings", [{"temperature": 1e-300}, {"temperature": 1e-300, "repetition_penalty": 1e-300}])
def test_smallest_temperature_takes_the_most_likely_token(settings):
    """Guards against division by a float32 zero."""
    logits = np.array([1.0, 3.0, 2.0, -1.0], dtype=np.float32)
    for limits in LIMITS:
        sampling = Sampling(**settings, **limits)
        assert sample_token(logits, sampling, np.random.default_rng(0), said=[1]) == 1
