"""Who may ask: the key, the host's name, kind and size of bodies; and the headers that keep pages from doing harm."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxchat.serve.faults import Fault
from mlxchat.serve.metrics import Metrics

_OPEN = ("/", "/health", "/logo.svg", "/favicon.ico")
_HEADERS = {
    # The page brings all it needs; whatever an answer contains, nothing can run or be asked for elsewhere.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}  # fmt: skip


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass
class Guard:
    """The outermost layer of the app."""

    app: ASGIApp
    metrics: Metrics
    api_key: str | None
    loopback_only: bool
    """Whether hosts' names that are not this machine's are refused: another site's page may not ask by its own name."""
    max_body_bytes: int
    cors: Sequence[str] = ()
    """Sites whose pages may ask."""
    body_seconds: float = 30.0
    """How long a body may take to arrive, all of it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, pass on, count."""
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
                await self.app(scope, self._bounded(receive), sending)
        finally:
            route = scope.get("route")
            self.metrics.requests[getattr(route, "path", "other"), status] += 1

    def _refusal(self, scope: Scope) -> Fault | None:
        headers = Headers(scope=scope)
        if self.loopback_only and not is_loopback(_name_of(headers.get("host", ""))):
            return Fault(f"this server answers to localhost only, not to {headers.get('host')!r}", status=403)
        path, method = scope["path"], scope["method"]
        if method == "OPTIONS":
            return None
        if self.api_key is not None and path not in _OPEN and not path.startswith("/page/"):
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
                return Fault("no such API key: send Authorization: Bearer KEY", status=401, code="invalid_api_key")
        # Browsers say whose page asks. Those that are too old to say so are kept out by the lines below alone.
        elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if method == "POST" and elsewhere and not {"*", headers.get("origin")} & set(self.cors):
            return Fault("pages of other sites may not ask (mlxchat serve --cors lets them)", status=403)
        if method == "POST":
            # What a form of another site could send is no JSON, and JSON needs that site to be let in by --cors.
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return Fault("the body must be JSON: send Content-Type: application/json", status=415)
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length) > self.max_body_bytes:
                return Fault(f"the body has {length} bytes, at most {self.max_body_bytes} may be", status=413)
        return None

    def _bounded(self, receive: Receive) -> Receive:
        left, whole = self.max_body_bytes, False
        ends = asyncio.get_running_loop().time() + self.body_seconds

        async def receiving() -> Message:
            nonlocal left, whole
            try:
                # What comes after the body is that the client leaves, for which there is all the time.
                async with asyncio.timeout_at(None if whole else ends):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {self.body_seconds:g} s") from None
            whole = not message.get("more_body", False)
            left -= len(message.get("body", b""))
            if left < 0:
                # FastAPI passes on no other exception from where a body is read.
                raise HTTPException(413, f"the body is larger than {self.max_body_bytes} bytes")
            return message

        return receiving


def _name_of(host: str) -> str:
    """Return a Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower().removesuffix(".")
