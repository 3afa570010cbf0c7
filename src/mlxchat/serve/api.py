"""The HTTP app: OpenAI's API, /health, /metrics, the chat page, and the guard in front of them.

A route parses its request in a thread, passes it to the worker, and sends the events as a stream or as one answer.
Generation is cancelled when the client disconnects.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client.exposition import choose_encoder
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from mlxchat import __version__
from mlxchat.engine.batch import Request as EngineRequest
from mlxchat.serve.answers import (
    STREAM,
    ChatCompletion,
    Completion,
    ModelEntry,
    ModelList,
    answers,
)
from mlxchat.serve.choices import Choice, choices_of, usage_of
from mlxchat.serve.models import Model, Models
from mlxchat.serve.requests import (
    ChatPrompt,
    ChatRequest,
    Defaults,
    Generation,
    TextRequest,
    chat_prompt,
    json_constraint,
    requests_for,
    text_prompts,
)
from mlxchat.serve.runs import run_routes
from mlxchat.serve.security import Fault, Guard, JsonAnswer, add_fault_handlers
from mlxchat.serve.worker import Answer, Worker

PAGE = Path(__file__).with_name("page")
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
        Guard, count=metrics.count_request, api_key=api_key, loopback_only=loopback_only, cors=cors,
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
        model, prompt, requests = await run_in_threadpool(prepare_chat, service, body)
        answer = service.worker.submit(model, requests)
        head = _head("chatcmpl", "chat.completion", service, model)
        own = {"mlxchat": {"truncated_turns": prompt.truncated_turns}} if body.truncation == "auto" else {}
        if body.stream:
            return EventStream(answer, _chunks(answer, {**head, "object": "chat.completion.chunk"}, body, own))
        choices = await collect(request, answer)
        described = await run_in_threadpool(lambda: [choice.for_chat(index) for index, choice in enumerate(choices)])
        return JsonAnswer({**head, "choices": described, "usage": usage_of(answer, choices, body.n), **own})

    @routes.post("/completions", response_model=None, responses=answers(Completion, STREAM))
    async def complete(body: TextRequest, request: Request) -> Response:
        model, requests = await run_in_threadpool(_prepare_text, service, body)
        answer = service.worker.submit(model, requests)
        head = _head("cmpl", "text_completion", service, model)
        if body.stream:
            return EventStream(answer, _chunks(answer, head, body))
        choices = await collect(request, answer)
        described = await run_in_threadpool(lambda: [choice.for_text(index) for index, choice in enumerate(choices)])
        return JsonAnswer({**head, "choices": described, "usage": usage_of(answer, choices, body.n)})

    return routes


def prepare_chat(service: Service, body: ChatRequest) -> tuple[Model, ChatPrompt, list[EngineRequest]]:
    """Return model, prompt and choices of a chat request. Call it in a thread: it reads files and encodes text."""
    model = service.models.find(body.model)
    if body.top_logprobs and not body.logprobs:
        raise Fault("top_logprobs needs logprobs=true", param="top_logprobs")
    most = body.max_completion_tokens or body.max_tokens
    prompt = chat_prompt(model, body.messages, answer_tokens=most, truncate=body.truncation == "auto")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    requests = requests_for(
        model, body, [prompt.ids], service.defaults, max_tokens=most, logprobs=logprobs,
        constraint=json_constraint(model, body.response_format), skip_blank=model.third_party,
    )  # fmt: skip
    return model, prompt, requests


def _prepare_text(service: Service, body: TextRequest) -> tuple[Model, list[EngineRequest]]:
    """Return model and choices of a text completion. Call it in a thread."""
    model = service.models.find(body.model)
    prompts = text_prompts(model, body)
    most = body.max_tokens if body.max_tokens is not None else 128
    return model, requests_for(model, body, prompts, service.defaults, max_tokens=most)


async def _all_choices(answer: Answer) -> list[Choice]:
    choices = choices_of(answer)
    async for index, event in answer:
        choices[index].add(event)
    return choices


async def _chunks(answer: Answer, head: Json, body: Generation, own: Json | None = None) -> AsyncIterator[Json | str]:
    """Yield the chunks of a stream; those of a chat begin with roles, the first one of them with the fields `own`."""
    choices = choices_of(answer)
    usage: Json = {"usage": None} if body.stream_options and body.stream_options.include_usage else {}

    def chunk(index: int, fields: Json) -> Json:
        return {**head, "choices": [{"index": index, "logprobs": None, "finish_reason": None, **fields}], **usage}

    if own is not None:
        for index in range(len(choices)):
            opening = chunk(index, {"delta": {"role": "assistant", "content": ""}})
            yield {**opening, **(own if index == 0 else {})}
    async for index, event in answer:
        choice = choices[index]
        pieces = choice.text_pieces(event) if own is None else choice.chat_pieces(event)
        for fields in pieces:
            yield chunk(index, fields)
    if usage:
        yield {**head, "choices": [], "usage": usage_of(answer, choices, body.n)}
    yield "[DONE]"


def _head(prefix: str, kind: str, service: Service, model: Model) -> Json:
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model.name,
        "system_fingerprint": service.models.fingerprint(model.digest),
    }  # fmt: skip


class EventStream(EventSourceResponse):
    """Server-sent events of an answer, which is cancelled when the stream ends or the client disconnects."""

    def __init__(self, answer: Answer, data: AsyncIterator[Json | str]) -> None:
        """Stream `data` of an answer: objects, sent as JSON, or text."""
        super().__init__(_encoded(data), sep="\n", ping=15, headers={"X-Accel-Buffering": "no"})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, then cancel what is left of the answer."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


async def collect(request: Request, answer: Answer) -> list[Choice]:
    """Return the choices of an answer once all have ended; cancel it if the client disconnects first.

    Raises:
        Fault: the client has disconnected, or the computation failed.
    """
    task = asyncio.create_task(_all_choices(answer))
    try:
        while not (await asyncio.wait({task}, timeout=_DISCONNECT_SECONDS))[0]:
            if await request.is_disconnected():
                raise Fault("the client has disconnected", status=499)
        return task.result()
    finally:
        task.cancel()
        answer.cancel()


async def _encoded(data: AsyncIterator[Json | str]) -> AsyncIterator[dict[str, str]]:
    try:
        async for item in data:
            yield {"data": item if isinstance(item, str) else json.dumps(item)}
    except Fault as fault:  # the status was sent before
        yield {"data": json.dumps(fault.body())}
