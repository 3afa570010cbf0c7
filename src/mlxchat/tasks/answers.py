"""Reference answers: calculator calls, the number after ####, and comparison with a response."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from typing import Any

Conversation = dict[str, Any]
"""{"messages": [{"role", "content"}, ...]}, plus "letters" and "answer" in a categorical task."""

_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
_ANY_NUMBER = re.compile(r"(?<![\d)])-?\d[\d,]*(?:\.\d+)?")
_CALL = re.compile(r"(<<[^>]+>>)")
_VALUE = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?<=[0-9])")
_GAPS = re.compile(r"[\s—…]|\.{2,}|--+")
_SAME_SIGNS = str.maketrans("−’‘“”", "-''\"\"")
# Not stripped: signs such as + - # % $, which change the meaning (C and C++, 5 and -5).
_OPENING = "([{\"'«¿¡,;:"
_CLOSING = ")]}\"'».,;:!?"
_EMPHASIS = "*_`"


def answer_text(conversation: Conversation) -> str:
    """Return the text of the last message: a string, or its parts of type text joined."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def content_text(content: str | list[dict[str, str]]) -> str:
    """Return a message's content as text, with calculator calls in GSM8K's notation, <<12+7=19>>."""
    if isinstance(content, str):
        return content
    marks = {"text": "{}", "python": "<<{}", "python_output": "={}>>"}
    return "".join(marks[part["type"]].format(part["text"]) for part in content)


def calculator_parts(answer: str, *, keep_empty: bool = False) -> list[dict[str, str]]:
    """Return the parts of an answer in GSM8K's notation: each <<12+7=19>> becomes a python and a python_output part.

    The output is the text after the last =, or empty. With `keep_empty`, empty texts between calls are kept, as in
    nanochat.
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
    """Return the number after the first #### as nanochat extracts it, without commas but with full stops; or None."""
    found = _NUMBER.search(text)
    return found[1].replace(",", "") if found else None


def final_number(text: str) -> str | None:
    """Return the number after the first ####, without commas and a trailing full stop; or None."""
    number = nanochat_number(text)
    return number.rstrip(".") or None if number is not None else None


def is_right(conversation: Conversation, response: str) -> bool:
    """Return True if a response has the conversation's number after ####, or, without one, equals its answer."""
    answer = answer_text(conversation)
    number = final_number(answer)
    return final_number(response) == number if number is not None else response.strip() == answer.strip()


def number_and_form(expected: str, response: str) -> tuple[bool, bool] | None:
    """Return whether a response has the expected number (else its last), and one after ####; None: none is expected."""
    number, given = final_number(expected), final_number(response)
    if number is None:
        return None
    numbers = _ANY_NUMBER.findall(response)[-1:] if given is None else [given]
    return any(_word(each) == _word(number) for each in numbers), given is not None


def is_right_by_nanochat(conversation: Conversation, response: str) -> bool:
    """Return nanochat's verdict on a GSM8K response: two missing numbers are equal, and "18." differs from "18"."""
    answer = str(conversation["messages"][-1]["content"][-1]["text"])
    return nanochat_number(response) == nanochat_number(answer)


def is_answer(conversation: Conversation, response: str, *, contains: bool = False) -> bool:
    """Return True if a response equals a conversation's answer after normalisation.

    Numbers are compared by value (4, 4.0; 1000, 1,000), words without letter case and surrounding punctuation. If the
    answer has a number after ####, only that number is compared. `contains` accepts a response that contains the
    answer's words in sequence.
    """
    answer = answer_text(conversation)
    number = final_number(answer)
    if number is not None:
        given = final_number(response)
        return given is not None and _word(given) == _word(number)
    expected, words = _words(answer), _words(response)
    if not contains:
        return words == expected
    count = len(expected)
    return any(words[start : start + count] == expected for start in range(len(words) - count + 1))


def _words(text: str) -> list[str | Decimal]:
    """Return the normalised words of a text, or its punctuation if it has no words."""
    plain = unicodedata.normalize("NFC", text).casefold().translate(_SAME_SIGNS)
    words = [word for word in map(_word, _GAPS.split(plain)) if word != ""]
    return words or list(plain.split())


def _word(word: str) -> str | Decimal:
    """Return a word without surrounding punctuation, or the value of a number."""
    bare = word.rstrip(_CLOSING).lstrip(_OPENING)
    bare = bare.strip(_EMPHASIS).rstrip(_CLOSING) or bare
    return Decimal(bare.replace(",", "")) if _VALUE.fullmatch(bare) else bare
