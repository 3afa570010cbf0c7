"""Text of a row as it may be shown: never half a UTF-8 character, never the beginning of a stop string."""

from __future__ import annotations

import codecs

from mlxchat.data.tokenizer import Tokenizer


class ShownText:
    """Turns a row's tokens into text to show. Special tokens are none."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        """Begin a row; `stop` are the strings before which the text ends."""
        self.stopped = False
        """Whether a stop string was found; it and what follows is never shown."""
        self._tokenizer, self._stop = tokenizer, tuple(filter(None, stop))
        self._special = set(tokenizer.special_ids.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def add(self, token: int) -> str:
        """Return what may be shown now that `token` has come."""
        if token in self._special:
            return self._show(self._decoder.decode(b"", final=True))
        return self._show(self._decoder.decode(self._tokenizer.decode_bytes([token])))

    def finish(self) -> str:
        """Return what was held back, now that nothing follows; half a character is shown as U+FFFD."""
        shown = self._show(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return shown if self.stopped else shown + held

    def _show(self, more: str) -> str:
        if self.stopped:
            return ""
        text = self._held + more
        found = [place for place in map(text.find, self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return how many last characters of the text are the first of a stop string that has not come whole."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
