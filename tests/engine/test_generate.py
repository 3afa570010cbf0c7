"""The engine: independent rows, seeds, ends of rows, the calculator."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from kit.text import tool_call, tool_output
from mlxchat.cpu import runtime
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.engine.scheduler import Request

# Of different lengths, one of them a single token.
PROMPT_LENGTHS = [7, 1, 30, 12]


def prompts_of(lengths: list[int], tokenizer: Tokenizer) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [[tokenizer.bos, *rng.integers(0, 256, length - 1).tolist()] for length in lengths]


def test_seed_determines_samples_but_not_greedy_answers(model, tokenizer):
    engine, prompts = Engine(model, tokenizer), prompts_of(PROMPT_LENGTHS, tokenizer)
    assert engine.complete(prompts, max_new_tokens=5, seed=1) == engine.complete(prompts, max_new_tokens=5, seed=2)
    first, same, other = (
        engine.complete(prompts, max_new_tokens=8, temperature=1.0, top_k=50, seed=seed) for seed in (1, 1, 2)
    )
    assert first == same != other


def test_draws_differ_between_rows_and_tokens(model, tokenizer):
    """nanochat of October 2025 gave all samples of a question the same first token."""
    head = np.array(model.lm_head.weight) * 0.01  # all tokens about equally likely
    head[tokenizer.bos :] = 0  # but the end tokens
    model.lm_head.weight = mx.array(head)
    engine = Engine(model, tokenizer)
    rows = engine.complete([[tokenizer.bos]] * 32, max_new_tokens=1, temperature=1.0)
    assert len({row.ids[0] for row in rows}) > 10
    (row,) = engine.complete([[tokenizer.bos]], max_new_tokens=32, temperature=1.0)
    assert len(set(row.ids)) > 10


def test_rows_end_with_an_end_token_or_at_the_limit(tokenizer, scripted):
    end, bos = tokenizer.assistant_end, tokenizer.bos
    engine, prompts = scripted([97, 98, 99], [100, end, 99], [bos])
    completions = engine.complete(prompts, max_new_tokens=3)
    assert [(each.ids, each.mask, each.finished) for each in completions] == [
        ([97, 98, 99], [1, 1, 1], False), ([100, end], [1, 1], True), ([bos], [1], True)
    ]  # fmt: skip
    assert [each.ids for each in engine.complete(prompts, max_new_tokens=0)] == [[], [], []]


def run_script(tokenizer: Tokenizer, scripted: Callable[..., tuple], script: list[int]) -> tuple[list[int], list[int]]:
    engine, prompts = scripted([*script, tokenizer.assistant_end])
    (completion,) = engine.complete(prompts, max_new_tokens=200)
    return completion.ids, completion.mask


def test_calls_force_their_answers(tokenizer, scripted):
    """While tokens are forced, the model's own are ignored, here end tokens."""
    start, end = tokenizer.special_ids["<|python_start|>"], tokenizer.special_ids["<|python_end|>"]
    again = [start, *tokenizer.encode("9*")]  # a second start discards this
    script, expected, forced = [97], [97], [0]
    for expression, result in (("6*7", "42"), ("1/2", "0.5"), ("2+2", "4")):
        output = tool_output(tokenizer, result)
        before = again if expression == "2+2" else []
        script += [*before, *tool_call(tokenizer, expression), *[tokenizer.assistant_end] * len(output)]
        expected += [*before, *tool_call(tokenizer, expression), *output]
        forced += [0] * (len(before) + len(tool_call(tokenizer, expression))) + [1] * len(output)
    ids, mask = run_script(tokenizer, scripted, [*script, end, 98])
    assert ids == [*expected, end, 98, tokenizer.assistant_end], "an end without a start forces nothing"
    assert mask == [1 - each for each in forced] + [1, 1, 1]


@pytest.mark.parametrize("expression", ["", "hello", "1/0", "2**9"])
def test_calls_without_result_force_nothing(tokenizer, scripted, expression):
    question = tool_call(tokenizer, expression)
    ids, mask = run_script(tokenizer, scripted, [*question, 98])
    assert ids == [*question, 98, tokenizer.assistant_end]
    assert set(mask) == {1}


def test_model_reads_the_forced_tokens(tokenizer, scripted):
    question, forced = tool_call(tokenizer, "6*7"), tool_output(tokenizer, "42")
    engine, prompts = scripted([*question, *[120] * len(forced), tokenizer.assistant_end])
    engine.complete(prompts, max_new_tokens=50)
    assert [row[0] for row in engine.model.scripted.given[1:]] == [*question, *forced]


def test_forced_tokens_count_as_new_tokens(tokenizer, scripted):
    question = tool_call(tokenizer, "6*7")
    engine, prompts = scripted([*question, *[0] * 20])
    (completion,) = engine.complete(prompts, max_new_tokens=len(question) + 2)
    assert completion.ids == [*question, *tool_output(tokenizer, "42")[:2]]
    assert not completion.finished


@pytest.mark.parametrize("early", [False, True], ids=["to the end", "left early"])
def test_blas_threads_are_restored(model, tokenizer, early):
    before = runtime.blas_threads()
    scheduler = Engine(model, tokenizer).scheduler()
    scheduler.submit(Request(prompt=[tokenizer.bos], max_new_tokens=4))
    for _ in range(2 if early else 4):
        scheduler.step()
    assert runtime.blas_threads() == before
