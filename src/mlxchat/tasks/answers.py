"""Answers: calls of the calculator in them, the number after ####, and whether a response gives the same answer."""

from __future__ import annotations

import re
from typing import Any

Conversation = dict[str, Any]
"""{"messages": [{"role", "content"}, ...]}, plus "letters" and "answer" in a categorical task."""

_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
_CALL = re.compile(r"(<<[^>]+>>)")


def answer_text(conversation: Conversation) -> str:
    """Return the text of the last message: a string, or its parts of type text joined."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def content_text(content: str | list[dict[str, str]]) -> str:
    """Return a message's content as people read it: calls of the calculator as GSM8K writes them, <<12+7=19>>."""
    if isinstance(content, str):
        return content
    marks = {"text": "{}", "python": "<<{}", "python_output": "={}>>"}
    return "".join(marks[part["type"]].format(part["text"]) for part in content)


def calculator_parts(answer: str, *, keep_empty: bool = False) -> list[dict[str, str]]:
    """Return an answer in GSM8K's form as parts: every <<12+7=19>> becomes a python and a python_output part.

    What follows the last = of a call is its output, empty if there is none. With `keep_empty`, empty texts between
    calls are kept, as nanochat keeps them.
    """
    parts = []
    for piece in _CALL.split(answer):
        if piece.startswith("<<") and piece.endswith(">>"):
            expression, sign, result = piece[2:-2].rpartition("=")
            parts.append({"type": "python", "text": expression if sign else result})
            parts.append({"type": "python_output", "text": result if sign else ""})
        elif piece or keep_empty:
            parts.append({"type": "text", "text": piece})
    return parts


def nanochat_number(text: str) -> str | None:
    """Return what nanochat takes for the number after the first ####: commas removed, full stops kept; or None."""
    found = _NUMBER.search(text)
    return found[1].replace(",", "") if found else None


def final_number(text: str) -> str | None:
    """Return the number after the first ####, without commas and a closing full stop, or None."""
    number = nanochat_number(text)
    return number.rstrip(".") or None if number is not None else None


def is_right(conversation: Conversation, response: str) -> bool:
    """Return whether a response gives the answer of a conversation: the number after ####, or else the whole text.

    A response without #### is wrong where the answer has it. White space around texts does not count.
    """
    answer = answer_text(conversation)
    number = final_number(answer)
    return final_number(response) == number if number is not None else response.strip() == answer.strip()


def is_answer(conversation: Conversation, response: str, *, contains: bool = False) -> bool:
    """Return the same as `is_right` by a looser comparison of texts.

    Letter case, white space and a closing full stop or exclamation mark do not count.

    Args:
        conversation: with the answer as its last message.
        response: to judge.
        contains: the answer may also be a part of the response, between word borders. A number is no part of another.
    """
    answer = answer_text(conversation)
    if final_number(answer) is not None:
        return is_right(conversation, response)
    right, given = _plain(answer), _plain(response)
    if not contains or not right:
        return given == right
    sign = r"(?<![-−])" if right[0].isdigit() else ""
    return re.search(rf"(?<!\w)(?<!\d[.,]){sign}{re.escape(right)}(?!\w)(?![.,]\d)", given) is not None


def _plain(text: str) -> str:
    plain = " ".join(text.casefold().split())
    return plain.rstrip(".! ") or plain
