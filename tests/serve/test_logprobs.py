"""Log-probabilities of text completions: text offsets, partial characters."""

import json
from typing import Any

from kit.text import byte_tokens
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
