"""Log-probabilities of text completions: text offsets, partial characters, echoed prompts."""

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kit.text import byte_tokens, tool_call
from mlxchat.engine.batch import Event
from mlxchat.serve.choices import Choice

TEXT = "the cat ▖ sat 5é on 😀 mat"
LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def complete(server: Any, **body: Any) -> Any:
    return server.client.post("/v1/completions", json={"model": "sft", "prompt": "a", "max_tokens": 60, **body})


def said_bytes(token: str) -> bytes:
    """Return a token's bytes as OpenAI's clients decode them."""
    if token.startswith("bytes:"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


def test_text_offset_counts_over_all_chunks_of_a_stream(start):
    with start(says=TEXT, seconds=0.0) as server:
        whole = complete(server, logprobs=1).json()["choices"][0]
        lines = complete(server, logprobs=1, stream=True).text.splitlines()
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    pieces = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    assert len(pieces) > 10
    assert {key: [each for piece in pieces for each in piece[key]] for key in LISTS} == whole["logprobs"]
    assert whole["text"] == TEXT
    tokens, offsets = whole["logprobs"]["tokens"], whole["logprobs"]["text_offset"]
    assert (tokens[-1], offsets[-1]) == ("<|assistant_end|>", len(TEXT))
    data = b""
    for token, offset in zip(tokens[:-1], offsets[:-1], strict=True):
        assert offset == len(data.decode(errors="ignore")), "characters before the token"
        if not token.startswith("bytes:"):
            assert TEXT[offset : offset + len(token)] == token
        data += said_bytes(token)
    assert data.decode() == TEXT


def test_logprobs_include_the_end_token(server, tokenizer):
    """lm-evaluation-harness drops the last token, which must be the sampled one."""
    end = {"logit_bias": {str(tokenizer.assistant_end): 100}, "temperature": 0}
    told = complete(server, prompt="the cat", echo=True, logprobs=0, max_tokens=1, **end).json()["choices"][0]
    chat = server.chat(logprobs=True, **end).json()["choices"][0]
    assert told["text"] == "the cat"
    assert "".join(told["logprobs"]["tokens"][:-1]) == "the cat"
    assert told["logprobs"]["tokens"][-1] == "<|assistant_end|>"
    assert (chat["message"]["content"], chat["logprobs"]) == ("", None)


@pytest.mark.parametrize("echoed", [False, True])
def test_text_offset_counts_characters_cut_short(echoed, tokenizer):
    cut = (b"\xe2\x82a", b"\xe2\x82\xc3\xa9", b"\xf0\x9f\xf0\x9f\x98\x80b", b"\xe2\x82\xff", b"\xc3\xa9a", b"a\xe2")
    for data in cut:
        ids = byte_tokens(tokenizer, data)
        choice = Choice(tokenizer, ids if echoed else [])
        for id_ in ids[:1] if echoed else ids:
            scores: Any = [(-1.0, [])] * (len(ids) - 1) if echoed else []
            choice.add(Event(id=0, token=id_, sampled=True, logprob=-1.0, prompt_logprobs=scores))
        told = choice.text_logprobs(choice.events)
        ends = [len(data[:end].decode(errors="replace")) for end in range(1, len(data) + 1)]
        assert told["text_offset"][: len(ids)] == [end - 1 for end in ends], "each byte is in the character it ends in"


def test_text_offset_counts_tool_results(start, tokenizer):
    call = [*tool_call(tokenizer, "2*30"), *tokenizer.encode("xyzuvwqp")]
    with start(says=call, seconds=0.0) as server:
        told = complete(server, logprobs=0).json()["choices"][0]
    assert told["text"].startswith("2*3060")
    assert told["text"].endswith("qp"), "text follows the result"
    found = [
        told["text"][offset : offset + len(token)]
        for token, offset in zip(told["logprobs"]["tokens"], told["logprobs"]["text_offset"], strict=True)
    ]
    assert [*found[:-1], "<|assistant_end|>"] == told["logprobs"]["tokens"]
    assert len("".join(found)) == len(told["text"]) - 2, "the result was not sampled and has no log-probability"


def test_partial_utf8_alternatives_are_not_merged(tokenizer):
    (a,) = tokenizer.encode("a")
    ids = [a, *byte_tokens(tokenizer, bytes(range(128, 160)))]
    event = Event(id=0, token=ids[-1], sampled=True, logprob=-3.0, top_logprobs=[(id_, -float(id_)) for id_ in ids])
    choice = Choice(tokenizer)
    choice.add(event)
    told = choice.text_logprobs(choice.newest)
    (top,) = told["top_logprobs"]
    assert top == {"a": -float(a)} | {
        f"bytes:\\x{byte:02x}": -float(id_) for byte, id_ in zip(range(128, 160), ids[1:], strict=True)
    }
    assert told["tokens"] == ["bytes:\\x9f"]
    chat = choice.chat_logprobs(choice.newest)
    assert [chat["content"][0]["token"], chat["content"][0]["bytes"]] == ["bytes:\\x9f", [0x9F]]
    assert [each["bytes"] for each in chat["content"][0]["top_logprobs"][1:]] == [[byte] for byte in range(128, 160)]


def test_echoed_prompt_has_the_models_log_probabilities(server, model, tokenizer):
    text = "the cat 5é sat"
    ids = tokenizer.encode(text)
    scores = np.asarray(model.logits(model.hidden(mx.array([[tokenizer.bos, *ids]]))[0]), dtype=np.float64)
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    body: dict[str, Any] = {"echo": True, "logprobs": 3, "max_tokens": 4, "temperature": 0}
    whole = complete(server, prompt=text, **body).json()["choices"][0]
    told = whole["logprobs"]
    assert whole["text"].startswith(text)
    assert b"".join(map(said_bytes, told["tokens"][: len(ids)])) == text.encode()
    expected = [scores[place, id_] for place, id_ in enumerate(ids)]
    assert told["token_logprobs"][: len(ids)] == pytest.approx(expected, abs=1e-4)
    for place, top in enumerate(told["top_logprobs"][: len(ids)]):
        assert sorted(top.values()) == pytest.approx(sorted(scores[place])[-3:], abs=1e-4)
    assert len(told["tokens"]) > len(ids)
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert token.startswith("bytes:") or whole["text"][offset : offset + len(token)] == token
    silent = complete(server, prompt=text, **{**body, "echo": False}).json()["choices"][0]
    assert told["token_logprobs"][len(ids) :] == silent["logprobs"]["token_logprobs"], "the answer is the same"
    assert text + silent["text"] == whole["text"]
    given = complete(server, prompt=[tokenizer.bos, *ids], **body).json()["choices"][0]["logprobs"]
    assert (given["token_logprobs"][0], given["top_logprobs"][0]) == (None, None), "nothing comes before it"
    assert given["token_logprobs"][1:] == told["token_logprobs"]
    single = complete(server, prompt=[tokenizer.bos], **body).json()["choices"][0]["logprobs"]
    assert single["token_logprobs"][0] is None
