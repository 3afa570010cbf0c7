"""The app: routes, page, guard, and the worker's life."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool

from mlxchat import __version__
from mlxchat.serve.faults import add_fault_handlers
from mlxchat.serve.guard import Guard
from mlxchat.serve.metrics import TEXT
from mlxchat.serve.nanochat import nanochat_routes
from mlxchat.serve.openai import openai_routes
from mlxchat.serve.responses import responses_routes
from mlxchat.serve.service import Service

PAGE = Path(__file__).with_name("page")
_LEAST_BODY_BYTES = 1_000_000


def make_app(
    service: Service, *, api_key: str | None = None, loopback_only: bool = True, cors: Sequence[str] = ()
) -> FastAPI:
    """Return the app.

    Args:
        service: what it serves.
        api_key: whoever asks must send it; None: nobody needs one.
        loopback_only: refuse requests that name another host than this machine.
        cors: origins of other sites whose pages may ask.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start(await run_in_threadpool(service.models.find, None))
        yield
        await service.worker.stop()

    # The pages that FastAPI would make of the interface load scripts from elsewhere.
    app = FastAPI(title="mlxchat", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    add_fault_handlers(app)
    app.include_router(openai_routes(service))
    app.include_router(responses_routes(service))
    app.include_router(nanochat_routes(service))

    @app.api_route("/metrics", methods=["GET", "HEAD"], include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(service.worker), media_type=TEXT)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/logo.svg", include_in_schema=False)
    @app.get("/favicon.ico", include_in_schema=False)
    async def logo() -> FileResponse:
        return FileResponse(PAGE / "logo.svg", media_type="image/svg+xml")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    if cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )  # fmt: skip
    app.add_middleware(
        Guard, metrics=service.metrics, api_key=api_key, loopback_only=loopback_only, cors=cors,
        max_body_bytes=max(_LEAST_BODY_BYTES, 16 * service.limits.max_conversation_chars),
    )  # fmt: skip
    return app
