"""What waits for a place, found by its length."""

from __future__ import annotations

import bisect
from typing import Any

# A key is length × 2^40 + arrival: plain numbers compare fastest, and a trillion documents are enough.
_ARRIVAL_BITS = 40


class BestFitBuffer:
    """Waiting sequences, found by length in logarithmic time. Among equals the first to arrive comes first."""

    def __init__(self) -> None:
        """Begin empty."""
        self._keys: list[int] = []  # sorted
        self._addresses: dict[int, Any] = {}  # arrival → address; a dict keeps the order of arrival
        self._arrivals = 0

    def __len__(self) -> int:
        """Number of waiting sequences."""
        return len(self._keys)

    def add(self, address: Any, length: int) -> None:
        """Let a sequence wait."""
        bisect.insort(self._keys, (length << _ARRIVAL_BITS) + self._arrivals)
        self._addresses[self._arrivals] = address
        self._arrivals += 1

    def take_largest(self, space: int) -> tuple[Any, int] | None:
        """Remove the longest sequence of at most `space` tokens; return its address and length, or None."""
        end = bisect.bisect_left(self._keys, (space + 1) << _ARRIVAL_BITS)
        if end == 0:
            return None
        longest = self._keys[end - 1] >> _ARRIVAL_BITS
        return self._remove(bisect.bisect_left(self._keys, longest << _ARRIVAL_BITS, 0, end))

    def take_shortest(self) -> tuple[Any, int]:
        """Remove the shortest sequence; return its address and length."""
        return self._remove(0)

    def addresses(self) -> list[Any]:
        """Return the addresses of what waits, in order of arrival."""
        return list(self._addresses.values())

    def _remove(self, index: int) -> tuple[Any, int]:
        key = self._keys.pop(index)
        return self._addresses.pop(key & ((1 << _ARRIVAL_BITS) - 1)), key >> _ARRIVAL_BITS
