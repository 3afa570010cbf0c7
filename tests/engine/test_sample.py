"""Sampling: distributions against their definitions in NumPy; answers by a JSON schema for any logits."""

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.stepping import steps
from mlxchat.engine.batch import Request
from mlxchat.engine.generate import Engine
from mlxchat.engine.sample import Constraint, JsonGrammars, Sampler, Sampling, make_draws, score_tokens
from mlxchat.errors import ConfigError

NUM_DRAWS = 5_000
LOGITS = np.array([0.5, -1.0, 2.0, 1.0, -3.0, 1.5, 0.0, -0.5], dtype=np.float32)
LIMITS: list[dict[str, Any]] = [
    {}, {"top_k": 1}, {"top_k": 3}, {"top_k": 8}, {"top_k": 50}, {"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 1.0},
    {"min_p": 0.3}, {"min_p": 1.0}, {"top_k": 5, "top_p": 0.7}, {"top_k": 4, "top_p": 0.95, "min_p": 0.2},
]  # fmt: skip


def expected(logits: np.ndarray, temperature: float, **limits: Any) -> np.ndarray:
    """Return the probabilities (V,) by the definitions."""
    weights = np.exp((logits / np.float32(temperature)).astype(np.float64))
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    allowed = order[: limits.get("top_k", len(order))]
    if "top_p" in limits:
        shares = np.cumsum(weights[allowed]) / weights[allowed].sum()
        allowed = allowed[: 1 + int((shares < limits["top_p"]).sum())]
    if "min_p" in limits:
        allowed = [token for token in allowed if weights[token] >= limits["min_p"] * weights[allowed[0]]]
    found = np.zeros(len(logits))
    found[allowed] = weights[allowed] / weights[allowed].sum()
    return found


def spread(sampler: Sampler, logits: np.ndarray) -> np.ndarray:
    """Return the sampler's probabilities (B, V)."""
    ids, probabilities = sampler.distribution(mx.array(logits))
    found, values = np.zeros(logits.shape), np.asarray(probabilities)
    np.put_along_axis(found, np.asarray(ids) if ids is not None else np.indices(logits.shape)[1], values, axis=1)
    return found / found.sum(-1, keepdims=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([10, 300, 5000]), st.lists(
    st.tuples(st.floats(0.2, 3), st.sampled_from(LIMITS)), min_size=1, max_size=4))  # fmt: skip
def test_distributions_equal_their_definitions(seed, size, rows):
    """Rows of a batch with settings of their own, float32 against float64; only a sum at top_p itself may differ."""
    logits = np.random.default_rng(seed).normal(scale=4, size=(len(rows), size)).astype(np.float32)
    sampler = Sampler([Sampling(temperature=temperature, **limits) for temperature, limits in rows])
    for got, row, (temperature, limits) in zip(spread(sampler, logits), logits, rows, strict=True):
        wanted = expected(row, temperature, **limits)
        less = {"top_p": limits["top_p"] - 1e-5} if "top_p" in limits else {}
        near = expected(row, temperature, **{**limits, **less})
        assert np.abs(got - wanted).max() < 1e-5 or np.abs(got - near).max() < 1e-5


@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.8}], ids=str)
def test_draws_follow_the_distribution(limits):
    draws = make_draws(0)
    sampler = Sampler([Sampling(temperature=0.8, **limits)] * NUM_DRAWS)
    drawn = np.asarray(sampler(mx.array(np.tile(LOGITS, (NUM_DRAWS, 1))), draws.random(NUM_DRAWS).tolist()))
    share, wanted = np.bincount(drawn, minlength=8) / NUM_DRAWS, expected(LOGITS, 0.8, **limits)
    assert (share[wanted == 0] == 0).all()
    # Five standard errors of each share.
    assert (np.abs(share - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / NUM_DRAWS) + 1e-12).all()


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_extreme_draws_and_greedy_rows(draw):
    """Extreme draws take tokens with a probability; greedy rows beside others the most likely token."""
    how = [Sampling(temperature=1.0, **limits) for limits in ({}, {"top_k": 3}, {"min_p": 0.5})]
    greedy = [Sampling(temperature=temperature, **limits) for limits in LIMITS for temperature in (0.0, 1e-300)]
    logits = np.stack([LOGITS] * (len(how) + len(greedy)))
    sampler = Sampler([*how, *greedy])
    drawn = np.asarray(sampler(mx.array(logits), [draw] * len(logits)))
    assert (spread(sampler, logits)[range(3), drawn[:3]] > 0).all()
    assert set(drawn[3:].tolist()) == {2}


def test_penalties_and_bias():
    """OpenAI's rule: minus frequency × count, minus presence once, of the answer; repetition of the prompt, too."""
    sampling = Sampling(repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((6, 3.0),))
    wanted = LOGITS.copy()
    wanted[[1, 2]] = [-1.0 * 1.5, 2.0 / 1.5 - 3 * 0.5 - 0.25]
    wanted[4] = -3.0 * 1.5 - 0.5 - 0.25
    wanted[6] += 3.0
    request = Request(prompt=[1, 2], max_new_tokens=9, sampling=sampling)
    got = request.restrict(mx.array(np.stack([LOGITS] * 3)), 1, [2, 4, 2, 2])
    np.testing.assert_allclose(np.asarray(got), [LOGITS, wanted, LOGITS], atol=1e-6)
    assert not Sampling(temperature=1.0, top_k=3, repetition_penalty=1.0).adjusts


def test_log_probabilities_are_the_models():
    scores = score_tokens(mx.array(np.stack([LOGITS, -LOGITS])), mx.array([4, 0]), 3)
    logs = np.log(expected(LOGITS, 1.0))
    (own, best), (other, _) = scores.read()
    assert (own, other) == pytest.approx((logs[4], np.log(expected(-LOGITS, 1.0))[0]), abs=1e-6)
    assert [token for token, _ in best] == [2, 5, 3]
    np.testing.assert_allclose([value for _, value in best], logs[[2, 5, 3]], atol=1e-6)


AGE = {"type": "integer", "minimum": 0, "maximum": 99}
LIKES = {"type": "array", "items": {"enum": ["tea", "go"]}, "maxItems": 2}
PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 4}, "age": AGE, "likes": LIKES},
          "required": ["name", "age", "likes"], "additionalProperties": False}  # fmt: skip


def is_person(value: Any) -> bool:
    return (
        value.keys() == {"name", "age", "likes"}
        and (isinstance(value["name"], str) and len(value["name"]) <= 4)
        and (isinstance(value["age"], int) and 0 <= value["age"] <= 99)
        and (len(value["likes"]) <= 2 and set(value["likes"]) <= {"tea", "go"})
    )


def test_answers_for_any_logits_match_the_schema(tokenizer):
    constraint = JsonGrammars(tokenizer).constraint(PERSON)
    first = constraint.copy().allowed([], tokenizer.vocab_size)
    assert first.any()
    assert not first[sorted(tokenizer.special_ids.values())].any(), "no end yet"
    for seed in range(20):
        draws, state, said = np.random.default_rng(seed), constraint.copy(), []
        while not said or said[-1] not in tokenizer.ends:
            allowed = state.allowed(said, tokenizer.vocab_size)
            said.append(int(np.argmax(np.where(allowed, draws.normal(size=tokenizer.vocab_size), -np.inf))))
        assert is_person(json.loads(tokenizer.decode(said[:-1])))
    with pytest.raises(ConfigError, match=r"JSON schema cannot be used: .*strin"):
        JsonGrammars(tokenizer).constraint({"type": "strin"})


def test_constrained_and_free_rows_are_independent(model, tokenizer):
    constraint = JsonGrammars(tokenizer).constraint(PERSON)

    def ask(*constraints: Constraint | None) -> list[list[int]]:
        scheduler = Engine(model, tokenizer).scheduler()
        said: dict[int, list[int]] = {}
        for each in constraints:
            request = Request(prompt=tokenizer.encode("a person"), max_new_tokens=60, tools=False, constraint=each,
                              sampling=Sampling(temperature=1.0, seed=3))  # fmt: skip
            said[scheduler.submit(request)] = []
        for event in steps(scheduler):
            said[event.id].append(event.token or 0)
        return list(said.values())

    held, free, again = ask(constraint.copy(), None, constraint.copy())
    assert held == again
    assert [free] == ask(None) != [held]
    assert is_person(json.loads(tokenizer.decode(held[:-1])))
