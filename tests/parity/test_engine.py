"""Greedy decoding of both snapshots."""

import pytest

from mlxchat.engine.generate import Engine
from parity.values import VARIANTS, assert_same, of_files

# If two logits are closer than this, rounding decides, and either token is right.
TIE = 4e-4

each_file = of_files("engine_*.json")


@each_file
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_continuations(values, variant):
    engine, pairs = Engine(values.core_model(variant), values.tokenizer), []
    for number, case in enumerate(values.json["greedy"][variant]):
        if case["min_top2_logit_gap"] >= TIE:
            (got,) = engine.complete([case["prompt"]], max_new_tokens=case["max_tokens"])
            pairs.append((number, got.ids, case["tokens"]))
    assert_same(pairs)
