"""A client of an OpenAI-compatible endpoint that reads answers and classifies failures.

`openai.AsyncOpenAI` does the HTTP. Hardened against endpoints that misbehave: the response's size and the total time
are limited; nothing is decompressed or redirected, and no header comes from the environment.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

import httpx2
import openai

from mlxchat.distill.answers import Answer
from mlxchat.distill.questions import one_line

_MOST_BYTES = 8 << 20
_RETRIED = (408, 409, 425, 429)
_NO_ROOM = (429, 503)
# Statuses sent before anything is computed. After others the answer may have been computed and billed: content filters
# send 400 after the answer, gateways 408 or 499 after waiting, 302 or 303 if the answer is kept elsewhere.
_FREE = (401, 402, 403, 404, 405, 413, 415, 429)
# Statuses caused by one question; other refusals apply to all requests.
_OF_THE_QUESTION = (400, 413, 415, 422, 451)
_SENT_HEADERS = ("host", "accept", "connection", "content-type", "content-length")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PARTS = ("text", "python", "python_output")


class Failed(Exception):
    """A request without an answer."""

    def __init__(
        self, reason: str, *, retry: bool, for_all: bool = False, free: bool = False, no_room: bool = False,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        """Create the failure.

        Args:
            reason: for messages.
            retry: the same request may succeed later.
            for_all: no other request can succeed either.
            free: the request is certainly not billed.
            no_room: the teacher is overloaded.
            retry_after: seconds to wait, if the teacher sent them.
        """
        super().__init__(reason)
        self.retry, self.for_all, self.free = retry, for_all, free
        self.no_room, self.retry_after = no_room, retry_after


class _TooLong(Exception):
    """A body exceeds `_MOST_BYTES`."""


class _Capped(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > _MOST_BYTES:
                raise _TooLong
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


class Teacher:
    """A connection to the endpoint; an asynchronous context manager."""

    def __init__(self, base: str, key: str | None, *, timeout_seconds: float, concurrency: int) -> None:
        """Open no connection yet. `base` may have a query (?api-version=…); `key` is sent as a bearer token."""
        self._key, self._timeout = key, timeout_seconds
        self.fingerprint: str | None = None
        """Expected `system_fingerprint` of all answers (mlxchat serve sends one); None: not checked."""
        parts = urlsplit(base)
        self._client = openai.AsyncOpenAI(
            base_url=urlunsplit(parts._replace(query="", fragment="")),
            default_query=dict(parse_qsl(parts.query, keep_blank_values=True)),
            api_key=key or "none",
            max_retries=0,
            http_client=httpx2.AsyncClient(
                timeout=httpx2.Timeout(timeout_seconds, connect=min(timeout_seconds, 30.0)),
                limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
                follow_redirects=False,
                trust_env=parts.hostname not in _LOOPBACK,  # no proxy for this machine
                event_hooks={"request": [self._strip], "response": [self._cap]},
            ),
        )

    async def __aenter__(self) -> Teacher:
        """Return itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections."""
        await self._client.close()

    async def ask(self, body: dict[str, Any]) -> Answer:
        """Return the answer to a chat request.

        Raises:
            Failed: there is no usable answer.
        """
        value = await self._call("/chat/completions", body)
        if isinstance(value, dict) and self.fingerprint not in (None, value.get("system_fingerprint")):
            model = one_line(str(body.get("model")))
            raise Failed(
                f'the model behind "{model}" was replaced. Run the same command again to get answers of the new one',
                retry=False, for_all=True,
            )  # fmt: skip
        return _read_answer(value)

    async def find_fingerprint(self, model: str) -> str | None:
        """Return the fingerprint of a model's weights; None if the endpoint sends none.

        That of mlxchat serve is a hash of the artifact's contents and the server's settings.

        Raises:
            Failed: a transient failure.
        """
        try:
            value = await self._call(f"/models/{quote(model)}")
        except Failed as error:
            if error.retry:
                raise
            return None
        own = value.get("mlxchat") if isinstance(value, dict) else None
        found = own.get("fingerprint") if isinstance(own, dict) else None
        return found if isinstance(found, str) else None

    async def models(self) -> list[str]:
        """Return the names of the endpoint's models. Raises Failed."""
        value = await self._call("/models")
        rows = value.get("data") if isinstance(value, dict) else None
        names = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        return [name for name in names if isinstance(name, str)]

    async def _strip(self, request: httpx2.Request) -> None:
        """Remove the headers that openai reads from the environment or that describe this machine."""
        for name in [name for name in request.headers if name.lower() not in _SENT_HEADERS]:
            del request.headers[name]
        request.headers.update({"User-Agent": "mlxchat", "Accept-Encoding": "identity"})
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"

    async def _cap(self, response: httpx2.Response) -> None:
        """Limit the body's size, and prevent decompression: 2 KB compressed three times take 4 s to unpack."""
        response.headers.pop("content-encoding", None)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Capped(response.stream)

    async def _call(self, route: str, body: dict[str, Any] | None = None) -> Any:
        """Return the parsed JSON of a response."""
        try:
            # httpx2's timeouts apply to each read, so a server that drips bytes would never time out.
            async with asyncio.timeout(self._timeout):
                if body is None:
                    got = await self._client.get(route, cast_to=httpx2.Response)
                else:
                    got = await self._client.post(route, cast_to=httpx2.Response, body=body)
        except (TimeoutError, openai.APITimeoutError) as error:
            unsent = isinstance(error.__cause__, httpx2.ConnectTimeout | httpx2.PoolTimeout)
            raise Failed(f"no complete answer within {self._timeout:g} s", retry=True, free=unsent) from None
        except _TooLong:
            raise Failed(f"its answer is longer than {_MOST_BYTES >> 20} MB", retry=False) from None
        except openai.APIStatusError as error:
            got = error.response
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            text = self._printable(str(cause))
            reason = f"{type(cause).__name__}: {text}" if text else type(cause).__name__
            raise Failed(reason, retry=True, free=isinstance(cause, httpx2.ConnectError)) from None
        try:
            value = json.loads(got.content)
        except (ValueError, RecursionError):
            value = None
        self._check(got, value)
        if value is None:
            shown = self._printable(got.content[:80].decode("utf-8", "replace"))
            raise Failed(f"its answer is not JSON ({shown!r})", retry=True)
        return value

    def _check(self, got: httpx2.Response, value: Any) -> None:
        """Raise Failed for an error status, or for an error object in a successful response."""
        fault = value.get("error") if isinstance(value, dict) else None
        status = got.status_code
        free = status in _FREE
        if 200 <= status < 300 and not fault:
            return
        if isinstance(fault, dict):
            message, code = str(fault.get("message") or fault), fault.get("code")
            if 200 <= status < 300:
                status = code if isinstance(code, int) and code >= 400 else 502
        else:
            message, code = str(fault or got.content[:300].decode("utf-8", "replace")), None
        reason = f"{status} {self._printable(message)}".strip()
        if 300 <= status < 400:
            place = self._printable(got.headers.get("location", "elsewhere"))
            raise Failed(f"{status}: redirected to {place}. Use that address", retry=False, for_all=True, free=free)
        if code == "insufficient_quota" or (status not in _RETRIED and status < 500):
            hint = ". Addresses of OpenAI-compatible endpoints usually end in /v1" if status in (404, 405) else ""
            for_all = code == "insufficient_quota" or status not in _OF_THE_QUESTION
            raise Failed(reason + hint, retry=False, for_all=for_all, free=free)
        wait = _retry_after(got.headers.get("retry-after"))
        raise Failed(reason, retry=True, retry_after=wait, no_room=status in _NO_ROOM, free=free)

    def _printable(self, text: str) -> str:
        """Return the teacher's text on one line, without the key, which error messages may repeat."""
        return one_line(text.replace(self._key, "<key>") if self._key else text)


def is_loopback(url: str) -> bool:
    """Return True if an address is this machine's."""
    return urlsplit(url).hostname in _LOOPBACK


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header (a number or a date); None if it is invalid."""
    if value is None:
        return None
    with suppress(ValueError):
        seconds = float(value)
        return seconds if 0 <= seconds < float("inf") else None
    with suppress(ValueError, TypeError, OverflowError):
        date = parsedate_to_datetime(value)
        return max(0.0, ((date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())
    return None


def _read_answer(value: Any) -> Answer:
    """Return the answer in an endpoint's JSON."""
    try:
        choice = value["choices"][0]
        message = choice["message"]
        content, parts = message.get("content"), message.get("parts")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Failed("its answer has no choices with a message", retry=True) from None
    if isinstance(content, list):
        content = "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    if content is not None and not isinstance(content, str):
        raise Failed("its answer's content is not text", retry=True)
    finish, usage, model = choice.get("finish_reason"), value.get("usage"), value.get("model")
    counts = [usage.get(key) if isinstance(usage, dict) else None for key in ("prompt_tokens", "completion_tokens")]
    # Some endpoints report 0 tokens; counting them would disable the cost limit.
    known = [count for count in counts if type(count) is int and 1 <= count < 1 << 63]
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    if len(known) == 2 and type(total) is int and sum(known) < total < 1 << 63:
        # Gemini's endpoint bills reasoning tokens but leaves them out of completion_tokens.
        known[1] = total - known[0]
    return Answer(
        text=content or "",
        parts=parts if _are_parts(parts) else None,
        finish=finish if isinstance(finish, str) else None,
        tokens=(known[0], known[1]) if len(known) == 2 else None,
        model=model if isinstance(model, str) else None,
    )


def _are_parts(parts: Any) -> bool:
    return isinstance(parts, list) and bool(parts) and all(
        isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] in _PARTS
        and isinstance(part["text"], str) for part in parts
    )  # fmt: skip
