"""Renders conversations to tokens and loss masks. Counterpart of `render_conversation` in nanochat/tokenizer.py.

<|bos|>, then for the user <|user_start|> text <|user_end|>, for the assistant <|assistant_start|> parts
<|assistant_end|>. The mask is 1 for the assistant's text, its calculator calls with their delimiters, and
<|assistant_end|>, and 0 for everything else, including a tool's output.
"""

from __future__ import annotations

from typing import Any

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import DataError
from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.base import find_fault

# Delimiters of each type of part, and its mask.
_PARTS = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int | None = 2048
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation and its loss mask (1: trained on).

    Args:
        tokenizer: of the model.
        conversation: {"messages": [{"role", "content"}]}, user and assistant alternating. An optional system message
            in front is prepended to the first user message with an empty line.
        max_tokens: maximum length; None: no truncation.

    Raises:
        DataError: the roles or contents are invalid.
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
    if messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    ids, _ = render_conversation(tokenizer, {"messages": messages}, max_tokens=None)
    return [*ids, tokenizer.special_ids["<|assistant_start|>"]]
