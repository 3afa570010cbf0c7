"""An answer in parts: what is said, what the calculator is asked, what it answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from mlxchat.data.tokenizer import Tokenizer
from mlxchat.engine.scheduler import Event

Kind = Literal["text", "python", "python_output"]


@dataclass
class Parts:
    """Follows the events of one choice and sorts their text."""

    tokenizer: Tokenizer
    kind: Kind = "text"
    found: list[tuple[Kind, str]] = field(default_factory=list)
    """(kind, text) of every part so far."""

    def __post_init__(self) -> None:
        """Know which special tokens change the kind of what follows."""
        special = self.tokenizer.special_ids
        self._turns: dict[int, Kind] = {
            special["<|python_start|>"]: "python",
            special["<|python_end|>"]: "text",
            special["<|output_start|>"]: "python_output",
            special["<|output_end|>"]: "text",
        }

    def add(self, event: Event) -> Iterator[tuple[Kind, str]]:
        """Yield the kind and text of what may be shown now."""
        if event.text:
            if self.found and self.found[-1][0] == self.kind:
                self.found[-1] = self.kind, self.found[-1][1] + event.text
            else:
                self.found.append((self.kind, event.text))
            yield self.kind, event.text
        if event.token is not None:
            self.kind = self._turns.get(event.token, self.kind)

    @property
    def text(self) -> str:
        """What was said, without calls and what they gave."""
        return "".join(text for kind, text in self.found if kind == "text")

    @property
    def tools_used(self) -> bool:
        """Whether the calculator was asked."""
        return any(kind != "text" for kind, _ in self.found)

    def as_content(self) -> list[dict[str, Any]]:
        """Return the parts as a conversation of a mixture holds them."""
        return [{"type": kind, "text": text} for kind, text in self.found]
