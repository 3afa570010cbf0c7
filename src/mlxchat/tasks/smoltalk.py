"""SmolTalk: general conversations (HuggingFaceTB/smol-smoltalk). Counterpart of nanochat's tasks/smoltalk.py."""

from __future__ import annotations

import random
from typing import Any, ClassVar

from mlxchat.errors import DataError
from mlxchat.tasks.base import Conversation, answer_text, find_turn_fault
from mlxchat.tasks.downloads import HubTask


class SmolTalk(HubTask):
    """Conversations of one turn or more, 460 thousand of them in train, some with a system message."""

    name = "smoltalk"
    repository: ClassVar[str] = "HuggingFaceTB/smol-smoltalk"
    splits = ("train", "test")
    subsets: ClassVar[tuple[str, ...]] = ("data",)
    columns = may_be_null = ("messages",)  # find_fault says better what is missing

    def pattern(self) -> str:
        """Return the shell pattern of the files of the split."""
        return f"{self.subset}/{self.split}-*.parquet"

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        messages = self.row(index)["messages"]
        fault = find_fault(messages)
        if fault:
            raise DataError(f"{self.place(index)} is no conversation: {fault}")
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Compare with the data's own answer, which few good answers equal: SmolTalk is for training."""
        return response.strip() == answer_text(conversation).strip()


def find_fault(messages: list[dict[str, Any]] | None) -> str:
    """Return what keeps messages from being a conversation of texts, or an empty string."""
    for index, message in enumerate(messages or ()):
        if not isinstance(message["content"], str):
            return f"the content of message {index + 1} is no text"
    return find_turn_fault(messages or ())
