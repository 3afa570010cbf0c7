"""Asking a teacher all that is not answered yet: many at a time, patiently, within limits, until told to stop."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxchat.config.wording import format_count
from mlxchat.distill.answers import Answer, Answers
from mlxchat.distill.cost import Budget, Prices, Usage, most_tokens
from mlxchat.distill.pace import Gate
from mlxchat.distill.teacher import Passing, Refused, Teacher
from mlxchat.distill.words import one_line
from mlxchat.errors import MlxchatError, PassingError, StoreError
from mlxchat.runner.progress import Progress

# Before the first further try; doubled each time, and varied by half.
FIRST_PAUSE_SECONDS = 1.0
_MOST_PAUSE_SECONDS = 60.0
# A teacher that wants to be left alone for longer than this is asked again another day.
_LONGEST_WAIT_SECONDS = 900.0
# So many refusals without one answer, and it is not the questions that are wrong.
_REFUSALS = 5


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to ask, once."""

    key: str
    name: str
    """Of its question, for people."""
    body: dict[str, Any]

    def most_tokens(self, max_tokens: int) -> tuple[int, int]:
        """Return the most tokens that it can cost, input and output."""
        return most_tokens(self.body, max_tokens)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How a teacher is asked."""

    concurrency: int = 8
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    retries: int = 6
    """Further tries of a request that failed for a passing reason."""
    max_cost: float | None = None
    max_tokens: int = 1024
    """The most that an answer may have, whatever field says so."""


@dataclass
class Collected:
    """What came of it."""

    asked: int = 0
    """Answers that came now."""
    usage: Usage = field(default_factory=Usage)
    """Of these."""
    failed: dict[str, str] = field(default_factory=dict)
    """Request's key → question and reason, of those that failed."""
    seconds: float = 0.0
    out_of_money: bool = False
    spent: float = 0.0
    """By all runs that --max-cost limits together."""
    spent_before: float = 0.0
    unanswered_cost: float = 0.0
    """Counted now for requests that came to no answer and that the teacher may bill."""
    fault: MlxchatError | None = None
    """What ended everything."""


class Collector:
    """Asks requests of a teacher and writes their answers down."""

    def __init__(self, teacher: Teacher, answers: Answers, limits: Limits, prices: Prices, ledger: Path) -> None:
        """Take what is needed; nothing is asked yet. `ledger` is where costs are kept if they are limited."""
        self.teacher, self.answers, self.limits, self.prices = teacher, answers, limits, prices
        self.collected = Collected()
        self._budget = Budget(limits.max_cost, prices, ledger)
        self._gate = Gate(limits.requests_per_minute, limits.tokens_per_minute)
        self._output_tokens: float = limits.max_tokens  # of an answer, on average, as far as is known
        self._refusals = 0
        self._answered_at = -1.0
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()

    def stop(self, number: int = 0) -> None:
        """Ask nothing more; what is under way is waited for. May be called by a signal."""
        self._stopped = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    async def run(self, requests: Sequence[Request], progress: Progress, done: int) -> Collected:
        """Ask all of them, in their order as far as there is room; `done` were answered before."""
        self._loop = asyncio.get_running_loop()
        if self._stopped:
            self._wake.set()
        began = time.monotonic()
        queue = iter(requests)
        self.collected.spent_before = self._budget.spent
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.limits.concurrency, len(requests))):
                    group.create_task(self._work(queue, progress, done, began))
        finally:
            self._budget.close()
        self.collected.seconds = time.monotonic() - began
        self.collected.spent, self.collected.unanswered_cost = self._budget.spent, self._budget.unanswered
        return self.collected

    async def _work(self, queue: Iterator[Request], progress: Progress, done: int, began: float) -> None:
        while not self._stopped and (request := next(queue, None)) is not None:
            try:
                answer = await self._ask(request)
            except Refused as error:
                self._fail(request, str(error))
                self._refusals += 1
                if error.for_good or (self._refusals >= _REFUSALS and self._answered_at < 0):
                    self._end(MlxchatError(f"the teacher refuses: {error}"))
            except Passing as error:
                self._fail(request, str(error))
            except StoreError as error:  # its cost could not be written down
                self._fail(request, "its cost could not be kept")
                self._end(error)
            else:
                if answer is not None:
                    self._keep(request, answer)
            progress.update(done + self.collected.asked, **self._numbers(time.monotonic() - began))

    async def _ask(self, request: Request) -> Answer | None:
        """Return an answer, after as many tries as it needs and may have; None: it was not asked any more."""
        most = request.most_tokens(self.limits.max_tokens)
        first, pause = time.monotonic(), FIRST_PAUSE_SECONDS
        failures, refused = 0, first
        while True:
            # Input as most of the world's tokenizers cut it: about four bytes a token.
            guess = most[0] / 4 + self._output_tokens
            if not await self._may_go(most):
                return None
            self._gate.enter(guess)
            reserved = self._budget.reserve(most)
            try:
                answer = await self.teacher.ask(request.body)
            except BaseException as error:
                self._budget.settle_unanswered(reserved, free=isinstance(error, Passing | Refused) and error.free)
                self._gate.tokens.give_back(guess)
                if not isinstance(error, Passing):
                    raise
                # A teacher that has no room now, and answered others since it last had none, will have some.
                failures = 1 if error.no_room and self._answered_at > refused else failures + 1
                refused = time.monotonic()
                if failures > self.limits.retries or (error.retry_after or 0) > _LONGEST_WAIT_SECONDS:
                    if self._answered_at < first:
                        self._end(PassingError(f"the teacher does not answer now: {error}"))
                    raise
                if error.retry_after is not None:
                    self._gate.close(error.retry_after)
                # After the wait, and not all at once again.
                await self._sleep((error.retry_after or 0.0) + pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, _MOST_PAUSE_SECONDS)
                continue
            self._budget.settle(reserved, most, answer.tokens)
            self._count(answer, guess, most)
            return answer

    async def _may_go(self, most: tuple[int, int]) -> bool:
        """Wait for the limits; tell whether to go on."""
        while not self._stopped:
            if not self._budget.fits(most):
                if not self._budget.has_waiting():
                    self.collected.out_of_money = True
                    self.stop()
                    return False
                await self._sleep(0.05)  # what is under way will cost less than was put aside
            elif wait := self._gate.wait_seconds():
                await self._sleep(wait)
            else:
                return True
        return False

    async def _sleep(self, seconds: float) -> None:
        """Wait, but not longer than until everything is to stop."""
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    def _count(self, answer: Answer, guess: float, most: tuple[int, int]) -> None:
        self._answered_at = time.monotonic()
        self.collected.asked += 1
        self.collected.usage.add(answer.tokens)
        if answer.tokens is not None:
            # A false count, however large, must not hold up the next requests.
            self._gate.tokens.give_back(guess - min(sum(answer.tokens), sum(most)))
            # The first says more than no answer at all, the later ones less and less.
            output = min(answer.tokens[1], most[1])
            self._output_tokens += (output - self._output_tokens) / min(self.collected.asked, 20)

    def _keep(self, request: Request, answer: Answer) -> None:
        try:
            self.answers.add(request.key, answer)
        except MlxchatError as error:
            self._fail(request, "its answer could not be kept")
            self._end(error)

    def _fail(self, request: Request, reason: str) -> None:
        self.collected.failed[request.key] = f"{one_line(request.name)}: {reason}"

    def _end(self, fault: MlxchatError) -> None:
        if self.collected.fault is None:
            self.collected.fault = fault
        self.stop()

    def _numbers(self, seconds: float) -> dict[str, str]:
        usage, failed = self.collected.usage, len(self.collected.failed)
        cost = self.prices.of(usage)
        return {
            "speed": f"{self.collected.asked / max(seconds, 1e-9):.3g}/s",
            "tokens": f"{format_count(usage.input)} + {format_count(usage.output)}",
            "cost": "" if cost is None else f"{cost:.4f}",
            "failed": str(failed) if failed else "",
        }
