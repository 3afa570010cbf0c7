"""Sends requests to a teacher concurrently, with a rate limit, retries and a cost limit."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiolimiter import AsyncLimiter

from mlxchat.config.wording import format_count
from mlxchat.distill.answers import Answer, Answers
from mlxchat.distill.cost import Budget, Prices, Usage, most_tokens
from mlxchat.distill.questions import one_line
from mlxchat.distill.teacher import Failed, Teacher
from mlxchat.errors import MlxchatError, PassingError, StoreError
from mlxchat.runner.progress import Progress

RETRIES = 6
"""Further attempts after a transient failure."""
FIRST_PAUSE_SECONDS = 1.0
"""Pause before the first retry; doubled each time, with a jitter of ±50%."""
_MOST_PAUSE_SECONDS = 60.0
# A longer Retry-After counts as a failure.
_LONGEST_WAIT_SECONDS = 900.0
# This many refusals without any answer end the run: every request has the same fault.
_REFUSALS = 5


@dataclass(frozen=True, kw_only=True)
class Request:
    """One chat request."""

    key: str
    name: str
    """Of its question, for messages."""
    body: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of rate, cost and answer length."""

    concurrency: int = 8
    requests_per_minute: float | None = None
    max_cost: float | None = None
    max_tokens: int = 1024
    """Maximum length of an answer, whichever field of the request sets it."""


@dataclass
class Collected:
    """The result of a run."""

    asked: int = 0
    """Answers received in this run."""
    usage: Usage = field(default_factory=Usage)
    """Of these answers."""
    failed: dict[str, str] = field(default_factory=dict)
    """Request key → question and reason."""
    seconds: float = 0.0
    out_of_money: bool = False
    spent: float = 0.0
    """By all runs that share the ledger of --max-cost."""
    spent_before: float = 0.0
    unanswered_cost: float = 0.0
    """Cost counted in this run for unanswered requests that the teacher may bill."""
    fault: MlxchatError | None = None
    """The error that ended the run."""


class Collector:
    """Sends requests to a teacher and stores their answers."""

    def __init__(self, teacher: Teacher, answers: Answers, limits: Limits, prices: Prices, ledger: Path) -> None:
        """Send nothing yet. `ledger` is the file of costs, used if `limits.max_cost` is set."""
        self.teacher, self.answers, self.limits, self.prices = teacher, answers, limits, prices
        self.collected = Collected()
        self._budget = Budget(limits.max_cost, prices, ledger)
        rate = limits.requests_per_minute
        # Evenly spaced: some servers count requests by the second.
        self._pace = None if rate is None else AsyncLimiter(1, 60 / rate)
        self._closed_until = 0.0
        self._refusals = 0
        self._answered_at = -1.0
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()

    def stop(self) -> None:
        """Send no further requests; requests in flight are awaited. Safe to call from a signal handler."""
        self._stopped = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake.set)

    async def run(self, requests: Sequence[Request], progress: Progress, done: int) -> Collected:
        """Send the requests in order. `done` others, answered before, count in the progress."""
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
                if answer is not None:
                    self.answers.add(request.key, answer)
            except Failed as error:
                self._fail(request, str(error))
                self._refusals += not error.retry
                if error.for_all or (self._refusals >= _REFUSALS and self._answered_at < 0):
                    self._end(MlxchatError(f"the teacher refuses: {error}"))
            except StoreError as error:
                self._fail(request, "its answer or its cost could not be written")
                self._end(error)
            progress.update(done + self.collected.asked, **self._numbers(time.monotonic() - began))

    async def _ask(self, request: Request) -> Answer | None:
        """Return the answer, retrying transient failures; None if the run stopped first."""
        most = most_tokens(request.body, self.limits.max_tokens)
        first, pause = time.monotonic(), FIRST_PAUSE_SECONDS
        failures, refused = 0, first
        while await self._wait_for_turn(most):
            reserved = self._budget.reserve(most)
            try:
                answer = await self.teacher.ask(request.body)
            except BaseException as error:
                self._budget.settle_unanswered(reserved, free=isinstance(error, Failed) and error.free)
                if not (isinstance(error, Failed) and error.retry):
                    raise
                # A teacher that has answered other requests since its last 429 is only overloaded.
                failures = 1 if error.no_room and self._answered_at > refused else failures + 1
                refused = time.monotonic()
                if failures > RETRIES or (error.retry_after or 0) > _LONGEST_WAIT_SECONDS:
                    if self._answered_at < first:
                        self._end(PassingError(f"the teacher does not answer now: {error}"))
                    raise
                wait = error.retry_after or 0.0
                self._closed_until = max(self._closed_until, time.monotonic() + wait)  # holds for all requests
                await self._unless_stopped(asyncio.sleep(wait + pause * random.uniform(0.5, 1.5)))
                pause = min(2 * pause, _MOST_PAUSE_SECONDS)
            else:
                self._budget.settle(reserved, most, answer.tokens)
                self._answered_at = time.monotonic()
                self.collected.asked += 1
                self.collected.usage.add(answer.tokens)
                return answer
        return None

    async def _wait_for_turn(self, most: tuple[int, int]) -> bool:
        """Wait until rate limit, Retry-After and cost limit allow a request; return False if the run stops first."""
        is_paced = self._pace is None
        while not self._stopped:
            if not self._budget.fits(most):
                if not self._budget.has_waiting():
                    self.collected.out_of_money = True
                    self.stop()
                    return False
                await self._unless_stopped(asyncio.sleep(0.05))  # until answers free part of their reservations
            elif (wait := self._closed_until - time.monotonic()) > 0:
                await self._unless_stopped(asyncio.sleep(wait))
            elif not is_paced:
                assert self._pace is not None
                await self._unless_stopped(self._pace.acquire())
                is_paced = True
            else:
                return True
        return False

    async def _unless_stopped(self, awaited: Awaitable[None]) -> None:
        """Await something, at most until the run stops."""
        tasks = {asyncio.ensure_future(awaited), asyncio.ensure_future(self._wake.wait())}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

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
