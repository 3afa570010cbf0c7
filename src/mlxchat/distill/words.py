"""Text of strangers made fit for a file, a terminal and a training."""

from __future__ import annotations

import re

from mlxchat.errors import visible

# All controls but tab and newline, halves of characters, and what would turn the direction of a terminal's line.
_UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


def clean(text: str) -> str:
    """Return a text without control characters and halves of characters, its line ends made newlines.

    Special tokens of a chat format (<|assistant_end|>) stay as they are: what renders conversations takes them for
    ordinary text.
    """
    return _UNFIT.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def without_thought(text: str) -> str:
    """Return an answer without the <think> … </think> that reasoning models begin with."""
    return _THOUGHT.sub("", text, count=1)


def one_line(text: str, longest: int = 200) -> str:
    """Return a text that may be shown: one line, no control characters, not longer than so many characters."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"
