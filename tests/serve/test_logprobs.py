"""Log-probabilities of text completions: offsets within the text, tokens that are parts of characters."""

import json
from typing import Any

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
