"""Constrained decoding: finished answers are valid for any logits."""

import json
from typing import Any

import numpy as np
import pytest

from kit.scripted import steps
from mlxchat.engine.batch import Request
from mlxchat.engine.generate import Engine
from mlxchat.engine.sample import Constraint, JsonGrammars, Sampling
from mlxchat.errors import ConfigError

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
