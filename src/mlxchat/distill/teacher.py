"""A teacher behind an OpenAI-compatible endpoint: one request, and what its answer or failure means."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit

from mlxchat.distill.answers import Answer
from mlxchat.distill.words import one_line
from mlxchat.errors import ConfigError

if TYPE_CHECKING:
    import httpx2

_ROUTE = "/chat/completions"
_MOST_BYTES = 8 << 20
_PASSING = (408, 409, 425, 429)
_NO_ROOM = (429, 503)
# Said before anything is computed. Behind other statuses something may have been, and is billed: a content filter that
# looks at the answer says 400, a gateway that waited for it 408 or 499, one that keeps the answer elsewhere 302 or 303.
_FREE = (401, 402, 403, 404, 405, 413, 415, 429)
# What one question has done wrong; all other refusals are of everything that could be asked.
_OF_THE_QUESTION = (400, 413, 415, 422, 451)
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
_PARTS = ("text", "python", "python_output")


class Passing(Exception):
    """It did not work now and may in a while."""

    def __init__(
        self, reason: str, retry_after: float | None = None, *, no_room: bool = False, free: bool = False
    ) -> None:
        """Take the reason, and what is known of the failure.

        Args:
            reason: for people.
            retry_after: seconds to wait, if the teacher said so.
            no_room: whether it only has too much to do.
            free: whether it certainly computed nothing that it could bill.
        """
        super().__init__(reason)
        self.retry_after, self.no_room, self.free = retry_after, no_room, free


class Refused(Exception):
    """It will not work, however often it is tried."""

    def __init__(self, reason: str, *, for_good: bool, free: bool = False) -> None:
        """Take the reason, whether it holds for every request, and whether certainly nothing was billed."""
        super().__init__(reason)
        self.for_good, self.free = for_good, free


class Teacher:
    """The endpoint. Used as an asynchronous context manager."""

    def __init__(self, base: str, key: str | None, *, timeout_seconds: float, concurrency: int) -> None:
        """Take where it is, and the key for it.

        Raises:
            ConfigError: the HTTP library is not installed.
        """
        try:
            import httpx2
        except ImportError:
            raise ConfigError("mlxchat distill needs httpx2: pip install 'mlxchat[distill]'") from None
        self._http, self.base, self._key = httpx2, base, key
        self.fingerprint: str | None = None
        """Of the model that must answer, of an endpoint that says it with every answer (mlxchat serve)."""
        self._timeout = timeout_seconds
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "mlxchat"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        self._client: httpx2.AsyncClient = httpx2.AsyncClient(
            headers=headers,
            # The whole of a request has a time limit of its own: a server may send a byte now and then for ever.
            timeout=httpx2.Timeout(timeout_seconds, connect=min(timeout_seconds, 30.0)),
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            # No proxy leads to this machine. Redirects are not followed: the key is for one host.
            trust_env=urlsplit(base).hostname not in _LOOPBACK,
        )

    async def __aenter__(self) -> Teacher:
        """Return itself."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def ask(self, body: dict[str, Any]) -> Answer:
        """Return the answer to a chat request.

        Raises:
            Passing: a limit, an overload, a cut or silent connection, an answer that is no answer.
            Refused: the teacher will not answer it.
        """
        value = await self._call("POST", _ROUTE, body)
        if (
            self.fingerprint is not None
            and isinstance(value, dict)
            and value.get("system_fingerprint") != self.fingerprint
        ):
            raise Refused(
                f'the model behind "{one_line(str(body.get("model")))}" was replaced meanwhile. '
                "The same command asks the new one",
                for_good=True,
            )
        return _read_answer(value)

    async def find_fingerprint(self, model: str) -> str | None:
        """Return what tells a model from others that had or will have its name; None: the endpoint does not say.

        mlxchat serve says it: a hash of the artifact's contents and of the server's settings. Raises Passing.
        """
        try:
            value = await self._call("GET", f"/models/{quote(model)}", None)
        except Refused:
            return None
        own = value.get("mlxchat") if isinstance(value, dict) else None
        told = own.get("fingerprint") if isinstance(own, dict) else None
        return told if isinstance(told, str) else None

    async def models(self) -> list[str]:
        """Return the names of its models. Raises as `ask`."""
        value = await self._call("GET", "/models", None)
        rows = value.get("data") if isinstance(value, dict) else None
        names = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        return [name for name in names if isinstance(name, str)]

    def hide_key(self, text: str) -> str:
        """Return a text of the teacher's as one line without our key, which error messages like to repeat."""
        return one_line(text.replace(self._key, "<key>") if self._key else text)

    async def _call(self, method: str, route: str, body: dict[str, Any] | None) -> Any:
        try:
            async with asyncio.timeout(self._timeout):
                content = None if body is None else json.dumps(body).encode()
                headers = {} if content is None else {"Content-Type": "application/json"}
                async with self._client.stream(
                    method, place_of(self.base, route), content=content, headers=headers
                ) as got:
                    data = bytearray()
                    async for part in got.aiter_raw():  # 2 KB that are compressed three times take 4 s to unpack
                        data += part
                        if len(data) > _MOST_BYTES:
                            raise Refused(f"its answer is longer than {_MOST_BYTES >> 20} MB", for_good=False)
        except TimeoutError:
            raise Passing(f"no whole answer within {self._timeout:g} s") from None
        except (self._http.HTTPError, self._http.StreamError, OSError) as error:
            told = self.hide_key(str(error))
            unsent = isinstance(error, self._http.ConnectError | self._http.ConnectTimeout | self._http.PoolTimeout)
            raise Passing(f"{type(error).__name__}: {told}" if told else type(error).__name__, free=unsent) from None
        except self._http.InvalidURL as error:
            raise Refused(f"{self.base} is no address ({one_line(str(error))})", for_good=True, free=True) from None
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        self._check_status(got, value, data)
        if value is None:
            raise Passing(f"its answer is not JSON ({self.hide_key(data[:80].decode('utf-8', 'replace'))!r})")
        return value

    def _check_status(self, got: httpx2.Response, value: Any, data: bytearray) -> None:
        """Raise what a status means, or an error that is sent with a good one."""
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
            message, code = str(fault or data[:300].decode("utf-8", "replace")), None
        told = f"{status} {self.hide_key(message)}".strip()
        if 300 <= status < 400:
            place = self.hide_key(got.headers.get("location", "elsewhere"))
            raise Refused(f"{status}: it is at {place} now. Give that address", for_good=True, free=free)
        if code == "insufficient_quota" or (status not in _PASSING and status < 500):
            hint = ". The address of OpenAI's interface mostly ends in /v1" if status in (404, 405) else ""
            for_good = code == "insufficient_quota" or status not in _OF_THE_QUESTION
            raise Refused(told + hint, for_good=for_good, free=free)
        raise Passing(told, _retry_after(got.headers.get("retry-after")), no_room=status in _NO_ROOM, free=free)


def place_of(base: str, route: str) -> str:
    """Return the address of a route; the base may end in a slash or have a query (?api-version=…)."""
    parts = urlsplit(base)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") + route, fragment=""))


def find_url_problems(url: str) -> list[str]:
    """Return what is wrong with the address of a teacher."""
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port != 0
    except ValueError as error:
        return [f"--teacher is {one_line(url)}: {error}"]
    if parts.username or parts.password:
        return ["--teacher holds a password. Keys come from the environment alone: --key-env NAME"]
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine:
        return [f'--teacher is "{one_line(url)}", expected an address such as http://localhost:8000/v1']
    return []


def is_loopback(url: str) -> bool:
    """Tell whether an address is this machine's own."""
    return urlsplit(url).hostname in _LOOPBACK


def public_url(url: str) -> str:
    """Return an address without its query, in which keys are sent at times."""
    return urlunsplit(urlsplit(url)._replace(query="", fragment=""))


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, a number or a date; None: it says nothing."""
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
    """Return what an endpoint's JSON says."""
    try:
        choice = value["choices"][0]
        message = choice["message"]
        content, parts = message.get("content"), message.get("parts")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Passing("its answer has no choices with a message") from None
    if isinstance(content, list):
        content = "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    if content is not None and not isinstance(content, str):
        raise Passing("its answer's content is no text")
    finish, usage, model = choice.get("finish_reason"), value.get("usage"), value.get("model")
    counts = [usage.get(key) if isinstance(usage, dict) else None for key in ("prompt_tokens", "completion_tokens")]
    # Some endpoints report 0 tokens of everything, and then no limit of money would hold.
    known = [count for count in counts if type(count) is int and 1 <= count < 1 << 63]
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    if len(known) == 2 and type(total) is int and sum(known) < total < 1 << 63:
        known[1] = total - known[0]  # Gemini's endpoint leaves thoughts out of completion_tokens, and bills them
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
