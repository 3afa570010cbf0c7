"""Constrained decoding: finished answers are valid for any logits."""

import json
from typing import Any

import numpy as np
import pytest

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.constraint import Constraint, JsonGrammars
from mlxchat.engine.generate import Engine
from mlxchat.engine.sample import Sampling
from mlxchat.engine.scheduler import Request
from mlxchat.errors import ConfigError

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "likes": {"type": "array", "items": {"enum": ["tea", "go"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


@pytest.fixture
def constraint(tokenizer: Tokenizer) -> Constraint:
    return JsonGrammars(tokenizer).constraint(PERSON)


def is_person(value: Any) -> bool:
    return (
        value.keys() == {"name", "age", "likes"}
        and (isinstance(value["name"], str) and len(value["name"]) <= 4)
        and (isinstance(value["age"], int) and 0 <= value["age"] <= 99)
        and (len(value["likes"]) <= 2 and set(value["likes"]) <= {"tea", "go"})
    )


def test_answers_for_any_logits_match_the_schema(tokenizer, constraint):
    for seed in range(20):
        draws, state, said = np.random.default_rng(seed), constraint.copy(), []
        for _ in range(200):
            logits = state.allowed(draws.normal(size=tokenizer.vocab_size).astype(np.float32))
            said.append(int(np.argmax(logits)))
            state.follow(said[-1])
            if said[-1] in (tokenizer.assistant_end, tokenizer.bos):
                break
        assert is_person(json.loads(tokenizer.decode(said[:-1])))


def test_special_tokens_are_forbidden_before_the_end(tokenizer, constraint):
    allowed = np.isfinite(constraint.allowed(np.zeros(tokenizer.vocab_size, dtype=np.float32)))
    assert allowed.any()
    assert not allowed[sorted(tokenizer.special_ids.values())].any()


def test_invalid_schema_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"JSON schema cannot be used: .*strin"):
        JsonGrammars(tokenizer).constraint({"type": "strin"})


def test_constrained_and_free_rows_are_independent(model, tokenizer, constraint):
    def ask(constraints: list[Constraint | None]) -> list[list[int]]:
        scheduler = Engine(model, tokenizer).scheduler()
        ids = [
            scheduler.submit(
                Request(
                    prompt=tokenizer.encode("a person"), max_new_tokens=60, tools=False, constraint=each,
                    sampling=Sampling(temperature=1.0, seed=3),
                )
            )
            for each in constraints
        ]  # fmt: skip
        said: dict[int, list[int]] = {id_: [] for id_ in ids}
        while not scheduler.idle:
            for event in scheduler.step():
                said[event.id] += [event.token] if event.token is not None else []
        return list(said.values())

    held, free, again = ask([constraint.copy(), None, constraint.copy()])
    assert held == again
    assert free == ask([None])[0], "independent of other rows' schemas"
    assert free != held
    assert held[-1] in (tokenizer.assistant_end, tokenizer.bos)
    assert is_person(json.loads(tokenizer.decode(held[:-1])))
