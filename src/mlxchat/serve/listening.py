"""Whoever asked may leave: then what is computed for them ends, whether it is streamed or waited for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.types import Receive, Scope, Send

from mlxchat.serve.faults import Fault
from mlxchat.serve.metrics import Metrics
from mlxchat.serve.worker import Answer, Told

Result = TypeVar("Result")
_PIECE_ITEMS = 64
_write_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode

# Streams end by themselves when the server is asked to stop, and are cut off when its patience ends.
AppStatus.enable_automatic_graceful_drain = False


class EventStream(EventSourceResponse):
    """Server-sent events of an answer, which is cancelled when the stream ends however it ends."""

    def __init__(self, answer: Answer, data: AsyncIterator[Any]) -> None:
        """Take the answer and what is sent of it: objects, written as JSON, or whole events as bytes."""
        super().__init__(_encoded(data), sep="\n", ping=15, headers={"X-Accel-Buffering": "no"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, and see to it that nothing is computed for nobody."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


async def while_connected(request: Request, answer: Answer, work: Coroutine[Any, Any, Result]) -> Result:
    """Return the result of `work`, or cancel the answer if the client leaves before.

    Raises:
        Fault: nobody is there any more, or what `work` raises.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Fault("the client has left", status=499)
    finally:
        answer.cancel()
        for each in (task, gone):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Fault):
                await each


async def measured(answer: Answer, metrics: Metrics) -> AsyncIterator[Told]:
    """Yield what comes of an answer, and count it."""
    began, first = time.perf_counter(), True
    metrics.prompt_tokens += sum(len(request.prompt) for request in answer.requests)
    try:
        async for index, event in answer:
            if first:
                metrics.first_token.add(time.perf_counter() - began)
                first = False
            if event.finish_reason is not None:
                metrics.finished[event.finish_reason] += 1
            yield index, event
        metrics.whole.add(time.perf_counter() - began)
    finally:
        metrics.finished["left"] += answer.left


async def _left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _encoded(data: AsyncIterator[Any]) -> AsyncIterator[bytes | dict[str, str]]:
    try:
        async for item in data:
            if isinstance(item, bytes):
                yield item
            else:
                yield {"data": item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)}
    except Fault as fault:  # the status has been sent long ago
        yield {"data": json.dumps(fault.body())}


def large_event(item: Any) -> bytes:
    """Return a server-sent event, encoded in pieces (`large_json`); it takes long, so call it in a thread."""
    return f"data: {large_json(item)}\n\n".encode()


class LargeAnswer(JSONResponse):
    """A JSON answer, encoded in pieces (`large_json`); it takes long, so make it in a thread."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return large_json(content).encode()


def large_json(value: Any) -> str:
    """Return JSON. Long lists are written in pieces: during one call of the encoder no other thread can run."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_write_json(key)}:{large_json(item)}" for key, item in value.items()) + "}"
    if not isinstance(value, list):
        return _write_json(value)
    if len(value) <= _PIECE_ITEMS:
        return "[" + ",".join(large_json(item) for item in value) + "]"
    starts = range(0, len(value), _PIECE_ITEMS)
    return "[" + ",".join(_write_json(value[at : at + _PIECE_ITEMS])[1:-1] for at in starts) + "]"
