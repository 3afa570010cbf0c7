"""How fast a teacher may be asked: so many requests and tokens a minute, and not while it says to wait."""

from __future__ import annotations

import time
from collections.abc import Callable

_MINUTE = 60.0


class Pace:
    """Spreads units over time: after n of them nothing may begin for n / rate. What was overestimated is given back.

    Even spacing instead of sixty at once and a pause: servers that count by the second refuse the former.
    """

    def __init__(self, per_minute: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the rate; None: no limit."""
        self._seconds = None if per_minute is None else _MINUTE / per_minute
        self._clock = clock
        self._free_at = clock()

    def wait_seconds(self) -> float:
        """Return how long nothing may begin, 0 if something may."""
        return 0.0 if self._seconds is None else max(0.0, self._free_at - self._clock())

    def take(self, units: float) -> None:
        """Count units that begin now."""
        if self._seconds is not None:
            self._free_at = max(self._free_at, self._clock()) + units * self._seconds

    def give_back(self, units: float) -> None:
        """Take units back that were counted too much; negative: that were counted too little."""
        if self._seconds is not None:
            self._free_at -= units * self._seconds


class Gate:
    """Requests and tokens together, and a time before which the teacher asked to be left alone."""

    def __init__(
        self, requests: float | None, tokens: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take the rates by the minute; None: no limit."""
        self.requests, self.tokens, self._clock = Pace(requests, clock), Pace(tokens, clock), clock
        self._closed_until = clock()

    def wait_seconds(self) -> float:
        """Return how long nothing may be asked."""
        return max(self.requests.wait_seconds(), self.tokens.wait_seconds(), self._closed_until - self._clock(), 0.0)

    def enter(self, tokens: float) -> None:
        """Count a request of about so many tokens."""
        self.requests.take(1)
        self.tokens.take(tokens)

    def close(self, seconds: float) -> None:
        """Let nothing through for so long: a limit that was hit is everybody's."""
        self._closed_until = max(self._closed_until, self._clock() + seconds)
