"""Who the model is. The bundled file speaks of mlxchat; `path` puts the user's own in its place."""

from __future__ import annotations

import random
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from mlxchat.tasks.base import Conversation
from mlxchat.tasks.downloads import UrlTask
from mlxchat.tasks.jsonl import ConversationFile, Jsonl, is_answer, read_conversations

IDENTITY_FILE = Path(__file__).with_name("identity.jsonl")
NANOCHAT_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"
"""nanochat's thousand conversations."""


class Identity(Jsonl):
    """Conversations about the model itself, in the form of task jsonl."""

    name = "identity"

    def __init__(
        self,
        split: str,
        *,
        path: str | Path | None = None,
        size: int | None = None,
        seed: int = 0,
        held_out_frac: float = 0.1,
        contains: float = 0,
    ) -> None:
        """Read the bundled conversations, or those of `path`; the other options are those of task jsonl."""
        path = IDENTITY_FILE if path is None else path
        super().__init__(split, path=path, size=size, seed=seed, held_out_frac=held_out_frac, contains=contains)


class IdentityConversations(UrlTask):
    """nanochat's conversations about itself, or another file of conversations, all of them, in the file's order."""

    name = "identity_conversations"
    splits = ("train",)
    source_options: ClassVar[tuple[str, ...]] = ("url", "sha256")

    def __init__(
        self,
        split: str,
        *,
        size: int | None = None,
        url: str = NANOCHAT_URL,
        sha256: str | None = None,
        path: str | Path | None = None,
    ) -> None:
        """Choose the conversations; none is read yet.

        Args:
            split: "train".
            size: at most so many; None: all.
            url: address of a .jsonl file in the form of task jsonl.
            sha256: of what is at the address; None: any contents.
            path: a file in place of the address.

        Raises:
            ConfigError: split, size or url cannot be.

        """
        super().__init__(split, size=size)
        self._read_from("url", url, sha256, path)

    @cached_property
    def _conversations(self) -> ConversationFile:
        return read_conversations(self._path or self.fetch()[0], ends_answered=False)

    def _own_size(self) -> int:
        return len(self._conversations)

    def _most(self) -> int:
        return len(self._conversations)

    def _conversation(self, index: int, rng: random.Random) -> Conversation:
        return self._conversations[index]

    def evaluate(self, conversation: Conversation, response: str) -> bool:
        """Judge as task jsonl does."""
        return is_answer(conversation, response)
