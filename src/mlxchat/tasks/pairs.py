"""Pairs of a chosen and a rejected answer, one per line of a file, in the forms that datasets of the Hub have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxchat.tasks.answers import Conversation
from mlxchat.tasks.base import Task
from mlxchat.tasks.jsonl import Jsonl, Lines, parse_conversation

_FORMS = (
    '{"prompt" or "messages": text or messages, "chosen": ..., "rejected": ...}, where both answers are text or lists '
    "of messages; lists that begin with the user's message need no prompt"
)


class Pairs(Jsonl):
    """Pairs of a file: conversations that end with the chosen answer, the content of the rejected one beside them."""

    name = "pairs"
    is_paired = True
    usually_held_out = 0.1

    def _read(self, path: Path) -> Lines[Conversation]:
        return Lines(path, parse_pair, _FORMS)


def parse_pair(value: Any) -> Conversation:
    """Return {"messages", "rejected"} of one parsed line: the messages up to the chosen answer, the rejected content.

    Raises ValueError with what is wrong.
    """
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= value.keys():
        raise ValueError('not an object with "chosen" and "rejected"')
    chosen, rejected = (_whole(value, name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected differ before their last message")
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return {"messages": chosen, "rejected": rejected[-1]["content"]}


def _whole(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the messages up to one of the answers."""
    answer = value[name]
    if not isinstance(answer, list):
        answer = [{"role": "assistant", "content": answer}]
    # A list that begins with a question is the whole conversation.
    if not (answer and isinstance(answer[0], dict) and answer[0].get("role") in ("user", "system")):
        asked = next((value[key] for key in ("messages", "prompt", "question") if key in value), None)
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
        if not isinstance(asked, list):
            raise ValueError(f"no question before {name}, neither in it nor as messages, prompt, question")
        if isinstance(system := value.get("system"), str) and system.strip():
            asked = [{"role": "system", "content": system}, *asked]
        answer = [*asked, *answer]
    try:
        messages: list[dict[str, Any]] = parse_conversation(answer)["messages"]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return messages


class Answers:
    """Both answers of each pair as conversations, the chosen one first."""

    def __init__(self, pairs: Sequence[Conversation] | Task) -> None:
        """Take conversations with a rejected answer."""
        self._pairs = pairs

    def __len__(self) -> int:
        return 2 * len(self._pairs)

    def __iter__(self) -> Iterator[Conversation]:
        for index in range(len(self._pairs)):
            pair = self._pairs[index]
            yield {"messages": pair["messages"]}
            yield {"messages": [*pair["messages"][:-1], {"role": "assistant", "content": pair["rejected"]}]}
