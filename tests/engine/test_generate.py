"""The engine: one token ahead, prompts read together, prefixes kept; seeds, ends of rows, the calculator, texts."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.stepping import steps
from kit.models import make_model
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.batch import Event, Generator, Request
from mlxchat.engine.decode import Decoder
from mlxchat.engine.generate import Engine, calculate
from mlxchat.engine.sample import Sampling
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


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Return a token for each byte."""
    single = {tokenizer.decode_bytes([token]): token for token in range(256)}
    return [single[bytes([byte])] for byte in data]


def between(tokenizer: Tokenizer, kind: str, text: str) -> list[int]:
    """Return the tokens of a tool's call ("python") or of its answer ("output")."""
    special = tokenizer.special_ids
    return [special[f"<|{kind}_start|>"], *tokenizer.encode(text), special[f"<|{kind}_end|>"]]


def test_calls_force_their_answers(tokenizer, scripted):
    """While tokens are forced, the model's own are ignored, here end tokens; calls without result force nothing."""
    start, end = tokenizer.special_ids["<|python_start|>"], tokenizer.special_ids["<|python_end|>"]
    again = [start, *tokenizer.encode("9*")]  # a second start discards this
    script, expected, forced = [97], [97], [0]
    for before, expression, result in (([], "6*7", "42"), ([], "1/2", "0.5"), (again, "2+2", "4"), ([], "1/0", "")):
        call = between(tokenizer, "python", expression)
        output = between(tokenizer, "output", result) if result else []
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


# Prompts of one token, of several chunks, equal ones, prefixes of others; windows of July 2026 are 128 tokens.
LENGTHS = (1, 5, 40, 140, 40, 17, 5, 126)


def requests_of(tokenizer: Tokenizer) -> list[Request]:
    ids = [tokenizer.bos, *np.random.default_rng(3).integers(0, 256, 200).tolist()]
    hot = {"temperature": 1.0, "repetition_penalty": 1.1, "top_p": 0.95}
    return [
        Request(prompt=ids[:length], max_new_tokens=3 + 2 * index, logprobs=2, reuse=index % 3 > 0,
                sampling=Sampling(seed=index, **(hot if index % 2 else {})))
        for index, length in enumerate(LENGTHS)
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{"max_rows": 3}, {}], ids=str)
@pytest.mark.parametrize("architecture", ["oct2025", "jul2026"])
def test_answers_are_those_of_each_request_alone(path, tokenizer, architecture, options):
    """Within rounding: in chunks, in padded batches, in free places, with reused prefixes, with penalties."""
    engine = Engine(make_model(architecture, width=128, scale=0.1), tokenizer)
    alone = []
    for request in requests_of(tokenizer):
        scheduler = engine.scheduler(prefill_tokens=32)
        scheduler.submit(request)
        alone.append(steps(scheduler))
    scheduler = engine.scheduler(prefill_tokens=32, **options)
    ids = [scheduler.submit(request) for request in requests_of(tokenizer)]
    together = steps(scheduler)
    for id, wanted in zip(ids, alone, strict=True):
        got = [event for event in together if event.id == id]
        assert [(event.token, event.text) for event in got] == [(event.token, event.text) for event in wanted]
        assert [event.logprob for event in got] == pytest.approx([event.logprob for event in wanted], abs=1e-4)
        for mine, other in zip(got, wanted, strict=True):
            assert dict(mine.top_logprobs) == pytest.approx(dict(other.top_logprobs), abs=1e-4)


def test_next_token_is_queued_before_the_last_is_read(model, tokenizer, monkeypatch):
    """A step starts one computation and waits for none; nothing large leaves the device."""
    monkeypatch.setenv("MLXCHAT_CPU", "plain")
    generator = Generator(Decoder(model))
    for seed in range(4):
        sampling = Sampling(temperature=1.0, top_k=5, seed=seed)
        generator.insert(Request(prompt=[tokenizer.bos] * 9, max_new_tokens=20, sampling=sampling, logprobs=1))
    generator.next()
    order: list[str] = []

    def noted(name: str, own: Any) -> Any:
        def call(*given: Any, **more: Any) -> Any:
            if name != "asarray" or isinstance(given[0], mx.array):
                assert name != "asarray" or given[0].size <= 4, "no logits"
                order.append(name)
            return own(*given, **more)

        return call

    for module, name in ((mx, "eval"), (mx, "async_eval"), (np, "asarray")):
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    for _ in range(5):
        order.clear()
        assert len(generator.next()) == 4
        assert order == ["async_eval", *["asarray"] * 4]


def test_equal_prompts_are_read_once(model, tokenizer, monkeypatch):
    read: list[int] = []
    own = Decoder.read
    monkeypatch.setattr(Decoder, "read", lambda self, ids, *past: read.append(len(ids)) or own(self, ids, *past))
    engine = Engine(model, tokenizer)
    engine.complete([[tokenizer.bos] * 30] * 6 + [[tokenizer.bos] * 20], max_new_tokens=2, temperature=1.0)
    assert read == [2], "one batch of two different prompts"
    engine.max_rows = 2
    engine.complete([[tokenizer.bos] * 30] * 6, max_new_tokens=2, temperature=1.0)
    assert read == [2, 1], "rows that wait share it, too"


def test_next_turn_continues_the_kept_prefix(model, tokenizer):
    scheduler = Engine(model, tokenizer).scheduler()
    first = [tokenizer.bos, *range(50)]

    def ask(prompt: list[int], *, reuse: bool) -> list[Event]:
        scheduler.submit(Request(prompt=prompt, max_new_tokens=12, reuse=reuse, logprobs=0))
        return steps(scheduler)

    second = [*first, *(event.token or 0 for event in ask(first, reuse=True)), *range(60, 80)]
    alone = ask(second, reuse=False)
    assert scheduler.source.num_reused == 0
    again = ask(second, reuse=True)
    assert scheduler.source.num_reused == len(first) + 11, "all but the last token of the answer"
    assert [event.token for event in again] == [event.token for event in alone]
    assert [event.logprob for event in again] == pytest.approx([event.logprob for event in alone], abs=1e-4)


# The calculator

SUMS = {
    " 3 + 4 ": "7", "7-9": "-2", "10/2": "5", "7/2": "3.5", "0.2*50": "10", "-7//2": "-4", "17%5": "2", "3*(4+5)": "27",
    "--5": "5", "+7": "7", "1-1-1-1": "-2", "5.": "5", "1.10": "1.1", "1,234,567": "1234567", "5/3": "1.6666666667",
    "100000*100000": "10000000000", "-0.0": "0", "1.1*3-0.3": "3",  # 3.0000000000000004 in floating point
    "'strawberry'.count('r')": "3", '"Strawberry".count("s")': "0", "'aaa'.count('aa')": "1", "'a,b'.count(',')": "1",
    "'naïve'.count('ï')": "1", "'a'.count('a')+1": "2",
}  # fmt: skip
REFUSED = [
    "", " ", "...", "1+", "2 3", "3*(4", "012", "12*30=360", "$5+3", "50%", "5 apples", "1/0", "1%0", "1e309",
    "x+1", "True", "inf", "len('abc')", "(1)(2)", "__import__('os').system('ls')", "open('x').read().count('a')",
    "().__class__.__bases__", "'abc'.upper().count('A')", "'abc'.count", "'abc'.count(b)", "'a'.count('a', 0)",
    "'a'.count(sub='a')", "'abc'.index('b')", "[1,2][0]", "f'{1}'.count('1')", "b'a'.count(b'a')", "2**3", "1<<100",
    "~1", "not 1", "1==1", "1 or 2", "lambda x: x", "(x:=1)", "1;2", "import os", "1j", "'abc'", "'a'*1000000000",
    "9" * 200, "1e16", "99999999*99999999*99999999", "(" * 99 + "1", "1" * 201, "2−1", "١+١", "1\x00", "\ud800", "#",
]  # fmt: skip


def test_results_and_refusals():
    assert {expression: calculate(expression) for expression in SUMS} == SUMS
    assert [expression for expression in REFUSED if calculate(expression) is not None] == []
