"""Renders conversations to tokens and loss masks. Counterpart of `render_conversation` in nanochat/tokenizer.py.

<|bos|>, then for the user <|user_start|> text <|user_end|>, for the assistant <|assistant_start|> parts
<|assistant_end|>. The mask is 1 for the assistant's text, its calculator calls with their delimiters, and
<|assistant_end|>, and 0 for everything else, including a tool's output.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import DataError
from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.base import find_fault

Content = str | list[dict[str, str]]
"""Of a message: text, or the parts of an answer."""

# Delimiters of each type of part, and its mask.
_PARTS = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int | None = 2048
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation and its loss mask (1: trained on), at most `max_tokens`; None: all.

    It is {"messages": [{"role", "content"}]}, user and assistant alternating. An optional system message in front is
    prepended to the first user message with an empty line.
    """
    messages: Any = conversation.get("messages")
    if fault := find_fault(messages, least=1):
        raise DataError(f"a conversation cannot be tokenized: {fault}")
    if messages[0]["role"] == "system":
        system, first, *rest = messages
        messages = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]
    ids, mask = [tokenizer.bos], [0]
    special = tokenizer.special_ids

    def add(tokens: list[int], trained: int) -> None:
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    for message in messages:
        content = message["content"]
        if message["role"] == "user":
            add([special["<|user_start|>"], *tokenizer.encode(content), special["<|user_end|>"]], 0)
            continue
        add([special["<|assistant_start|>"]], 0)
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            start, end, trained = _PARTS[part["type"]]
            tokens = tokenizer.encode(part["text"])
            add([special[start], *tokens, special[end]] if start and end else tokens, trained)
        add([special["<|assistant_end|>"]], 1)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Return the ids that prompt the assistant for its next message; a final assistant message is dropped."""
    messages = conversation.get("messages") or []
    if messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    ids, _ = render_conversation(tokenizer, {"messages": messages}, max_tokens=None)
    return [*ids, tokenizer.special_ids["<|assistant_start|>"]]


def fit_turns(
    messages: Sequence[Conversation], render: Callable[[list[Conversation]], list[int]], room: int
) -> tuple[list[int], int]:
    """Return the prompt without the oldest turns beyond `room`, and their number; system and last turn stay."""
    turns: list[int | None] = []
    turn = -1
    for message in messages:
        turn += message["role"] == "user"
        turns.append(None if message["role"] in ("system", "developer") else turn)

    def without(dropped: int) -> list[int]:
        return render([each for each, own in zip(messages, turns, strict=True) if own is None or own >= dropped])

    dropped = bisect_left(range(turn), True, key=lambda number: len(without(number)) <= room)
    return without(dropped), dropped


def parse_answer(tokenizer: Tokenizer, ids: Sequence[int]) -> Content | None:
    """Return the content of an answer's tokens, without its end token; None: it is empty, or a call is not closed."""
    special = tokenizer.special_ids
    kinds = {special[start]: (kind, special[end]) for kind, (start, end, _) in _PARTS.items() if start and end}
    parts: list[dict[str, str]] = []
    rest = list(ids)
    while rest:
        kind, end = kinds.get(rest[0], ("text", None))
        if end is None:
            stop = next((place for place, id_ in enumerate(rest) if id_ in kinds), len(rest))
            inside, rest = rest[:stop], rest[stop:]
        elif end in rest:
            stop = rest.index(end)
            inside, rest = rest[1:stop], rest[stop + 1 :]
        else:
            return None
        if any(id_ in special.values() for id_ in inside):
            return None
        parts.append({"type": kind, "text": tokenizer.decode(inside)})
    if len(parts) == 1 and parts[0]["type"] == "text":
        return parts[0]["text"] if parts[0]["text"].strip() else None
    return parts or None
