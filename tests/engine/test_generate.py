"""The engine: seeds, ends of rows, the calculator, texts."""

import mlx.core as mx
import numpy as np
import pytest

from kit.scripted import steps
from kit.text import byte_tokens, tool_call, tool_output
from mlxchat.engine.batch import Request
from mlxchat.engine.generate import Engine
from mlxchat.errors import ConfigError


def test_seed_determines_samples_but_not_greedy_answers(model, tokenizer):
    rng, engine = np.random.default_rng(3), Engine(model, tokenizer)
    prompts = [[tokenizer.bos, *rng.integers(0, 256, length).tolist()] for length in (6, 0, 29, 11)]
    assert engine.complete(prompts, max_new_tokens=5, seed=1) == engine.complete(prompts, max_new_tokens=5, seed=2)
    how = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 50}
    first, same, other = (engine.complete(prompts, seed=seed, **how) for seed in (1, 1, 2))
    assert first == same != other


def test_log_probabilities_are_those_of_the_whole_row(path, model, tokenizer):
    prompts = [[tokenizer.bos, *range(length)] for length in (6, 29)]
    found = Engine(model, tokenizer).complete(prompts, max_new_tokens=9, temperature=1.0, log_probabilities=True)
    for prompt, row in zip(prompts, found, strict=True):
        logits = np.asarray(model(mx.array([[*prompt, *row.ids]])))[0, len(prompt) - 1 : -1].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(row.log_probabilities, logs[range(len(row.ids)), row.ids], atol=1e-4)


def test_draws_differ_between_rows_and_tokens(model, tokenizer):
    """nanochat of October 2025 gave all samples of a question the same first token."""
    head = np.array(model.lm_head.weight) * 0.01  # all tokens about equally likely
    head[tokenizer.bos :] = 0  # but the end tokens
    model.lm_head.weight = mx.array(head)
    rows = Engine(model, tokenizer).complete([[tokenizer.bos]] * 32, max_new_tokens=32, temperature=1.0)
    assert len({row.ids[0] for row in rows}) > 10
    assert len(set(rows[0].ids)) > 10


def test_rows_end_with_an_end_token_or_at_the_limit(tokenizer, scripted):
    end, bos = tokenizer.assistant_end, tokenizer.bos
    engine, prompts = scripted([97, 98, 99], [100, end, 99], [bos])
    completions = engine.complete(prompts, max_new_tokens=3)
    assert [(each.ids, each.mask, each.finished) for each in completions] == [
        ([97, 98, 99], [1, 1, 1], False), ([100, end], [1, 1], True), ([bos], [1], True)
    ]  # fmt: skip
    assert len(engine.decoder.given) == 3, "the last token needs no further step"
    assert [each.ids for each in engine.complete(prompts, max_new_tokens=0)] == [[], [], []]
    with pytest.raises(ConfigError, match="prompt is empty"):
        engine.complete([[]], max_new_tokens=1)


def test_calls_force_their_answers(tokenizer, scripted):
    """While tokens are forced, the model's own are ignored, here end tokens; calls without result force nothing."""
    start, end = tokenizer.special_ids["<|python_start|>"], tokenizer.special_ids["<|python_end|>"]
    again = [start, *tokenizer.encode("9*")]  # a second start discards this
    script, expected, forced = [97], [97], [0]
    for before, expression, result in (([], "6*7", "42"), ([], "1/2", "0.5"), (again, "2+2", "4"), ([], "1/0", "")):
        call, output = tool_call(tokenizer, expression), tool_output(tokenizer, result) if result else []
        script += [*before, *call, *[tokenizer.assistant_end] * len(output)]
        expected += [*before, *call, *output]
        forced += [0] * len([*before, *call]) + [1] * len(output)
    engine, prompts = scripted([*script, end, 98, tokenizer.assistant_end])
    (completion,) = engine.complete(prompts, max_new_tokens=200)
    assert completion.ids == [*expected, end, 98, tokenizer.assistant_end], "an end without a start forces nothing"
    assert completion.mask == [1 - each for each in forced] + [1, 1, 1]
    assert [row[0] for row in engine.decoder.given[1:]] == completion.ids, "the model reads forced tokens, too"
    (short,) = engine.complete(prompts, max_new_tokens=8)
    assert (short.ids, short.finished) == (expected[:8], False), "forced tokens count"


@pytest.mark.parametrize("text", ["naïve 🙂 day", "ends END here", "ENENDx", "EN", "plain"])
def test_texts_have_whole_characters_and_end_before_stop_strings(tokenizer, scripted, text):
    for stop in ((), ("END",), ("🙂", "day")):
        engine, (prompt,) = scripted([*byte_tokens(tokenizer, text.encode()), tokenizer.assistant_end])
        scheduler = engine.scheduler()
        scheduler.submit(Request(prompt=prompt, max_new_tokens=100, stop=stop))
        events = steps(scheduler)
        ends = [text.index(each) for each in stop if each in text]
        assert "".join(event.text for event in events) == text[: min(ends, default=len(text))]
        assert not any("\ufffd" in event.text for event in events)
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["stop"]


def test_incomplete_last_character_is_replaced(tokenizer, scripted):
    engine, (prompt,) = scripted(byte_tokens(tokenizer, "🙂🙂".encode()))
    scheduler = engine.scheduler()
    scheduler.submit(Request(prompt=prompt, max_new_tokens=6))
    assert [event.text for event in steps(scheduler)] == ["", "", "", "🙂", "", "\ufffd"]
