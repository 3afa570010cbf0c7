"""What a server takes: nanochat's limits unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mlxchat.errors import ConfigError
from mlxchat.ops.machine import KEPT_TOKENS


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of requests and of what is kept in memory."""

    max_messages: int = 500
    """Messages of a conversation."""
    max_message_chars: int = 8000
    """Characters of one message or prompt."""
    max_conversation_chars: int = 32000
    """Characters of all of them."""
    max_tokens: int = 4096
    """Tokens of an answer."""
    max_choices: int = 16
    """Answers to one request, `n` and prompts together."""
    max_rows: int = 16
    """Answers computed at a time, over all models."""
    max_queue: int = 64
    """Answers that wait for a row; further requests are refused with 429."""
    max_models: int = 2
    """Models in memory. A request for another one waits until one of them is idle; the least recently used one goes."""
    kept_tokens: int = KEPT_TOKENS
    """Tokens of earlier conversations whose keys and values are kept for their next turns, for each model; 0: none."""

    def __post_init__(self) -> None:
        """Refuse what no server could keep to."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("max_queue", "kept_tokens") else 1
            if value < least:
                raise ConfigError(f"--{field.name.replace('_', '-')} is {value}, expected at least {least}")
