"""truncation="auto": which turns of a long conversation are dropped."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlxchat.data.conversation import render_for_completion
from mlxchat.data.tokenizer import Tokenizer
from mlxchat.serve.models import Model
from mlxchat.serve.requests import Message, chat_prompt
from mlxchat.serve.security import Fault, Limits

Turn = tuple[str, str]


def messages(*said: Turn) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in said]


def pairs(count: int, text: str = "the cat sat ") -> list[Turn]:
    return [(role, f"{text}{number}") for number in range(count) for role in ("user", "assistant")]


def prompt(tokenizer: Tokenizer, context: int, said: list[Turn], truncate: bool = True, **limits: int) -> Any:
    model = Model("a", Path("a"), tokenizer, context, True)
    given = [Message(role=role, content=text) for role, text in said]
    return chat_prompt(model, given, Limits(**limits), answer_tokens=8, truncate=truncate)


def rendered(tokenizer: Tokenizer, *said: Turn) -> list[int]:
    return render_for_completion(tokenizer, {"messages": messages(*said)})


def test_truncation_keeps_the_system_prompt(tokenizer):
    said = pairs(9)
    got = prompt(tokenizer, 128, [("system", "the dog"), *said, ("user", "the mat")])
    kept = said[2 * got.truncated_turns :]
    assert 0 < got.truncated_turns < 9
    assert got.ids == rendered(tokenizer, ("system", "the dog"), *kept, ("user", "the mat"))
    longer = rendered(tokenizer, ("system", "the dog"), *said[-len(kept) - 2 :], ("user", "the mat"))
    assert len(got.ids) <= 128 - 8 < len(longer), "no turn more than necessary is left out"
    short = [("system", "the dog"), *pairs(2), ("user", "the mat")]
    got = prompt(tokenizer, 200, short)
    assert (got.ids, got.truncated_turns) == (rendered(tokenizer, *short), 0)


@pytest.mark.parametrize(
    ("old", "limits"),
    [
        ([("user", "a" * 90), ("assistant", "b")], {"max_message_chars": 80}),
        ([("user", "a"), ("assistant", "b" * 90)], {"max_message_chars": 80}),
        (pairs(3), {"max_conversation_chars": 80}),
        (pairs(9), {"max_messages": 5}),
    ],
    ids=["long question", "long answer", "long conversation", "many messages"],
)
def test_limits_apply_after_truncation(tokenizer, old, limits):
    last = [*pairs(1, "the dog "), ("user", "the mat")]
    got = prompt(tokenizer, 2000, [*old, *last], **limits)
    assert got.truncated_turns > 0
    kept = (old + last)[2 * got.truncated_turns :]
    assert kept[-3:] == last
    assert got.ids == rendered(tokenizer, *kept)
    with pytest.raises(Fault, match="truncation=auto"):
        prompt(tokenizer, 2000, [*old, *last], truncate=False, **limits)


@pytest.mark.parametrize(
    ("said", "limits", "expected"),
    [
        ([("user", "a" * 90)], {"max_message_chars": 80}, "the message has 90 characters; at most 80"),
        ([("system", "a" * 50), ("user", "a" * 50)], {"max_conversation_chars": 80},
         "the system prompt and the message have 100 characters; at most 80"),
        ([("user", "1 2 " * 60)], {}, "maximum context length is 128 tokens, answer included; the message has 244"),
    ],
)  # fmt: skip
def test_impossible_truncation_is_explained(tokenizer, said, limits, expected):
    with pytest.raises(Fault, match=expected) as caught:
        prompt(tokenizer, 128, said, **limits)
    assert caught.value.status == 400


def test_response_counts_dropped_turns(server):
    long = messages(*pairs(12), ("user", "the mat"))
    told = server.chat(messages=long, truncation="auto").json()
    assert told["mlxchat"]["truncated_turns"] > 0
    assert told["usage"]["prompt_tokens"] < 128
    fits = server.chat(truncation="auto").json()
    assert fits["mlxchat"] == {"truncated_turns": 0}
    assert "mlxchat" not in server.chat().json(), "nothing is left out unless the client asks for it"
    lines = server.chat(messages=long, truncation="auto", stream=True).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert chunks[0]["mlxchat"] == told["mlxchat"]
    assert all("mlxchat" not in chunk for chunk in chunks[1:])
