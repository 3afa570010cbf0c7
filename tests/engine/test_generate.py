"""The engine: cached decoding is the model's own, rows do not touch each other, and the calculator answers."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlxchat.cpu import runtime
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.engine.scheduler import Request
from mlxchat.model.gpt import GPT

# Of different lengths, one of them a single token.
PROMPT_LENGTHS = [7, 1, 30, 12]


def prompts_of(lengths: list[int], tokenizer: Tokenizer) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [[tokenizer.bos, *rng.integers(0, 256, length - 1).tolist()] for length in lengths]


def never_ending(model: GPT, tokenizer: Tokenizer) -> GPT:
    """Return the model without any wish to end a row."""
    head = np.array(model.lm_head.weight)
    head[tokenizer.bos :] = 0
    model.lm_head.weight = mx.array(head)
    return model


# Rows


def test_rows_that_end_leave_the_others_as_they_are(model: GPT, tokenizer: Tokenizer) -> None:
    head = np.array(model.lm_head.weight)
    head[tokenizer.assistant_end] *= 1.8  # so that some rows end soon
    model.lm_head.weight = mx.array(head)
    engine, prompts = Engine(model, tokenizer), prompts_of([4, 9, 2, 17, 6, 11], tokenizer)
    together = engine.complete(prompts, max_new_tokens=25)
    lengths = [len(completion.ids) for completion in together]
    assert len(set(lengths)) > 2
    assert max(lengths) == 25
    assert together == [engine.complete([prompt], max_new_tokens=25)[0] for prompt in prompts]


# Draws


def test_greedy_decoding_ignores_the_seed(model: GPT, tokenizer: Tokenizer) -> None:
    engine, prompts = Engine(model, tokenizer), prompts_of(PROMPT_LENGTHS, tokenizer)
    assert engine.complete(prompts, max_new_tokens=5, seed=1) == engine.complete(prompts, max_new_tokens=5, seed=2)


def test_a_seed_gives_the_same_samples_and_another_seed_others(model: GPT, tokenizer: Tokenizer) -> None:
    engine, prompts = Engine(model, tokenizer), prompts_of(PROMPT_LENGTHS, tokenizer)
    first, same, other = (
        engine.complete(prompts, max_new_tokens=8, temperature=1.0, top_k=50, seed=seed) for seed in (1, 1, 2)
    )
    assert first == same
    assert first != other


def test_rows_with_the_same_prompt_draw_their_first_token_apart(model: GPT, tokenizer: Tokenizer) -> None:
    """The October 2025 nanochat gave all samples of a question the same first token."""
    model.lm_head.weight = model.lm_head.weight * 0.01  # all tokens about equally likely
    completions = Engine(model, tokenizer).complete([[tokenizer.bos]] * 32, max_new_tokens=1, temperature=1.0)
    assert len({completion.ids[0] for completion in completions}) > 10


def test_successive_tokens_of_a_row_are_drawn_apart(model: GPT, tokenizer: Tokenizer) -> None:
    model = never_ending(model, tokenizer)
    model.lm_head.weight = model.lm_head.weight * 0.01
    (completion,) = Engine(model, tokenizer).complete([[tokenizer.bos]], max_new_tokens=32, temperature=1.0)
    assert len(set(completion.ids)) > 10


# The end of a row


@pytest.mark.parametrize("name", ["<|assistant_end|>", "<|bos|>"])
def test_a_row_ends_with_its_end_token(tokenizer: Tokenizer, scripted: Callable[..., tuple], name: str) -> None:
    end = tokenizer.special_ids[name]
    engine, prompts = scripted([97, 98, end, 99])
    (completion,) = engine.complete(prompts, max_new_tokens=10)
    assert (completion.ids, completion.mask, completion.finished) == ([97, 98, end], [1, 1, 1], True)


def test_a_row_cut_off_is_not_finished(tokenizer: Tokenizer, scripted: Callable[..., tuple]) -> None:
    engine, prompts = scripted([97, 98, 99])
    (completion,) = engine.complete(prompts, max_new_tokens=2)
    assert (completion.ids, completion.finished) == ([97, 98], False)


def test_no_new_tokens_are_none(tokenizer: Tokenizer, scripted: Callable[..., tuple]) -> None:
    engine, prompts = scripted([97], [98])
    assert [each.ids for each in engine.complete(prompts, max_new_tokens=0)] == [[], []]


def test_rows_end_on_their_own(tokenizer: Tokenizer, scripted: Callable[..., tuple]) -> None:
    end = tokenizer.assistant_end
    engine, prompts = scripted([97, 98, 99], [100, end], [end])
    completions = engine.complete(prompts, max_new_tokens=3)
    assert [each.ids for each in completions] == [[97, 98, 99], [100, end], [end]]
    assert [each.mask for each in completions] == [[1, 1, 1], [1, 1], [1]]


# The calculator


def call(tokenizer: Tokenizer, expression: str) -> list[int]:
    special = tokenizer.special_ids
    return [special["<|python_start|>"], *tokenizer.encode(expression), special["<|python_end|>"]]


def answer(tokenizer: Tokenizer, text: str) -> list[int]:
    special = tokenizer.special_ids
    return [special["<|output_start|>"], *tokenizer.encode(text), special["<|output_end|>"]]


def run_script(tokenizer: Tokenizer, scripted: Callable[..., tuple], script: list[int]) -> tuple[list[int], list[int]]:
    engine, prompts = scripted([*script, tokenizer.assistant_end])
    (completion,) = engine.complete(prompts, max_new_tokens=200)
    return completion.ids, completion.mask


def test_a_call_forces_its_answer_which_is_not_sampled(tokenizer: Tokenizer, scripted: Callable[..., tuple]) -> None:
    question, forced = call(tokenizer, "6*7"), answer(tokenizer, "42")
    # What the model wants while tokens are forced is lost; then it goes on.
    ids, mask = run_script(tokenizer, scripted, [97, *question, *[120] * len(forced), 98])
    assert ids == [97, *question, *forced, 98, tokenizer.assistant_end]
    assert mask == [1, *[1] * len(question), *[0] * len(forced), 1, 1]


def test_the_model_is_given_the_forced_tokens(tokenizer: Tokenizer, scripted: Callable[..., tuple]) -> None:
    question, forced = call(tokenizer, "6*7"), answer(tokenizer, "42")
    engine, prompts = scripted([*question, *[120] * len(forced), tokenizer.assistant_end])
    engine.complete(prompts, max_new_tokens=50)
    assert [row[0] for row in engine.model.scripted.given[1:]] == [*question, *forced]


@pytest.mark.parametrize("expression", ["", "hello", "1/0", "2**9"])
def test_a_call_without_result_forces_nothing(
    tokenizer: Tokenizer, scripted: Callable[..., tuple], expression: str
) -> None:
    question = call(tokenizer, expression)
    ids, mask = run_script(tokenizer, scripted, [*question, 98])
    assert ids == [*question, 98, tokenizer.assistant_end]
    assert set(mask) == {1}


def test_two_calls_are_answered_in_turn(tokenizer: Tokenizer, scripted: Callable[..., tuple]) -> None:
    one, two = answer(tokenizer, "3"), answer(tokenizer, "0.5")
    script = [*call(tokenizer, "1+2"), *[0] * len(one), *call(tokenizer, "1/2"), *[0] * len(two)]
    ids, _ = run_script(tokenizer, scripted, script)
    assert ids == [*call(tokenizer, "1+2"), *one, *call(tokenizer, "1/2"), *two, tokenizer.assistant_end]


def test_a_second_start_begins_the_expression_anew(tokenizer: Tokenizer, scripted: Callable[..., tuple]) -> None:
    start, forced = tokenizer.special_ids["<|python_start|>"], answer(tokenizer, "4")
    script = [start, *tokenizer.encode("9*"), *call(tokenizer, "2+2")]
    ids, _ = run_script(tokenizer, scripted, [*script, *[0] * len(forced)])
    assert ids == [*script, *forced, tokenizer.assistant_end]


def test_an_end_without_a_start_forces_nothing(tokenizer: Tokenizer, scripted: Callable[..., tuple]) -> None:
    script = [*tokenizer.encode("2+2"), tokenizer.special_ids["<|python_end|>"], 98]
    assert run_script(tokenizer, scripted, script)[0] == [*script, tokenizer.assistant_end]


def test_an_end_that_the_model_wants_while_tokens_are_forced_is_lost(
    tokenizer: Tokenizer, scripted: Callable[..., tuple]
) -> None:
    question, forced = call(tokenizer, "6*7"), answer(tokenizer, "42")
    ids, _ = run_script(tokenizer, scripted, [*question, *[tokenizer.assistant_end] * len(forced), 98])
    assert ids == [*question, *forced, 98, tokenizer.assistant_end]


def test_forced_tokens_count_as_new_tokens(tokenizer: Tokenizer, scripted: Callable[..., tuple]) -> None:
    question = call(tokenizer, "6*7")
    engine, prompts = scripted([*question, *[0] * 20])
    (completion,) = engine.complete(prompts, max_new_tokens=len(question) + 2)
    assert completion.ids == [*question, *answer(tokenizer, "42")[:2]]
    assert not completion.finished


def test_each_row_has_its_own_calculator(tokenizer: Tokenizer, scripted: Callable[..., tuple]) -> None:
    end, forced = tokenizer.assistant_end, [answer(tokenizer, text) for text in ("2", "30")]
    scripts = [
        [*call(tokenizer, "1+1"), *[0] * len(forced[0]), end],
        [97, 98, 99, *call(tokenizer, "5*6"), *[0] * len(forced[1]), end],
        [97, end],
    ]
    engine, prompts = scripted(*scripts)
    completions = engine.complete(prompts, max_new_tokens=60)
    assert [completion.ids for completion in completions] == [
        [*call(tokenizer, "1+1"), *forced[0], end],
        [97, 98, 99, *call(tokenizer, "5*6"), *forced[1], end],
        [97, end],
    ]


@pytest.mark.parametrize("early", [False, True], ids=["to the end", "left early"])
def test_the_cores_of_matrix_products_are_as_before(model: GPT, tokenizer: Tokenizer, early: bool) -> None:
    before = runtime.blas_threads()
    scheduler = Engine(model, tokenizer).scheduler()
    scheduler.submit(Request(prompt=[tokenizer.bos], max_new_tokens=4))
    for _ in range(2 if early else 4):
        scheduler.step()
    assert runtime.blas_threads() == before
