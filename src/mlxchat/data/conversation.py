"""Conversations to tokens and loss masks. Counterpart of `render_conversation` in nanochat/tokenizer.py.

<|bos|> user: <|user_start|> text <|user_end|>; assistant: <|assistant_start|> parts <|assistant_end|>. Trained on
(mask 1): the assistant's text, its calculator calls with their delimiters, and <|assistant_end|>. Never trained on:
everything else, a tool's output included.
"""

from __future__ import annotations

from typing import Any

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.errors import DataError
from mlxchat.tasks import Conversation

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
    ids, mask = [tokenizer.bos], [0]
    special = tokenizer.special_ids

    def add(tokens: list[int], trained: int) -> None:
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    for index, message in enumerate(_merge_system(conversation)):
        role, content = message.get("role"), message.get("content")
        expected = "assistant" if index % 2 else "user"
        if role != expected:
            raise DataError(f"message {index} of a conversation is from {role!r}, expected {expected!r}")
        if role == "user":
            if not isinstance(content, str):
                raise DataError(f"message {index} of a conversation: the user's content must be text")
            add([special["<|user_start|>"], *tokenizer.encode(content), special["<|user_end|>"]], 0)
            continue
        add([special["<|assistant_start|>"]], 0)
        for kind, text in _parts(content, index):
            start, end, trained = _PARTS[kind]
            tokens = tokenizer.encode(text)
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


def _merge_system(conversation: Conversation) -> list[dict[str, Any]]:
    messages = list(conversation.get("messages") or [])
    if not messages:
        raise DataError("a conversation has no messages")
    if not all(isinstance(message, dict) for message in messages):
        raise DataError("a message of a conversation is no object with role and content")
    if messages[0].get("role") != "system":
        return messages
    if len(messages) < 2 or messages[1].get("role") != "user":
        raise DataError("a system message must be followed by a user message")
    if not all(isinstance(message.get("content"), str) for message in messages[:2]):
        raise DataError("the contents of a system message and of the user message after it must be text")
    first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _parts(content: Any, index: int) -> list[tuple[str, str]]:
    if isinstance(content, str):
        return [("text", content)]
    if not isinstance(content, list):
        raise DataError(f"message {index} of a conversation: content must be text or a list of parts")
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise DataError(f"message {index} of a conversation: every part must be an object with type and text")
    unknown = [part.get("type") for part in content if part.get("type") not in _PARTS]
    if unknown:
        raise DataError(f"message {index} of a conversation has parts {unknown}; known: {', '.join(_PARTS)}")
    return [(part["type"], part["text"]) for part in content]
