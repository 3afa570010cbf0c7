"""What goes wrong with a request, in the form in which OpenAI's clients read it."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Fault(Exception):
    """A request that is answered with an error body."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        """Keep what is told: `retry_after` in seconds."""
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return {"error": {message, type, param, code}}."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the answer, with Retry-After where another try may succeed and WWW-Authenticate where a key lacks."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def add_fault_handlers(app: FastAPI) -> None:
    """Have every error of an app leave in OpenAI's form."""

    async def fault(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Fault)
        return error.response()

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _first_problem(error).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is nothing at {request.method} {request.url.path}"
        return Fault(message, status=error.status_code).response()

    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        return Fault(f"the server failed: {type(error).__name__}", status=500).response()

    app.add_exception_handler(Fault, fault)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unforeseen)


def _first_problem(error: RequestValidationError) -> Fault:
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return Fault(f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    # A union's alternatives are no part of the field's name.
    kinds = {"body", "str", "list[dict[str,any]]", "list[str]", "list[int]", "list[list[int]]"}
    place = ".".join(str(part) for part in first["loc"] if part not in kinds)
    message = f"{place}: {first['msg']}" if place else str(first["msg"])
    if len(problems) > 1:
        message += f" (and {len(problems) - 1} more)"
    return Fault(message, param=place or None)
