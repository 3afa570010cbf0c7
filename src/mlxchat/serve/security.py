"""Protection of the server: limits, error responses, and the guard of every request.

A `Fault` is an error response in OpenAI's format.
"""

import hmac
import ipaddress
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxchat.ops.machine import KEPT_TOKENS

_MOST_BODY_BYTES = 1_000_000
# Paths that need no key, in addition to /page/.
_OPEN = ("/", "/runs", "/health", "/logo.svg", "/favicon.ico")
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_HEADERS = {
    # The page loads nothing from other hosts and runs only its own scripts.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of memory and load. A request is limited by its body's size and the model's context."""

    max_rows: int = 16
    """Answers generated at the same time, over all models."""
    max_queue: int = 64
    """Answers that wait for a row; further requests are refused with status 429."""
    max_models: int = 2
    """Models in memory. A request for another model waits until one is idle; the least recently used one is freed."""
    kept_tokens: int = KEPT_TOKENS
    """Tokens per model in the KV cache of earlier conversations, for their next turns; 0: no reuse."""


class JsonAnswer(JSONResponse):
    """A JSON answer in ASCII, since its text may have lone surrogates, which UTF-8 cannot encode."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class Fault(Exception):
    """An error response."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        """Set the fields of the error body; `retry_after` in seconds."""
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return {"error": {message, type, param, code}}."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, given: Mapping[str, str] | None = None) -> JsonAnswer:
        """Return the HTTP response, with Retry-After if a retry may succeed and WWW-Authenticate with status 401."""
        headers = dict(given or {})
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JsonAnswer(self.body(), status_code=self.status, headers=headers)


def add_fault_handlers(app: FastAPI) -> None:
    """Make an app answer every error in OpenAI's format."""

    async def fault(_: Request, error: Any) -> Any:
        return error.response()

    async def invalid(_: Request, error: Any) -> Response:
        return _first_problem(error).response()

    async def http(request: Request, error: Any) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is nothing at {request.method} {request.url.path}"
        return Fault(message, status=error.status_code).response(error.headers)

    async def unforeseen(_: Request, error: Exception) -> Response:
        return Fault(f"the server failed: {type(error).__name__}", status=500).response()

    app.add_exception_handler(Fault, fault)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unforeseen)


def _first_problem(error: RequestValidationError) -> Fault:
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return Fault(f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    place = ".".join(str(part) for part in first["loc"][1:])
    message = f"{place}: {first['msg']}" if place else str(first["msg"])
    if len(problems) > 1:
        message += f" (and {len(problems) - 1} more)"
    return Fault(message, param=place or None)


def is_loopback(host: str) -> bool:
    """Return True if an address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass
class Guard:
    """Outermost middleware: checks key, Host header, origin, content type and size of each request."""

    app: ASGIApp
    requests: Counter
    """Counts the responses by route and status."""
    api_key: str | None
    loopback_only: bool
    """Refuse Host headers other than this machine's (DNS rebinding)."""
    cors: Sequence[str] = ()
    """Origins of other sites whose pages may send requests."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, pass it on and count it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            fault = self._refusal(scope)
            if fault is not None:
                await fault.response()(scope, receive, sending)
            else:
                await self.app(scope, _bounded(receive), sending)
        finally:
            self.requests.labels(getattr(scope.get("route"), "path", "other"), str(status)).inc()

    def _refusal(self, scope: Scope) -> Fault | None:
        headers = Headers(scope=scope)
        if self.loopback_only and not is_loopback(_name_of(headers.get("host", ""))):
            return Fault(f"this server accepts only localhost as Host, not {headers.get('host')!r}", status=403)
        path, method = scope["path"], scope["method"]
        if method == "OPTIONS":
            return None
        if self.api_key is not None and path not in _OPEN and not path.startswith("/page/"):
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
                return Fault("invalid API key: send Authorization: Bearer KEY", status=401, code="invalid_api_key")
        # For old browsers, which do not send Sec-Fetch-Site, the checks below suffice.
        cross_site = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if method == "POST" and cross_site and not {"*", headers.get("origin")} & set(self.cors):
            return Fault("requests from other sites are refused (mlxchat serve --cors ORIGIN allows them)", status=403)
        # Forms of other sites cannot send JSON; their scripts can only with --cors.
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            return Fault("the body must be JSON: send Content-Type: application/json", status=415)
        return None


def _bounded(receive: Receive) -> Receive:
    """Return `receive`, which raises an exception once the body is too large."""
    left = _MOST_BODY_BYTES

    async def receiving() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            # FastAPI passes on only this exception while it reads a body.
            raise HTTPException(413, f"the body is larger than {_MOST_BODY_BYTES} bytes")
        return message

    return receiving


def _name_of(host: str) -> str:
    """Return a Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower().removesuffix(".")
