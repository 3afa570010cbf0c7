"""GSM8K: grade-school word problems whose answers call the calculator, and the number after ####.

Counterpart of nanochat's tasks/gsm8k.py. Conversations are the same; verdicts differ in two cases: a response
without a number after #### is always wrong, and a full stop after the number is not part of it.
"""

from __future__ import annotations

import random
import re
from typing import Any, ClassVar

from mlxchat.tasks.base import Conversation, dialogue
from mlxchat.tasks.downloads import HubTask

_NUMBER = re.compile(r"#### (-?[0-9.,]+)")
_CALL = re.compile(r"(<<[^>]+>>)")


class GSM8K(HubTask):
    """Word problems; right where the response has #### and the right number."""

    name = "gsm8k"
    repository: ClassVar[str] = "openai/gsm8k"
    splits = ("train", "test")
    subsets: ClassVar[tuple[str, ...]] = ("main", "socratic")
    columns = texts = ("question", "answer")
    prompt_tokens = 320

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        row = self.row(index)
        return dialogue(row["question"], calculator_parts(row["answer"]))

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Compare the number after the first ####; a response without one is wrong."""
        return same_final_number(_last_text(conversation), response)

    def explain(self, conversation: Conversation, response: str) -> tuple[bool, dict[str, Any]]:
        """Return the verdict, and nanochat's, which published scores use."""
        verdict = self.evaluate(conversation, response)
        return verdict, {"nanochat_verdict": nanochat_verdict(conversation, response)}


def calculator_parts(answer: str) -> list[dict[str, str]]:
    """Return an answer in GSM8K's form as nanochat's parts: <<12+7=19>> is a python and a python_output part.

    What follows the last = of a call is its output, empty if there is none. Empty texts between calls are kept.
    """
    parts = []
    for piece in _CALL.split(answer):
        if piece.startswith("<<") and piece.endswith(">>"):
            expression, sign, result = piece[2:-2].rpartition("=")
            parts.append({"type": "python", "text": expression if sign else result})
            parts.append({"type": "python_output", "text": result if sign else ""})
        else:
            parts.append({"type": "text", "text": piece})
    return parts


def final_number(text: str) -> str | None:
    """Return the number after the first ####, without commas and a closing full stop, or None."""
    number = nanochat_number(text)
    return number.rstrip(".") or None if number is not None else None


def same_final_number(right: str, response: str) -> bool:
    """Say whether two texts have the same number after ####, digit for digit."""
    number = final_number(response)
    return number is not None and number == final_number(right)


def nanochat_number(text: str) -> str | None:
    """Return what nanochat takes for the number after the first ####: commas removed, full stops kept; or None."""
    found = _NUMBER.search(text)
    return found[1].replace(",", "") if found else None


def nanochat_verdict(conversation: Conversation, response: str) -> bool:
    """Return nanochat's verdict on a response, by which two missing numbers are the same number."""
    return nanochat_number(response) == nanochat_number(_last_text(conversation))


def _last_text(conversation: Conversation) -> str:
    return str(conversation["messages"][-1]["content"][-1]["text"])
