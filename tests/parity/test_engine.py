"""The calculator's protocol, sampling, and greedy decoding of both snapshots."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from test_tasks import our_rule
from values import VARIANTS, Values, absolute, assert_same, assert_within, of_files

from kit.scripted import ScriptedDecoder
from mlxchat.engine import generate
from mlxchat.engine.generate import Completion, Engine
from mlxchat.engine.sample import Sampler, Sampling
from mlxchat.engine.tools import calculate

PROBABILITY = 1e-6
# If two logits are closer than this, rounding decides, and either token is right.
TIE = 4e-4

each_file = of_files("engine_*.json")


def complete(values: Values, scripts: list[list[int]], limit: int | None) -> list[Completion]:
    """Return the completions of scripted rows. As in nanochat, all start with the first script's first token."""
    prompt, filler = values.json["prompt"], values.json["filler_token"]
    nothing: Any = SimpleNamespace(sizes=SimpleNamespace(context_tokens=1 << 20))
    engine = Engine(nothing, values.tokenizer)
    scripts = [[scripts[0][0], *script[1:], filler] for script in scripts]
    engine.decoder = ScriptedDecoder(scripts, values.tokenizer.vocab_size, shortest=len(prompt) - 1)
    return engine.complete(
        [prompt + [filler] * row for row in range(len(scripts))], max_new_tokens=1000 if limit is None else limit
    )


def row_of(values: Values, case: dict[str, Any], row: int) -> tuple[list[int], list[int]]:
    """Return the tokens and the mask of a row up to its end; nanochat keeps computing rows that have ended."""
    ids, mask = [column[row] for column in case["columns"]], [column[row] for column in case["masks"]]
    ends = [place for place, token in enumerate(ids) if token in (values.tokenizer.assistant_end, values.tokenizer.bos)]
    stop = ends[0] + 1 if ends else len(ids)
    return ids[:stop], mask[:stop]


def calls_of(values: Values, ids: list[int], mask: list[int]) -> Iterator[tuple[str, str | None, bool]]:
    """Yield every expression of a row, the answer forced after it, and whether that answer is complete."""
    special, decode, call = values.tokenizer.special_ids, values.tokenizer.decode, None
    for place, token in enumerate(ids):
        if token == special["<|python_start|>"]:
            call = []
        elif token == special["<|python_end|>"] and call is not None:
            answer, is_whole, rest = None, False, ids[place + 1 :]
            if rest[:1] == [special["<|output_start|>"]] and mask[place + 1] == 0:
                is_whole = special["<|output_end|>"] in rest
                answer = decode(rest[1 : rest.index(special["<|output_end|>"]) if is_whole else None])
            yield decode(call), answer, is_whole
            call = None
        elif call is not None:
            call.append(token)


@each_file
def test_protocol_of_the_calculator(values, monkeypatch):
    """Tokens and masks of scripted rows with nanochat's answers; these by our rule; and a call of exit()."""
    pairs, answers = [], []
    for case in values.section("scripted"):
        rows = [row_of(values, case, row) for row in range(len(case["scripts"]))]
        calls = [call for row in rows for call in calls_of(values, *row)]
        answers += [call[:2] for call in calls if call[2]]
        monkeypatch.setattr(generate, "calculate", {expression: answer for expression, answer, _ in calls}.get)
        got = complete(values, case["scripts"], case["max_tokens"])
        pairs += [(case["name"], (each.ids, each.mask), row) for each, row in zip(got, rows, strict=True)]
    assert_same(pairs)
    rules = [(expression, our_rule(expression, answer)) for expression, answer in answers]
    assert_same((expression, calculate(expression), wanted) for expression, wanted in rules if wanted != "skip")
    monkeypatch.undo()
    case = values.section("exit_in_expression")["jul2026"]
    (got,) = complete(values, [case["script"]], None)
    ended = got.ids[:-1] if got.ids[-1] in values.tokenizer.ends else got.ids
    assert [*values.json["prompt"], *ended] == case["batch_results"][0]


@each_file
def test_distributions_that_tokens_are_drawn_from(values):
    """nanochat refuses some cases, and our configuration refuses them earlier. top_k is off with 0 in jul2026."""
    errors = {}
    for number, case in enumerate(values.section("sampling")):
        if "error" in case:
            continue
        logits = mx.array(np.array(case["logits"], np.float32))
        top_k = case["top_k"] if case["top_k"] is None or case["top_k"] > 0 else None
        sampler = Sampler([Sampling(temperature=case["temperature"], top_k=top_k)] * len(logits))
        if "argmax" in case:
            assert np.asarray(sampler(logits, [0.5] * len(logits))).tolist() == case["argmax"]
            continue
        ids, found = sampler.distribution(logits)
        got = np.zeros(logits.shape)
        np.put_along_axis(got, np.indices(got.shape)[1] if ids is None else np.asarray(ids), np.asarray(found), axis=1)
        errors[str(number)] = absolute(got / got.sum(-1, keepdims=True), case["probs"])
    assert_within(PROBABILITY, errors)


@each_file
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_continuations(values, variant):
    engine, pairs = Engine(values.core_model(variant), values.tokenizer), []
    for number, case in enumerate(values.section("greedy")[variant]):
        if case["min_top2_logit_gap"] >= TIE:
            (got,) = engine.complete([case["prompt"]], max_new_tokens=case["max_tokens"])
            pairs.append((number, got.ids, case["tokens"]))
    assert_same(pairs)
