"""The scheduler: answers depend only on the request, for any order of events."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.models import make_model
from kit.text import byte_tokens
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.generate import Engine
from mlxchat.engine.sample import Sampling
from mlxchat.engine.scheduler import Event, Request, Scheduler
from mlxchat.errors import ConfigError

# Prompts of one token, of several chunks, equal ones, prefixes of others; windows of July 2026 are 128 tokens.
LENGTHS = (1, 5, 40, 140, 40, 17, 5, 126)
PIECE = 32


def requests_of(tokenizer: Tokenizer) -> list[Request]:
    rng = np.random.default_rng(3)
    ids = [tokenizer.bos, *rng.integers(0, 256, 200).tolist()]
    hot = {"temperature": 1.0, "repetition_penalty": 1.1, "top_p": 0.95}
    return [
        Request(
            prompt=ids[:length], max_new_tokens=3 + 2 * index, logprobs=2,
            sampling=Sampling(seed=index, **(hot if index % 2 else {})), reuse="exact" if index % 3 else "off",
        )
        for index, length in enumerate(LENGTHS)
    ]  # fmt: skip


def run(scheduler: Scheduler) -> dict[int, list[Event]]:
    events: dict[int, list[Event]] = {}
    while not scheduler.idle:
        for event in scheduler.step():
            events.setdefault(event.id, []).append(event)
    return events


def contents(events: list[Event]) -> list[Any]:
    return [(each.token, each.text, each.logprob, each.top_logprobs, each.finish_reason) for each in events]


@pytest.fixture(params=[("oct2025", None), ("jul2026", 8)], ids=str)
def alone(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> tuple[Engine, list[list[Any]]]:
    """Return an engine, and each request's answer without other requests."""
    architecture, kv_bits = request.param
    engine, answers = Engine(make_model(architecture, width=128, scale=0.1), tokenizer, kv_bits=kv_bits), []
    for each in requests_of(tokenizer):
        scheduler = engine.scheduler(prefill_tokens=PIECE)
        scheduler.submit(each)
        answers.append(contents(next(iter(run(scheduler).values()))))
    return engine, answers


def test_answers_do_not_depend_on_other_requests(alone, tokenizer):
    """Bit-identical tokens, texts and log-probabilities; beyond windows, with prefix reuse and little room."""
    engine, answers = alone
    requests = requests_of(tokenizer)
    what = st.one_of(st.integers(0, len(requests) - 1), st.just("step"), st.integers(-4, -1))

    @settings(max_examples=10, deadline=None)
    @given(st.lists(what, max_size=25), st.integers(1, 6), st.sampled_from([None, 1, 200]))
    def check(order: list[int | str], max_rows: int, room: int | None) -> None:
        scheduler = engine.scheduler(max_rows=max_rows, max_cached_tokens=room, prefill_tokens=PIECE)
        asked: dict[int, int] = {}
        events: dict[int, list[Event]] = {}
        cancelled = set()
        for each in order:
            if each == "step":
                for event in scheduler.step():
                    events.setdefault(event.id, []).append(event)
            elif isinstance(each, int) and each >= 0:
                asked[scheduler.submit(requests[each])] = each
            elif asked:
                cancelled.add(list(asked)[int(each) % len(asked)])
                scheduler.cancel(list(asked)[int(each) % len(asked)])
        for id, more in run(scheduler).items():
            events.setdefault(id, []).extend(more)
        assert events.keys() == asked.keys()
        for id, index in asked.items():
            if events[id][-1].finish_reason == "cancelled":
                assert id in cancelled
                assert contents(events[id][:-1]) == answers[index][: len(events[id]) - 1]
            else:
                assert contents(events[id]) == answers[index]

    check()


def test_equal_prompts_are_read_once(model, tokenizer, monkeypatch):
    engine, read = Engine(model, tokenizer), []
    scheduler = engine.scheduler()
    forward: Any = scheduler.forward
    own = forward.read
    monkeypatch.setattr(forward, "read", lambda ids, *past: read.append(len(ids)) or own(ids, *past))
    for seed in range(6):
        scheduler.submit(Request(prompt=[tokenizer.bos] * 30, max_new_tokens=2, sampling=Sampling(seed=seed)))
    run(scheduler)
    assert read == [29]


@pytest.mark.parametrize("text", ["naïve 🙂 day", "ends END here", "ENENDx", "EN", "plain"])
@pytest.mark.parametrize("stop", [(), ("END",), ("🙂", "day")], ids=str)
def test_texts_have_whole_characters_and_end_before_stop_strings(tokenizer, scripted, text, stop):
    engine, (prompt,) = scripted([*byte_tokens(tokenizer, text.encode()), tokenizer.assistant_end])
    scheduler = engine.scheduler()
    scheduler.submit(Request(prompt=prompt, max_new_tokens=100, stop=stop))
    (events,) = run(scheduler).values()
    ends = [text.index(each) for each in stop if each in text]
    assert "".join(event.text for event in events) == text[: min(ends, default=len(text))]
    assert not any("\ufffd" in event.text for event in events)
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["stop"]


def test_incomplete_last_character_is_replaced(tokenizer, scripted):
    engine, (prompt,) = scripted(byte_tokens(tokenizer, "🙂🙂".encode()))
    scheduler = engine.scheduler()
    scheduler.submit(Request(prompt=prompt, max_new_tokens=6))
    (events,) = run(scheduler).values()
    assert [event.text for event in events] == ["", "", "", "🙂", "", "\ufffd"]
    assert events[-1].finish_reason == "length"


def test_impossible_requests_are_refused(model, tokenizer):
    bad = Request(prompt=[], max_new_tokens=0, sampling=Sampling(temperature=-1.0))
    with pytest.raises(ConfigError, match=r"temperature is -1.*prompt is empty.*max_new_tokens is 0"):
        Engine(model, tokenizer).scheduler().submit(bad)
