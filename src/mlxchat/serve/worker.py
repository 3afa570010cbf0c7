"""The worker thread that loads, runs and frees all models, since MLX's streams belong to one thread.

Requests come from the event loop's thread through a bounded queue. Events go back in one call per step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mlxchat.engine.batch import Event, Request
from mlxchat.engine.generate import Scheduler
from mlxchat.serve.models import Model
from mlxchat.serve.security import Fault, Limits

_log = logging.getLogger("mlxchat.serve")
_RETRY_SECONDS = 5
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ChoiceEvent = tuple[int, Event]
"""Index of a choice of an answer, and its next event."""
Load = Callable[[Model, Limits], Scheduler]


@dataclass(eq=False)
class Answer:
    """The choices of one request. Iterate over its events; cancel it if the client disconnects."""

    worker: Worker
    model: Model
    requests: list[Request]
    events: asyncio.Queue[list[ChoiceEvent] | Exception] = field(default_factory=asyncio.Queue)
    left: int = 0
    """Choices that have not ended."""

    async def __aiter__(self) -> AsyncIterator[ChoiceEvent]:
        """Yield the events until every choice has ended, and count them; Fault if the computation failed."""
        metrics, began, left = self.worker.metrics, time.perf_counter(), len(self.requests)
        metrics.prompt_tokens.inc(sum(len(request.prompt) for request in self.requests))
        is_first = True
        while left:
            got = await self.events.get()
            if isinstance(got, Exception):
                raise got
            if is_first:
                metrics.first_token.observe(time.perf_counter() - began)
                is_first = False
            for index, event in got:
                left -= event.finish_reason is not None
                yield index, event

    def cancel(self) -> None:
        """Stop computing its remaining choices."""
        if self.left:
            self.worker.commands.put(lambda: self.worker.cancel(self))


class Worker:
    """The thread with the models in memory and the answers that it computes."""

    def __init__(self, limits: Limits, load: Load) -> None:
        """Create a worker, which `start` starts; `load` returns the scheduler of a model."""
        self.limits, self._load = limits, load
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.answers: set[Answer] = set()
        self.tokens_generated = self.failures = 0
        self.has_loaded = False
        """Whether a model was ever in memory."""
        self._schedulers: OrderedDict[str, Scheduler] = OrderedDict()
        self._pending: deque[tuple[Answer, int]] = deque()
        self._choices: dict[tuple[str, int], tuple[Answer, int]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="mlxchat-worker", daemon=True)
        self._closing = False
        self._reused_before = 0
        self.metrics = Metrics(self)

    def start(self, default: Model | None = None) -> None:
        """Start the thread; load `default` at once. Call it on the event loop's thread."""
        self._loop = asyncio.get_running_loop()
        if default is not None:
            self.commands.put(lambda: self._preload(default))
        self._thread.start()

    async def stop(self) -> None:
        """End all answers and the thread."""
        self._closing = True
        self.commands.put(None)
        await asyncio.to_thread(self._thread.join, 30)

    @property
    def num_choices(self) -> int:
        """Number of choices that run or wait."""
        return sum(answer.left for answer in self.answers)

    @property
    def loaded(self) -> list[str]:
        """Names of the models in memory."""
        return list(self._schedulers)

    @property
    def num_reused(self) -> int:
        """Prompt tokens whose keys and values were reused from earlier requests."""
        return sum(scheduler.source.num_reused for scheduler in list(self._schedulers.values())) + self._reused_before

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._closing

    def submit(self, model: Model, requests: list[Request]) -> Answer:
        """Queue the choices of a request; Fault if the queue is full or the server is shutting down."""
        if not self.alive:
            raise Fault("the server is shutting down", status=503, retry_after=_RETRY_SECONDS)
        room = self.limits.max_rows + self.limits.max_queue - self.num_choices
        if len(requests) > room:
            raise Fault(
                f"the server is busy: {self.num_choices} answers are running or waiting; at most "
                f"{self.limits.max_rows + self.limits.max_queue} are accepted",
                status=429, code="queue_full", retry_after=_RETRY_SECONDS,
            )  # fmt: skip
        answer = Answer(self, model, requests, left=len(requests))
        self.answers.add(answer)
        choices = [(answer, index) for index in range(len(requests))]
        self.commands.put(lambda: self._pending.extend(choices))
        return answer

    def cancel(self, answer: Answer) -> None:
        """Cancel an answer's choices. Call it on the worker's thread."""
        gone = Event(id=-1, token=None, finish_reason="cancelled")
        self._deliver([(answer, index, gone) for index in self._cancel_rows(answer)])

    def _cancel_rows(self, answer: Answer) -> list[int]:
        """End an answer's rows; return its choices that have not ended before."""
        ended = [index for asked, index in self._pending if asked is answer]
        self._pending = deque(each for each in self._pending if each[0] is not answer)
        for name, row in [place for place, (asked, _) in self._choices.items() if asked is answer]:
            self._schedulers[name].cancel(row)
            ended.append(self._choices.pop((name, row))[1])
        return ended

    def _run(self) -> None:
        while True:
            idle = not self._pending and all(scheduler.idle for scheduler in self._schedulers.values())
            try:
                command = self.commands.get(block=idle)
            except queue.Empty:
                self._step()
                continue
            if command is None:
                break
            command()
        for answer in list(self.answers):
            self._fail(answer, Fault("the server is shutting down", status=503, retry_after=_RETRY_SECONDS))
        self._schedulers.clear()
        # MLX frees a thread's streams after Python has joined it, which is too late if the process exits then.
        mx.clear_streams()

    def _preload(self, model: Model) -> None:
        try:
            self._ensure_loaded(model)
        except Exception:  # the server continues; requests for this model report the error
            _log.exception("%s cannot be loaded", model.name)

    def _admit(self) -> None:
        """Give rows to pending choices, first come, first served, up to max_rows over all models.

        A choice whose model does not fit into memory blocks those after it: otherwise busy models could keep it
        waiting forever.
        """
        while self._pending and len(self._choices) < self.limits.max_rows:
            answer, index = self._pending[0]
            try:
                if not self._ensure_loaded(answer.model):
                    return
                row = self._schedulers[answer.model.name].submit(answer.requests[index])
            except Exception as error:  # fails only this answer
                self._cancel_rows(answer)
                self._fail(answer, error)
                continue
            self._pending.popleft()
            self._choices[answer.model.name, row] = answer, index

    def _ensure_loaded(self, model: Model) -> bool:
        """Load a model unless it is in memory; return False if max_models other models are in use.

        Frees the least recently used idle model before it loads, so nothing else may hold a scheduler.
        """
        if model.name not in self._schedulers:
            unused = [name for name, scheduler in self._schedulers.items() if scheduler.idle]
            while len(self._schedulers) >= self.limits.max_models:
                if not unused:
                    return False
                self._reused_before += self._schedulers.pop(unused.pop(0)).source.num_reused
            began = time.perf_counter()
            self._schedulers[model.name] = self._load(model, self.limits)
            self.has_loaded = True
            _log.info("loaded %s in %.1f s", model.name, time.perf_counter() - began)
        self._schedulers.move_to_end(model.name)
        return True

    def _step(self) -> None:
        self._admit()
        found: list[tuple[Answer, int, Event]] = []
        for name, scheduler in list(self._schedulers.items()):
            if scheduler.idle:
                continue
            try:
                events = scheduler.step()
            except Exception as error:  # fails only this model's answers
                _log.exception("%s failed", name)
                self._drop(name, error)
                continue
            for event in events:
                answer, index = self._choices[name, event.id]
                if event.finish_reason is not None:
                    del self._choices[name, event.id]
                found.append((answer, index, event))
        if found:
            self._deliver(found)

    def _drop(self, name: str, error: Exception) -> None:
        """Free a model whose computation failed, and fail its answers; the next request loads it again."""
        self._reused_before += self._schedulers.pop(name).source.num_reused
        failed = {answer for (model, _), (answer, _) in self._choices.items() if model == name}
        self._choices = {key: value for key, value in self._choices.items() if key[0] != name}
        for answer in failed:
            self._cancel_rows(answer)
            self._fail(answer, error)

    def _fail(self, answer: Answer, error: Exception) -> None:
        if not isinstance(error, Fault):
            _log.error("an answer failed: %s: %s", type(error).__name__, error)
            error = Fault(f"the computation failed: {type(error).__name__}: {error}", status=500)

        def end() -> None:
            answer.left = 0
            self.answers.discard(answer)
            self.failures += 1
            answer.events.put_nowait(error)

        self._call(end)

    def _deliver(self, found: list[tuple[Answer, int, Event]]) -> None:
        """Pass events to the event loop's thread."""

        def deliver() -> None:
            parts: dict[Answer, list[ChoiceEvent]] = {}
            for answer, index, event in found:
                if answer not in self.answers:  # it failed before
                    continue
                parts.setdefault(answer, []).append((index, event))
                self.tokens_generated += event.sampled
                answer.left -= event.finish_reason is not None
                if not answer.left:
                    self.answers.discard(answer)
            for answer, events in parts.items():
                answer.events.put_nowait(events)

        self._call(deliver)

    def _call(self, function: Callable[[], None]) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)


class Metrics:
    """Prometheus metrics of one server, in a separate registry."""

    def __init__(self, worker: Worker) -> None:
        """Report the state of a worker."""
        self._worker, self.registry = worker, CollectorRegistry()
        into: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("mlxchat_requests", "Requests by route and status.", ["route", "status"], **into)
        self.prompt_tokens = Counter("mlxchat_prompt_tokens", "Prompt tokens.", **into)
        told = "Time from a request to its first token."
        self.first_token = Histogram("mlxchat_time_to_first_token_seconds", told, buckets=_SECONDS, **into)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield counters and gauges of the worker."""
        worker, running = self._worker, min(self._worker.num_choices, len(self._worker._choices))
        yield CounterMetricFamily("mlxchat_generated_tokens", "Sampled tokens.", worker.tokens_generated)
        yield CounterMetricFamily("mlxchat_failures", "Answers whose computation failed.", worker.failures)
        yield CounterMetricFamily("mlxchat_reused_prompt_tokens", "Prompt tokens in the KV cache.", worker.num_reused)
        yield GaugeMetricFamily("mlxchat_rows_running", "Choices that run.", running)
        yield GaugeMetricFamily("mlxchat_rows_waiting", "Choices that wait.", worker.num_choices - running)
        yield GaugeMetricFamily("mlxchat_models_loaded", "Models in memory.", len(worker.loaded))
