"""What earlier requests left: keys and values of their beginnings, so that a next turn need not read them again.

Looked for by token ids alone: the longest common beginning counts, whoever left it. The ones used longest ago go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What is shorter costs more to look after than to read.
_LEAST_TOKENS = 16


@dataclass
class Kept:
    """The beginning of a row."""

    ids: list[int]
    past: Any
    """Of all of `ids`; made by a `Forward`."""
    exact: int
    """How many first tokens have the keys and values that reading would give; those after them were decoded."""


class KeptPasts:
    """Beginnings of rows, of so many tokens together."""

    def __init__(self, max_tokens: int) -> None:
        """Begin with nothing."""
        self.max_tokens = max_tokens
        self.num_found = 0
        """Tokens that need not be read again, of all that was found."""
        self._kept: list[Kept] = []  # the one used last stands last

    @property
    def num_tokens(self) -> int:
        """Tokens that are kept."""
        return sum(len(each.ids) for each in self._kept)

    def find(self, prompt: list[int], piece_tokens: int, *, exactly: bool) -> tuple[Any, int, int]:
        """Return (past, its tokens, how many of them are exact) to go on from; (None, 0, 0): there is nothing.

        Args:
            prompt: the last token of it is never part of what is found.
            piece_tokens: in which prompts are read. Of what was read only whole pieces have the same bits in any
                prompt that begins with them.
            exactly: whether nothing else counts; or whatever is the same text.
        """
        best, most, exact = None, _LEAST_TOKENS - 1, 0
        for each in self._kept:
            same = common_length(prompt[:-1], each.ids)
            whole = min(same, each.exact) // piece_tokens * piece_tokens
            tokens = whole if exactly else same
            if tokens > most:
                best, most, exact = each, tokens, whole
        if best is None:
            return None, 0, 0
        self._kept.remove(best)
        self._kept.append(best)
        self.num_found += most
        return best.past.begun(most), most, exact

    def keep(self, ids: list[int], past: Any, exact: int) -> None:
        """Keep a beginning in place of those that it goes on from."""
        if not _LEAST_TOKENS <= len(ids) <= self.max_tokens:
            return
        for each in list(self._kept):
            same = common_length(ids, each.ids)
            if same == len(ids) and each.exact >= exact:  # there is as much already
                return
            if same == len(each.ids) and each.exact <= exact:
                self._kept.remove(each)
        self._kept.append(Kept(ids, past, exact))
        while self.num_tokens > self.max_tokens:
            del self._kept[0]


def common_length(a: list[int], b: list[int]) -> int:
    """Return how many first elements two lists share."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return next(place for place in range(most) if a[place] != b[place])
