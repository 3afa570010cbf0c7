"""The HTTP app: OpenAI's API, /health, /metrics, the chat page, and the guard in front of them.

A route parses its request in a thread, passes it to the worker, and sends the events as a stream or as one answer.
Generation is cancelled when the client disconnects.
"""

import asyncio
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client.exposition import choose_encoder
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from mlxchat import __version__
from mlxchat.errors import ConfigError, visible
from mlxchat.serve.answers import STREAM, ChatCompletion, Choice, Completion, ModelEntry, ModelList, answers, usage_of
from mlxchat.serve.models import Models
from mlxchat.serve.requests import ChatRequest, Defaults, TextRequest, chat_requests, text_requests
from mlxchat.serve.runs import run_routes
from mlxchat.serve.security import Fault, Guard, JsonAnswer, add_fault_handlers
from mlxchat.serve.worker import Answer, Worker

PAGE = Path(__file__).with_name("page")
_MOST_CONNECTIONS = 200
"""Further ones get status 503; macOS allows 256 files by default."""
_GRACE_SECONDS = 30
_DISCONNECT_SECONDS = 0.5
"""Interval at which an answer that is not streamed looks for its client."""
Json = dict[str, Any]

# At shutdown streams may finish within the server's grace period.
AppStatus.enable_automatic_graceful_drain = False


@dataclass(frozen=True)
class Service:
    """Models, the worker that runs them, and default settings of requests."""

    models: Models
    worker: Worker
    defaults: Defaults


def make_app(
    service: Service, *, api_key: str | None = None, loopback_only: bool = True, cors: Sequence[str] = ()
) -> FastAPI:
    """Return the app.

    `loopback_only` refuses requests whose Host header is not this machine (DNS rebinding); `cors` are origins of other
    sites whose pages may send requests.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start(await run_in_threadpool(service.models.find, None))
        yield
        await service.worker.stop()

    # FastAPI's documentation pages load scripts from other hosts.
    app = FastAPI(title="mlxchat", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    add_fault_handlers(app)
    app.include_router(openai_routes(service))
    app.include_router(run_routes(service.models.store))
    metrics = service.worker.metrics

    @app.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
    async def health(response: Response) -> Json:
        alive, ready = service.worker.alive, service.worker.alive and service.worker.has_loaded
        response.status_code = 200 if ready else 503  # for health probes
        return {"status": "ok" if ready else "loading" if alive else "stopping", "ready": ready}

    @app.api_route("/metrics", methods=["GET", "HEAD"], include_in_schema=False)
    def prometheus(request: Request) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"Content-Type": kind})

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/runs", include_in_schema=False)
    async def runs() -> FileResponse:
        return FileResponse(PAGE / "runs.html", headers={"Cache-Control": "no-cache"})

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
        Guard, requests=metrics.requests, api_key=api_key, loopback_only=loopback_only, cors=cors,
    )  # fmt: skip
    return app


def openai_routes(service: Service) -> APIRouter:
    """Return the routes of models, chat completions and text completions."""
    routes = APIRouter(prefix="/v1")

    # Functions that are not async run in a thread, so reading files does not block the event loop.
    @routes.get("/models", response_model=None, responses=answers(ModelList))
    def list_models() -> Response:
        return JsonAnswer({"object": "list", "data": service.models.entries()})

    @routes.get("/models/{name:path}", response_model=None, responses=answers(ModelEntry))
    def show_model(name: str) -> Response:
        return JsonAnswer(service.models.entry(name))

    @routes.post("/chat/completions", response_model=None, responses=answers(ChatCompletion, STREAM))
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _respond(service, body, request)

    @routes.post("/completions", response_model=None, responses=answers(Completion, STREAM))
    async def complete(body: TextRequest, request: Request) -> Response:
        return await _respond(service, body, request)

    return routes


async def _respond(service: Service, body: ChatRequest | TextRequest, request: Request) -> Response:
    """Return the response to a completion, as a stream or whole."""
    model = await run_in_threadpool(service.models.find, body.model)
    own: Json = {}
    # Threads: they encode text and may compile a JSON schema.
    if isinstance(body, ChatRequest):
        requests, dropped = await run_in_threadpool(chat_requests, model, body, service.defaults)
        prefix, kind, streamed = "chatcmpl", "chat.completion", "chat.completion.chunk"
        if body.truncation == "auto":
            own = {"mlxchat": {"truncated_turns": dropped}}
    else:
        requests = await run_in_threadpool(text_requests, model, body, service.defaults)
        prefix, kind, streamed = "cmpl", "text_completion", "text_completion"
    answer = service.worker.submit(model, requests)
    head = {
        "id": f"{prefix}-{uuid.uuid4().hex}", "object": streamed if body.stream else kind, "created": int(time.time()),
        "model": model.name, "system_fingerprint": service.models.fingerprint(model.digest),
    }  # fmt: skip
    if body.stream:
        return EventStream(answer, _chunks(answer, head, body, own))
    choices = await _collect(request, answer)
    numbered = list(enumerate(choices))
    described = await run_in_threadpool(
        lambda: [each.for_chat(at) if isinstance(body, ChatRequest) else each.for_text(at) for at, each in numbered]
    )
    return JsonAnswer({**head, "choices": described, "usage": usage_of(answer, choices, body.n), **own})


async def _collect(request: Request, answer: Answer) -> list[Choice]:
    """Return the choices of an answer once all have ended; cancel it with a Fault if the client disconnects."""

    async def all_choices() -> list[Choice]:
        choices = [Choice(answer.model.tokenizer) for _ in answer.requests]
        async for index, event in answer:
            choices[index].add(event)
        return choices

    task = asyncio.create_task(all_choices())
    try:
        while not (await asyncio.wait({task}, timeout=_DISCONNECT_SECONDS))[0]:
            if await request.is_disconnected():
                raise Fault("the client has disconnected", status=499)
        return task.result()
    finally:
        task.cancel()
        answer.cancel()


async def _chunks(
    answer: Answer, head: Json, body: ChatRequest | TextRequest, own: Json
) -> AsyncIterator[dict[str, str]]:
    """Yield the events of a stream; those of a chat begin with roles, the first one of them with the fields `own`."""
    choices = [Choice(answer.model.tokenizer) for _ in answer.requests]
    usage: Json = {"usage": None} if body.stream_options and body.stream_options.include_usage else {}

    def chunk(index: int, fields: Json) -> Json:
        choice = {"index": index, "logprobs": None, "finish_reason": None, **fields}
        return {"data": json.dumps({**head, "choices": [choice], **usage, **more})}

    more = own
    try:
        if isinstance(body, ChatRequest):
            for index in range(len(choices)):
                yield chunk(index, {"delta": {"role": "assistant", "content": ""}})
                more = {}
        async for index, event in answer:
            choice = choices[index]
            pieces = choice.chat_pieces(event) if isinstance(body, ChatRequest) else choice.text_pieces(event)
            for fields in pieces:
                yield chunk(index, fields)
        if usage:
            yield {"data": json.dumps({**head, "choices": [], "usage": usage_of(answer, choices, body.n)})}
        yield {"data": "[DONE]"}
    except Fault as fault:  # the status was sent before
        yield {"data": json.dumps(fault.body())}


class EventStream(EventSourceResponse):
    """Server-sent events of an answer, which is cancelled when the stream ends or the client disconnects."""

    def __init__(self, answer: Answer, events: AsyncIterator[dict[str, str]]) -> None:
        """Stream the events of an answer."""
        super().__init__(events, sep="\n", ping=15, headers={"X-Accel-Buffering": "no"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, then cancel what is left of the answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


# Running it: the first signal lets answers finish, the second one drops them


class _Lines(logging.Formatter):
    """Escapes control characters in log lines and tracebacks, which quote requests and files."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def run_server(app: FastAPI, host: str, port: int, *, name: str, key_needed: bool) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code. ConfigError: the address cannot be bound.

    Answers have 30 s to finish after the first signal; port 0 is any free port.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port"
        ) from None
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}"
    key = "; clients send the key as Authorization: Bearer KEY" if key_needed else ""
    banner = f"{name} at {address}  (page: {address}/, OpenAI: {address}/v1{key}). Ctrl-C stops."
    logging.basicConfig(level=logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Lines("%(asctime)s %(message)s"))
    for quiet in ("sse_starlette", "asyncio"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_SECONDS,
        server_header=False, limit_concurrency=_MOST_CONNECTIONS,
    )  # fmt: skip
    print(banner, flush=True)  # further connections wait until the server is started
    with listening:
        uvicorn.Server(config).run(sockets=[listening])
    return 0
