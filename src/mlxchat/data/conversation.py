"""Conversations to tokens and loss masks. Counterpart of `render_conversation` in nanochat/tokenizer.py.

<|bos|> user: <|user_start|> text <|user_end|>; assistant: <|assistant_start|> parts <|assistant_end|>. Trained on
(mask 1): the assistant's text, its calculator calls with their delimiters, and <|assistant_end|>. Never trained on:
everything else, a tool's output included.
"""

from __future__ import annotations

from typing import Any

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import DataError
from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.base import find_fault

# Delimiters of each kind of part, and whether the part is trained on.
_PARTS = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int | None = 2048
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation and, for each, 1 if it is trained on.

    Args:
        tokenizer: of the model.
        conversation: {"messages": [{"role", "content"}]}; a system message may come first and is joined to the
            first user message by an empty line; then user and assistant alternate.
        max_tokens: the rest is cut off; None: keep all.

    Raises:
        DataError: roles or contents are not as above.
    """
    messages: Any = conversation.get("messages")
    if fault := find_fault(messages, least=1):
        raise DataError(f"a conversation cannot be made into tokens: {fault}")
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
    """Return the ids that prompt the assistant for its next message; a final assistant message is left out."""
    messages = conversation.get("messages") or []
    if messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    ids, _ = render_conversation(tokenizer, {"messages": messages}, max_tokens=None)
    return [*ids, tokenizer.special_ids["<|assistant_start|>"]]
