"""What answers cost, and how much may still be spent."""

from __future__ import annotations

from dataclasses import dataclass

_MILLION = 1e6
# Tokens around a message in any chat format that is known, and those that formats put before all of them (a system
# prompt of their own); a text has no more tokens than bytes.
_MESSAGE_TOKENS, _FORMAT_TOKENS = 16, 64


@dataclass
class Usage:
    """Tokens of answers, as the teacher counts them."""

    input: int = 0
    output: int = 0
    unknown: int = 0
    """Answers of which the teacher did not say."""

    def add(self, tokens: tuple[int, int] | None) -> None:
        """Count one answer's tokens; None: not told."""
        if tokens is None:
            self.unknown += 1
        else:
            self.input += tokens[0]
            self.output += tokens[1]


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in any currency; None: unknown."""

    input: float | None = None
    output: float | None = None

    def of(self, usage: Usage) -> float | None:
        """Return what these tokens cost, None if a price is unknown."""
        if self.input is None or self.output is None:
            return None
        return (usage.input * self.input + usage.output * self.output) / _MILLION


class Budget:
    """Money that may be spent. What a request may cost at most is put aside before it is sent."""

    def __init__(self, most: float | None, prices: Prices) -> None:
        """Take the limit; None: none."""
        self.most, self._prices = most, prices
        self.spent, self._aside = 0.0, 0.0

    def fits(self, most_tokens: tuple[int, int]) -> bool:
        """Tell whether a request of at most so many input and output tokens may be sent now."""
        return self.most is None or self.spent + self._aside + self._cost(most_tokens) <= self.most

    def has_waiting(self) -> bool:
        """Tell whether something is put aside, part of which will be free again."""
        return self._aside > 0

    def put_aside(self, most_tokens: tuple[int, int]) -> None:
        """Count a request that is sent."""
        self._aside += self._cost(most_tokens)

    def settle(self, most_tokens: tuple[int, int], tokens: tuple[int, int] | None, *, answered: bool) -> None:
        """Count what came of it. An answer whose tokens were not told is counted at the most that it may have cost."""
        self._aside = max(0.0, self._aside - self._cost(most_tokens))
        if answered:
            self.spent += self._cost(tokens or most_tokens)

    def _cost(self, tokens: tuple[int, int]) -> float:
        return self._prices.of(Usage(*tokens)) or 0.0


def most_tokens(messages: list[dict[str, str]], max_tokens: int) -> tuple[int, int]:
    """Return the most input and output tokens that a request can have: a text has no more tokens than bytes."""
    size = sum(len(message["content"].encode("utf-8", "replace")) + _MESSAGE_TOKENS for message in messages)
    return size + _FORMAT_TOKENS, max_tokens
